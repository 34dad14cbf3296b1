"""The report of a bench on the terminal and as a picture. Its JSON form is what `run_bench` returns.

format, what, timed, date, commit, machine, load_average, versions, bundle, precision, backend, device, options
load_s, first_run_s     apart from every row
peaks                   of the device: flops_per_s, bytes_per_s
rows[]                  steps, seconds, audio_s, rtf, ttfa_s, total_s, stages, engines_s, step_s, flow_step_s,
                        peak_rss_mb, cpu_s, percentiles, runs_s, checked, floor, quality
ratios                  with an opponent: its seconds over the runtime's, for every stage and `total`
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from lada_rt.audio import replaced_file
from lada_rt.errors import EngineError

__all__ = ["STAGES", "check_plot", "draw", "print_report"]

#: order and colour of the stages in tables and stacks; of the palette of Okabe and Ito, told apart by the colour-blind
STAGES = {
    "encoder": "#009E73",
    "text_encoder": "#999999",
    "denoiser": "#0072B2",
    "flow": "#E69F00",
    "mel_decoder": "#D55E00",
    "vocoder": "#CC79A7",
}


#: measures that need weights: key in a row's quality -> heading
LEARNED = {"fad": "FAD", "clamp_score": "CLaMP score"}


def print_report(report: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Print the tables of a report."""
    out = file or sys.stdout
    console = Console(file=out, width=None if out.isatty() else 140)

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    bundle = report["bundle"]
    line(
        f"{bundle['name']}{'' if bundle['trained'] else ' (untrained)'}, {report['backend']} on {report['device']}, "
        f"{report['machine']['cpu']} with {report['machine']['cpus']} CPUs, load {report['load_average']['before']}"
    )
    line(f"apart from the rows: loading {report['load_s']:.2f} s, first run {report['first_run_s']:.2f} s")
    table = Table(box=None, header_style="bold")
    for name in ("length s", "steps", "RTF", "20-80 %", "TTFA s", *STAGES, "ms/step", "peak MB", "of floor"):
        table.add_column(name.replace("_", " "), justify="right")
    for row in report["rows"]:
        low, high = (row["percentiles"]["rtf"][q] for q in ("20", "80"))
        table.add_row(
            f"{row['seconds']:g}",
            str(row["steps"]),
            f"{row['rtf']:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{row['ttfa_s']:.2f}",
            *(f"{row['stages'][name]:.3f}" for name in STAGES),
            f"{1e3 * row['step_s']:.1f}",
            f"{row['peak_rss_mb']:.0f}",
            f"{100 * row['floor']['fraction']:.0f} %" if "floor" in row else "-",
        )
    console.print(table)
    line("stages in seconds; of floor: the least time at this machine's measured peaks over the time taken")
    if any(row["stages"]["mel_decoder"] and not row["stages"]["vocoder"] for row in report["rows"]):
        line("the vocoder runs in the mel decoder's loop on the device, without a wait between: its seconds are there")
    if any("quality" in row for row in report["rows"]):
        _print_quality(report, console)
    if "untrained" in report:
        line(f"note: {report['untrained']}")
    if "ratios" in report:
        _print_ratios(report, console)


def _print_quality(report: Mapping[str, Any], console: Console) -> None:
    table = Table(box=None, header_style="bold")
    names = ("length s", "steps", "same tokens", "STFT distance", "chroma to best", "onset F1", "chroma to vocal")
    learned = [n for n in LEARNED if any(n in row.get("quality", {}) for row in report["rows"])]
    for name in (*names, *(LEARNED[n] for n in learned)):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        if "quality" in row:
            best, vocal = row["quality"]["against_reference"], row["quality"]["against_vocal"]
            values = (
                best["token_agreement"],
                best["stft_distance"],
                best["chroma_similarity"],
                vocal["onset_f1"],
                vocal["chroma_similarity"],
                *(row["quality"].get(n) for n in learned),
            )
            table.add_row(f"{row['seconds']:g}", str(row["steps"]), *("-" if v is None else f"{v:.3f}" for v in values))
    console.print(table)
    best_steps = max(report["options"]["steps"])
    console.print(
        f"same tokens, STFT distance, chroma to best: against the run with {best_steps} steps; the other two: against "
        "the vocal",
        highlight=False,
    )
    if any(row["quality"]["against_vocal"]["onset_f1"] is None for row in report["rows"] if "quality" in row):
        console.print("onset F1 needs mir_eval: pip install mir_eval", highlight=False, markup=False)


def _print_ratios(report: Mapping[str, Any], console: Console) -> None:
    table = Table(box=None, header_style="bold")
    names = list(report["ratios"])
    for name in ("length s", "steps", *names):
        table.add_column(name.replace("_", " "), justify="right")
    for row in report["rows"]:
        table.add_row(f"{row['seconds']:g}", str(row["steps"]), *(f"{row['ratios'][name]:.2f}" for name in names))
    table.add_row("all", "", *(f"{report['ratios'][name]:.2f}" for name in names))
    console.print(table)
    console.print(f"seconds of {report['opponent']} over those of lada-rt, run in turn", highlight=False)


def check_plot() -> None:
    """Find out before anything is measured whether a picture can be drawn.

    Raises:
        EngineError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise EngineError(
            '--plot: matplotlib is missing; install it with: pip install "lada-rt[plot]", or leave --plot out'
        )


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw RTF against steps, stacked by stage, a panel for each length.

    Raises:
        EngineError: matplotlib is not installed.
    """
    check_plot()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({row["seconds"] for row in report["rows"]})
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(3.2 + 3.6 * len(lengths), 5.2), sharey=True, squeeze=False)
    top = max(max(row["rtf"], row["percentiles"]["rtf"]["80"]) for row in report["rows"])
    for axis, seconds in zip(axes[0], lengths, strict=True):
        rows = sorted((r for r in report["rows"] if r["seconds"] == seconds), key=lambda r: r["steps"])
        positions = range(len(rows))
        bottom = [0.0] * len(rows)
        for name, colour in STAGES.items():
            shares = [row["rtf"] * row["stages"][name] / sum(row["stages"].values()) for row in rows]
            axis.bar(positions, shares, 0.62, bottom, color=colour, label=name.replace("_", " "))
            bottom = [b + s for b, s in zip(bottom, shares, strict=True)]
        low, high = ([row["percentiles"]["rtf"][q] for row in rows] for q in ("20", "80"))
        middle = [row["rtf"] for row in rows]
        spread = [[max(0.0, m - v) for m, v in zip(middle, low, strict=True)]]
        spread.append([max(0.0, v - m) for m, v in zip(middle, high, strict=True)])
        axis.errorbar(positions, middle, spread, fmt="none", ecolor="black", capsize=4, lw=1)
        for x, value, up in zip(positions, middle, high, strict=True):
            axis.text(x, max(value, up) + 0.015 * top, f"{value:.3f}", ha="center", fontsize=10)
        axis.set_xticks(list(positions), [str(row["steps"]) for row in rows])
        axis.set_xlim(-0.6, len(rows) - 0.4)
        axis.set_title(f"{seconds:g} s of vocal", fontsize=11)
        axis.set_xlabel("denoising steps")
        axis.grid(axis="y", lw=0.4, alpha=0.6)
        axis.set_axisbelow(True)
    axes[0, 0].set_ylim(0, 1.1 * top)
    axes[0, 0].set_ylabel("RTF (wall seconds per second of audio)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="center right", frameon=False)
    bundle, machine = report["bundle"], report["machine"]
    title = (
        f"{bundle['name']}{'' if bundle['trained'] else ' (untrained)'}, {report['backend']} on "
        f"{machine['gpus'][0] if report['device'] == 'cuda' and machine['gpus'] else machine['cpu']}"
        f", {machine['cpus']} CPUs; median of {report['options']['repeat']}, bars 20 to 80 %"
    )
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1 - 1.5 / figure.get_figwidth(), 0.97))
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
