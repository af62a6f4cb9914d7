"""What a visitor sees: three answers side by side, critiques and votes, a constitution edited and trained with."""
