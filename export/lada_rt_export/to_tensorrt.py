"""A stage's graph to a proven TensorRT engine.

The builder and the first runs are in a child process: builders crash, and fused kernels can be silently wrong, so
nothing they make is kept before it has been compared.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from lada_rt.bundle import StageEntry
from lada_rt.engines.cache import EngineKey, this_machine
from lada_rt.errors import EngineError, ExportError

from lada_rt_export.engine_builders import BuiltEngine, EngineJob
from lada_rt_export.proof import Reference, prove, reference
from lada_rt_export.workspace import available_memory

__all__ = ["build", "input_profile"]

PLAN_FILE: Final = "engine.plan"
#: progress is logged this often at most
_LOG_SECONDS: Final = 10.0


def build(job: EngineJob, folder: Path) -> BuiltEngine:
    """Build the plan of one stage and compare it with the float32 module.

    Args:
        job: stage, bundle and options.
        folder: empty, for this stage; the plan is written there.

    Raises:
        EngineError: TensorRT or the GPU is missing, or the child process died.
        ExportError: TensorRT refuses the graph, or the engine misses its tolerance.
    """
    machine = this_machine("tensorrt")
    if machine.backend_version is None or not machine.arch.startswith("sm_"):
        raise EngineError(f"backend tensorrt: expected TensorRT and an NVIDIA GPU, got {machine}; see: lada-rt doctor")
    spec = job.spec()
    stage = job.bundle.stages[job.stage]
    expected = reference(spec, min(available_memory() // 2, job.memory_bytes))
    cases = folder / "cases"
    cases.mkdir()
    for index, case in enumerate(expected.cases):
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in case.inputs.items()}
        np.savez(cases / f"{index}.npz", **arrays)
    later = "later-versions" in job.compatibility
    hardware = "ampere_plus" if "ampere-plus" in job.compatibility else "same_compute_capability"
    timings = folder.parent / f"timings-{machine.backend_version}-{machine.arch}.cache"
    order = {
        "graph": str(job.bundle.file_path(stage.graph)),
        "plan": str(folder / PLAN_FILE),
        "profile": input_profile(stage, spec.profile),
        "timing_cache": str(timings),
        "later_versions": later,
        "hardware": hardware,
        "cases": str(cases),
        "n_cases": len(expected.cases),
    }
    (folder / "job.json").write_text(json.dumps(order), encoding="utf-8")
    _run_child(folder / "job.json", job.stage, job.log)
    proof = prove(spec, expected, _Answers(expected, cases), "plan in TensorRT on the GPU", job.log)
    key = EngineKey(
        stage=job.stage,
        network_sha256=stage.sha256,
        backend="tensorrt",
        backend_version=machine.backend_version,
        arch="sm_80+" if hardware == "ampere_plus" else machine.arch,
        precision=stage.precision,
        profile=spec.profile,
        any_later_version=later,
    )
    return BuiltEngine(key, [folder / PLAN_FILE], proof)


def input_profile(stage: StageEntry, axes: Mapping[str, tuple[int, int, int]]) -> dict[str, list[list[int]]]:
    """Min, opt and max shape of every input, from the profile of its axes."""
    return {
        tensor.name: [[dim if isinstance(dim, int) else axes[dim][which] for dim in tensor.shape] for which in range(3)]
        for tensor in stage.inputs
    }


class _Answers:
    """What the child's engine answered, as an engine."""

    def __init__(self, expected: Reference, folder: Path) -> None:
        self._files = iter([folder / f"{index}.results.npz" for index in range(len(expected.cases))])

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        with np.load(next(self._files), allow_pickle=False) as results:
            return dict(results)


def _run_child(order: Path, stage: str, log: Callable[[str], None]) -> None:
    command = [sys.executable, "-P", "-m", "lada_rt_export.tensorrt_worker", str(order)]
    errors = order.with_name("stderr.txt")
    error = {"error": "", "kind": "ExportError"}
    tail = ""
    logged = time.monotonic()
    with errors.open("wb") as stderr, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as child:
        assert child.stdout is not None
        for line in child.stdout:
            message = _parse(line)
            if "error" in message:
                error = message
            elif "log" in message:
                tail = message["log"]
                log(f"  TensorRT: {tail}")
            elif "phase" in message and time.monotonic() - logged > _LOG_SECONDS:
                logged = time.monotonic()
                log(f"  {stage}: {message['phase']}, step {message['step']} of {message['steps']}")
    if child.returncode == 0:
        return
    if error["error"]:
        raise (EngineError if error["kind"] == "EngineError" else ExportError)(error["error"])
    if child.returncode < 0:
        how = f"was killed by {signal.Signals(-child.returncode).name}"
    else:
        how = f"ended with status {child.returncode}"
    last = tail or _last_line(errors)
    raise EngineError(
        f"{stage}: the process that builds the TensorRT engine {how}{f' after: {last}' if last else ''}; "
        "try another release of TensorRT, or --precision fp32"
    )


def _parse(line: bytes) -> dict[str, Any]:
    """A message of the child; anything else on its stdout comes from a library and is ignored."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
