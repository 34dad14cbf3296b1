"""Schedule tables against the goldens, and their bounds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from golden_io import read_sidecar
from hypothesis import given, settings
from hypothesis import strategies as st
from lada_rt.errors import ParamError
from lada_rt.schedule import Schedule, mask_counts, mask_ratios, parse_schedule, selection_temperatures

GOLDEN_PATTERN = "lada_band_schedules*.json"
NAMES = ["cosine", "linear", "sqrt", "square", "cubic", "power:0.7"]


def test_golden_tables(golden_case: Path) -> None:
    tables = read_sidecar(golden_case)
    assert tables["tables"]
    for table in tables["tables"]:
        parsed = parse_schedule(table["schedule"])
        assert [parsed.kind, parsed.power] == table["normalized"]
        ratios = mask_ratios(table["steps"], table["schedule"])
        assert len(ratios) == len(table["ratios"])
        assert max(abs(a - b) for a, b in zip(ratios, table["ratios"], strict=True)) <= 1e-15
        for n_frames, counts in table["num_to_mask"].items():
            assert mask_counts(int(n_frames), table["steps"], table["schedule"]) == counts["effective"]


def test_golden_edge_cases(golden_case: Path) -> None:
    tables = read_sidecar(golden_case)
    for schedule, expected in tables["edge_cases"]:
        if expected == "ValueError":
            with pytest.raises(ParamError):
                mask_ratios(3, schedule)
        else:
            assert mask_ratios(len(expected), schedule) == expected


def test_float32_rounding_decides() -> None:
    # spec d.3: flooring the double gives one position fewer here
    n = mask_counts(4096, 60)[36]
    assert n == math.floor(math.cos(37 / 60 * math.pi / 2) * 4096) + 1


@pytest.mark.parametrize(
    ("given_name", "parsed"),
    [
        (" Cosine ", Schedule("cosine")),
        ("COS", Schedule("cosine")),
        ("lin", Schedule("linear")),
        ("poly:3", Schedule("power", power=3.0)),
        ("pow:0.5", Schedule("power", power=0.5)),
        ([1.5, 0.5, -1], Schedule("ratios", ratios=(1.0, 0.5, 0.0))),
        (Schedule("linear"), Schedule("linear")),
    ],
)
def test_names(given_name: Any, parsed: Schedule) -> None:
    assert parse_schedule(given_name) == parsed


@pytest.mark.parametrize(
    "schedule", ["power", "power:inf", "power:nan", "linear:1", [], [math.nan], [0.2, 0.3], ["a"], 3]
)
def test_bad_schedules(schedule: Any) -> None:
    with pytest.raises(ParamError):
        parse_schedule(schedule)


@pytest.mark.parametrize(("frames", "steps"), [(0, 4), (-1, 4), (4, 0), (4, -1), (4, 2.0), (True, 4), (4, True)])
def test_bad_counts(frames: Any, steps: Any) -> None:
    with pytest.raises(ParamError):
        mask_counts(frames, steps)


def test_ratio_list_needs_one_per_step() -> None:
    with pytest.raises(ParamError, match="expected 4 schedule ratios"):
        mask_ratios(4, [0.5, 0.2])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9001), st.integers(1, 120), st.sampled_from(NAMES))
def test_counts_fall_to_zero(frames: int, steps: int, schedule: str) -> None:
    counts = mask_counts(frames, steps, schedule)
    assert len(counts) == steps
    assert counts[-1] == 0
    for before, after in zip([frames, *counts], counts, strict=False):
        # one is revealed at each step while more than one is left; then the count waits at 1
        assert after < before or before == after == 1 or after == 0
    assert all(n >= 1 for n in counts[:-1])


def test_selection_temperatures_anneal_to_zero() -> None:
    taus = selection_temperatures(8, 10.5)
    assert taus == [10.5 * (1 - (i + 1) / 8) for i in range(8)]  # eighths are exact in float32
    assert selection_temperatures(3, 0.0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("temperature", [-1.0, math.inf, math.nan])
def test_bad_mask_temperature(temperature: float) -> None:
    with pytest.raises(ParamError):
        selection_temperatures(4, temperature)
