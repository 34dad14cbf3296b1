"""What the command line shows and writes: progress bars, summaries, JSON reports."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

import lada_rt
from lada_rt.audio import replaced_file
from lada_rt.bundle import Bundle, TensorEntry
from lada_rt.delivery import Delivery
from lada_rt.files import check_target
from lada_rt.pipeline import Pipeline
from lada_rt.progress import Progress
from lada_rt.results import Result, Song
from lada_rt.torch_loop.memory import MemoryPlan

__all__ = [
    "ProgressBars",
    "check_report_path",
    "peak_rss_mb",
    "print_bundle",
    "print_doctor",
    "print_memory_plans",
    "print_summary",
    "write_json",
    "write_json_report",
]

#: the first audio is promised within this many times encoding, denoising and decoding one window
TTFA_SLACK = 1.1


def check_report_path(path: Path | None, option: str = "--json", *inputs: Path | None) -> None:
    """Refuse a report that cannot be written before any work is done; see `check_target`."""
    if path is not None:
        check_target(path, option, *inputs)


class ProgressBars:
    """One bar for each stage on stderr; does nothing when disabled."""

    def __init__(self, *, enabled: bool) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not enabled,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def update(self, progress: Progress) -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(progress.stage, total=progress.total)
        self._bars.update(self._tasks[progress.stage], completed=progress.step, total=progress.total)


def print_summary(pipeline: Pipeline, result: Result, out: str, n_samples: int, file: TextIO) -> None:
    timings = result.timings
    print(
        f"{n_samples / result.sample_rate:.2f} s of audio in {timings.total_s:.2f} s, RTF {timings.rtf:.3f}, "
        f"TTFA {timings.first_audio_s:.2f} s, seed {result.params.seed}, {pipeline.backend} on {pipeline.device}, "
        f"bundle {pipeline.bundle.name}{'' if pipeline.bundle.trained else ' (untrained)'}",
        file=file,
    )
    print("stdout" if out == "-" else out, file=file)


def write_json_report(
    path: Path, pipeline: Pipeline, song: Song, result: Result, delivery: Delivery, *, out: str, mix: bool
) -> None:
    """The report of one `generate`: inputs, options, bundle, timings and codes."""
    params, timings = result.params, result.timings
    write_json(
        path,
        {
            "lada_rt": lada_rt.__version__,
            "vocal": str(song.vocal),
            "out": out,
            "text": song.text,
            "reference": None if song.reference is None else str(song.reference),
            "mix": mix,
            "seed": params.seed,
            "params": {name: getattr(params, name) for name in params.__dataclass_fields__},
            "bundle": {
                "name": pipeline.bundle.name,
                "path": str(pipeline.bundle.path),
                "sha256": pipeline.bundle.sha256,
                "trained": pipeline.bundle.trained,
            },
            "backend": pipeline.backend,
            "device": pipeline.device,
            "sample_rate_hz": result.sample_rate,
            "duration_s": (delivery.n_samples or 0) / result.sample_rate,
            "rtf": timings.rtf,
            "ttfa_s": timings.first_audio_s,
            "ttfa_limit_s": TTFA_SLACK * (timings.encode_s + timings.denoise_s + timings.first_window_s),
            "timings": timings.to_json(),
            "peak_rss_mb": peak_rss_mb(),
            **delivery.measurements(),
            "warnings": list(result.warnings),
            "codes": result.codes.tolist(),
        },
    )


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, whole or not at all."""
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MB; 0 where the platform does not tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3 / 1.024)


def print_bundle(bundle: Bundle) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(
        f"{bundle.path}: {bundle.name}, {'trained' if bundle.trained else 'UNTRAINED'}",
        highlight=False,
        markup=False,
    )
    if bundle.note:
        console.print(bundle.note, highlight=False, markup=False)
    console.print(
        f"sha256 {bundle.sha256[:16]}, up to {bundle.max_seconds:g} s, vocabulary "
        f"{bundle.vocab_size}, every checksum verified",
        highlight=False,
    )
    table = Table("stage", "MB", "precision", "inputs", "outputs", "error", box=None, header_style="bold")
    for stage in bundle.stages.values():
        table.add_row(
            Text(stage.name),
            f"{stage.bytes / 1e6:.2f}",
            Text(stage.precision),
            _signature(stage.inputs),
            _signature(stage.outputs),
            f"{stage.proof['max_rel_error']:.1e}" if "max_rel_error" in stage.proof else "-",
        )
    console.print(table)


def _signature(tensors: tuple[TensorEntry, ...]) -> Text:
    return Text(", ".join(f"{t.name}[{','.join(map(str, t.shape))}]" for t in tensors))


def print_memory_plans(plans: Mapping[float, MemoryPlan]) -> None:
    """Device memory by length of the song, planned and not measured."""
    if not plans:
        return
    names = [field.name for field in dataclasses.fields(MemoryPlan)]
    table = Table("planned GB on a GPU", *names, box=None, header_style="bold")
    for seconds, plan in plans.items():
        table.add_row(f"{seconds:g} s", *(f"{getattr(plan, name) / 1e9:.2f}" for name in names))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def print_doctor(report: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table("what", "found", "remedy", box=None, header_style="bold")
    for row in report["checks"]:
        table.add_row(*(Text(row[key]) for key in ("what", "found", "remedy")))
    console.print(table)
    console.print("ready to generate" if report["ready"] else "not ready: see the remedies above", highlight=False)
