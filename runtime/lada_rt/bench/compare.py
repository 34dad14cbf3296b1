"""`lada-rt bench --compare`: did anything get slower between two reports?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lada_rt.bench.measure import FORMAT
from lada_rt.errors import ParamError

__all__ = ["RowChange", "compare_reports", "differences", "parse_percent", "read_report"]

#: what two reports should have in common, as (what it is, where it stands)
CONDITIONS = (
    ("machines", ("machine", "cpu")),
    ("CPUs", ("machine", "cpus")),
    ("backends", ("backend",)),
    ("devices", ("device",)),
    ("bundles", ("bundle", "sha256")),
    ("flow steps", ("options", "flow_steps")),
    ("vocals", ("vocal",)),
)


@dataclass(frozen=True, slots=True)
class RowChange:
    """One row of two reports.

    Attributes:
        seconds, steps: which row.
        ratio: RTF of the second report over that of the first; above 1 is slower.
        low, high: the ratio's spread: each report's 20th percentile over the other's 80th, and the reverse.
        stages: ratio of every stage that took more than a hundredth of its run.
    """

    seconds: float
    steps: int
    ratio: float
    low: float
    high: float
    stages: Mapping[str, float]

    def slower_than(self, limit: float) -> bool:
        """Whether the RTF grew by more than the share `limit`."""
        return not self.ratio <= 1 + limit


def parse_percent(text: str) -> float:
    """`10%` or `0.1` to 0.1.

    Raises:
        ParamError: neither, or negative.
    """
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise ParamError(f"--max-regression: expected a share such as 10% or 0.1, got {text!r}")
    return value


def read_report(path: Path) -> dict[str, Any]:
    """Read what `lada-rt bench --json` wrote.

    Raises:
        ParamError: the file cannot be read or is no such report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["format"] != FORMAT:
            raise ValueError(f"its format is {report['format']!r}")
        for row in report["rows"]:
            _ = row["seconds"], row["steps"], row["stages"]
            measured = (row["rtf"], row["percentiles"]["rtf"]["20"], row["percentiles"]["rtf"]["80"])
            if not all(0 < float(value) < math.inf for value in measured):
                raise ValueError(f"its RTF is {measured}")
        return report
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise ParamError(f"{path}: expected a report of lada-rt bench --json, {reason}") from None


def compare_reports(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[RowChange]:
    """Rows that both reports have, in the order of the first.

    Raises:
        ParamError: they have no row in common.
    """
    later = {(row["seconds"], row["steps"]): row for row in after["rows"]}
    changes = []
    for row in before["rows"]:
        other = later.get((row["seconds"], row["steps"]))
        if other is not None:
            changes.append(_change(row, other))
    if not changes:
        raise ParamError(
            "--compare: expected reports with rows in common, got "
            f"{_keys(before['rows'])} and {_keys(after['rows'])}; use the same --steps and --seconds"
        )
    return changes


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Why the rows of two reports may differ beside the program, one line each, and rows that only one of them has."""
    lines = []
    for name, path in CONDITIONS:
        a, b = (_at(report, path) for report in (before, after))
        if a != b:
            lines.append(f"{name} differ: {a} and {b}")
    keys = [{(row["seconds"], row["steps"]): row for row in report["rows"]} for report in (before, after)]
    for only, where in ((keys[0].keys() - keys[1].keys(), "first"), (keys[1].keys() - keys[0].keys(), "second")):
        if only:
            rows = [{"seconds": seconds, "steps": steps} for seconds, steps in sorted(only)]
            lines.append(f"only in the {where} report: {_keys(rows)}")
    return lines


def _at(report: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = report
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> RowChange:
    a, b = before["percentiles"]["rtf"], after["percentiles"]["rtf"]
    whole = sum(before["stages"].values())
    stages = {
        name: after["stages"].get(name, 0.0) / seconds
        for name, seconds in before["stages"].items()
        if seconds > 0.01 * whole
    }
    return RowChange(
        before["seconds"], before["steps"], after["rtf"] / before["rtf"], b["20"] / a["80"], b["80"] / a["20"], stages
    )


def _keys(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{row['seconds']:g} s/{row['steps']} steps" for row in rows) or "none"
