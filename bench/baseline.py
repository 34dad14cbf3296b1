"""Time the way the public program runs a checkpoint: plain eager torch in float32.

    python bench/baseline.py --seconds 10 --steps 8                                      # the demo bundle
    python bench/baseline.py --bundle B --checkpoint C.ckpt --pretrained-root D          # a release and its bundle

What it does is in `lada_rt_export.baseline`; `lada-rt bench --baseline` runs it in turn with the runtime, after
checking on the same noise that both give the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from lada_rt.bench import machine
from lada_rt.bench.measure import BenchOptions, sung_vocal
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.files import check_target
from lada_rt_export.baseline import Baseline


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=demo_bundle_path())
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--pretrained-root", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--flow-steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.json is not None:
        check_target(args.json, "--json")
    bundle = Bundle.open(args.bundle)
    baseline = Baseline.for_bundle(bundle, args.checkpoint, args.pretrained_root)
    rate_hz = bundle.geometry.sample_rate_hz
    options = BenchOptions((args.steps,), (args.seconds,), args.repeat, args.flow_steps)
    vocal, made_by = sung_vocal(args.seconds, options.seed, rate_hz)
    runs = [baseline.run(vocal, rate_hz, options.text, options.params(args.steps)) for _ in range(args.repeat)]
    median = {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
    for name, seconds in median.items():
        print(f"{name:14}{seconds:10.3f} s")
    if args.json is not None:
        report = {
            "what": "eager torch alone",
            "bundle": bundle.name,
            "vocal": made_by,
            "steps": args.steps,
            "seconds": args.seconds,
            "flow_steps": args.flow_steps,
            "median_s": median,
            "runs_s": [run["total"] for run in runs],
            "commit": machine.commit(),
            "machine": machine.describe_machine(),
            "versions": machine.versions(),
            "load_average": machine.load_average(),
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
