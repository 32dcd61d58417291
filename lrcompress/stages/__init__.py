"""The steps of a compression, in the order of pipeline.py; each can be resumed."""
