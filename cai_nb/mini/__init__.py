"""The embedded model organism: its world, its oracle, its training and its weights."""
