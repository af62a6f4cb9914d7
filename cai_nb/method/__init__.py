"""The paper, step by step: red-team prompts, critique and revision, SL-CAI, AI labels, preference model, RL-CAI."""
