"""Checkpoints on disk: reading, writing, the manifest, and how transformers loads ours."""
