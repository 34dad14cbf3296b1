"""The embedded default: songs of our own making, the small models trained on them, and their evaluation."""
