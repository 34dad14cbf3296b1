"""The row draw's arguments: bad values and shapes are reported, odd layouts work."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lada_rt_kernels
import numpy as np
import pytest
import torch
from lada_rt import _C
from lada_rt.errors import ParamError
from lada_rt_kernels import filtered_probs, sample
from lada_rt_kernels.dispatch import IMPLS
from torch import Tensor

FILTERS: list[dict[str, Any]] = [{"top_k": 100, "top_p": 0.9}, {}]


def at(impl: str, tensor: Tensor) -> Tensor:
    return tensor.cuda() if impl == "triton" and torch.cuda.is_available() else tensor


def run(impl: str, logits: Tensor, positions: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    noise = kwargs.pop("exp_noise", None)
    if noise is not None:
        kwargs["exp_noise"] = at(impl, noise)
    tokens, log_confidence = sample(at(impl, logits), at(impl, positions), impl=impl, **kwargs)
    return tokens.cpu(), log_confidence.cpu()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1500, 2047])
def test_bad_values_are_reported(impl: str, bad: float, where: int) -> None:
    logits = torch.zeros(4, 2048)
    logits[2, where] = bad
    for setting in FILTERS:
        with pytest.raises(ParamError, match=r"row 2 \(position 50\)"):
            run(impl, logits, torch.tensor([0, 1, 50, 3]), seed=0, step=0, **setting)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_finite_value_are_reported(impl: str) -> None:
    logits = torch.zeros(3, 2048)
    logits[1] = -math.inf
    for setting in FILTERS:
        with pytest.raises(ParamError, match=r"row 1 \(position 7\)"):
            run(impl, logits, torch.tensor([0, 7, 3]), seed=0, step=0, **setting)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "change",
    [
        {"top_k": -1},
        {"top_p": -0.1},
        {"top_p": math.nan},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e-45},
        {"temperature": 1e300},
        {"step": -1},
        {"step": 2**32},
        {"logits": torch.zeros(8)},
        {"logits": torch.zeros(2, 8, dtype=torch.float64)},
        {"logits": torch.zeros(2, 8, dtype=torch.int64)},
        {"logits": torch.zeros(2, 0)},
        {"positions": torch.zeros(3, dtype=torch.int64)},
        {"positions": torch.zeros(2, dtype=torch.int32)},
        {"exp_noise": torch.ones(2, 7)},
        {"exp_noise": torch.ones(2, 8, dtype=torch.float64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_bad_arguments(impl: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(2, 8), "positions": torch.arange(2), "seed": 0, "step": 0}
    run(impl, **arguments)
    with pytest.raises(ParamError):
        run(impl, **{**arguments, **change})


@pytest.mark.parametrize("position", [-1, 2**32])
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_positions_that_are_no_frames(impl: str, position: int) -> None:
    with pytest.raises(ParamError, match="positions"):
        run(impl, torch.zeros(2, 8), torch.tensor([0, position]), seed=0, step=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nucleus_that_rounds_to_everything_keeps_everything(impl: str) -> None:
    """1 - 1e-9 is 1 as float32, in which it is compared; a tail under the mass of one unit has to stay."""
    row = torch.zeros(1, 2048)
    row[0, 1500:] = -45.0
    probs = filtered_probs(at(impl, row), top_p=1 - 1e-9, temperature=100.0, impl=impl)
    assert int((probs > 0).sum()) == 2048


def test_binding_checks_arrays() -> None:
    good: dict[str, Any] = {"seed": 0, "step": 0, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    logits, positions = np.zeros((2, 8), np.float32), np.arange(2)
    bad: list[tuple[Any, Any, dict[str, Any]]] = [
        (logits[0], positions, {}),
        (logits.astype(np.float64), positions, {}),
        (logits, positions.astype(np.int32), {}),
        (logits, positions[:1], {}),
        (logits, [0, 1], {}),
        (logits, np.array([0, -1]), {}),
        (logits, np.array([0, 2**32]), {}),
        (logits, positions, {"n_threads": -1}),
        (logits, positions, {"exp_noise": logits[:, :7]}),
        (logits, positions, {"exp_noise": [1.0]}),
    ]
    for x, where, change in bad:
        with pytest.raises(ParamError):
            _C.sample(x, where, **{**good, **change})
    with pytest.raises(ParamError, match="impl"):
        sample(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), seed=0, step=0, impl="cuda")


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input_and_empty_batch(impl: str) -> None:
    g = torch.Generator().manual_seed(2)
    wide = torch.randn(10, 96, generator=g)
    positions = torch.arange(20)[::4]
    expected = run("torch", wide[::2, :40].contiguous(), positions.contiguous(), seed=1, step=0, top_k=9)
    for logits in (wide[::2, :40], wide[::2, :40].t().contiguous().t()):
        assert not logits.is_contiguous()
        got = run(impl, logits, positions, seed=1, step=0, top_k=9)
        assert torch.equal(expected[0], got[0])
        assert torch.equal(expected[1], got[1])
    tokens, log_confidence = run(impl, wide[:0], positions[:0], seed=1, step=0)
    assert (tokens.shape, tokens.dtype) == ((0,), torch.int32)
    assert (log_confidence.shape, log_confidence.dtype) == ((0,), torch.float32)
    assert filtered_probs(at(impl, wide[:0]), impl=impl).shape == (0, 96)


def test_kernels_lower_for_ampere_and_hopper() -> None:
    # Without the interpreter, and in a process of its own: conftest has set it for this one.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "lower_kernels.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    lowered = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert len(lowered) == 2 + 4 + 5 + 4
    # every kernel that a launcher starts, on both
    sources = Path(lada_rt_kernels.__file__).parent.glob("*.py")
    started = {name for path in sources for name in re.findall(r"(\w+_kernel)\[", path.read_text())}
    assert {(name, capability) for name, _, capability in lowered} == {(n, c) for n in started for c in ("80", "90")}
