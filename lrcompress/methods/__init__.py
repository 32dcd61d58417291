"""Compression methods, one file a paper, found by the registry."""

from lrcompress.methods.base import METHODS, Method, MethodOptions, make_method

__all__ = ["METHODS", "Method", "MethodOptions", "make_method"]
