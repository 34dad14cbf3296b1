"""Write the README's table of numbers from the committed reports of `lada-rt bench --json`, and the demo's musical
figures, in its model card, from that of `lada_rt_export.demo.evaluate`.

    python bench/readme_table.py            # rewrite the text between the markers
    python bench/readme_table.py --check    # exit 1 if it is not what the reports say

Of reports with one name but for the date, the newest counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from lada_rt.bench.compare import read_report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PATTERN = "*-bench-*.json"
MUSIC_PATTERN = "*-demo-music.json"
CARD = ROOT / "runtime" / "lada_rt" / "DEMO_CARD.md"
HEAD = ("device", "bundle", "precision", "vocal", "steps", "RTF", "TTFA", "peak memory", "eager torch / lada-rt")


def newest(folder: Path, pattern: str = PATTERN) -> list[Path]:
    """Files matching a pattern, for each name without its date the last one, sorted by that name."""
    found = {re.sub(r"^\d{4}-\d\d-\d\d-", "", path.name): path for path in sorted(folder.glob(pattern))}
    return [found[name] for name in sorted(found)]


def device_of(report: dict[str, Any]) -> str:
    machine = report["machine"]
    if report["device"] == "cuda" and machine["gpus"]:
        return machine["gpus"][0].partition(",")[0]
    return f"{machine['cpu']}, {machine['cpus']} CPUs"


def rows_of(report: dict[str, Any], path: Path) -> list[tuple[str, ...]]:
    bundle = report["bundle"]
    name = f"[{bundle['name']}](bench/results/{path.name}){'' if bundle['trained'] else ', untrained'}"
    rows = []
    for row in report["rows"]:
        ratio = f"{row['ratios']['total']:.1f}" if "ratios" in row else ""
        # with the opponent in the same process its networks are counted too
        memory = "" if ratio else f"{row['peak_rss_mb'] / 1000:.1f} GB"
        rows.append(
            (
                device_of(report),
                name,
                report["precision"]["denoiser"],
                f"{row['seconds']:g} s",
                str(row["steps"]),
                f"{row['rtf']:.3f}",
                f"{row['ttfa_s']:.2f} s",
                memory,
                ratio,
            )
        )
    return rows


def table(reports: list[tuple[Path, dict[str, Any]]]) -> str:
    """Markdown: one line for each row of each report, and the conditions."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    for path, report in reports:
        lines += ["| " + " | ".join(row) + " |" for row in rows_of(report, path)]
    runs, flow = (
        " or ".join(map(str, sorted({report["options"][name] for _, report in reports})))
        for name in ("repeat", "flow_steps")
    )
    lines += [
        "",
        "RTF is wall seconds per second of audio, from reading the vocal to the last sample (LaDA-Band, B.3);",
        f"loading, the first run and writing files are not in it. Medians of {runs} runs, {flow} flow steps; no memory",
        "where eager torch, the same weights as plain PyTorch modules, shares the process.",
        "Every configuration is checked against a reference before it is timed, by `lada-rt bench`; the links lead",
        "to the reports.",
    ]
    return "\n".join(lines)


def music_table(report: dict[str, Any]) -> str:
    """Markdown: each musical figure of the generated songs beside those that frame it, and the levels."""
    summary, settings = report["summary"], report["settings"]
    lines = [
        "| | generated | codec | truth | another song's | of the codec's | times another's |",
        "|" + " --- |" * 7,
    ]
    for name, title in (("chord_match", "beats in the right chord"), ("onset_f1", "onset F1, 50 ms")):
        kinds = [_figure(summary[name + kind]) for kind in ("", "_codec", "_truth", "_shuffled")]
        ratios = [_figure(summary[f"{name}_of_{other}"]) for other in ("codec", "shuffled")]
        lines.append("| " + " | ".join([title, *kinds, *ratios]) + " |")
    style = [_figure(summary[f"style_accuracy{kind}"]) for kind in ("", "_codec", "_truth")]
    lines.append("| " + " | ".join(["style heard as asked", *style, "", "", ""]) + " |")
    levels = ", ".join(f"{part} {summary[f'{part}_level_db']:+.1f} dB" for part in ("intro", "interlude"))
    length = "40 to 60" if settings["song_s"] is None else f"{settings['song_s']:g}"
    lines += [
        "",
        f"{settings['n_songs']} unseen songs of {length} s, {settings['steps']} steps, {settings['flow_steps']} flow",
        f"steps; ratios of chords after chance ({report['chord_chance']:.2f}) is taken off, none if no more of",
        "another song's is left than its noise.",
        f"Level where nobody sings, over the truth's: {levels}.",
    ]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def replaced(path: Path, name: str, text: str) -> str:
    """The text of a file with `text` between its markers of a name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{path.name}: expected the markers {begin} and {end}; put them where the table belongs")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--card", type=Path, default=CARD)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the table is out of date")
    args = parser.parse_args(argv)
    reports = [(path, read_report(path)) for path in newest(args.results)]
    if not reports:
        raise SystemExit(f"{args.results}: expected reports named {PATTERN}; write one with: lada-rt bench --json FILE")
    tables = [(args.readme, "table", table(reports))]
    for path in newest(args.results, MUSIC_PATTERN)[-1:]:
        text = music_table(json.loads(path.read_text(encoding="utf-8")))
        tables.append((args.card, "music", text))
    stale = 0
    for path, name, text in tables:
        wanted = replaced(path, name, text)
        if wanted == path.read_text(encoding="utf-8"):
            continue
        stale = 1
        if args.check:
            print(f"{path}: its table is not what {args.results} says; run: make readme-table", file=sys.stderr)
        else:
            path.write_text(wanted, encoding="utf-8")
    print(json.dumps({"tables": [str(path) for path, _, _ in tables], "reports": [path.name for path, _ in reports]}))
    return stale if args.check else 0


if __name__ == "__main__":
    sys.exit(main())
