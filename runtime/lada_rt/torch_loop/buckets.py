"""Row counts that the denoiser is evaluated with on a device; apart from its loop, as planning needs no torch."""

from __future__ import annotations

__all__ = ["N_BUCKETS", "row_bucket"]

#: Row counts are padded to multiples of a T / 8, so that 60 steps need 8 graphs; the padding costs 0.4 % of the work.
N_BUCKETS = 8


def row_bucket(n_rows: int, n_frames: int) -> int:
    """Rows that the denoiser evaluates when `n_rows` of `n_frames` are masked: n_rows or more.

    A multiple of 8, or all frames: an engine takes no more rows than it takes frames. A shorter song counts as 8.
    """
    size = -(-n_frames // (N_BUCKETS * 8)) * 8
    return min(-(-n_rows // size) * size, max(n_frames, 8))
