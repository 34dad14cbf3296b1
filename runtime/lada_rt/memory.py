"""Giving back to the system what songs have freed. What engines keep for the next song, over a gigabyte, stays."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

__all__ = ["return_freed"]


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library than glibc
        return None
    return trim


def return_freed() -> None:
    """Ask the C library to give back blocks it keeps for reuse; does nothing where it cannot.

    glibc learns from the first large free to keep blocks of up to 32 MB, one heap for each thread, and a song frees
    many of about that size: without this a server's resident set wanders by hundreds of megabytes. Takes a few
    milliseconds.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
