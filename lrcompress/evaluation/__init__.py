"""Measuring what compression cost; lm-eval is the engine."""
