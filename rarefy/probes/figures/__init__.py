"""Figures of a page as inline SVG: places in percent and text in pixels, so that they are read at any width."""
