"""A model as a GGUF file that llama.cpp loads: which tensor goes where, how each is stored, the vocabulary, the file."""

from rarefy.hub.llama_cpp.export import export_gguf

__all__ = ["export_gguf"]
