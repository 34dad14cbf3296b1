"""Argument checks of the row draw, the same for every implementation."""

from __future__ import annotations

import math

import torch
from lada_rt.errors import ParamError
from torch import Tensor

from lada_rt_kernels import numeric

__all__ = [
    "check_finite",
    "check_logits",
    "check_positions",
    "check_rows",
    "float32",
    "inverse_temperature",
    "raise_bad_row",
]


def float32(value: float) -> float:
    """The nearest float32: what every implementation computes with."""
    return float(torch.tensor(value, dtype=torch.float32))


def inverse_temperature(temperature: float) -> float:
    """1 / temperature as float32; infinite where it is not above 0."""
    return float32(1.0 / temperature) if temperature > 0 else math.inf


def check_logits(logits: Tensor, top_k: int, top_p: float, temperature: float, step: int) -> None:
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ParamError(
            f"expected logits [R, V] float32, float16 or bfloat16, got {list(logits.shape)} {logits.dtype}; "
            "convert them first"
        )
    if not 1 <= logits.shape[1] <= numeric.MAX_VOCAB:
        raise ParamError(f"expected 1 <= V <= {numeric.MAX_VOCAB}, got V = {logits.shape[1]}; split the vocabulary")
    if top_k < 0:
        raise ParamError(f"expected top_k >= 1, or 0 for off, got {top_k}; pass for example 100")
    if not top_p >= 0:
        raise ParamError(f"expected top_p >= 0 (1 or more is off), got {top_p}; pass for example 0.9")
    if not 0 < inverse_temperature(temperature) < math.inf:
        raise ParamError(f"expected a finite temperature above 0, got {temperature}; pass for example 1.0")
    if not 0 <= step < 2**32:
        raise ParamError(f"expected step in [0, 2**32), got {step}; pass the 0-based step")


def check_rows(logits: Tensor, positions: Tensor, exp_noise: Tensor | None) -> None:
    rows = logits.shape[0]
    if positions.shape != (rows,) or positions.dtype != torch.int64 or positions.device != logits.device:
        raise ParamError(
            f"expected positions [{rows}] int64 on {logits.device}, got {list(positions.shape)} {positions.dtype} "
            f"on {positions.device}; pass the absolute frame of each row"
        )
    if exp_noise is None:
        return
    if exp_noise.shape != logits.shape or exp_noise.dtype != torch.float32 or exp_noise.device != logits.device:
        raise ParamError(
            f"expected exp_noise {list(logits.shape)} float32 on {logits.device}, got {list(exp_noise.shape)} "
            f"{exp_noise.dtype} on {exp_noise.device}; pass one draw per logit"
        )


def check_positions(positions: Tensor) -> None:
    """Waits for the positions, where they are on a GPU."""
    wrong = (positions < 0) | (positions >= 2**32)
    if bool(wrong.any()):
        raise ParamError(f"expected positions in [0, 2**32), got {int(positions[wrong][0])}; pass the absolute frame")


def check_finite(x: Tensor, positions: Tensor | None) -> None:
    bad = ~(x < math.inf).all(dim=1) | (x.amax(dim=1) == -math.inf)
    if bool(bad.any()):
        raise_bad_row(int(bad.to(torch.int8).argmax()), positions)


def raise_bad_row(row: int, positions: Tensor | None) -> None:
    where = "" if positions is None else f" (position {int(positions[row])})"
    raise ParamError(
        f"expected finite logits, or -inf to exclude a token: row {row}{where} holds NaN or +inf, or nothing but "
        "-inf; check the network's output"
    )
