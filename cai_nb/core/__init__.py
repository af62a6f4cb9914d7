"""What everything is made of: errors, files, rows, principles, constitutions, dialogues, prompts."""
