"""One command on a GPU: is every kernel and stage right, how fast is each, how fast is a song, against the public way.

    python bench/gpu_check.py                        # full size, random weights, under nine minutes
    python bench/gpu_check.py --device cpu --tiny    # every line of it, in seconds

Needs torch and triton, and runs from the source tree. The result is a JSON file, written whenever something is found,
so that a run that is cut short leaves it. A section that does not fit into the time left is skipped and named; one that
takes the time of the essential sections after it is interrupted and named.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import signal
import sys
import time
import traceback
import types
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: what hangs in native code is ended from outside this long after the budget
GRACE_S = 25.0
for _name in ("bench", "kernels", "export", "runtime"):
    sys.path.insert(0, str(ROOT / _name))
try:
    from lada_rt import _C  # noqa: F401  only to see whether it is there
except ImportError:
    # Nothing measured here calls the CPU kernels, but modules of the runtime name them when they are imported.
    sys.modules["lada_rt._C"] = types.ModuleType("lada_rt._C")

import torch  # noqa: E402  the tree has to be on the path first
from gpu_models import FULL, TINY  # noqa: E402
from gpu_sections import State  # noqa: E402
from gpu_songs import SECTIONS, Section  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="networks of a few channels, songs of seconds")
    parser.add_argument("--budget-s", type=float, default=500.0, help="start no section that would end after this")
    parser.add_argument("--only", help="names of sections, comma-separated")
    parser.add_argument("--no-compile", action="store_true", help="leave the blocks of denoiser and flow eager")
    parser.add_argument("--json", type=Path, help="default: $OUT/gpu_check.json or bench/results/<date>-<device>.json")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: this torch sees no GPU; use --device cpu --tiny to try the script", file=sys.stderr)
        return 5
    known = [section.name for section in SECTIONS]
    only = args.only.split(",") if args.only else known
    if set(only) - set(known):
        parser.error(f"--only: expected names among {', '.join(known)}, got {args.only}")
    if args.tiny and args.device == "cpu":
        torch.set_num_threads(1)  # threads cost more than they bring at this size
    device = torch.device(args.device)
    state = State(TINY if args.tiny else FULL, device, compile_blocks=not args.no_compile)
    report: dict[str, Any] = {"name": "gpu_check", "tiny": args.tiny, "seconds": {}, "skipped": {}, "failed": {}}
    path = args.json or _default_path(args.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    faulthandler.dump_traceback_later(args.budget_s + GRACE_S, exit=True)
    chosen = [section for section in SECTIONS if section.name in only]
    for index, section in enumerate(chosen):
        left = args.budget_s - (time.monotonic() - start)
        limit_s = _limit(section, chosen[index + 1 :], left)
        # an estimate is rough: what is essential is tried in half of it
        if limit_s < section.estimate_s * (0.5 if section.essential else 1) and not args.tiny:
            report["skipped"][section.name] = f"needs about {section.estimate_s:g} s, {limit_s:.0f} s left for it"
        else:
            _run(section, math.inf if args.tiny else limit_s, state, report, path)
        _write(path, report, state)
    faulthandler.cancel_dump_traceback_later()
    report["total_s"] = round(time.monotonic() - start, 1)
    _write(path, report, state)
    print(summary(report))
    print(f"wrote {path}")
    return 1 if report["failed"] or not report.get("right", True) else 0


def _limit(section: Section, later: list[Section], left_s: float) -> float:
    """Seconds a section may take: what is left, less what the essential ones after it need.

    An essential section gets its own estimate in any case, as far as there is that much time at all.
    """
    spare_s = left_s - sum(other.estimate_s for other in later if other.essential)
    return max(spare_s, min(section.estimate_s, left_s)) if section.essential else spare_s


class TookTooLong(BaseException):
    """A section is at its limit. No `Exception`, which a section may catch and go on."""


def _run(section: Section, limit_s: float, state: State, report: dict[str, Any], path: Path) -> None:
    start = time.monotonic()
    print(f"[{section.name}]", flush=True)

    def partial(found: dict[str, Any]) -> None:
        report[section.name] = found
        _write(path, report, state)

    def interrupt(number: int, frame: Any) -> None:
        raise TookTooLong(f"stopped after {limit_s:.0f} s, its limit")

    state.partial, state.deadline = partial, start + limit_s
    if math.isfinite(limit_s):
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        report[section.name] = section.run(state)
    except (Exception, TookTooLong) as error:
        report["failed"][section.name] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        traceback.print_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    report["seconds"][section.name] = round(time.monotonic() - start, 1)
    report["right"] = state.right and not report["failed"]
    for line in state.take_lines():
        print("  " + line, flush=True)


def _default_path(device: str) -> Path:
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"]) / "gpu_check.json"
    label = torch.cuda.get_device_name().replace(" ", "-").lower() if device == "cuda" else "cpu"
    return ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{label}-gpu-check.json"


def _write(path: Path, report: dict[str, Any], state: State) -> None:
    data = {**report, "machine": state.machine()}
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(_finite(data), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as text: JSON has none."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def summary(report: dict[str, Any]) -> str:
    """The table that is printed last."""
    lines = ["", f"right: {report.get('right')}"]
    for name in ("skipped", "failed"):
        lines += [f"{name}: {section}: {why}" for section, why in report[name].items()]
    for song in report.get("songs", {}).get("runs", []):
        lines.append(
            f"{song['audio_s']:7.2f} s, {song['steps']:2d} steps: {song['total_s']:7.3f} s, RTF {song['rtf']:.4f}, "
            f"TTFA {song['first_audio_s']:.3f} s, peak {song['peak_gb']:.1f} GB"
        )
    baseline = report.get("baseline", {})
    if "rtf" in baseline:
        lines.append(
            f"{baseline['audio_s']:7.2f} s, {baseline['steps']:2d} steps the public way: {baseline['total_s']:.3f} s"
            f"{' (extrapolated)' if baseline['extrapolated'] else ''}, RTF {baseline['rtf']:.4f}"
        )
        if "speedup" in baseline:
            lines.append(f"ours is {baseline['speedup']:.1f} times as fast")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
