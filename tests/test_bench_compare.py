"""`lada-rt bench --compare`: ratios with their spread, the exit code, what is refused and what is noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lada_rt import cli
from lada_rt.bench import measure
from lada_rt.bench.command import compare_files
from lada_rt.bench.compare import compare_reports, parse_percent, read_report
from lada_rt.errors import ParamError


def small_report(rtf: float, spread: float = 0.0) -> dict[str, Any]:
    low, high = rtf * (1 - spread), rtf * (1 + spread)
    row = {
        "seconds": 10.0,
        "steps": 8,
        "rtf": rtf,
        "stages": {"flow": rtf * 10},
        "percentiles": {"rtf": {"20": low, "50": rtf, "80": high}},
    }
    return {"format": measure.FORMAT, "rows": [row]}


@pytest.mark.parametrize(
    ("after", "limit", "code"), [(1.05, "10%", 0), (1.2, "10%", 1), (1.2, "0.25", 0), (0.5, "0%", 0)]
)
def test_compare_exits_by_the_limit(
    tmp_path: Path, after: float, limit: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rtf in (("a.json", 1.0), ("b.json", after)):
        (tmp_path / name).write_text(json.dumps(small_report(rtf)))
    args = ["bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--max-regression", limit]
    assert cli.run(args) == code
    assert f"{after:.3f}" in capsys.readouterr().out
    assert compare_files(tmp_path / "a.json", tmp_path / "b.json", limit) == (code == 0)


def test_compare_gives_the_spread() -> None:
    (change,) = compare_reports(small_report(1.0, 0.1), small_report(2.0, 0.05))
    assert change.ratio == 2.0
    assert (change.low, change.high) == (pytest.approx(1.9 / 1.1), pytest.approx(2.1 / 0.9))
    assert change.stages == {"flow": 2.0}


def test_compare_refuses_what_is_no_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good, other = tmp_path / "good.json", tmp_path / "other.json"
    good.write_text(json.dumps(small_report(1.0)))
    for text in ("", "[]", '{"format": "something"}', json.dumps({"format": measure.FORMAT, "rows": [{}]})):
        other.write_text(text)
        with pytest.raises(ParamError, match=r"other\.json: expected a report"):
            read_report(other)
    assert cli.run(["bench", "--compare", str(good), str(tmp_path / "none.json")]) == 2
    assert "expected a report" in capfd.readouterr().err
    away = small_report(1.0)
    away["rows"][0]["steps"] = 9
    with pytest.raises(ParamError, match="rows in common"):
        compare_reports(small_report(1.0), away)


@pytest.mark.parametrize("rtf", [0.0, -1.0, float("nan"), float("inf")])
def test_compare_refuses_an_rtf_that_is_none(tmp_path: Path, rtf: float) -> None:
    (tmp_path / "a.json").write_text(json.dumps(small_report(rtf)))
    with pytest.raises(ParamError, match=r"a\.json: expected a report"):
        read_report(tmp_path / "a.json")


def test_compare_says_what_else_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = small_report(1.0), small_report(1.0)
    before |= {"bundle": {"sha256": "a"}, "options": {"flow_steps": 20}, "device": "cpu"}
    after |= {"bundle": {"sha256": "a"}, "options": {"flow_steps": 8}, "device": "cpu"}
    after["rows"].append({**after["rows"][0], "steps": 9})
    for name, report in (("a.json", before), ("b.json", after)):
        (tmp_path / name).write_text(json.dumps(report))
    assert compare_files(tmp_path / "a.json", tmp_path / "b.json", "10%")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert notes[0] == "note: flow steps differ: 20 and 8"
    assert "only in the second report" in notes[1]
    assert "9 steps" in notes[1]


@pytest.mark.parametrize("text", ["", "x", "-1%", "nan", "1e9"])
def test_bad_limits(text: str) -> None:
    with pytest.raises(ParamError, match="--max-regression"):
        parse_percent(text)
