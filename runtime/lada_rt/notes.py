"""One-line messages to whoever sits at the terminal."""

from __future__ import annotations

import sys

__all__ = ["note"]


def note(message: str) -> None:
    """Say something on stderr: results alone go to stdout."""
    print(f"lada-rt: {message}", file=sys.stderr)
