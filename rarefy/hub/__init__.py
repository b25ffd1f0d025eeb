"""Hugging Face in and out; the embedded demo model and text."""
