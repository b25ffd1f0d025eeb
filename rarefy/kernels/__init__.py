"""Compute with zeros: each operation has a plain PyTorch reference, which is the specification, and a native kernel beside it."""
