"""A model as a GGUF file that llama.cpp loads: which tensor goes where, how each is stored, the vocabulary, the file."""

from rarefy.hub.llama_cpp.export import check, export_gguf

__all__ = ["check", "export_gguf"]
