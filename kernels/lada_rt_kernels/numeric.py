"""The arithmetic all implementations of the sampler share, for torch; the twin of csrc/numeric.h.

Each function is the same sequence of IEEE float32 multiplications, additions and integer operations as its C++ and
Triton (numeric_triton.py) twins, so the three give the same bits on any device. Sums are sums of integers, which have
no order. Largest errors found: exp 1.16 ulp, log 0.82 ulp.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "LOG_CONFIDENCE_FLOOR",
    "MASS_BITS",
    "MAX_VOCAB",
    "STREAM_DRAW",
    "STREAM_REMASK",
    "exp_shifted",
    "exponential_of",
    "gumbel_of",
    "gumbel_of_exponential",
    "log_normal",
    "mass_of",
    "order_key",
    "philox_words",
    "unit_of",
]

# Masses are integers in units of 2^-46 of the row's largest weight; 65,536 of them stay below 2^63.
MASS_BITS = 46
MAX_VOCAB = 65536
STREAM_DRAW = 0
STREAM_REMASK = 1
LOG_CONFIDENCE_FLOOR = -46.0517018598809  # ln(1e-20)

_WORD = 0xFFFFFFFF
_SMALLEST_NORMAL = 2.0**-126


def exp_shifted(d: Tensor, shift: int) -> Tensor:
    """exp(d) * 2**shift for float32 d <= 0; arguments under -87 count as -87."""
    d = torch.where(d > -87.0, d, torch.full_like(d, -87.0))
    n = (d * 1.44269504 + 12582912.0) - 12582912.0  # 1.5 * 2^23 rounds to the nearest integer
    r = d - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = torch.full_like(d, float.fromhex("0x1.6a23cep-10"))
    for c in ("0x1.123a2p-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2", "0x1p0", "0x1p0"):
        p = p * r
        p = p + float.fromhex(c)
    return (p.view(torch.int32) + ((n.to(torch.int32) + shift) << 23)).view(torch.float32)


def mass_of(d: Tensor) -> Tensor:
    """floor(exp(d) * 2**46) as int64, for float32 d <= 0."""
    return exp_shifted(d, MASS_BITS).to(torch.int64)


def _log_parts(f: Tensor, e: Tensor) -> Tensor:
    p = torch.full_like(f, float.fromhex("0x1.1457c4p-4"))
    for c in (
        "-0x1.de3c48p-4",
        "0x1.e6f07ap-4",
        "-0x1.fc22p-4",
        "0x1.233766p-3",
        "-0x1.555c4ep-3",
        "0x1.99a4b6p-3",
        "-0x1.000006p-2",
        "0x1.555548p-2",
    ):
        p = p * f
        p = p + float.fromhex(c)
    z = f * f
    y = p * f
    y = y * z
    y = y + e * -2.12194440e-4
    y = y - z * 0.5
    y = f + y
    return y + e * 0.693359375


def _split_log(x: Tensor) -> tuple[Tensor, Tensor]:
    bits = x.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    return (bits - (exponent << 23)).view(torch.float32) - 1.0, exponent.to(torch.float32)


def log_normal(x: Tensor) -> Tensor:
    """Natural logarithm of positive, normal float32."""
    return _log_parts(*_split_log(x))


def unit_of(words: Tensor) -> Tensor:
    """Uniform float32 in (0, 1) from 32-bit words held in int64; keeps 2**-33 resolution near 0."""
    v = words.to(torch.float32) * 2.0**-32 + 2.0**-33
    top = float.fromhex("0x1.fffffep-1")
    return torch.where(v < top, v, torch.full_like(v, top))


def exponential_of(v: Tensor) -> Tensor:
    """-ln(1 - v), with full relative precision for small v, which decide a race."""
    f, e = _split_log(1.0 - v)
    small = v < 0.29289
    return -_log_parts(torch.where(small, -v, f), torch.where(small, torch.zeros_like(e), e))


def gumbel_of_exponential(q: Tensor) -> Tensor:
    """-ln(q), q floored at the smallest normal float32."""
    return -log_normal(torch.where(q > _SMALLEST_NORMAL, q, torch.full_like(q, _SMALLEST_NORMAL)))


def gumbel_of(words: Tensor) -> Tensor:
    """Standard Gumbel draws from 32-bit words held in int64."""
    return gumbel_of_exponential(exponential_of(unit_of(words)))


def order_key(x: Tensor) -> Tensor:
    """int32 that orders as float32 x does; -0 and +0 share one key. x must not be NaN."""
    bits = (x + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def philox_words(
    c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, stream: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four output words as int64 in [0, 2**32), of the counters' broadcast shape.

    Args:
        c0, c1, c2: counter words in [0, 2**32), int64 tensors on the device or ints; `stream` is the fourth.
        seed: any integer; its low 64 bits are the key, low word first.
        device: where to compute.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    # full, not as_tensor: a number copied to a GPU would be waited for
    words = [
        c.to(torch.int64) if isinstance(c, Tensor) else torch.full((), c, dtype=torch.int64, device=device)
        for c in (c0, c1, c2, stream)
    ]
    x0, x1, x2, x3 = torch.broadcast_tensors(*words)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # int64 products wrap, which keeps all 64 bits; the mask undoes the sign extension of the shift
        p0 = x0 * 0xD2511F53
        p1 = x2 * 0xCD9E8D57
        x0, x1, x2, x3 = ((p1 >> 32) & _WORD) ^ x1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ x3 ^ k1, p0 & _WORD
        k0 = (k0 + 0x9E3779B9) & _WORD
        k1 = (k1 + 0xBB67AE85) & _WORD
    return x0, x1, x2, x3
