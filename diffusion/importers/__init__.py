"""Readers of checkpoints in other projects' formats."""
