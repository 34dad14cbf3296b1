"""Execution backends behind one interface."""
