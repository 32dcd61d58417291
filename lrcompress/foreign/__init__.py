"""What others made: hub ids, GGUF files, quantised checkpoints and adapters, opened and read."""
