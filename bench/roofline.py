"""Floating-point operations and bytes of every stage of a song, and the least time they take on a device.

    python bench/roofline.py --seconds 163.84 --steps 60                       # the released sizes
    python bench/roofline.py --bundle song.bundle --tflops 400 --gbps 3350     # a bundle on a device with these peaks

The model itself is `lada_rt.bench.roofline`, so that `lada-rt bench` has it too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lada_rt.bench.graph_sizes import bundle_sizes
from lada_rt.bench.roofline import ModelSizes, Peaks, floor_seconds, song_work
from lada_rt.bundle import Bundle
from lada_rt.geometry import CodecGeometry


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="sizes of this bundle; default: the released 1B model")
    parser.add_argument("--seconds", type=float, default=163.84)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--flow-steps", type=int, default=20)
    parser.add_argument("--tflops", type=float, default=989.0, help="peak of the device (default: H200 dense bf16)")
    parser.add_argument("--gbps", type=float, default=4800.0, help="memory bandwidth in GB/s")
    args = parser.parse_args(argv)
    geometry, sizes = CodecGeometry(), ModelSizes()
    if args.bundle is not None:
        bundle = Bundle.open(args.bundle)
        geometry, sizes = bundle.geometry, bundle_sizes(bundle)
    peaks = Peaks(args.tflops * 1e12, args.gbps * 1e9)
    work = song_work(
        sizes,
        geometry,
        n_samples=round(args.seconds * geometry.sample_rate_hz),
        n_steps=args.steps,
        flow_steps=args.flow_steps,
        n_tokens=32,
    )
    print(f"{'stage':14}{'TFLOP':>12}{'GB':>10}{'floor s':>12}")
    total = 0.0
    for name, stage in work.items():
        seconds = floor_seconds(stage, peaks)
        total += seconds
        print(f"{name:14}{stage.flops / 1e12:12.4f}{stage.bytes / 1e9:10.3f}{seconds:12.5f}")
    print(f"{'all':14}{sum(w.flops for w in work.values()) / 1e12:12.4f}{'':10}{total:12.5f}")
    print(f"RTF floor {total / args.seconds:.6f} at {args.tflops:g} TFLOP/s and {args.gbps:g} GB/s")


if __name__ == "__main__":
    main()
