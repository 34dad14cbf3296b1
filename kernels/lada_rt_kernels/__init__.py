"""Triton kernels and the torch references that define them."""
