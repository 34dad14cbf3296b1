"""Row draw: nucleus and top-k filter, exponential race, log confidence.

Source: spec/lada_band.md d.4 (definition), f.1 to f.3 (no sort is needed). Order of values: descending, then
ascending id. Masses are integers (numeric.py), so every implementation keeps the same tokens, draws the same token
and returns the same confidence bits.

Bytes per row of V logits: V * itemsize read (the Triton kernel holds the row in registers; recorded noise adds 4 V),
8 written.
"""
# mypy: allow-untyped-defs
# Triton traces the kernels and reads parameter annotations as its own type hints, so mypy's go without.

import math
from typing import Any

import torch
import triton
import triton.language as tl
from lada_rt.cpus import cpu_count
from torch import Tensor

from lada_rt_kernels import numeric
from lada_rt_kernels.checks import (
    check_finite,
    check_logits,
    check_positions,
    check_rows,
    float32,
    inverse_temperature,
    raise_bad_row,
)
from lada_rt_kernels.dispatch import pick_impl, seed_words
from lada_rt_kernels.numeric_triton import (
    exp_shifted,
    gumbel_of,
    gumbel_of_exponential,
    log_normal,
    mass_of,
    order_key,
    philox_word,
)
from lada_rt_kernels.select_triton import compact, kth_largest

__all__ = ["filtered_probs", "filtered_probs_ref", "sample", "sample_ref"]


def _filter_ref(x: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Mask of kept tokens and d = x - row maximum, both [R, V] in id order."""
    vocab = x.shape[1]
    ordered, ids = x.sort(dim=1, descending=True, stable=True)  # [R, V], equal values by ascending id
    d = ordered - ordered[:, :1]
    kept = torch.ones_like(ordered, dtype=torch.bool)
    p = float32(top_p)
    if p < 1:
        mass = numeric.mass_of(d)
        running = mass.cumsum(1)
        limit = (running[:, -1:].to(torch.float64) * p).to(torch.int64)  # [R, 1]
        # rank j goes when the mass before it already exceeds p; rank 1 has none before it
        kept = running - mass <= limit
    if 0 < top_k < vocab:
        left = torch.where(kept, ordered, torch.full_like(ordered, -math.inf))
        kept = kept & (left >= left[:, top_k - 1 : top_k])
    by_id = torch.empty_like(kept).scatter_(1, ids, kept)
    return by_id, x - ordered[:, :1]


def sample_ref(
    logits: Tensor,
    positions: Tensor,
    *,
    seed: int,
    step: int,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    exp_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `sample`, in plain torch; arguments and results as there."""
    check_logits(logits, top_k, top_p, temperature, step)
    check_rows(logits, positions, exp_noise)
    check_positions(positions)
    x = logits.to(torch.float32)
    rows, vocab = x.shape
    if rows == 0:
        return positions.to(torch.int32), x.new_empty(0)
    check_finite(x, positions)
    kept, d = _filter_ref(x, top_k, top_p)
    scaled = d * inverse_temperature(temperature)
    total = torch.where(kept, numeric.mass_of(scaled), 0).sum(1)  # [R]
    ids = torch.arange(vocab, device=x.device)
    if exp_noise is None:
        words = numeric.philox_words(step, positions[:, None], ids, numeric.STREAM_DRAW, seed, x.device)
        gumbel = numeric.gumbel_of(words[0])
    else:
        gumbel = numeric.gumbel_of_exponential(exp_noise)
    score = torch.where(kept, scaled + gumbel, torch.full_like(scaled, -math.inf))
    best = score.max(dim=1, keepdim=True).values
    token = torch.where(score == best, ids, vocab).min(dim=1).values  # lowest id on ties
    log_total = numeric.log_normal(total.to(torch.float32) * 2.0**-numeric.MASS_BITS)
    log_confidence = scaled.gather(1, token[:, None])[:, 0] - log_total
    return token.to(torch.int32), log_confidence.clamp(min=numeric.LOG_CONFIDENCE_FLOOR)


def filtered_probs_ref(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, temperature: float = 1.0) -> Tensor:
    """The definition of `filtered_probs`, in plain torch; arguments and results as there."""
    check_logits(logits, top_k, top_p, temperature, 0)
    x = logits.to(torch.float32)
    if x.shape[0] == 0:
        return x
    check_finite(x, None)
    kept, d = _filter_ref(x, top_k, top_p)
    scaled = d * inverse_temperature(temperature)
    total = torch.where(kept, numeric.mass_of(scaled), 0).sum(1, keepdim=True)
    weight = torch.where(kept & (scaled >= -87.0), numeric.exp_shifted(scaled, 0), torch.zeros_like(scaled))
    return weight / (total.to(torch.float32) * 2.0**-numeric.MASS_BITS)


@triton.jit
def _keep(x, valid, row_max, row_mass, top_k, top_p, BY_COUNT: tl.constexpr, BY_MASS: tl.constexpr):
    """Which of the values, in ascending id order, survive; they include every value that can."""
    keys = order_key(x)
    cut = tl.min(keys, axis=0)
    if BY_COUNT:
        cut = kth_largest(keys, top_k, 0)
    kept = valid & (keys >= cut)
    if BY_MASS:
        mass = tl.where(valid, mass_of(x - row_max), 0)
        limit = (row_mass.to(tl.float64) * top_p).to(tl.int64)
        if tl.sum(tl.where(kept, mass, 0), axis=0) > limit:
            low = cut.to(tl.int64)
            high = tl.max(keys, axis=0).to(tl.int64) + 1
            above = low * 0
            while high - low > 1:
                mid = low + (high - low) // 2
                upper = tl.sum(tl.where(keys >= mid.to(tl.int32), mass, 0), axis=0)
                above = tl.where(upper > limit, above, upper)
                high = tl.where(upper > limit, high, mid)
                low = tl.where(upper > limit, mid, low)
            cut = low.to(tl.int32)
            tie = valid & (keys == cut)
            one = tl.max(tl.where(tie, mass, 0), axis=0)
            # one is 0 only in rows that are reported as bad
            n_ties = (limit - above) // tl.maximum(one, 1) + 1
            rank = tl.cumsum(tie.to(tl.int32), axis=0)
            kept = (valid & (keys > cut)) | (tie & (rank <= n_ties))
    return kept


@triton.jit
def _total(scaled, kept):
    return tl.sum(tl.where(kept, mass_of(scaled), 0), axis=0).to(tl.float32) * 1.4210854715202004e-14  # 2^-46


@triton.jit
def _draw(
    x,
    ids,
    valid,
    row_max,
    row_mass,
    top_k,
    top_p,
    inv_temperature,
    position,
    noise_row_ptr,
    seed_lo,
    seed_hi,
    step,
    BY_COUNT: tl.constexpr,
    BY_MASS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
):
    """Token and log confidence of the exponential race among the values that survive the filter."""
    kept = _keep(x, valid, row_max, row_mass, top_k, top_p, BY_COUNT, BY_MASS)
    scaled = (x - row_max) * inv_temperature
    if HAS_NOISE:
        gumbel = gumbel_of_exponential(tl.load(noise_row_ptr + ids, mask=kept, other=1.0))
    else:
        gumbel = gumbel_of(philox_word(step, position, ids.to(tl.uint32), 0, seed_lo, seed_hi))
    score = tl.where(kept, scaled + gumbel, float("-inf"))
    best = tl.max(score, axis=0)
    # lowest id on ties
    token = tl.min(tl.where(kept & (score == best), ids, 0x7FFFFFFF), axis=0)
    chosen = tl.sum(tl.where(kept & (ids == token), scaled, 0.0), axis=0)
    confidence = chosen - log_normal(_total(scaled, kept))
    return token, tl.where(confidence > -46.0517018598809, confidence, -46.0517018598809)


# Values that change from call to call must not be baked in: each would compile the kernel again.
@triton.jit(do_not_specialize=["vocab", "top_k", "seed_lo", "seed_hi", "step"])
def _sample_kernel(
    logits_ptr,
    positions_ptr,
    noise_ptr,
    tokens_ptr,
    confidence_ptr,
    probs_ptr,
    row_stride,
    vocab,
    top_k,
    top_p,
    inv_temperature,
    seed_lo,
    seed_hi,
    step,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    BY_COUNT: tl.constexpr,
    BY_MASS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    WRITE_PROBS: tl.constexpr,
):
    # int64: row * vocab passes 2**31 at 131,072 rows of 16,384
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    ids = tl.arange(0, BLOCK)
    inside = ids < vocab
    x = tl.load(row_ptr + ids, mask=inside, other=float("-inf")).to(tl.float32)
    finite = x < float("inf")  # false for NaN and +inf
    n_bad = tl.sum((inside & (finite == 0)).to(tl.int32), axis=0)
    x = tl.where(finite, x, float("-inf"))
    row_max = tl.max(x, axis=0)
    ok = (n_bad == 0) & (row_max > float("-inf"))
    row_mass = tl.full((), 0, tl.int64)
    if BY_MASS:
        row_mass = tl.sum(mass_of(x - row_max), axis=0)

    if WRITE_PROBS:
        kept = _keep(x, inside, row_max, row_mass, top_k, top_p, BY_COUNT, BY_MASS)
        scaled = (x - row_max) * inv_temperature
        weight = tl.where(kept & (scaled >= -87.0), exp_shifted(scaled, 0), 0.0)
        probs = tl.div_rn(weight, _total(scaled, kept) + weight * 0.0)
        tl.store(probs_ptr + row * vocab + ids, tl.where(ok, probs, float("nan")), mask=inside)
    else:
        noise_row_ptr = noise_ptr + row * vocab
        position = tl.load(positions_ptr + row).to(tl.uint32)
        lo = seed_lo.to(tl.uint32)
        hi = seed_hi.to(tl.uint32)
        now = step.to(tl.uint32)
        if SLOTS > 0:
            # The k-th largest of the group maxima bounds the k-th largest value from below.
            groups = tl.max(tl.reshape(x, (BLOCK // 64, 64)), axis=1)
            chosen = inside & (order_key(x) >= kth_largest(order_key(groups), top_k, top_k // 8))
            n_chosen = tl.sum(chosen.to(tl.int32), axis=0)
            token = tl.full((), 0, tl.int32)
            confidence = tl.full((), 0.0, tl.float32)
            if n_chosen <= SLOTS:
                slots = compact(chosen, BLOCK, SLOTS)
                used = tl.arange(0, SLOTS) < n_chosen
                few = tl.load(row_ptr + slots, mask=used, other=float("-inf")).to(tl.float32)
                few = tl.where(few < float("inf"), few, float("-inf"))
                token, confidence = _draw(
                    few,
                    slots,
                    used,
                    row_max,
                    row_mass,
                    top_k,
                    top_p,
                    inv_temperature,
                    position,
                    noise_row_ptr,
                    lo,
                    hi,
                    now,
                    BY_COUNT,
                    BY_MASS,
                    HAS_NOISE,
                )
            else:
                token, confidence = _draw(
                    x,
                    ids,
                    inside,
                    row_max,
                    row_mass,
                    top_k,
                    top_p,
                    inv_temperature,
                    position,
                    noise_row_ptr,
                    lo,
                    hi,
                    now,
                    BY_COUNT,
                    BY_MASS,
                    HAS_NOISE,
                )
        else:
            token, confidence = _draw(
                x,
                ids,
                inside,
                row_max,
                row_mass,
                top_k,
                top_p,
                inv_temperature,
                position,
                noise_row_ptr,
                lo,
                hi,
                now,
                BY_COUNT,
                BY_MASS,
                HAS_NOISE,
            )
        tl.store(tokens_ptr + row, tl.where(ok, token, -1))
        tl.store(confidence_ptr + row, tl.where(ok, confidence, float("nan")))


def _launch(
    logits: Tensor,
    positions: Tensor,
    exp_noise: Tensor | None,
    tokens: Tensor,
    confidence: Tensor,
    probs: Tensor | None,
    *,
    seed: int,
    step: int,
    top_k: int,
    top_p: float,
    temperature: float,
) -> None:
    rows, vocab = logits.shape
    x = logits if logits.stride(1) == 1 else logits.contiguous()
    block = max(64, triton.next_power_of_2(vocab))
    by_count = 0 < top_k < vocab
    # Candidates are sought among group maxima only where there are many more groups than k.
    slots = 512 if by_count and top_k <= 128 and block >= 128 * top_k and block >= 2048 else 0
    seed_lo, seed_hi = seed_words(seed)
    p = float32(top_p)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _sample_kernel[(rows,)](
            x,
            positions,
            confidence if exp_noise is None else exp_noise.contiguous(),
            tokens,
            confidence,
            confidence if probs is None else probs,
            x.stride(0),
            vocab,
            top_k,
            p,
            inverse_temperature(temperature),
            seed_lo,
            seed_hi,
            step - 2**32 if step >= 2**31 else step,
            BLOCK=block,
            SLOTS=slots,
            BY_COUNT=by_count,
            BY_MASS=p < 1,
            HAS_NOISE=exp_noise is not None,
            WRITE_PROBS=probs is not None,
            num_warps=min(16, max(1, block // 1024)),
            enable_fp_fusion=False,
        )


def _as_numpy(logits: Tensor) -> Any:
    return logits.view(torch.uint16).numpy() if logits.dtype == torch.bfloat16 else logits.numpy()


def sample(
    logits: Tensor,
    positions: Tensor,
    *,
    seed: int,
    step: int,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    exp_noise: Tensor | None = None,
    impl: str | None = None,
    check_values: bool = True,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row from the filtered distribution, with its log probability there.

    Nucleus first, on the raw logits with the full-row normaliser; then top-k, which keeps every value tied with the
    k-th; then temperature. The random number of token v in a row depends only on (seed, step, position, v).

    Args:
        logits: [R, V] float32, float16 or bfloat16, V <= 65,536; -inf excludes a token.
        positions: [R] int64, absolute frame of each row, in [0, 2**32), which the Triton kernel does not check.
        seed: any integer; its low 64 bits are the Philox key.
        step: 0-based step, in [0, 2**32).
        top_k: tokens to keep, 0 for off.
        top_p: mass of the nucleus, compared as float32; 1 or more is off, 0 keeps the first rank alone.
        temperature: above 0.
        exp_noise: [R, V] float32 Exp(1) draws to use in place of Philox.
        impl: torch, cpp or triton; by default Triton on CUDA and C++ on CPU.
        check_values: on CUDA, wait for the result and raise for bad rows; without it such rows hold token -1 and
            confidence NaN, and nothing waits.

    Returns:
        tokens [R] int32; log_confidence [R] float32, natural logarithm, at least ln(1e-20).

    Raises:
        ParamError: an argument is out of range or does not fit, or a row holds NaN, +inf or only -inf.

    Source: spec/lada_band.md d.4, f.1, f.3.
    """
    check_logits(logits, top_k, top_p, temperature, step)
    check_rows(logits, positions, exp_noise)
    settings: dict[str, Any] = {
        "seed": seed,
        "step": step,
        "top_k": top_k,
        "top_p": top_p,
        "temperature": temperature,
    }
    chosen = pick_impl(impl, logits)
    if chosen == "torch":
        return sample_ref(logits, positions, exp_noise=exp_noise, **settings)
    if chosen == "cpp":
        from lada_rt import _C

        noise = None if exp_noise is None else exp_noise.contiguous().numpy()
        drawn, log_confidence = _C.sample(
            _as_numpy(logits), positions.numpy(), exp_noise=noise, n_threads=cpu_count(), **settings
        )
        return torch.from_numpy(drawn), torch.from_numpy(log_confidence)
    tokens = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
    confidence = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        _launch(logits, positions.contiguous(), exp_noise, tokens, confidence, None, **settings)
        if check_values and bool((tokens < 0).any()):
            raise_bad_row(int((tokens < 0).to(torch.int8).argmax()), positions)
    return tokens, confidence


def filtered_probs(
    logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, temperature: float = 1.0, impl: str | None = None
) -> Tensor:
    """Probabilities of the distribution that `sample` draws from.

    Args:
        logits, top_k, top_p, temperature, impl: as for `sample`.

    Returns:
        [R, V] float32; removed tokens, and those under e**-87 of the first rank, are 0.

    Raises:
        ParamError: as for `sample`.
    """
    check_logits(logits, top_k, top_p, temperature, 0)
    settings: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    chosen = pick_impl(impl, logits)
    if chosen == "torch":
        return filtered_probs_ref(logits, **settings)
    if chosen == "cpp":
        from lada_rt import _C

        return torch.from_numpy(_C.filtered_probs(_as_numpy(logits), n_threads=cpu_count(), **settings))
    probs = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        unused = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        confidence = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        _launch(logits, unused, None, unused, confidence, probs, seed=0, step=0, **settings)
        bad = probs.isnan().any(dim=1)
        if bool(bad.any()):
            raise_bad_row(int(bad.to(torch.int8).argmax()), None)
    return probs
