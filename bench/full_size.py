"""Does a release of the real sizes become a bundle within 16 GB of memory, and do its graphs compute what torch does?

    python bench/full_size.py [--scale full] [--folder DIR] [--stages A,B] [--engines cuda] [--json results/FILE.json]

Writes a synthetic release (12 GB), turns it into a bundle with `lada-rt build-engine` and lets `lada-rt generate` make
a short song from it. Each stage is proven by the build itself: a denoiser call at T = 751, one step of a flow window,
one mel window, one vocoder block, and so on, in ONNX Runtime against the float32 torch module on the same random input.

The peak memory of each stage is read between stages from the one process that builds them: all that is resident, which
counts the pages of checkpoint and weights that are mapped files and that the system can take back, and what is not.

With --engines it then compiles the denoiser and the flow in bfloat16, mel decoder and vocoder in float32 as their table
asks, for the torch backend on that device, each proven like the graphs, and lets `generate` use them.

Needs 30 GB of disk, 40 with --engines. With --folder the work stays there, and an interrupted run goes on where it was;
--stages builds only some of them for now. Without, everything but the result file is removed.
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
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import soundfile
import torch
from lada_rt.bundle import STAGES, Bundle
from lada_rt.cpus import cpu_count
from lada_rt.engines.cache import list_engines
from lada_rt.engines.torch import device_key
from lada_rt_export.synthetic_release import write_synthetic_release

LIMIT_GB = 16.0
LIMIT_ERROR = 1e-4
COMPILED = ("denoiser", "flow", "mel_decoder", "vocoder")
POLL_SECONDS = 0.1


@dataclass(slots=True)
class Part:
    """What one stage of a command took."""

    seconds: float = 0.0
    peak_resident_gb: float = 0.0
    #: without the pages of mapped files
    peak_anonymous_gb: float = 0.0
    lines: list[str] = field(default_factory=list)


class Watched:
    """A command whose log is cut into parts by the lines that begin a stage; memory is read for each part."""

    def __init__(self, command: Sequence[str], begins: re.Pattern[str]) -> None:
        self._begins = begins
        self.parts: dict[str, Part] = {"": Part()}
        self._part, self._started = self.parts[""], time.monotonic()
        self._child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def run(self) -> int:
        """Wait for the end; returns the exit code."""
        with self._child, self._sampling():
            assert self._child.stderr is not None
            for line in self._child.stderr:
                print(line, end="", flush=True)
                begun = self._begins.search(line)
                if begun:
                    self._close_part()
                    self._reset_peak()
                    self._part = self.parts[begun[1]] = Part()
                self._part.lines.append(line.rstrip("\n"))
            _, status, usage = os.wait4(self._child.pid, 0)
            self._child.returncode = os.waitstatus_to_exitcode(status)
        self._close_part()
        # the kernel's own figure for the whole process and its children: no peak between two samples is missed
        whole = max(part.peak_resident_gb for part in self.parts.values())
        if usage.ru_maxrss * 1024 / 1e9 > whole + 0.05:
            raise SystemExit(f"a peak of {usage.ru_maxrss * 1024 / 1e9:.2f} GB was not sampled, {whole:.2f} GB were")
        return self._child.returncode

    def _close_part(self) -> None:
        now = time.monotonic()
        self._part.seconds, self._started = now - self._started, now

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        done = threading.Event()

        def sample() -> None:
            while not done.wait(POLL_SECONDS):
                part, status = self._part, self._status()
                part.peak_resident_gb = max(part.peak_resident_gb, status.get("VmHWM", 0.0))
                part.peak_anonymous_gb = max(part.peak_anonymous_gb, status.get("RssAnon", 0.0))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _status(self) -> dict[str, float]:
        """Sizes in GB; nothing once the child is gone."""
        try:
            text = Path(f"/proc/{self._child.pid}/status").read_text()
        except OSError:
            return {}
        return {name: int(kb) * 1024 / 1e9 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}

    def _reset_peak(self) -> None:
        try:
            Path(f"/proc/{self._child.pid}/clear_refs").write_text("5")
        except OSError as error:
            raise SystemExit(
                f"the peak memory of a stage cannot be read here ({error.strerror}): run it on Linux"
            ) from None


def build_command(folder: Path, stages: Sequence[str], memory_gb: float) -> list[str]:
    release = folder / "release"
    return [
        *(sys.executable, "-P", "-m", "lada_rt.cli", "build-engine", "--out", str(folder / "song.bundle")),
        *("--checkpoint", str(next(release.glob("*.ckpt"))), "--pretrained-root", str(release / "pretrained")),
        *("--stages", ",".join(stages), "--memory-gb", str(memory_gb)),
    ]


def build(folder: Path, stages: Sequence[str], memory_gb: float) -> None:
    """`lada-rt build-engine` for some stages; leaves what it took beside the bundle, stage by stage."""
    # hashing the files and looking through them come before the first stage, checksums and renaming after the last
    watched = Watched(build_command(folder, stages, memory_gb), re.compile(r"lada-rt: (\w+) \(\d+ of \d+\): "))
    code = watched.run()
    for name, part in watched.parts.items():
        log = "\n".join(part.lines)
        if f"{name}: " in log and re.search(rf"lada-rt: {name}: [\d.]+ MB, ", log):
            keep(folder, name, {**rounded(part), "memory_gb": memory_gb, **proof_times(log)})
        elif not name:
            keep(folder, f"before_{'_'.join(stages)}", rounded(part))
    if code:
        raise SystemExit(f"build-engine ended with {code}")


def build_compiled(folder: Path, device: str, memory_gb: float) -> None:
    """The same for the torch backend: bfloat16 graphs with their proofs, then what is compiled from the modules."""
    options = ["--backend", "torch", "--device", device, "--precision", "bf16"]
    watched = Watched([*build_command(folder, COMPILED, memory_gb), *options], re.compile(r"(?!)"))
    code = watched.run()
    if code:
        raise SystemExit(f"build-engine ended with {code}")
    keep(folder, f"compiled_{device}", {**rounded(watched.parts[""]), "stages": engine_times(watched.parts[""].lines)})


def engine_times(lines: Sequence[str]) -> dict[str, int]:
    """Seconds that each engine took to be compiled, loaded and proven."""
    found = (re.search(r"lada-rt: (\w+): \w+ engine for .* ([\d.]+) s$", line) for line in lines)
    return {line[1]: int(line[2]) for line in found if line}


def rounded(part: Part) -> dict[str, float]:
    return {name: round(value, 2) for name, value in asdict(part).items() if name != "lines"}


def proof_times(log: str) -> dict[str, Any]:
    exported = re.search(r"exported in (\d+) s, ([\d.]+) MB", log)
    sizes = re.findall(r"  (\w+): module ([\d.]+) s, engine ([\d.]+) s, error ([\d.e+-]+)$", log, re.M)
    return {
        "export_s": int(exported[1]) if exported else None,
        "graph_mb": float(exported[2]) if exported else None,
        "sizes": {
            size: {"torch_fp32_s": float(a), "onnxruntime_s": float(b), "max_rel_error": float(e)}
            for size, a, b, e in sizes
        },
    }


def generate(folder: Path, backend: str, device: str, name: str) -> None:
    """A short song through the whole command, with few steps: that the bundle runs within the memory, not how fast."""
    report = folder / "report.json"
    vocal = folder / "vocal.wav"
    t = np.arange(2 * 48_000) / 48_000
    soundfile.write(vocal, 0.3 * np.sin(2 * np.pi * 220 * t) * np.sin(np.pi * t / 2), 48_000)
    command = [
        *(sys.executable, "-P", "-m", "lada_rt.cli", "generate", str(vocal), "-o", str(folder / "out.wav")),
        *("--bundle", str(folder / "song.bundle"), "--steps", "2", "--flow-steps", "1", "--guidance", "1"),
        *("--backend", backend, "--device", device, "--json", str(report)),
    ]
    watched = Watched(command, re.compile(r"(?!)"))
    code = watched.run()
    if code:
        raise SystemExit(f"generate ended with {code}")
    data = json.loads(report.read_text())
    samples, _ = soundfile.read(folder / "out.wav")
    if not np.isfinite(samples).all() or not samples.any():
        raise SystemExit("generate made silence, or no numbers")
    keep(
        folder,
        name,
        {
            **rounded(watched.parts[""]),
            "audio_s": data["duration_s"],
            "timings": data["timings"],
            **{name: data["params"][name] for name in ("steps", "flow_steps", "guidance")},
        },
    )


def keep(folder: Path, name: str, record: dict[str, Any]) -> None:
    (folder / "parts").mkdir(exist_ok=True)
    (folder / "parts" / f"{name}.json").write_text(json.dumps(record))


def kept(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads((folder / "parts" / f"{name}.json").read_text()))
    except FileNotFoundError:
        return None


def compiled(folder: Path, device: str, memory_gb: float) -> dict[str, Any]:
    """What there is of the torch backend's engines, after doing what is still to be done."""
    if kept(folder, f"compiled_{device}") is None:
        build_compiled(folder, device, memory_gb)
    if kept(folder, f"generate_{device}") is None:
        generate(folder, "torch", device, f"generate_{device}")
    arch = device_key(device)
    entries = [e for e in list_engines(Bundle.open(folder / "song.bundle")) if e.key.arch == arch]
    return {
        "device": device,
        "arch": arch,
        "build": kept(folder, f"compiled_{device}"),
        "engines": {
            entry.key.stage: {
                "precision": entry.key.precision,
                "mb": round(sum(file.bytes for file in entry.files) / 1e6, 1),
                "proof": dict(entry.proof),
            }
            for entry in entries
        },
        "generate": kept(folder, f"generate_{device}"),
    }


def run(
    folder: Path, scale: str, stages: Sequence[str], memory_gb: float, engines: str | None = None
) -> dict[str, Any] | None:
    """Do what is still to be done of `stages`; the result, once there is nothing left."""
    if kept(folder, "release") is None:
        start = time.monotonic()
        release = write_synthetic_release(folder / "release", scale, 1, print)
        seconds = round(time.monotonic() - start, 1)
        keep(folder, "release", {"scale": scale, "gb": round(release.n_bytes / 1e9, 2), "write_s": seconds})
    todo = [name for name in stages if kept(folder, name) is None]
    if todo:
        build(folder, todo, memory_gb)
    if any(kept(folder, name) is None for name in STAGES):
        return None
    if kept(folder, "generate") is None:
        generate(folder, "onnxruntime", "cpu", "generate")
    if kept(folder, "bundle") is None:
        bundle = Bundle.open(folder / "song.bundle")
        proofs = {name: dict(entry.proof) for name, entry in bundle.stages.items()}
        gb = round(sum(f.bytes for f in bundle.all_files()) / 1e9, 2)
        keep(folder, "bundle", {"bundle_gb": gb, "proofs": proofs})
    found = kept(folder, "bundle") or {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    built = {name: kept(folder, name) or {} for name in STAGES}
    parts = {path.stem for path in (folder / "parts").glob("before_*.json")}
    result = {
        "question": __doc__.splitlines()[0] if __doc__ else "",
        "device": f"{platform.processor() or platform.machine()}, {cpu_count()} CPUs",
        "commit": commit.stdout.strip(),
        "versions": {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        "timing": "seconds of a stage hold reading, both runs of each size, export and hashing",
        "release": kept(folder, "release"),
        "bundle_gb": found["bundle_gb"],
        "stages": built,
        "before_stages": {name.removeprefix("before_"): kept(folder, name) for name in sorted(parts)},
        "proofs": found["proofs"],
        "generate": kept(folder, "generate"),
    }
    if engines is not None:
        result["compiled"] = compiled(folder, engines, memory_gb)
    worst = max(proof["max_rel_error"] for name, proof in found["proofs"].items() if name != "encoder")
    peaks = [kept(folder, path.stem) or {} for path in (folder / "parts").glob("*.json")]
    peak_gb = max(record.get("peak_resident_gb", 0.0) for record in peaks)
    summary = {"worst_error": worst, "limit_error": LIMIT_ERROR, "peak_gb": peak_gb, "limit_gb": LIMIT_GB}
    return {**result, **summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scale", default="full", choices=("tiny", "mid", "full"))
    parser.add_argument("--folder", type=Path, help="where to work and leave the bundle; default: a temporary folder")
    parser.add_argument("--stages", default=",".join(STAGES), help="build these for now")
    parser.add_argument("--memory-gb", type=float, default=LIMIT_GB, help="of build-engine: leaves large proofs out")
    parser.add_argument("--engines", choices=("cpu", "cuda"), help="then compile engines of the torch backend there")
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--note", help="a sentence for the result file")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="lada-rt-full-size-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        result = run(folder, options.scale, options.stages.split(","), options.memory_gb, options.engines)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    if result is None:
        print(f"stages are left to build: run it again with --folder {folder}")
        return
    if options.note:
        result = {"note": options.note, **result}
    text = json.dumps(result, indent=1) + "\n"
    if options.json:
        options.json.write_text(text, encoding="utf-8")
    print(text)
    if not result["worst_error"] <= LIMIT_ERROR or result["peak_gb"] > LIMIT_GB:
        raise SystemExit("an error or the memory is over its limit; see above")


if __name__ == "__main__":
    main()
