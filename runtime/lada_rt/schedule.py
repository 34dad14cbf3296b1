"""How many positions stay masked after each step, and how strongly noise stirs the choice.

All of it depends only on the number of frames, the number of steps and the schedule, so the whole table is
known before the first network evaluation. Source: spec/lada_band.md d.2 and d.3 (steps 5 and 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lada_rt.errors import ParamError

__all__ = ["Schedule", "mask_counts", "mask_ratios", "parse_schedule", "selection_temperatures"]

_ALIASES = {"cosine": "cosine", "cos": "cosine", "linear": "linear", "lin": "linear"}
_POWER_NAMES = {"sqrt": 0.5, "square": 2.0, "cubic": 3.0}
_POWER_PREFIXES = ("power", "poly", "pow")
_CHOICES = "cosine, linear, sqrt, square, cubic, power:<p> with p > 0, or a list with one ratio per step"
# Explicit ratios may rise by this much between steps before they count as increasing.
_RISE = 1e-8


@dataclass(frozen=True, slots=True)
class Schedule:
    """A parsed schedule: `kind` is cosine, linear, power (with `power`) or ratios (with `ratios`)."""

    kind: str
    power: float | None = None
    ratios: tuple[float, ...] | None = None


def parse_schedule(schedule: str | Sequence[float] | Schedule) -> Schedule:
    """Read a schedule name or an explicit list of ratios.

    Args:
        schedule: a name (trimmed, case ignored), `power:<p>`, or the fraction that stays masked after each
            step; ratios are clamped to [0, 1] and must not increase.

    Raises:
        ParamError: the name is unknown, the power is not a positive number, or the ratios increase or
            are no numbers.

    Source: spec/lada_band.md d.2.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, str):
        return _parse_name(schedule)
    try:
        given = [float(ratio) for ratio in schedule]
    except (TypeError, ValueError):
        raise ParamError(f"expected a schedule, got {schedule!r}; use {_CHOICES}") from None
    if not given or not all(math.isfinite(ratio) for ratio in given):
        raise ParamError(f"expected finite schedule ratios, one per step, got {given}; use numbers in [0, 1]")
    ratios = tuple(min(1.0, max(0.0, ratio)) for ratio in given)
    for i in range(1, len(ratios)):
        if ratios[i] > ratios[i - 1] + _RISE:
            raise ParamError(
                f"expected schedule ratios that never increase, got {ratios[i - 1]} then {ratios[i]} "
                f"at step {i}; sort them in descending order"
            )
    return Schedule("ratios", ratios=ratios)


def _parse_name(given: str) -> Schedule:
    name = given.strip().lower()
    if name in _ALIASES:
        return Schedule(_ALIASES[name])
    if name in _POWER_NAMES:
        return Schedule("power", power=_POWER_NAMES[name])
    head, colon, tail = name.partition(":")
    if colon and head in _POWER_PREFIXES:
        try:
            power = float(tail)
        except ValueError:
            power = math.nan
        if math.isfinite(power) and power > 0:
            return Schedule("power", power=power)
        raise ParamError(f"expected power:<p> with p > 0, got {given!r}; use for example power:2")
    raise ParamError(f"expected a schedule name, got {given!r}; use {_CHOICES}")


def mask_ratios(n_steps: int, schedule: str | Sequence[float] | Schedule = "cosine") -> list[float]:
    """Fraction of the frames that stays masked after each step, in double precision.

    Args:
        n_steps: number of steps, >= 1.
        schedule: see `parse_schedule`; an explicit list needs exactly n_steps ratios.

    Returns:
        n_steps ratios in [0, 1], never increasing.

    Raises:
        ParamError: n_steps < 1, an unusable schedule, or a list of another length.

    Source: spec/lada_band.md d.2.
    """
    _check_steps(n_steps)
    parsed = parse_schedule(schedule)
    if parsed.ratios is not None:
        if len(parsed.ratios) != n_steps:
            raise ParamError(
                f"expected {n_steps} schedule ratios, one per step, got {len(parsed.ratios)}; "
                "change the steps or the list"
            )
        return list(parsed.ratios)
    ratios = []
    for i in range(n_steps):
        u = (i + 1) / n_steps
        if parsed.kind == "cosine":
            ratio = math.cos(u * math.pi / 2)
        elif parsed.kind == "linear":
            ratio = 1.0 - u
        else:
            assert parsed.power is not None
            ratio = (1.0 - u) ** parsed.power
        ratios.append(min(1.0, max(0.0, ratio)))
    return ratios


def mask_counts(n_frames: int, n_steps: int, schedule: str | Sequence[float] | Schedule = "cosine") -> list[int]:
    """Number of positions still masked after each step, starting from n_frames.

    Every step but the last reveals at least one position while it can and leaves at least one masked; with
    more steps than frames the count therefore stalls at 1 until the last step. The last count is the floored
    ratio, 0 for every named schedule; the caller fills what is left with the last step's draws.

    Raises:
        ParamError: n_frames < 1, n_steps < 1, or an unusable schedule.

    Source: spec/lada_band.md d.3 step 5. The product is rounded to float32 before it is floored.
    """
    if isinstance(n_frames, bool) or not isinstance(n_frames, int) or n_frames < 1:
        raise ParamError(f"expected a frame count >= 1, got {n_frames!r}; pass a longer segment")
    counts = []
    masked = n_frames
    for i, ratio in enumerate(mask_ratios(n_steps, schedule)):
        n = math.floor(float(np.float32(ratio * n_frames)))
        if i != n_steps - 1:
            n = max(1, min(masked - 1, n))
        masked = min(masked, max(0, n))
        counts.append(masked)
    return counts


def selection_temperatures(n_steps: int, mask_temperature: float) -> list[float]:
    """Weight of the Gumbel noise in the remask score at each step, annealed to 0.

    Args:
        n_steps: number of steps, >= 1.
        mask_temperature: the weight before annealing, >= 0.

    Raises:
        ParamError: n_steps < 1, or mask_temperature negative or not finite.

    Source: spec/lada_band.md d.3 step 6: double arithmetic on a quotient rounded to float32.
    """
    _check_steps(n_steps)
    if not math.isfinite(mask_temperature) or mask_temperature < 0:
        raise ParamError(f"expected a mask temperature >= 0, got {mask_temperature!r}; use 0 for no noise")
    return [mask_temperature * (1.0 - float(np.float32((i + 1) / n_steps))) for i in range(n_steps)]


def _check_steps(n_steps: int) -> None:
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise ParamError(f"expected at least 1 step, got {n_steps!r}; pass a whole number such as 60")
