"""Write the README's table of numbers from the committed reports of `lada-rt bench --json`.

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
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEAD = ("device", "bundle", "precision", "vocal", "steps", "RTF", "TTFA", "peak memory", "eager torch / lada-rt")


def newest(folder: Path) -> list[Path]:
    """Files matching PATTERN, for each name without its date the last one, sorted by that name."""
    found = {re.sub(r"^\d{4}-\d\d-\d\d-", "", path.name): path for path in sorted(folder.glob(PATTERN))}
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
    flow = sorted({report["options"]["flow_steps"] for _, report in reports})
    lines += [
        "",
        "RTF is compute seconds per second of audio, from reading the vocal to the last sample (LaDA-Band, B.3);",
        f"loading, the first run and writing files are not in it. Medians; {' or '.join(map(str, flow))} flow steps.",
        "Every configuration is checked against a reference before it is timed, by `lada-rt bench`; the links lead",
        "to the reports.",
    ]
    return "\n".join(lines)


def replaced(readme: str, text: str) -> str:
    """The README with `text` between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md: expected the markers {BEGIN} and {END}; put them where the table belongs")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the table is out of date")
    args = parser.parse_args(argv)
    reports = [(path, read_report(path)) for path in newest(args.results)]
    if not reports:
        raise SystemExit(f"{args.results}: expected reports named {PATTERN}; write one with: lada-rt bench --json FILE")
    readme = args.readme.read_text(encoding="utf-8")
    wanted = replaced(readme, table(reports))
    if args.check:
        if wanted != readme:
            print(f"{args.readme}: its table is not what {args.results} says; run: make readme-table", file=sys.stderr)
        return int(wanted != readme)
    args.readme.write_text(wanted, encoding="utf-8")
    print(json.dumps({"readme": str(args.readme), "reports": [path.name for path, _ in reports]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
