"""Triton device functions that select: the k-th largest key, and the indices of set flags."""
# mypy: allow-untyped-defs
# Triton traces these functions and reads parameter annotations as its own type hints, so mypy's go without.

import triton
import triton.language as tl

__all__ = ["compact", "kth_largest"]


@triton.jit
def kth_largest(keys, k, slack):
    """A key with at least k and at most k + slack keys at or above it, ties apart; needs k keys.

    Bisection over 32-bit keys ends after 32 rounds, whatever the values; int64 bounds cannot overflow.
    """
    low = tl.min(keys, axis=0).to(tl.int64)
    high = tl.max(keys, axis=0).to(tl.int64) + 1
    while high - low > 1:
        mid = low + (high - low) // 2
        count = tl.sum((keys >= mid.to(tl.int32)).to(tl.int32), axis=0)
        low = tl.where(count >= k, mid, low)
        high = tl.where(count >= k, tl.where(count <= k + slack, mid + 1, high), mid)
    return low.to(tl.int32)


@triton.jit
def _popcount(bits):
    """Set bits of each uint32."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return (bits * 0x01010101) >> 24


@triton.jit
def compact(chosen, BLOCK: tl.constexpr, SLOTS: tl.constexpr):
    """Indices of the first SLOTS set entries of chosen [BLOCK], ascending; slots past the last are arbitrary.

    Each group of 32 entries becomes a bitmap word. A slot finds its word by binary search over the running count,
    then its bit by halving the word: no scratch memory, no atomics.
    """
    WORDS: tl.constexpr = BLOCK // 32
    bits = tl.reshape(chosen.to(tl.uint32), (WORDS, 32))
    words = tl.sum(bits << tl.arange(0, 32)[None, :].to(tl.uint32), axis=1)  # [WORDS]
    counts = _popcount(words).to(tl.int32)
    ends = tl.cumsum(counts, axis=0)
    slot = tl.arange(0, SLOTS)
    at = slot * 0
    width = WORDS // 2
    while width > 0:
        at = tl.where(tl.gather(ends, at + width - 1, 0) <= slot, at + width, at)
        width = width // 2
    word = tl.gather(words, at, 0)
    left = slot - tl.gather(ends - counts, at, 0)  # set bits to skip within the word
    bit = slot * 0
    half = 16
    while half > 0:
        below = _popcount(word & ((tl.full((), 1, tl.uint32) << half) - 1)).to(tl.int32)
        skip = left >= below
        left = tl.where(skip, left - below, left)
        word = tl.where(skip, word >> half, word)
        bit = tl.where(skip, bit + half, bit)
        half = half // 2
    return at * 32 + bit
