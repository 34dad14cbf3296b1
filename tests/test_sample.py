"""The row draw over its implementations: goldens, bit equality, the drawn distribution, invariances, bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_io import read_sidecar, read_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from lada_rt import _C
from lada_rt.errors import ParamError
from lada_rt_kernels import filtered_probs, sample
from lada_rt_kernels.dispatch import IMPLS
from scipy import stats
from torch import Tensor

CUDA = torch.cuda.is_available()
SETTINGS: list[dict[str, Any]] = [
    {"top_k": 100, "top_p": 0.9},
    {"top_k": 20, "top_p": 0.3, "temperature": 0.8},
    {"top_k": 5},
    {"top_p": 0.9, "temperature": 2.0},
    {"top_k": 128, "top_p": 0.0},
    {},
]


def at(impl: str, tensor: Tensor) -> Tensor:
    return tensor.cuda() if impl == "triton" and CUDA else tensor


def run(impl: str, logits: Tensor, positions: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    noise = kwargs.pop("exp_noise", None)
    if noise is not None:
        kwargs["exp_noise"] = at(impl, noise)
    tokens, log_confidence = sample(at(impl, logits), at(impl, positions), impl=impl, **kwargs)
    return tokens.cpu(), log_confidence.cpu()


def rows_of(vocab: int, seed: int = 0) -> Tensor:
    """Rows that stress one thing each; all of the given width."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(3, vocab, generator=g) * 3
    sparse = normal[0].clone()
    sparse[torch.rand(vocab, generator=g) < 0.9] = -math.inf
    sparse[vocab // 2] = 1.0
    peaked = normal[1].clone()
    peaked[vocab // 3] = 40.0
    signed_zeros = torch.where(torch.arange(vocab) % 2 == 0, 0.0, -0.0)
    return torch.stack(
        [
            normal[0],
            normal[1] / 6,
            normal[2].to(torch.bfloat16).float(),  # ties, also at the k-th rank
            torch.zeros(vocab),
            signed_zeros,
            sparse,
            peaked,
            (torch.arange(vocab) % 3).float() - 1e4,
            -torch.arange(vocab).float() * 1e36,  # differences overflow to -inf
        ]
    )


# ---- goldens


@pytest.mark.parametrize("impl", IMPLS)
def test_filter_goldens(golden_case: Path, impl: str) -> None:
    sidecar, tensors = read_sidecar(golden_case), read_tensors(golden_case)
    logits = tensors["logits"]
    assert sidecar["settings"]
    loose = sidecar["tolerance"].get("probs_abs_for_rows", {})
    for setting in sidecar["settings"]:
        expected = expected_probs(tensors, setting["id"], logits.shape)
        top_p = 1.0 if setting["top_p"] is None else setting["top_p"]
        probs = filtered_probs(
            at(impl, logits),
            top_k=setting["top_k"] or 0,
            top_p=top_p,
            temperature=setting["temperature"],
            impl=impl,
        ).cpu()
        margins = setting["min_abs_cumprob_minus_p"]
        for r, name in enumerate(sidecar["row_names"]):
            if top_p < 1 and margins is not None and margins[r] < 1e-6:
                continue
            tolerance = loose.get(name, sidecar["tolerance"]["probs_abs"])
            assert float((probs[r] - expected[r]).abs().max()) <= tolerance, (setting["id"], name)
            sure = (expected[r] == 0) | (expected[r] >= 1e-30)
            assert torch.equal((probs[r] > 0)[sure], (expected[r] > 0)[sure]), (setting["id"], name)


test_filter_goldens.golden_pattern = "lada_band_filter_*.json"  # type: ignore[attr-defined]  # read by conftest


def expected_probs(tensors: dict[str, Tensor], setting: int, shape: torch.Size) -> Tensor:
    if f"probs_{setting:02d}" in tensors:
        return tensors[f"probs_{setting:02d}"]
    ids, probs = tensors[f"kept_ids_{setting:02d}"].long(), tensors[f"kept_probs_{setting:02d}"]
    dense = torch.zeros(shape[0], shape[1] + 1)  # the last column swallows the padding id -1
    dense.scatter_(1, ids % (shape[1] + 1), torch.where(ids >= 0, probs, 0))
    return dense[:, :-1]


# ---- one definition, three implementations


@pytest.mark.parametrize("vocab", [1, 2, 64, 1000, 1024, 2048])
@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_implementations_agree_bit_for_bit(vocab: int, setting: int) -> None:
    logits = rows_of(vocab)
    positions = torch.tensor([3, 0, 16384, 2**32 - 1, 7, 8, 9, 10, 1])
    arguments = {"seed": -(2**40) + 17, "step": 5, **SETTINGS[setting]}
    expected = run("torch", logits, positions, **arguments)
    probs = filtered_probs(logits, impl="torch", **SETTINGS[setting])
    picks = list(range(len(logits))) if CUDA else [setting, setting + 1, setting + 2]  # the interpreter is slow
    for impl, rows in (("cpp", list(range(len(logits)))), ("triton", picks)):
        got = run(impl, logits[rows], positions[rows], **arguments)
        assert torch.equal(got[0], expected[0][rows])
        assert torch.equal(got[1].view(torch.int32), expected[1][rows].view(torch.int32))
        assert torch.equal(filtered_probs(at(impl, logits[rows]), impl=impl, **SETTINGS[setting]).cpu(), probs[rows])


@pytest.mark.parametrize("vocab", [16384, 16385])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_full_width_rows_agree(vocab: int, dtype: torch.dtype) -> None:
    logits = rows_of(vocab)[:8].to(dtype)
    positions = torch.arange(8) * 11
    for arguments in SETTINGS:
        expected = run("torch", logits, positions, seed=1, step=2, **arguments)
        got = run("cpp", logits, positions, seed=1, step=2, **arguments)
        assert torch.equal(expected[0], got[0])
        assert torch.equal(expected[1], got[1])
    expected = run("torch", logits, positions, seed=1, step=2, **SETTINGS[0])
    rows = slice(None) if CUDA else slice(1, 4)
    got = run("triton", logits[rows], positions[rows], seed=1, step=2, **SETTINGS[0])
    assert torch.equal(expected[0][rows], got[0])
    assert torch.equal(expected[1][rows], got[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_full_shape_on_gpu(dtype: torch.dtype, setting: int) -> None:
    g = torch.Generator().manual_seed(3)
    logits = (torch.randn(1024, 16384, generator=g) * 3).to(dtype)
    positions = torch.randperm(1024, generator=g)
    expected = run("cpp", logits, positions, seed=9, step=1, **SETTINGS[setting])
    got = run("triton", logits, positions, seed=9, step=1, **SETTINGS[setting])
    assert torch.equal(expected[0], got[0])
    assert torch.equal(expected[1], got[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_recorded_noise(impl: str) -> None:
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 300, generator=g)
    noise = torch.empty(4, 300).exponential_(generator=g)
    tokens, log_confidence = run(impl, logits, torch.arange(4), seed=0, step=0, top_k=30, exp_noise=noise)
    kept = logits >= logits.topk(30, dim=1).values[:, -1:]
    probs = torch.where(kept, logits.double().exp(), 0)
    probs /= probs.sum(1, keepdim=True)
    assert torch.equal(tokens.long(), (probs / noise).argmax(1))
    exact = probs.gather(1, tokens.long()[:, None])[:, 0].log()
    torch.testing.assert_close(log_confidence.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_in_the_race_go_to_the_lowest_id(impl: str) -> None:
    logits = torch.full((1, 70), -5.0)
    logits[0, [9, 33, 66]] = 1.0
    noise = torch.full((1, 70), 2.0)
    tokens, _ = run(impl, logits, torch.tensor([0]), seed=0, step=0, exp_noise=noise)
    assert tokens.tolist() == [9]


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_noise_counts_as_the_smallest_normal(impl: str) -> None:
    logits = torch.zeros(1, 8)
    noise = torch.ones(1, 8)
    noise[0, [3, 5]] = torch.tensor([2.0**-126, 0.0])
    assert run(impl, logits, torch.tensor([0]), seed=0, step=0, exp_noise=noise)[0].tolist() == [3]


# ---- properties


def reference(x: np.ndarray, top_k: int, top_p: float, temperature: float) -> tuple[np.ndarray, float]:
    """Filtered probabilities of one row from a sort in float64, and how near a rank boundary is to top_p."""
    order = np.lexsort((np.arange(len(x)), -x))
    y = x[order].astype(np.float64)
    cumulative = np.cumsum(np.exp(y - y[0])) / np.exp(y - y[0]).sum()
    kept = np.ones(len(x), dtype=bool)
    margin = math.inf
    if top_p < 1:
        p = float(np.float32(top_p))
        kept[1:] = cumulative[:-1] <= p
        margin = float(np.abs(cumulative[:-1] - p).min()) if len(x) > 1 else math.inf
    if 0 < top_k < len(x):
        left = np.where(kept, y, -np.inf)
        kept &= left >= left[top_k - 1]
    weight = np.where(kept, np.exp((y - y[0]) / temperature), 0)
    probs = np.empty(len(x))
    probs[order] = weight / weight.sum()
    return probs, margin


values = st.one_of(
    st.floats(-30, 30, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 5.0, -math.inf]),
    st.integers(-3, 3).map(float),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(values, min_size=1, max_size=80),
    st.integers(0, 90),
    st.one_of(st.floats(0, 1.2), st.sampled_from([0.0, 0.5, 0.9, 1.0])),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from(["torch", "cpp"]),
    st.integers(-(2**70), 2**70),
)
def test_matches_a_sort_in_float64(
    row: list[float], top_k: int, top_p: float, temperature: float, impl: str, seed: int
) -> None:
    row[len(row) // 2] = 1.5  # at least one finite
    x = np.array(row, dtype=np.float32)
    probs, margin = reference(x, top_k, top_p, temperature)
    logits = torch.from_numpy(x)[None]
    got = filtered_probs(logits, top_k=top_k, top_p=top_p, temperature=temperature, impl=impl)[0].numpy()
    tokens, log_confidence = run(
        impl, logits, torch.tensor([4]), seed=seed, step=1, top_k=top_k, top_p=top_p, temperature=temperature
    )
    token = int(tokens[0])
    assert got[token] > 0
    # Confidence is the filtered probability of the drawn token; measured 4e-7 relative at log values up to 60.
    assert abs(math.exp(float(log_confidence[0])) - got[token]) <= 1e-5 * got[token] + 1e-20
    if margin > 1e-6:
        np.testing.assert_allclose(got, probs, rtol=0, atol=1e-6)
        sure = (probs == 0) | (probs > 1e-30)
        assert ((got > 0) == (probs > 0))[sure].all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 200), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(0, 2**32))
def test_cpp_equals_torch_on_random_shapes(vocab: int, top_k: int, top_p: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocab, generator=g) * 4
    logits[1] = logits[1].round()
    arguments = {"seed": seed, "step": 0, "top_k": top_k, "top_p": top_p}
    expected = run("torch", logits, torch.arange(3), **arguments)
    got = run("cpp", logits, torch.arange(3), **arguments)
    assert torch.equal(expected[0], got[0])
    assert torch.equal(expected[1], got[1])


def long_tail(vocab: int) -> Tensor:
    return -1.2 * torch.arange(1, vocab + 1).float().log()


def two_peaks(vocab: int) -> Tensor:
    row = torch.full((vocab,), -4.0)
    row[[vocab // 5, vocab - 1]] = 6.0
    return row


def boundary_ties(vocab: int) -> Tensor:
    row = -torch.arange(vocab).float() * 0.05
    row[90:130] = row[100]  # ranks 91 to 130 tie across rank 100
    return row


def holes(vocab: int) -> Tensor:
    row = long_tail(vocab)
    row[::2] = -math.inf
    return row


CHI_SQUARE_CASES: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "uniform": (torch.zeros(64), {}),
    "uniform, nucleus": (torch.zeros(500), {"top_k": 100, "top_p": 0.9}),
    "peaked": (torch.nn.functional.one_hot(torch.tensor(7), 64).float() * 8, {"top_p": 0.9999}),
    "two equal peaks": (two_peaks(256), {"top_k": 100, "top_p": 0.9}),
    "long tail": (long_tail(200), {"top_k": 0, "top_p": 0.95, "temperature": 1.3}),
    "ties at the k boundary": (boundary_ties(1024), {"top_k": 100}),
    "-inf": (holes(1024), {"top_k": 100, "top_p": 0.9}),
}


def chi_square(draws: np.ndarray, probs: np.ndarray) -> float:
    """p-value of the draws against the exact distribution; cells expected under 20 times are pooled."""
    counts = np.bincount(draws, minlength=len(probs))
    assert counts[probs == 0].sum() == 0, "a removed token was drawn"
    expected = probs * len(draws)
    few = expected < 20
    observed, wanted = counts[~few], expected[~few]
    if expected[few].sum() >= 20:
        observed, wanted = np.append(observed, counts[few].sum()), np.append(wanted, expected[few].sum())
    if len(wanted) == 1:
        return float(stats.binomtest(int(observed[0]), len(draws), min(1.0, float(wanted[0]) / len(draws))).pvalue)
    return float(stats.chisquare(observed, wanted * (observed.sum() / wanted.sum())).pvalue)


@pytest.mark.parametrize("case", CHI_SQUARE_CASES)
@pytest.mark.parametrize(
    ("impl", "n_draws"),
    [
        ("cpp", 2_000_000),
        ("torch", 3_000),  # slow; its draws equal the C++ ones bit for bit
        pytest.param("triton", 2_000_000, marks=pytest.mark.gpu),
    ],
)
def test_draws_follow_the_distribution(case: str, impl: str, n_draws: int) -> None:
    row, setting = CHI_SQUARE_CASES[case]
    probs, _ = reference(row.numpy(), setting.get("top_k", 0), setting.get("top_p", 1.0), setting.get("temperature", 1))
    chunk = min(n_draws, 40_000)
    draws = [
        run(impl, row.expand(chunk, -1), torch.arange(start, start + chunk), seed=20, step=3, **setting)[0]
        for start in range(0, n_draws, chunk)
    ]
    assert chi_square(torch.cat(draws).numpy(), probs) > 1e-4


def test_steps_seeds_and_positions_are_independent_streams() -> None:
    row = torch.zeros(1, 4096)
    pairs = [((1, 0, 0), (2, 0, 0)), ((1, 0, 0), (1 + 2**32, 0, 0)), ((1, 0, 0), (1, 1, 0)), ((1, 0, 0), (1, 0, 1))]
    for (seed, step, position), (seed2, step2, position2) in pairs:
        where = torch.arange(2000) * 2
        a = run("cpp", row.expand(2000, -1), where + position, seed=seed, step=step)[0]
        b = run("cpp", row.expand(2000, -1), where + position2, seed=seed2, step=step2)[0]
        # 2000 independent draws of 4096 coincide 0.5 times on average
        assert int((a == b).sum()) < 8


@pytest.mark.parametrize("impl", IMPLS)
def test_top_1_is_argmax(impl: str) -> None:
    logits = rows_of(200)
    tokens, log_confidence = run(impl, logits, torch.arange(9), seed=1, step=0, top_k=1)
    ties = (logits == logits.amax(1, keepdim=True)).sum(1)
    assert (logits.gather(1, tokens.long()[:, None])[:, 0] == logits.amax(1)).all()
    # every value equal to the largest survives top-k, so the draw is uniform among them
    torch.testing.assert_close(log_confidence, -ties.float().log(), rtol=1e-6, atol=1e-6)
    tokens, log_confidence = run(impl, logits, torch.arange(9), seed=1, step=0, top_p=0.0)
    first = torch.tensor([int((row == row.max()).nonzero()[0]) for row in logits])
    assert torch.equal(tokens.long(), first)
    assert (log_confidence == 0).all()


def test_adding_a_constant_changes_nothing() -> None:
    logits = (rows_of(5000)[[0, 1, 2, 5, 6]] * 64).round() / 64  # the shift is exact on multiples of 2^-6
    a = run("cpp", logits, torch.arange(5), seed=1, step=0, top_k=100, top_p=0.9)
    b = run("cpp", logits + 128, torch.arange(5), seed=1, step=0, top_k=100, top_p=0.9)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_row_order_and_batch_do_not_matter(impl: str) -> None:
    n = 600 if impl != "triton" or CUDA else 6
    g = torch.Generator().manual_seed(11)
    logits = torch.randn(n, 1100, generator=g) * 2
    positions = torch.randperm(5000, generator=g)[:n]
    arguments: dict[str, Any] = {"seed": 4, "step": 9, "top_k": 50, "top_p": 0.9}
    tokens, log_confidence = run(impl, logits, positions, **arguments)
    order = torch.randperm(n, generator=g)
    shuffled = run(impl, logits[order], positions[order], **arguments)
    assert torch.equal(tokens[order], shuffled[0])
    assert torch.equal(log_confidence[order], shuffled[1])
    for r in (0, n - 1):
        alone = run(impl, logits[r : r + 1], positions[r : r + 1], **arguments)
        assert torch.equal(tokens[r : r + 1], alone[0])


def test_thread_count_does_not_matter() -> None:
    logits = rows_of(4096).repeat(40, 1)
    positions = np.arange(len(logits))
    arguments: dict[str, Any] = {"seed": 4, "step": 9, "top_k": 100, "top_p": 0.9, "temperature": 1.0}
    one = _C.sample(logits.numpy(), positions, n_threads=1, **arguments)
    for n_threads in (0, 2, 3, 7, 64):
        many = _C.sample(logits.numpy(), positions, n_threads=n_threads, **arguments)
        assert np.array_equal(one[0], many[0])
        assert np.array_equal(one[1], many[1])


def test_wider_vocabulary_of_excluded_tokens_changes_nothing() -> None:
    logits = rows_of(1500)
    wide = torch.nn.functional.pad(logits, (0, 700), value=-math.inf)
    for setting in SETTINGS:
        a = run("cpp", logits, torch.arange(9), seed=1, step=0, **setting)
        b = run("cpp", wide, torch.arange(9), seed=1, step=0, **setting)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_largest_vocabulary() -> None:
    logits = torch.zeros(1, _C.MAX_VOCAB)
    tokens, log_confidence = run("cpp", logits, torch.tensor([0]), seed=1, step=0, top_p=0.5)
    assert int(tokens[0]) <= _C.MAX_VOCAB // 2
    assert abs(float(log_confidence[0]) + math.log(_C.MAX_VOCAB // 2 + 1)) < 1e-5
    with pytest.raises(ParamError, match="65536"):
        run("cpp", torch.zeros(1, _C.MAX_VOCAB + 1), torch.tensor([0]), seed=1, step=0)
