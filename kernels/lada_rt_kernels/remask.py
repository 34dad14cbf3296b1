"""Remask selection: commit the drawn tokens, except at the positions that stay masked for the next step.

Source: spec/lada_band.md d.3 (steps 6 to 8) and f.4. The n_masked positions with the smallest (score, position) stay
masked. Scores: low_confidence is log confidence plus tau times Gumbel noise; random and fixed_position are uniform
noise alone, the latter the same at every step.

Bytes for R masked rows: 16 R read (position, token, confidence), 8 R written to codes, 8 n_masked to the row list.
"""
# mypy: allow-untyped-defs
# Triton traces the kernel and reads parameter annotations as its own type hints, so mypy's go without.

import math
from typing import Any

import torch
import triton
import triton.language as tl
from lada_rt.errors import ParamError
from torch import Tensor

from lada_rt_kernels import numeric
from lada_rt_kernels.dispatch import pick_impl, seed_words
from lada_rt_kernels.numeric_triton import gumbel_of, order_key, philox_word, unit_of

__all__ = ["MAX_ROWS", "STRATEGIES", "remask", "remask_ref"]

#: Rows that one Triton program selects from; the C++ and torch implementations have no limit.
MAX_ROWS = 16384
STRATEGIES = ("low_confidence", "random", "fixed_position")


def remask_ref(
    codes: Tensor,
    rows: Tensor,
    tokens: Tensor,
    log_confidence: Tensor,
    *,
    n_masked: int,
    tau: float,
    strategy: str,
    mask_id: int,
    seed: int,
    step: int,
    noise: Tensor | None = None,
) -> Tensor:
    """The definition of `remask`, in plain torch; arguments and results as there."""
    _check(codes, rows, tokens, log_confidence, n_masked, tau, strategy, step, noise)
    _check_order(codes, rows)
    if strategy == "low_confidence" and not tau > 0:
        score = log_confidence
    else:
        if noise is None:
            counter_step = 0 if strategy == "fixed_position" else step
            words = numeric.philox_words(counter_step, rows, 0, numeric.STREAM_REMASK, seed, rows.device)[0]
            own = numeric.gumbel_of(words) if strategy == "low_confidence" else numeric.unit_of(words)
        else:
            own = noise[rows]
        score = log_confidence + own * tau if strategy == "low_confidence" else own
    if 0 < n_masked < rows.numel() and bool(score.isnan().any()):
        _raise_nan(rows, score)
    # stable: rows ascend, so equal scores stay in order of position
    stays = torch.zeros(rows.numel(), dtype=torch.bool, device=rows.device)
    stays[(score + 0.0).sort(stable=True).indices[:n_masked]] = True
    codes[rows] = torch.where(stays, mask_id, tokens.to(torch.int64))
    return rows[stays]


@triton.jit(do_not_specialize=["n_rows", "n_masked", "mask_id", "seed_lo", "seed_hi", "step"])
def _remask_kernel(
    codes_ptr,
    rows_ptr,
    tokens_ptr,
    confidence_ptr,
    noise_ptr,
    rows_next_ptr,
    n_rows,
    n_masked,
    tau,
    mask_id,
    seed_lo,
    seed_hi,
    step,
    BLOCK: tl.constexpr,
    BY_CONFIDENCE: tl.constexpr,
    HAS_TAU: tl.constexpr,
    HAS_NOISE: tl.constexpr,
):
    index = tl.arange(0, BLOCK)
    inside = index < n_rows
    position = tl.load(rows_ptr + index, mask=inside, other=0)
    token = tl.load(tokens_ptr + index, mask=inside, other=0)
    if HAS_NOISE:
        own = tl.load(noise_ptr + position, mask=inside, other=0.0)
    else:
        word = philox_word(
            step.to(tl.uint32),
            position.to(tl.uint32),
            index.to(tl.uint32) * 0,
            1,
            seed_lo.to(tl.uint32),
            seed_hi.to(tl.uint32),
        )
        own = gumbel_of(word) if BY_CONFIDENCE else unit_of(word)
    score = own
    if BY_CONFIDENCE:
        score = tl.load(confidence_ptr + index, mask=inside, other=0.0)
        if HAS_TAU:
            score = score + own * tau
    # Rows past the end sort last, at the key that no score reaches.
    key = tl.where(inside, tl.minimum(order_key(score), 0x7FFFFFFE), 0x7FFFFFFF)

    # The n_masked-th smallest key by bisection over 32-bit keys: the smallest bound with n_masked keys at or below.
    low = tl.min(key, axis=0).to(tl.int64) - 1
    high = tl.max(key, axis=0).to(tl.int64)
    while high - low > 1:
        mid = low + (high - low) // 2
        count = tl.sum((key <= mid.to(tl.int32)).to(tl.int32), axis=0)
        low = tl.where(count >= n_masked, low, mid)
        high = tl.where(count >= n_masked, mid, high)
    last = high.to(tl.int32)
    less = inside & (key < last)
    tie = inside & (key == last)
    n_less = tl.sum(less.to(tl.int32), axis=0)
    # ties go to the earlier position, so runs repeat exactly
    stays = (less | (tie & (tl.cumsum(tie.to(tl.int32), axis=0) <= n_masked - n_less))) & (n_masked > 0)
    tl.store(codes_ptr + position, tl.where(stays, mask_id.to(tl.int64), token.to(tl.int64)), mask=inside)
    slot = tl.cumsum(stays.to(tl.int32), axis=0) - 1
    tl.store(rows_next_ptr + slot, position, mask=stays)


def _check(
    codes: Tensor,
    rows: Tensor,
    tokens: Tensor,
    log_confidence: Tensor,
    n_masked: int,
    tau: float,
    strategy: str,
    step: int,
    noise: Tensor | None,
) -> None:
    n_rows = rows.numel()
    wanted: list[tuple[str, Tensor | None, int | None, torch.dtype]] = [
        ("codes", codes, None, torch.int64),
        ("rows", rows, None, torch.int64),
        ("tokens", tokens, n_rows, torch.int32),
        ("log_confidence", log_confidence, n_rows, torch.float32),
        ("noise", noise, codes.numel(), torch.float32),
    ]
    for name, tensor, size, dtype in wanted:
        if tensor is None:
            continue
        fits = tensor.dim() == 1 and tensor.dtype == dtype and (size is None or tensor.numel() == size)
        if not fits or tensor.device != codes.device:
            raise ParamError(
                f"expected {name} [{'n' if size is None else size}] {dtype} on {codes.device}, got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}; convert it first"
            )
    if not codes.is_contiguous():
        raise ParamError("expected contiguous codes, since they are updated in place; pass codes.contiguous()")
    if not 0 <= n_masked <= n_rows:
        raise ParamError(f"expected 0 <= n_masked <= {n_rows} masked rows, got {n_masked}; see schedule.mask_counts")
    if not 0 <= tau < math.inf:
        raise ParamError(f"expected a finite tau >= 0, got {tau}; see schedule.selection_temperatures")
    if strategy not in STRATEGIES:
        raise ParamError(f"expected a strategy among {', '.join(STRATEGIES)}, got {strategy!r}; use one of these")
    if not 0 <= step < 2**32:
        raise ParamError(f"expected step in [0, 2**32), got {step}; pass the 0-based step")


def _check_order(codes: Tensor, rows: Tensor) -> None:
    ends = torch.cat([rows.new_tensor([-1]), rows, rows.new_tensor([codes.numel()])])
    if bool((ends.diff() <= 0).any()):
        raise ParamError(f"expected rows strictly ascending in [0, {codes.numel()}); sort the masked positions")


def _raise_nan(rows: Tensor, score: Tensor) -> None:
    at = int(rows[int(score.isnan().to(torch.int8).argmax())])
    raise ParamError(f"expected scores that are numbers, got NaN at position {at}; check log_confidence and noise")


def remask(
    codes: Tensor,
    rows: Tensor,
    tokens: Tensor,
    log_confidence: Tensor,
    *,
    n_masked: int,
    tau: float,
    strategy: str,
    mask_id: int,
    seed: int,
    step: int,
    noise: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Write the drawn tokens into codes, in place, and choose the positions that stay masked.

    Args:
        codes: [T] int64, contiguous; changed at `rows` only.
        rows: [R] int64, the masked positions, strictly ascending. On CUDA this is not checked, to avoid waiting.
        tokens: [R] int32, one draw per row.
        log_confidence: [R] float32, from `sample`.
        n_masked: how many of the rows stay masked.
        tau: weight of the Gumbel noise, >= 0, compared and applied as float32; only for low_confidence.
        strategy: low_confidence, random or fixed_position.
        mask_id: the code that marks a masked position.
        seed: any integer; its low 64 bits are the Philox key.
        step: 0-based step, in [0, 2**32).
        noise: [T] float32 indexed by position, in place of Philox: Gumbel draws for low_confidence, scores otherwise.
        impl: torch, cpp or triton; by default Triton on CUDA and C++ on CPU.

    Returns:
        [n_masked] int64, the positions that stay masked, ascending.

    Raises:
        ParamError: an argument is out of range or does not fit, or a score is NaN (not looked for by Triton);
            more than 16,384 rows for Triton.

    Source: spec/lada_band.md d.3, f.4.
    """
    _check(codes, rows, tokens, log_confidence, n_masked, tau, strategy, step, noise)
    tau = float(torch.tensor(tau, dtype=torch.float32))
    settings: dict[str, Any] = {
        "n_masked": n_masked,
        "tau": tau,
        "strategy": strategy,
        "mask_id": mask_id,
        "seed": seed,
        "step": step,
    }
    chosen = pick_impl(impl, codes)
    if chosen == "torch":
        return remask_ref(codes, rows, tokens, log_confidence, noise=noise, **settings)
    if chosen == "cpp":
        from lada_rt import _C

        arrays = (rows.numpy(), tokens.numpy(), log_confidence.numpy())
        recorded = None if noise is None else noise.numpy()
        return torch.from_numpy(_C.remask(codes.numpy(), *arrays, noise=recorded, **settings))
    n_rows = rows.numel()
    if n_rows > MAX_ROWS:
        raise ParamError(f"expected at most {MAX_ROWS} masked rows, got {n_rows}; use impl torch for longer sequences")
    rows_next = torch.empty(n_masked, dtype=torch.int64, device=codes.device)
    if n_rows == 0:
        return rows_next
    by_confidence = strategy == "low_confidence"
    seed_lo, seed_hi = seed_words(seed)
    counter_step = 0 if strategy == "fixed_position" else step
    with torch.cuda.device_of(codes):  # Triton launches on the current device
        _remask_kernel[(1,)](
            codes,
            rows.contiguous(),
            tokens.contiguous(),
            log_confidence.contiguous(),
            log_confidence if noise is None else noise.contiguous(),
            # An empty tensor has no address to hand over; nothing is stored through it.
            rows_next if n_masked else rows,
            n_rows,
            n_masked,
            tau,
            mask_id,
            seed_lo,
            seed_hi,
            counter_step - 2**32 if counter_step >= 2**31 else counter_step,
            BLOCK=max(64, triton.next_power_of_2(n_rows)),
            BY_CONFIDENCE=by_confidence,
            HAS_TAU=by_confidence and tau > 0,
            HAS_NOISE=noise is not None,
            num_warps=16 if n_rows > 2048 else 4,
            enable_fp_fusion=False,
        )
    return rows_next
