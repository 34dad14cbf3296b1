"""The `bench` command's work, apart from its options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lada_rt.bench.compare import RowChange, compare_reports, differences, parse_percent, read_report
from lada_rt.bench.learned import LearnedMetrics
from lada_rt.bench.measure import BenchOptions, Opponent, run_bench
from lada_rt.bench.report import check_plot, draw, print_report
from lada_rt.bench.roofline import Peaks
from lada_rt.bundle import Bundle
from lada_rt.errors import ParamError, missing_for_export
from lada_rt.files import check_different
from lada_rt.terminal import check_report_path, write_json

__all__ = ["compare_files", "numbers", "run_command"]


def numbers(option: str, text: str) -> tuple[float, ...]:
    """`8,20,60` to numbers.

    Raises:
        ParamError: not numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ParamError(f"{option}: expected numbers separated by commas, got {text!r}") from None


def run_command(
    *,
    bundle: Path | None,
    steps: str,
    seconds: str,
    repeat: int,
    flow_steps: int,
    seed: int,
    text: str,
    quality: bool,
    fad_model: Path | None,
    fad_rate: int | None,
    fad_reference: Path | None,
    clamp_bundle: Path | None,
    backend: str,
    device: str,
    reference_bundle: Path | None,
    peaks: str | None,
    baseline: bool,
    checkpoint: Path | None,
    pretrained_root: Path | None,
    json_file: Path | None,
    plot: Path | None,
    log: Callable[[str], None],
) -> None:
    """Measure, print, and write what was asked for.

    Raises:
        ParamError: an option cannot be used.
        EngineError: a configuration is wrong, or something to measure with is missing.
    """
    counts = numbers("--steps", steps)
    if not all(n.is_integer() for n in counts):  # NaN and infinity are none
        raise ParamError(f"--steps: expected whole numbers, got {steps!r}")
    options = BenchOptions(
        tuple(int(n) for n in counts),
        numbers("--seconds", seconds),
        repeat,
        flow_steps,
        seed,
        text,
        quality,
        LearnedMetrics(fad_model, fad_rate, fad_reference, clamp_bundle),
    )
    inputs = (fad_model, fad_reference, checkpoint)
    check_report_path(json_file, "--json", *inputs)
    check_report_path(plot, "--plot", *inputs)
    check_different({"--json": json_file, "--plot": plot})
    if plot is not None:
        check_plot()
    rates = None
    if peaks is not None:
        given = numbers("--peaks", peaks)
        if len(given) != 2:
            raise ParamError(f"--peaks: expected TFLOPS,GBPS, got {peaks!r}")
        rates = Peaks(given[0] * 1e12, given[1] * 1e9)
    report = run_bench(
        bundle,
        options,
        backend=backend,
        device=device,
        reference_path=reference_bundle,
        peaks=rates,
        opponent=_baseline(checkpoint, pretrained_root) if baseline else None,
        log=log,
    )
    if json_file is not None:
        write_json(json_file, report)
    print_report(report)
    if plot is not None:
        draw(report, plot)
        print(plot)


def _baseline(checkpoint: Path | None, pretrained_root: Path | None) -> Callable[[Bundle], Opponent]:
    try:
        from lada_rt_export.baseline import Baseline
    except ImportError as error:
        raise missing_for_export("--baseline", error) from None
    return lambda bundle: Baseline.for_bundle(bundle, checkpoint, pretrained_root)


def compare_files(before: Path, after: Path, max_regression: str) -> bool:
    """Print how the rows of two reports differ; True if none is slower by more than `max_regression`.

    Raises:
        ParamError: a file is no report, or they have no row in common.
    """
    limit = parse_percent(max_regression)
    reports = read_report(before), read_report(after)
    changes = compare_reports(*reports)
    _print_changes(changes, limit)
    for line in differences(*reports):
        print(f"note: {line}")
    slower = sum(change.slower_than(limit) for change in changes)
    print(f"{slower} of {len(changes)} rows slower by more than {100 * limit:g} %")
    return slower == 0


def _print_changes(changes: Sequence[RowChange], limit: float) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(box=None, header_style="bold")
    for name in ("length s", "steps", "RTF ratio", "spread", "stages", ""):
        table.add_column(name, justify="left" if name == "stages" else "right")
    for change in changes:
        table.add_row(
            f"{change.seconds:g}",
            str(change.steps),
            f"{change.ratio:.3f}",
            f"{change.low:.3f}-{change.high:.3f}",
            ", ".join(f"{name} {ratio:.2f}" for name, ratio in change.stages.items()),
            "SLOWER" if change.slower_than(limit) else "",
        )
    console.print(table)
