"""How much memory a song needs, by its length: does it grow by more than the audio and the denoiser's activations?

    python bench/stream_memory.py [--seconds 60,240,360] [--at-once 1,2,4] [--bundle B] [--json bench/results/FILE.json]

Each length runs in a process of its own: a vocal of that length is streamed with few steps, the chunks are dropped as
a player would. The peak resident set is read and reset at every change of stage, so each stage has its own peak.
Compared between the shortest and the longest song are the peaks of encoding and decoding, less the vocal (the caller's
and the one read).

Then songs of 40 s, several at once in a process of their own: the peak, and what stays resident once all are done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

RATE_HZ = 48_000
LIMIT = 1.2


def peak_mb() -> float:
    """Peak resident set since the last `reset_peak`."""
    return _status_mb("VmHWM")


def resident_mb() -> float:
    return _status_mb("VmRSS")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status_mb(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this bench reads /proc/self/status: run it on Linux")


def measure(seconds: int, bundle: str | None) -> dict[str, Any]:
    """Stream one song in this process."""
    from lada_rt import GenerationParams, Pipeline, Progress

    pipe = Pipeline.load(bundle)
    t = np.arange(seconds * RATE_HZ, dtype=np.float32) / RATE_HZ
    vocal = (0.3 * np.sin(2 * np.pi * 220 * t) * (np.sin(2 * np.pi * 0.5 * t) > 0)).astype(np.float32)
    del t
    loaded_mb = resident_mb()
    reset_peak()
    stage, peaks, resident = "encode", dict[str, float](), dict[str, float]()

    def watch(progress: Progress) -> None:
        nonlocal stage
        name = "decode" if progress.stage in ("flow", "render") else progress.stage
        if name != stage:
            peaks[stage] = max(peaks.get(stage, 0.0), peak_mb())
            resident[name] = resident_mb()
            reset_peak()
            stage = name

    started = time.perf_counter()
    stream = pipe.stream((vocal, RATE_HZ), text="", params=GenerationParams(steps=4, flow_steps=1), on_progress=watch)
    with stream:
        for _ in stream:
            pass
    peaks[stage] = peak_mb()
    assert stream.vocal is not None
    held = stream.vocal.nbytes / 2**20
    return {
        "seconds": seconds,
        "wall_s": round(time.perf_counter() - started, 2),
        "loaded_mb": round(loaded_mb, 1),
        "vocal_mb": round(held, 1),
        "peak_mb": {name: round(value, 1) for name, value in peaks.items()},
        # what the denoiser's arena still holds when the decoder starts, logits and workspace being gone
        "denoiser_kept_mb": round(resident["decode"] - resident["denoise"], 1),
        # the vocal given and the vocal read are the same samples twice, as neither may be changed
        "encode_less_audio_mb": round(peaks["encode"] - 2 * held, 1),
        "decode_less_audio_mb": round(peaks["decode"] - 2 * held, 1),
        "whole_peak_mb": round(max(peaks.values()), 1),
    }


def measure_at_once(n_songs: int, bundle: str | None) -> dict[str, Any]:
    """Generate songs at once in this process."""
    from lada_rt import GenerationParams, Pipeline

    pipe = Pipeline.load(bundle, max_concurrent=n_songs)
    t = np.arange(40 * RATE_HZ, dtype=np.float32) / RATE_HZ
    vocal = (0.3 * np.sin(2 * np.pi * 220 * t)).astype(np.float32)
    loaded_mb = resident_mb()
    params = GenerationParams(steps=4, flow_steps=1)

    def song(_: int) -> None:
        pipe.generate((vocal, RATE_HZ), params=params)

    with ThreadPoolExecutor(n_songs) as pool:
        list(pool.map(song, range(n_songs)))
    return {
        "at_once": n_songs,
        "loaded_mb": round(loaded_mb, 1),
        "peak_mb": round(peak_mb(), 1),
        "idle_mb": round(resident_mb(), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", default="60,240,360")
    parser.add_argument("--at-once", default="1,2,4")
    parser.add_argument("--bundle")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what = {"song": measure, "at-once": measure_at_once}[args.child[0]]
        print(json.dumps(what(int(args.child[1]), args.bundle)))
        return

    def in_a_process(what: str, number: str) -> dict[str, Any]:
        command = [sys.executable, "-P", __file__, "--child", what, number]
        command += ["--bundle", args.bundle] if args.bundle else []
        row: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(json.dumps(row, indent=1))
        return row

    rows = [in_a_process("song", seconds) for seconds in args.seconds.split(",")]
    at_once = [in_a_process("at-once", n) for n in args.at_once.split(",")]
    ratios = {key: round(rows[-1][key] / rows[0][key], 3) for key in ("encode_less_audio_mb", "decode_less_audio_mb")}
    print(ratios)
    if args.json:
        import platform

        import lada_rt
        import onnxruntime

        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        report = {
            "question": __doc__.splitlines()[0],
            "commit": commit,
            "machine": {"processor": platform.processor() or platform.machine(), "system": platform.platform()},
            "versions": {
                "lada_rt": lada_rt.__version__,
                "onnxruntime": onnxruntime.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "bundle": args.bundle or "demo",
            "steps": 4,
            "flow_steps": 1,
            "rows": rows,
            "at_once": at_once,
            "longest_over_shortest": ratios,
            "limit": LIMIT,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if max(ratios.values()) > LIMIT:
        sys.exit(f"memory grows with the song: {ratios}, expected at most {LIMIT}")


if __name__ == "__main__":
    main()
