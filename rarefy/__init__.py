"""rarefy makes neural networks sparse and makes the zeros pay."""
__version__ = "0.1.0.dev0"
