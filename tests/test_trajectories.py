"""Recorded trajectories, step by step: logits and noises in, tokens, masks and confidences out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_io import read_sidecar, read_tensors
from lada_rt.noise import released_remask_noise
from lada_rt.schedule import mask_counts, selection_temperatures
from lada_rt_kernels import remask, sample
from lada_rt_kernels.dispatch import IMPLS
from torch import Tensor

CUDA = torch.cuda.is_available()
# Every trajectory and the autoregressive case, not the weights.
GOLDEN_PATTERN = "lada_band_gen_[!w]*.json"


def at(impl: str, tensor: Tensor) -> Tensor:
    return (tensor.cuda() if impl == "triton" and CUDA else tensor).contiguous()


def filter_arguments(args: dict[str, Any]) -> dict[str, Any]:
    return {
        "top_k": args["top_k"] or 0,
        "top_p": 1.0 if args["top_p"] is None else args["top_p"],
        "temperature": args["temperature"],
    }


def rows_to_draw(impl: str, rows: Tensor, step: int, n_steps: int) -> Tensor:
    """All rows; but the Triton interpreter takes 40 ms a row, so there a few rows of three steps."""
    if impl != "triton" or CUDA:
        return rows
    return rows[step % 3 :: max(3, len(rows) // 8)] if step in (0, n_steps // 2, n_steps - 1) else rows[:0]


@pytest.mark.parametrize("impl", IMPLS)
def test_recorded_steps(golden_case: Path, impl: str) -> None:
    sidecar, tensors = read_sidecar(golden_case), read_tensors(golden_case)
    args = sidecar["args"]
    settings = filter_arguments(args)
    if sidecar["kind"] == "autoregressive":
        check_autoregressive(impl, tensors)
        return
    n_frames, mask_id, n_steps = sidecar["T"], sidecar["config"]["acc_mask"], args["sampling_steps"]
    one_shot = args["remask_strategy"] == "one_shot"
    counts = mask_counts(n_frames, n_steps, args.get("remask_ratios") or args["remask_schedule"])
    taus = selection_temperatures(n_steps, args["mask_temperature"])
    codes = torch.full((n_frames,), mask_id)
    rows = torch.arange(n_frames)
    for step in range(sidecar["steps_executed"]):
        assert torch.equal(codes, tensors["acc_ids_in"][step].long())
        recorded, probs = tensors["sampled"][step].int(), tensors["sel_probs"][step]
        tokens, log_confidence = recorded[rows], probs[rows].log()
        if "logits" in tensors:
            drawn = rows_to_draw(impl, rows, step, sidecar["steps_executed"])
            inputs = [at(impl, t) for t in (tensors["logits"][step][drawn], drawn)]
            noise = at(impl, tensors["exp_noise"][step][drawn])
            got, confidence = (
                t.cpu() for t in sample(*inputs, seed=0, step=step, exp_noise=noise, impl=impl, **settings)
            )
            assert torch.equal(got, recorded[drawn])
            assert float((confidence.exp() - probs[drawn]).abs().max() if len(drawn) else 0) <= 1e-5
            if len(drawn) == len(rows):
                tokens, log_confidence = got, confidence
        if one_shot:
            codes[rows] = tokens.long()
            break
        assert counts[step] == sidecar["num_to_mask"][step]
        assert abs(taus[step] - sidecar["selection_temperature"][step]) <= 1e-12
        after = at(impl, codes.clone())
        left = remask(
            after,
            *(at(impl, t) for t in (rows, tokens, log_confidence)),
            n_masked=counts[step],
            tau=taus[step],
            strategy=args["remask_strategy"],
            mask_id=mask_id,
            seed=0,
            step=step,
            noise=at(impl, remask_noise(sidecar, tensors, step)),
            impl=impl,
        )
        codes, rows = after.cpu(), left.cpu()
        assert torch.equal((codes == mask_id).to(torch.uint8), tensors["new_mask"][step])
        assert torch.equal(rows, tensors["new_mask"][step].nonzero()[:, 0])
    assert torch.equal(codes, tensors["final_tokens"])


def remask_noise(sidecar: dict[str, Any], tensors: dict[str, Tensor], step: int) -> Tensor:
    """The recorded noise, after checking that it follows from seed and sequence id (spec d.6)."""
    args = sidecar["args"]
    strategy, seed, song = args["remask_strategy"], args["remask_seed"], args["remask_sequence_id"]
    derived = torch.from_numpy(released_remask_noise(strategy, seed, song, step, sidecar["T"]))
    if strategy == "fixed_position":
        return derived
    recorded = tensors["select_noise"][step]
    if not sidecar["noise_used"][step]:
        return torch.zeros_like(recorded)
    np.testing.assert_allclose(derived.numpy(), recorded.numpy(), rtol=0, atol=2e-6)
    return recorded


def check_autoregressive(impl: str, tensors: dict[str, Tensor]) -> None:
    """The recorded distributions are filtered already: drawing from their logarithm gives the recorded tokens."""
    logits, positions = tensors["probs"].log(), torch.arange(len(tensors["probs"]))
    noise = at(impl, tensors["exp_noise"])
    tokens, confidence = sample(at(impl, logits), at(impl, positions), seed=0, step=0, exp_noise=noise, impl=impl)
    assert torch.equal(tokens.cpu().long(), tensors["final_tokens"])
    expected = tensors["probs"].gather(1, tensors["final_tokens"][:, None])[:, 0]
    assert float((confidence.cpu().exp() - expected).abs().max()) <= 1e-5
