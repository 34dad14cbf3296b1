"""Start noise of the flow, drawn on the device: the bits of csrc/noise.cpp, operation for operation.

Every operation is a torch call of its own, so none is fused into a multiply-add that would round once where C++
rounds twice. Do not compile this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lada_rt_kernels import numeric
from torch import Tensor

__all__ = ["STREAM_FLOW", "flow_noise"]

STREAM_FLOW = 2
_WORD = 0xFFFFFFFF


def _minus_log_unit(words: Tensor) -> Tensor:
    """-ln((word + 1/2) / 2^32), near 1 from the complement."""
    low = -numeric.log_normal(numeric.unit_of(words))
    high = numeric.exponential_of(numeric.unit_of(words ^ _WORD))
    return torch.where(words < 0x80000000, low, high)


def _cos_sin_turn(words: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi word / 2^32; the reduction is integer arithmetic."""
    quadrant = ((words + 0x20000000) & _WORD) >> 30
    rest = (words - (quadrant << 30) + 0x80000000 & _WORD) - 0x80000000  # wraps to int32, as in C++
    x = rest.to(torch.float32) * 1.46291807927e-9
    z = x * x
    s = torch.full_like(z, -1.9517e-4)
    for coefficient in (8.33218e-3, -1.6666655e-1):
        s = s * z
        s = s + coefficient
    s = s * z
    s = s * x
    s = s + x
    c = torch.full_like(z, 2.44380909e-5)
    for coefficient in (-1.38873645e-3, 4.16666468e-2):
        c = c * z
        c = c + coefficient
    c = c * z
    c = c * z
    half = z * 0.5
    c = c + (1.0 - half)
    odd = (quadrant & 1) == 1
    sine, cosine = torch.where(odd, c, s), torch.where(odd, s, c)
    sine = torch.where((quadrant & 2) != 0, -sine, sine)
    cosine = torch.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    return cosine, sine


def flow_noise(seed: int, window: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal start noise of one decoder window; equal to `lada_rt.noise.flow_noise` bit for bit.

    Args:
        seed: any integer; its low 64 bits are the key.
        window: index of the window in the song, 0 <= window < 2**32.
        shape: the shape to fill.
        device: where to draw.

    Returns:
        float32 of that shape: Philox counter (i // 4, window, 0, 2), whose four words make two Box-Muller pairs.
    """
    n = 1
    for size in shape:
        n *= int(size)
    block = torch.arange((n + 3) // 4, dtype=torch.int64, device=device)
    words = numeric.philox_words(block, window, 0, STREAM_FLOW, seed, device)
    values = []
    for radius_word, angle_word in ((words[0], words[1]), (words[2], words[3])):
        # Through float64, whose rounding to float32 is the IEEE root: torch's float32 root on CPU is one ulp off.
        radius = (_minus_log_unit(radius_word) * 2.0).to(torch.float64).sqrt().to(torch.float32)
        cosine, sine = _cos_sin_turn(angle_word)
        values += [radius * cosine, radius * sine]
    return torch.stack(values, dim=1).flatten()[:n].reshape(tuple(int(s) for s in shape))
