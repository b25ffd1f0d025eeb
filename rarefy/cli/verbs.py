"""Imports every verb, which registers it on the application."""

from rarefy.cli import bench, catalogue, compare, demo, evaluate, generate, optimize, pack, prune, report, train

__all__ = ["bench", "catalogue", "compare", "demo", "evaluate", "generate", "optimize", "pack", "prune", "report", "train"]
