"""The shared arithmetic (numeric.py, csrc/numeric.h) as Triton device functions, operation for operation.

Kernels that use it must be launched with enable_fp_fusion=False: a fused multiply-add rounds once where the twins
round twice.
"""
# mypy: allow-untyped-defs
# Triton traces these functions and reads parameter annotations as its own type hints, so mypy's go without.

import triton
import triton.language as tl

__all__ = [
    "exp_shifted",
    "exponential_of",
    "gumbel_of",
    "gumbel_of_exponential",
    "log_normal",
    "mass_of",
    "order_key",
    "philox_word",
    "unit_of",
]


@triton.jit
def exp_shifted(d, SHIFT: tl.constexpr):
    d = tl.where(d > -87.0, d, -87.0)
    n = (d * 1.44269504 + 12582912.0) - 12582912.0
    r = d - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = r * 0.0013814539415761828 + 0.00836874544620514
    p = p * r + 0.04166838899254799
    p = p * r + 0.1666652113199234
    p = p * r + 0.4999999403953552
    p = p * r + 1.0
    p = p * r + 1.0
    bits = p.to(tl.int32, bitcast=True) + ((n.to(tl.int32) + SHIFT) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def mass_of(d):
    return exp_shifted(d, 46).to(tl.int64)


@triton.jit
def _log_parts(f, e):
    p = f * 0.06746651232242584 + -0.11675670742988586
    p = p * f + 0.11888168007135391
    p = p * f + -0.12405586242675781
    p = p * f + 0.14219550788402557
    p = p * f + -0.1666799634695053
    p = p * f + 0.2000211924314499
    p = p * f + -0.25000008940696716
    p = p * f + 0.3333331346511841
    z = f * f
    y = p * f
    y = y * z
    y = y + e * -2.12194440e-4
    y = y - z * 0.5
    y = f + y
    return y + e * 0.693359375


@triton.jit
def _split_log(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    return f, exponent.to(tl.float32)


@triton.jit
def log_normal(x):
    f, e = _split_log(x)
    return _log_parts(f, e)


@triton.jit
def unit_of(word):
    v = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    return tl.where(v < 0.9999999403953552, v, 0.9999999403953552)


@triton.jit
def exponential_of(v):
    f, e = _split_log(1.0 - v)
    small = v < 0.29289
    return -_log_parts(tl.where(small, -v, f), tl.where(small, 0.0, e))


@triton.jit
def gumbel_of_exponential(q):
    return -log_normal(tl.where(q > 1.1754943508222875e-38, q, 1.1754943508222875e-38))


@triton.jit
def gumbel_of(word):
    return gumbel_of_exponential(exponential_of(unit_of(word)))


@triton.jit
def order_key(x):
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def philox_word(c0, c1, c2, STREAM: tl.constexpr, seed_lo, seed_hi):
    """First output word of Philox4x32-10; all words uint32, c2 a tensor."""
    zero = c2 * 0
    c0 = c0 + zero
    c1 = c1 + zero
    c3 = zero + STREAM
    k0 = seed_lo
    k1 = seed_hi
    m0: tl.constexpr = 0xD2511F53
    m1: tl.constexpr = 0xCD9E8D57
    for _ in tl.static_range(10):
        a = zero + m0
        b = zero + m1
        hi0 = tl.umulhi(a, c0)
        hi1 = tl.umulhi(b, c2)
        lo0 = a * c0
        lo1 = b * c2
        c0 = hi1 ^ c1 ^ k0
        c1 = lo1
        c2 = hi0 ^ c3 ^ k1
        c3 = lo0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0
