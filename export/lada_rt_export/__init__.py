"""Checkpoints to torch modules to engines. The runtime never imports this package at generation time."""
