"""Random numbers: Philox against its published vectors, the released noises against the goldens, flow noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_io import read_sidecar
from lada_rt import _C
from lada_rt.errors import ParamError
from lada_rt.noise import (
    flow_noise,
    released_fixed_position,
    released_gumbel,
    released_remask_noise,
    released_uniform,
    sample_seed,
    stable_seed,
)
from lada_rt_kernels import numeric
from scipy import stats

GOLDEN_PATTERN = "lada_band_seeds*.json"
CPU = torch.device("cpu")

# Random123's known-answer vectors for philox4x32-10: counter, key, output.
PHILOX_VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_VECTORS)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert list(_C.philox4x32(counter, key)) == expected
    seed = key[0] | key[1] << 32
    words = numeric.philox_words(counter[0], counter[1], counter[2], counter[3], seed, CPU)
    assert [int(word) for word in words] == expected


def test_released_seeds(golden_case: Path) -> None:
    seeds = read_sidecar(golden_case)
    assert seeds["derive_sample_seed"]
    assert seeds["stable_seed"]
    for case in seeds["derive_sample_seed"]:
        assert sample_seed(case["seed"], case["sequence_id"]) == case["sample_seed"]
    for case in seeds["stable_seed"]:
        assert stable_seed(case["seed"], case["sequence_id"], case["step_index"], case["salt"]) == case["stable_seed"]


def test_released_gumbel(golden_case: Path) -> None:
    seeds = read_sidecar(golden_case)
    for case in seeds["gumbel"]:
        noise = released_gumbel(case["seed"], case["sequence_id"], case["step_index"], case["length"])
        assert noise.dtype == np.float32
        np.testing.assert_allclose(noise[:16], case["gumbel_first16"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(noise[-1], case["gumbel_last"], rtol=0, atol=2e-6)


def test_released_uniform_and_fixed(golden_case: Path) -> None:
    seeds = read_sidecar(golden_case)
    for case in seeds["random_scores"]:
        noise = released_uniform(case["seed"], case["sequence_id"], case["step_index"], case["length"])
        assert noise[:16].tolist() == case["first16"]
        assert float(noise[-1]) == case["last"]
    for case in seeds["fixed_position_scores"]:
        noise = released_fixed_position(case["seed"], case["sequence_id"], case["length"])
        assert noise[:16].tolist() == case["first16"]
        assert float(noise[-1]) == case["last"]


def test_zero_uniform_stays_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lada_rt.noise._mersenne_uniform", lambda seed, n: np.zeros(n, dtype=np.float32))
    # u = 0 counts as 1e-20: -ln(-ln 1e-20) = -3.8297...
    np.testing.assert_allclose(released_gumbel(0, "a", 0, 2), -np.log(20 * np.log(10.0)), rtol=1e-6)


def test_released_remask_noise_by_strategy() -> None:
    fixed = released_remask_noise("fixed_position", 3, "song", 7, 5)
    assert (fixed == released_remask_noise("fixed_position", 3, "song", 8, 5)).all()
    uniform = released_remask_noise("random", 3, "song", 7, 5)
    assert not (uniform == released_remask_noise("random", 3, "song", 8, 5)).all()
    with pytest.raises(ParamError, match="one_shot"):
        released_remask_noise("one_shot", 3, "song", 7, 5)


def _ulp_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    spacing = torch.from_numpy(np.spacing(exact.abs().numpy().astype(np.float32))).double()
    return float(((got.double() - exact).abs() / spacing).max())


def test_exp_and_log_are_accurate() -> None:
    # Every 199th float of the range, and every 3rd around 1 for the logarithm. Measured: exp 1.16, log 0.82 ulp.
    d = -torch.arange(0, 0x42AE0000, 199).to(torch.int32).view(torch.float32)
    assert _ulp_error(numeric.exp_shifted(d, 0), d.double().exp()) < 1.3
    x = torch.arange(0x00800000, 0x7F800000, 199).to(torch.int32).view(torch.float32)
    assert _ulp_error(numeric.log_normal(x), x.double().log()) < 1.0
    x = torch.arange(0x3F000000, 0x40000000, 3).to(torch.int32).view(torch.float32)
    assert _ulp_error(numeric.log_normal(x), x.double().log()) < 1.0


def test_exponential_draws_keep_relative_precision() -> None:
    # Measured: 2.4 ulp, also for the smallest words, which decide races.
    words = torch.cat([torch.arange(0, 1 << 16), torch.arange(0, 1 << 32, 65521), torch.tensor([0xFFFFFFFF])])
    v = numeric.unit_of(words)
    assert float(v.min()) == 2.0**-33
    assert float(v.max()) < 1
    assert _ulp_error(numeric.exponential_of(v), -torch.log1p(-v.double())) < 3
    exact = (words.double() + 0.5) * 2.0**-32
    assert float(((v.double() - exact) / exact)[words < 0xFFFFFF00].abs().max()) < 1e-7


def test_flow_noise_is_standard_normal() -> None:
    noise = flow_noise(13, 0, [1, 32, 256, 32])
    assert noise.shape == (1, 32, 256, 32)
    assert noise.dtype == np.float32
    assert stats.kstest(noise.ravel()[:100_000], "norm").pvalue > 1e-3
    # the four outputs of a block, and neighbouring windows, are uncorrelated: 5 standard errors
    table = np.concatenate([noise.reshape(-1, 4), flow_noise(13, 1, noise.shape).reshape(-1, 4)], axis=1)
    correlation = np.corrcoef(table.T) - np.eye(8)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(table))


def test_flow_noise_depends_on_element_and_window_alone() -> None:
    noise = flow_noise(13, 2, [10_001])
    assert np.array_equal(noise[:37], flow_noise(13, 2, [37]))
    assert np.array_equal(noise, flow_noise(13, 2, [73, 137]).ravel())
    assert np.array_equal(noise, flow_noise(13 + 2**64, 2, [10_001]))  # the key is 64 bits
    for other in (flow_noise(13, 3, [10_001]), flow_noise(12, 2, [10_001]), flow_noise(13 + 2**32, 2, [10_001])):
        assert (noise != other).mean() > 0.99


def test_flow_noise_matches_box_muller_in_double() -> None:
    noise = flow_noise(-7, 5, [4096])
    words = numeric.philox_words(torch.arange(1024), 5, 0, 2, -7, CPU)
    expected = torch.empty(1024, 4, dtype=torch.float64)
    for pair in (0, 2):
        radius = (-2 * ((words[pair].double() + 0.5) * 2.0**-32).log()).sqrt()
        angle = words[pair + 1].double() * (2 * torch.pi * 2.0**-32)
        expected[:, pair], expected[:, pair + 1] = radius * angle.cos(), radius * angle.sin()
    # Measured over 2**20 values: 6.3e-7.
    np.testing.assert_allclose(noise.reshape(-1, 4), expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("window", "shape"), [(-1, [4]), (2**32, [4]), (0, [-1])])
def test_flow_noise_bad_arguments(window: int, shape: list[int]) -> None:
    with pytest.raises(ParamError):
        flow_noise(0, window, shape)
