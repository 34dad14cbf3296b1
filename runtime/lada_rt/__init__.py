"""lada-rt: a sung vocal in, a full-song accompaniment out."""

from __future__ import annotations

__version__ = "0.1.0"
