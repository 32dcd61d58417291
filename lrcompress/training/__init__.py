"""Continuing to train a compressed checkpoint in its compressed form."""
