"""Transformers models without architecture names: where the weights are and how blocks are run."""
