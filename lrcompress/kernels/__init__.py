"""Loops that torch has no operation for, in C: compiled when first needed, never required."""
