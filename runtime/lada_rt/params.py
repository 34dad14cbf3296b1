"""Options of one generation, checked once where they enter."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lada_rt.errors import ParamError

__all__ = ["STRATEGIES", "GenerationParams", "check_seconds"]

STRATEGIES = ("low_confidence", "random", "fixed_position", "one_shot")

MAX_STEPS = 10_000
#: finite numbers are at most this; math.isfinite fails on whole numbers beyond it
LARGEST = sys.float_info.max
#: a temperature's inverse must be a finite float32
MIN_TEMPERATURE = 1e-30
#: no time in seconds is larger: products with a sample rate stay numbers
MAX_SECONDS = 1e9


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """Everything that, with the bundle and the inputs, determines the output.

    Defaults are those of the released command line (spec/lada_band d.1, spec/mucodec 3.4).

    Attributes:
        steps: denoiser evaluations, 1..10000. One when strategy is `one_shot`, whatever is given.
        schedule: `cosine`, `linear`, `sqrt`, `square`, `cubic`, `power:<p>`, or `steps` ratios in [0, 1],
            non-increasing; one ratio when strategy is `one_shot`.
        strategy: how positions to remask are chosen: `low_confidence`, `random`, `fixed_position`, `one_shot`.
        top_k: keep the k likeliest tokens (>= 1), or None for no limit.
        top_p: nucleus mass in (0, 1]; 1 is off.
        temperature: of the token draw, 1e-30 to 1e6. It does not move the nucleus.
        mask_temperature: Gumbel noise on the confidence, >= 0, annealed to 0 over the steps.
        flow_steps: Euler steps of the flow decoder, 1..10000.
        guidance: classifier-free guidance of the flow decoder, finite; 1 needs one evaluation per step instead of two.
        seed: 0 <= seed < 2**64. Same bundle, inputs and params give the same bytes on the same backend.
        prefix_order: order of the two condition slots. The released program infers with `ref,text` and trains with
            `text,ref` (spec/clamp3 10, quirk 6).

    Raises:
        ParamError: a value is of the wrong type or out of range.
    """

    steps: int = 60
    schedule: str | tuple[float, ...] = "cosine"
    strategy: str = "low_confidence"
    top_k: int | None = 100
    top_p: float = 0.9
    temperature: float = 1.0
    mask_temperature: float = 10.5
    flow_steps: int = 20
    guidance: float = 1.5
    seed: int = 13
    prefix_order: str = "ref,text"

    def __post_init__(self) -> None:
        # here, not above: the command line's help reads the defaults and shall not wait for numpy
        from lada_rt.condition import PREFIX_ORDERS
        from lada_rt.schedule import parse_schedule

        _check_int("steps", self.steps, 1, MAX_STEPS)
        _check_int("flow_steps", self.flow_steps, 1, MAX_STEPS)
        _check_int("seed", self.seed, 0, 2**64 - 1)
        if self.top_k is not None:
            _check_int("top_k", self.top_k, 1, 2**31 - 1, extra=" or None for no limit")
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_float("temperature", self.temperature, MIN_TEMPERATURE, 1e6)
        _check_float("mask_temperature", self.mask_temperature, 0.0, 1e6)
        _check_float("guidance", self.guidance, -1e3, 1e3)
        _check_choice("strategy", self.strategy, STRATEGIES)
        _check_choice("prefix_order", self.prefix_order, PREFIX_ORDERS)
        if not isinstance(self.schedule, str):
            n_ratios = 1 if self.strategy == "one_shot" else self.steps
            object.__setattr__(self, "schedule", _as_ratios(self.schedule, n_ratios))
        parse_schedule(self.schedule)


def _check_int(name: str, value: Any, low: int, high: int, extra: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ParamError(f"{name}: expected an integer from {low} to {high}{extra}, got {value!r}")


def _check_float(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # NaN is not
    if not ok or (open_low and value <= low):
        bound = "above" if open_low else "from"
        raise ParamError(
            f"{name}: expected a number {bound} {low:g} {'up ' if open_low else ''}to {high:g}, got {value!r}"
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ParamError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _as_ratios(value: Any, n_ratios: int) -> tuple[float, ...]:
    if not isinstance(value, Sequence) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= LARGEST for v in value
    ):
        raise ParamError(f"schedule: expected a name or a list of {n_ratios} ratios, got {value!r}")
    if len(value) != n_ratios:
        raise ParamError(f"schedule: expected {n_ratios} ratios, one for each step, got {len(value)}")
    return tuple(float(v) for v in value)


def check_seconds(name: str, value: Any) -> None:
    """Refuse what is no time from 0 to 1e9 s; `name` is the option's.

    Raises:
        ParamError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SECONDS:
        raise ParamError(f"{name}: expected seconds from 0 to {MAX_SECONDS:g}, got {value!r}")
