"""Options: what is refused, and how."""

from __future__ import annotations

import math

import pytest
from lada_rt import GenerationParams, ParamError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", -1),
        ("steps", 1.0),
        ("steps", True),
        ("steps", 10_001),
        ("flow_steps", 0),
        ("top_k", 0),
        ("top_k", -5),
        ("top_p", 0.0),
        ("top_p", 2.0),
        ("top_p", math.nan),
        ("top_p", "0.9"),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("temperature", 1e-40),  # its inverse is no float32
        ("temperature", 10**400),
        ("mask_temperature", -0.1),
        ("guidance", math.nan),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("strategy", "best"),
        ("schedule", "unknown"),
        ("schedule", "cosine:2"),
        ("schedule", "power:0"),
        ("schedule", ""),
        ("schedule", [0.5, 0.1]),
        ("schedule", 3),
        ("schedule", [10**400] * 60),
        ("prefix_order", "text"),
    ],
)
def test_bad_values_are_refused_in_one_line(name: str, value: object) -> None:
    with pytest.raises(ParamError) as caught:
        GenerationParams(**{name: value})
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError):
        GenerationParams(stepz=3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 1, "top_k": None, "top_p": 1.0},
        {"schedule": " Cosine "},
        {"schedule": "power:1.5"},
        {"steps": 3, "schedule": [0.9, 0.5, 0.0]},
        {"steps": 2, "schedule": (1, 0)},
        {"seed": 2**64 - 1},
        {"mask_temperature": 0},
        {"strategy": "one_shot"},
        {"strategy": "one_shot", "steps": 4, "schedule": [0]},
    ],
)
def test_good_values(options: dict) -> None:
    GenerationParams(**options)


def test_released_defaults() -> None:
    """spec/lada_band d.1 and spec/mucodec 3.4."""
    params = GenerationParams()
    assert (params.steps, params.top_p, params.top_k, params.temperature) == (60, 0.9, 100, 1.0)
    assert (params.mask_temperature, params.schedule, params.strategy, params.seed) == (
        10.5,
        "cosine",
        "low_confidence",
        13,
    )
    assert (params.flow_steps, params.guidance) == (20, 1.5)
