"""Remask selection over its implementations: the n smallest by (score, position), and nothing else touched."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lada_rt import _C
from lada_rt.errors import ParamError
from lada_rt_kernels import remask
from lada_rt_kernels.dispatch import IMPLS
from lada_rt_kernels.remask import MAX_ROWS, STRATEGIES
from torch import Tensor

CUDA = torch.cuda.is_available()
MASK = 16384
DEFAULTS: dict[str, Any] = {"tau": 0.0, "strategy": "low_confidence", "mask_id": MASK, "seed": 13, "step": 2}


def at(impl: str, tensor: Tensor) -> Tensor:
    return tensor.cuda() if impl == "triton" and CUDA else tensor.clone()


def run(impl: str, codes: Tensor, rows: Tensor, tokens: Tensor, confidence: Tensor, **kwargs: Any) -> list[Tensor]:
    """Codes and masked rows after the call."""
    noise = kwargs.pop("noise", None)
    if noise is not None:
        kwargs["noise"] = at(impl, noise)
    after = at(impl, codes)
    arrays = [at(impl, t) for t in (rows, tokens, confidence)]
    left = remask(after, *arrays, impl=impl, **{**DEFAULTS, **kwargs})
    return [after.cpu(), left.cpu()]


def problem(n_frames: int, n_rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randperm(n_frames, generator=g)[:n_rows].sort().values
    codes = torch.randint(0, MASK, (n_frames,), generator=g)
    codes[rows] = MASK
    tokens = torch.randint(0, MASK, (n_rows,), generator=g, dtype=torch.int32)
    confidence = -torch.rand(n_rows, generator=g) * 9
    confidence[torch.rand(n_rows, generator=g) < 0.3] = 0.0  # many certain draws: ties
    return codes, rows, tokens, confidence


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tau", [0.0, 3.7])
@pytest.mark.parametrize(("n_frames", "n_rows"), [(1, 1), (50, 50), (300, 129), (4097, 2600), (16384, 16384)])
def test_implementations_agree(strategy: str, tau: float, n_frames: int, n_rows: int) -> None:
    given_problem = problem(n_frames, n_rows, seed=n_rows)
    for n_masked in {0, 1, n_rows // 3, max(0, n_rows - 1), n_rows}:
        arguments = {"n_masked": n_masked, "tau": tau, "strategy": strategy, "seed": -5, "step": 3}
        expected = run("torch", *given_problem, **arguments)
        for impl in ("cpp", "triton"):
            got = run(impl, *given_problem, **arguments)
            assert torch.equal(expected[0], got[0])
            assert torch.equal(expected[1], got[1])


scores = st.one_of(st.floats(-50, 0, width=32), st.sampled_from([0.0, -0.0, -1.0, -2.0]))


@settings(max_examples=150, deadline=None)
@given(st.lists(scores, min_size=1, max_size=60), st.data(), st.sampled_from(["torch", "cpp"]))
def test_keeps_the_smallest_by_score_then_position(score: list[float], data: st.DataObject, impl: str) -> None:
    n_rows = len(score)
    n_frames = data.draw(st.integers(n_rows, 2 * n_rows))
    n_masked = data.draw(st.integers(0, n_rows))
    rows = torch.tensor(sorted(data.draw(st.permutations(range(n_frames)))[:n_rows]))
    codes = torch.arange(n_frames) + 100
    codes[rows] = MASK
    tokens = torch.arange(n_rows, dtype=torch.int32)
    after, left = run(impl, codes, rows, tokens, torch.tensor(score), n_masked=n_masked)
    order = sorted(range(n_rows), key=lambda i: (score[i], int(rows[i])))
    stays = sorted(int(rows[i]) for i in order[:n_masked])
    assert left.tolist() == stays
    for i, position in enumerate(rows.tolist()):
        assert int(after[position]) == (MASK if position in stays else int(tokens[i]))
    untouched = torch.ones(n_frames, dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(after[untouched], codes[untouched])


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_scores_stay_masked_from_the_front(impl: str) -> None:
    codes, rows = torch.full((9,), MASK), torch.arange(9)
    tokens, confidence = torch.arange(9, dtype=torch.int32), torch.zeros(9)
    confidence[1::2] = -0.0
    after, left = run(impl, codes, rows, tokens, confidence, n_masked=4)
    assert left.tolist() == [0, 1, 2, 3]
    assert after.tolist() == [MASK] * 4 + [4, 5, 6, 7, 8]


@pytest.mark.parametrize("impl", IMPLS)
def test_recorded_noise_is_indexed_by_position(impl: str) -> None:
    codes = torch.tensor([7, MASK, 8, MASK, MASK])
    rows, tokens = torch.tensor([1, 3, 4]), torch.tensor([11, 13, 14], dtype=torch.int32)
    confidence = torch.tensor([-1.0, -2.0, -3.0])
    noise = torch.tensor([9.0, 0.0, 9.0, -9.0, 3.0])
    # low_confidence: -1 + 0, -2 - 18, -3 + 6
    after, left = run(impl, codes, rows, tokens, confidence, n_masked=2, tau=2.0, noise=noise)
    assert left.tolist() == [1, 3]
    assert after.tolist() == [7, MASK, 8, MASK, 14]
    # tau 0: confidence alone
    assert run(impl, codes, rows, tokens, confidence, n_masked=1, noise=noise)[1].tolist() == [4]
    # the other strategies look at the noise alone
    for strategy in ("random", "fixed_position"):
        got = run(impl, codes, rows, tokens, confidence, n_masked=1, noise=noise, strategy=strategy)
        assert got[1].tolist() == [3]


def test_own_noise_depends_on_step_seed_and_position() -> None:
    codes, rows, tokens, confidence = problem(2000, 2000, seed=1)

    def left(**change: Any) -> set[int]:
        arguments = {"n_masked": 1000, "tau": 50.0, **change}
        return set(run("cpp", codes, rows, tokens, confidence, **arguments)[1].tolist())

    for strategy in ("low_confidence", "random"):
        base = left(strategy=strategy)
        assert base == left(strategy=strategy)
        for change in ({"step": 3}, {"seed": 14}):
            # independent halves share 500 of 1000, standard deviation 11
            assert 400 < len(base & left(strategy=strategy, **change)) < 600
    assert left(strategy="fixed_position") == left(strategy="fixed_position", step=9)
    # a position keeps its noise when other rows leave
    some = torch.arange(0, 2000, 2)
    kept = run("cpp", codes, some, tokens[::2], confidence[::2], n_masked=500, strategy="fixed_position")[1]
    everything = run("cpp", codes, rows, tokens, confidence, n_masked=1000, strategy="fixed_position")[1]
    assert len(set(kept.tolist()) & set(everything.tolist())) > 450


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl: str) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    codes = torch.arange(5)
    after, left = run(impl, codes, empty, empty.int(), torch.zeros(0), n_masked=0)
    assert torch.equal(after, codes)
    assert (left.numel(), left.dtype) == (0, torch.int64)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "change",
    [
        {"n_masked": -1},
        {"n_masked": 4},
        {"tau": -1.0},
        {"tau": math.nan},
        {"tau": math.inf},
        {"strategy": "one_shot"},
        {"step": -1},
        {"step": 2**32},
        {"codes": torch.zeros(5, dtype=torch.int32)},
        {"codes": torch.zeros(10, dtype=torch.int64)[::2]},
        {"codes": torch.zeros(1, 5, dtype=torch.int64)},
        {"rows": torch.tensor([0, 1, 2], dtype=torch.int32)},
        {"rows": torch.tensor([[0, 1, 2]])},
        {"tokens": torch.zeros(2, dtype=torch.int32)},
        {"tokens": torch.zeros(3, dtype=torch.int64)},
        {"confidence": torch.zeros(3, dtype=torch.float64)},
        {"noise": torch.zeros(4)},
        {"noise": torch.zeros(5, dtype=torch.float64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_bad_arguments(impl: str, change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "codes": torch.zeros(5, dtype=torch.int64),
        "rows": torch.tensor([0, 1, 4]),
        "tokens": torch.zeros(3, dtype=torch.int32),
        "confidence": torch.zeros(3),
        "n_masked": 1,
    }
    run(impl, **good)
    arguments = {**DEFAULTS, **good, **change}
    arrays = [arguments.pop(name) for name in ("codes", "rows", "tokens", "confidence")]
    with pytest.raises(ParamError):
        remask(*arrays, impl=impl, **arguments)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("rows", [[0, 0, 1], [2, 1, 3], [-1, 0, 1], [1, 2, 5]])
def test_rows_must_ascend_within_the_codes(impl: str, rows: list[int]) -> None:
    tokens = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ParamError, match="ascending"):
        run(impl, torch.zeros(5, dtype=torch.int64), torch.tensor(rows), tokens, torch.zeros(3), n_masked=1)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_nan_scores_are_reported(impl: str) -> None:
    codes, rows, tokens, confidence = problem(6, 6, seed=0)
    confidence[3] = math.nan
    with pytest.raises(ParamError, match="position 3"):
        run(impl, codes, rows, tokens, confidence, n_masked=2)


def test_triton_row_limit() -> None:
    n = MAX_ROWS + 1
    codes, tokens = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int32)
    with pytest.raises(ParamError, match="16384"):
        run("triton", codes, torch.arange(n), tokens, torch.zeros(n), n_masked=1)


def test_binding_checks_arrays() -> None:
    good: dict[str, Any] = {**DEFAULTS, "n_masked": 1}
    codes, rows, tokens = np.zeros(4, np.int64), np.arange(2), np.zeros(2, np.int32)
    confidence = np.zeros(2, np.float32)
    frozen = codes.copy()
    frozen.setflags(write=False)
    for bad in (frozen, codes[::2], codes.astype(np.int32), [0, 0, 0, 0]):
        with pytest.raises(ParamError, match="codes"):
            _C.remask(bad, rows, tokens, confidence, **good)
    with pytest.raises(ParamError, match="rows"):
        _C.remask(codes, [0, 1], tokens, confidence, **good)
    left = _C.remask(codes, rows, tokens, confidence, **good)
    assert left.tolist() == [0]
    assert codes.tolist() == [MASK, 0, 0, 0]
