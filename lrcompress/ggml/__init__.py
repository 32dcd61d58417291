"""llama.cpp's block types: their numbers, their bytes, and which of them a named file type gives to which tensor."""
