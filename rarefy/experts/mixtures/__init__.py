"""Mixtures that are no choice: everything takes part by its share, one idea per file."""
