"""Does a pipeline that runs for long leak memory or threads? Random songs, threads, cancels, slow and lost consumers.

    python bench/soak.py [--runs 300] [--threads 3] [--bundle demo|stub|PATH] [--max-seconds 60] [--json FILE]

Every run draws a length, a way (generate, stream, stream dropped half-way, cancel at a random step, regenerate, batch
of variations) and a seed. The resident set is read between rounds, with nothing in flight; its slope is fitted by least
squares over the second half, when the engines' arenas have seen their largest input. The C library is told to give
freed blocks back at once (MALLOC_MMAP_THRESHOLD_=131072), so that what is resident is what is in use; with
`--allocator default` it keeps some for reuse, and the resident set wanders with the order of the runs.
Results of equal jobs are compared, so a wrong answer under load shows too.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from lada_rt import GenerationCancelled, GenerationParams, Pipeline, Progress, Song

RATE_HZ = 48_000
LIMIT_MB_PER_RUN = 0.1
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "131072"}
FAST = GenerationParams(steps=3, flow_steps=1, guidance=1.0)
WAYS = ("generate", "stream", "drop", "cancel", "regenerate", "variations")


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this bench reads /proc/self/status: run it on Linux")


def open_pipeline(name: str) -> Pipeline:
    if name != "stub":
        return Pipeline.load(None if name == "demo" else name, max_concurrent=2)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import importlib

    pipe: Pipeline = importlib.import_module("stubs").stub_pipeline(
        Path(tempfile.mkdtemp(prefix="lada-soak-")), max_concurrent=2
    )
    return pipe


def vocal_of(seconds: float, seed: int) -> tuple[np.ndarray, int]:
    t = np.arange(int(seconds * RATE_HZ), dtype=np.float32) / RATE_HZ
    return (0.3 * np.sin(2 * np.pi * (200 + 10 * seed) * t)).astype(np.float32), RATE_HZ


def one_run(pipe: Pipeline, rng: np.random.Generator, max_seconds: float) -> str:
    """One random run; returns its way."""
    way = WAYS[rng.integers(len(WAYS))]
    vocal = vocal_of(rng.uniform(0.1, max_seconds), int(rng.integers(5)))
    if way == "generate":
        pipe.generate(vocal, text="soul", params=FAST)
    elif way == "stream":
        for _ in pipe.stream(vocal, params=FAST):
            time.sleep(0.01 * rng.random())
    elif way == "drop":
        stream = pipe.stream(vocal, params=FAST)
        next(stream)
        del stream  # never closed: the collector has to do it
    elif way == "cancel":
        left = int(rng.integers(1, 12))

        def watch(progress: Progress) -> bool:
            nonlocal left
            left -= 1
            return left > 0

        with contextlib.suppress(GenerationCancelled):
            pipe.generate(vocal, params=FAST, on_progress=watch)
    elif way == "regenerate":
        result = pipe.generate(vocal, params=FAST)
        pipe.regenerate(result, 0, result.timings.audio_s * rng.uniform(0.2, 1))
    else:
        for _ in pipe.generate_batch([Song(vocal)], params=FAST, variations=2):
            pass
    return way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--bundle", default="stub")
    parser.add_argument("--max-seconds", type=float, default=60.0)
    parser.add_argument("--allocator", choices=("returning", "default"), default="returning")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.allocator == "returning" and RETURNING.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | RETURNING)
    pipe = open_pipeline(args.bundle)
    probe = vocal_of(1.0, 1)
    expected = pipe.generate(probe, params=FAST).audio
    rng = np.random.default_rng(0)
    ways: dict[str, int] = {}
    errors: list[str] = []
    # Each length that decides the size of a buffer once, largest first, before anything is counted.
    for seconds in (args.max_seconds, args.max_seconds / 2, 0.1):
        pipe.generate(vocal_of(seconds, 0), text="soul", params=FAST)

    done, rss, started, rounds = 0, [], time.perf_counter(), 0
    while done < args.runs:
        n = min(args.threads, args.runs - done)
        seeds = rng.integers(2**32, size=n)

        def work(seed: int) -> None:
            try:
                way = one_run(pipe, np.random.default_rng(seed), args.max_seconds)
                ways[way] = ways.get(way, 0) + 1
            except Exception as error:
                errors.append(repr(error))

        threads = [threading.Thread(target=work, args=(int(seed),)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done += n
        rounds += 1
        gc.collect()
        rss.append((done, resident_mb()))
        if rounds % 20 == 0:
            if not np.array_equal(pipe.generate(probe, params=FAST).audio, expected):
                errors.append(f"after {done} runs the probe's audio differs")
            print(f"{done} runs, {rss[-1][1]:.1f} MB, {threading.active_count()} threads", flush=True)

    left = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    late = np.array(rss[len(rss) // 2 :])
    slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0])
    report = {
        "question": __doc__.splitlines()[0],
        "bundle": args.bundle,
        "runs": done,
        "threads": args.threads,
        "allocator": args.allocator,
        "max_seconds": args.max_seconds,
        "ways": ways,
        "wall_s": round(time.perf_counter() - started, 1),
        "rss_mb": [[n, round(mb, 1)] for n, mb in rss[:: max(1, len(rss) // 40)]],
        "late_range_mb": [round(float(late[:, 1].min()), 1), round(float(late[:, 1].max()), 1)],
        "slope_mb_per_run": round(slope, 4),
        "limit_mb_per_run": LIMIT_MB_PER_RUN,
        "threads_left": left,
        "errors": errors,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "machine": platform.platform(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    print(json.dumps({k: v for k, v in report.items() if k != "rss_mb"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if errors or left or slope > LIMIT_MB_PER_RUN:
        sys.exit("the soak failed")


if __name__ == "__main__":
    main()
