"""Mixture-of-experts layers: a router, a bank of experts, and exact dispatch between them."""
