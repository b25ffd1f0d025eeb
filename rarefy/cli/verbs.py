"""Imports every verb, which registers it on the application."""

from rarefy.cli import bench, catalogue, compare, demo, evaluate, export, generate, heal, optimize, pack, prune, push, report, train, unpack

__all__ = ["bench", "catalogue", "compare", "demo", "evaluate", "export", "generate", "heal", "optimize", "pack", "prune", "push", "report", "train", "unpack"]
