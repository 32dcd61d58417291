"""Compressed checkpoints in the shapes that other tools read."""
