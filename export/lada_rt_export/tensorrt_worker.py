"""The child process of to_tensorrt: builds a plan, then runs it on given inputs.

    python -m lada_rt_export.tensorrt_worker JOB.json

Writes one JSON object per line to stdout: {"phase", "step", "steps"}, {"log"} or {"error", "kind"}. A builder that
crashes takes this process with it and no other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from lada_rt.engines.tensorrt import TensorRTEngine
from lada_rt.errors import LadaError

from lada_rt_export.tensorrt_builder import PlanJob, build_plan

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Do the job of the file named by the first argument. Returns 0, or 1 after an {"error"} line."""
    job = json.loads(Path((sys.argv[1:] if argv is None else argv)[0]).read_text(encoding="utf-8"))
    try:
        build_plan(_plan_job(job), _on_phase, _log)
        _run_cases(job)
    except LadaError as error:
        _tell({"error": str(error), "kind": type(error).__name__})
        return 1
    return 0


def _plan_job(job: dict[str, Any]) -> PlanJob:
    return PlanJob(
        graph=Path(job["graph"]),
        plan=Path(job["plan"]),
        profile={name: (tuple(low), tuple(opt), tuple(high)) for name, (low, opt, high) in job["profile"].items()},
        timing_cache=Path(job["timing_cache"]),
        later_versions=job["later_versions"],
        hardware=job["hardware"],
    )


def _run_cases(job: dict[str, Any]) -> None:
    engine = TensorRTEngine(Path(job["plan"]), any_later_version=job["later_versions"], log=_log)
    for index in range(job["n_cases"]):
        with np.load(Path(job["cases"]) / f"{index}.npz", allow_pickle=False) as inputs:
            results = engine.run(**dict(inputs))
        # numpy's stub takes keyword arrays and options by one name
        np.savez(Path(job["cases"]) / f"{index}.results.npz", **results)  # type: ignore[arg-type]


def _on_phase(phase: str, step: int, steps: int) -> bool:
    _tell({"phase": phase, "step": step, "steps": steps})
    return True


def _log(line: str) -> None:
    _tell({"log": line})


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
