"""Does a release of the real sizes become a bundle within 16 GB of memory, and do its graphs compute what torch does?

    python bench/full_size.py [--scale full] [--folder DIR] [--out results/DATE-DEVICE-full-size.json]

Writes a synthetic release (12 GB), builds one stage after the other, each in a process of its own so that its peak
memory can be told, and lets ONNX Runtime generate a short song from the bundle. The proof of each stage is the
comparison: a denoiser call at T = 751, one step of a flow window, one mel window, one vocoder block, and so on, against
the float32 torch module on the same random input. Needs 30 GB of disk; everything but the result file is removed
afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from lada_rt.bundle import STAGES, Bundle
from lada_rt.engines.onnxruntime import cpu_count
from lada_rt_export.build import BuildOptions, build_bundle
from lada_rt_export.release import Release
from lada_rt_export.release_modules import ReleaseSource
from lada_rt_export.synthetic_release import write_synthetic_release

#: two rows of the flow and two channels of the mel decoder would pass this; they are left out and named in the result
MEMORY_BYTES = 12 << 30
LIMIT_BYTES = 16 << 30
LIMIT_ERROR = 1e-4


def build_stage(folder: Path, stage: str) -> None:
    """One stage, in this process."""
    checkpoint = next((folder / "release").glob("*.ckpt"))
    source = ReleaseSource(Release.locate(checkpoint, folder / "release" / "pretrained"))
    options = BuildOptions(stages=(stage,), memory_bytes=MEMORY_BYTES)
    build_bundle(folder / "song.bundle", source, options, lambda line: print(line, flush=True))


def measure_stage(folder: Path, stage: str) -> dict[str, Any]:
    """Build a stage in a child process; its log, seconds and peak memory."""
    start = time.monotonic()
    command = [sys.executable, "-P", __file__, "--folder", str(folder), "--stage", stage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = []
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{stage}: the build ended with {child.returncode}")
    sizes = re.findall(r"^  (\w+): module ([\d.]+) s, engine ([\d.]+) s, error ([\d.e+-]+)$", "".join(lines), re.M)
    exported = re.search(r"exported in (\d+) s, ([\d.]+) MB", "".join(lines))
    return {
        "seconds": round(time.monotonic() - start, 1),
        # counts mapped pages of the checkpoint and of the graph's weights, which the system could take back
        "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "export_seconds": int(exported[1]) if exported else None,
        "graph_mb": float(exported[2]) if exported else None,
        "sizes": {
            size: {"torch_fp32_s": float(a), "onnxruntime_s": float(b), "max_rel_error": float(e)}
            for size, a, b, e in sizes
        },
    }


def generate(folder: Path) -> dict[str, Any]:
    """A short song through the whole command, with few steps: that the bundle runs, not how fast."""
    report = folder / "report.json"
    vocal = folder / "vocal.wav"
    _write_tone(vocal)
    command = [
        *(sys.executable, "-P", "-m", "lada_rt.cli", "generate", str(vocal), "-o", str(folder / "out.wav")),
        *("--bundle", str(folder / "song.bundle"), "--steps", "2", "--flow-steps", "1", "--guidance", "1.0"),
        *("--backend", "onnxruntime", "--device", "cpu", "--json", str(report)),
    ]
    start = time.monotonic()
    run = subprocess.run(command, check=False)
    if run.returncode:
        return {"exit_code": run.returncode, "wall_s": round(time.monotonic() - start, 1)}
    data = json.loads(report.read_text())
    return {
        "audio_s": data["duration_s"],
        "wall_s": round(time.monotonic() - start, 1),
        "peak_rss_mb": data["peak_rss_mb"],
        "timings": data["timings"],
    }


def _write_tone(path: Path) -> None:
    import numpy as np
    import soundfile

    t = np.arange(2 * 48_000) / 48_000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 220 * t) * np.sin(np.pi * t / 2), 48_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scale", default="full", choices=("tiny", "mid", "full"))
    parser.add_argument("--folder", type=Path, help="where to work; default: a new temporary folder")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        build_stage(options.folder, options.stage)
        return
    folder = Path(tempfile.mkdtemp(prefix="lada-rt-full-size-", dir=options.folder))
    try:
        result = run(folder, options.scale)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(result, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text)
    if "audio_s" not in result["generate"]:
        raise SystemExit("lada-rt generate failed; see above")
    worst = max(
        size["max_rel_error"]
        for name, s in result["stages"].items()
        if name != "encoder"
        for size in s["sizes"].values()
    )
    peak = max(s["peak_rss_gb"] for s in result["stages"].values())
    if not worst <= LIMIT_ERROR or peak * 1e9 > LIMIT_BYTES:
        raise SystemExit(f"worst error {worst:.1e} of {LIMIT_ERROR}, peak {peak} GB of {LIMIT_BYTES / 1e9:.1f}")


def run(folder: Path, scale: str) -> dict[str, Any]:
    start = time.monotonic()
    release = write_synthetic_release(folder / "release", scale, 1, print)
    written_s = time.monotonic() - start
    stages = {}
    for name in STAGES:
        stages[name] = measure_stage(folder, name)
        print(json.dumps({name: stages[name]}), flush=True)
    bundle = Bundle.open(folder / "song.bundle")
    song = generate(folder)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "what": f"synthetic {scale} release to a bundle of float32 graphs, ONNX Runtime against torch float32",
        "device": f"{platform.processor() or platform.machine()}, {cpu_count()} CPUs, shared with other work",
        "commit": commit.stdout.strip(),
        "versions": {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        "timing": "seconds of a stage include importing torch, reading, both runs of each size, export, hashing",
        "release_gb": round(release.n_bytes / 1e9, 2),
        "write_release_s": round(written_s, 1),
        "bundle_gb": round(sum(f.bytes for f in bundle.all_files()) / 1e9, 2),
        "stages": stages,
        "proofs": {name: dict(entry.proof) for name, entry in bundle.stages.items()},
        "generate": song,
        "total_s": round(time.monotonic() - start, 1),
    }


if __name__ == "__main__":
    main()
