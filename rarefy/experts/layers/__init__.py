"""Layers that are more than one router over one bank, one idea per file."""
