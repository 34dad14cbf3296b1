"""The losses of a demo training in one PNG and one JSON.

    python bench/plot_losses.py TRAINING_FOLDER bench/results/losses.png bench/results/losses.json

One panel for each stage, one line for each loss, log scale, a point for the mean of 50 steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(path: Path, stages: list[dict[str, Any]]) -> None:
    n_rows = (len(stages) + 2) // 3
    figure, axes = plt.subplots(n_rows, 3, figsize=(14, 3.8 * n_rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(stages) :]:
        axis.axis("off")
    for axis, stage in zip(axes.flat, stages, strict=False):
        # a loss may have come later than the others
        for name in (name for name in stage["rows"][-1] if name not in ("step", "entropy_bits")):
            rows = [row for row in stage["rows"] if name in row]
            values = [row[name] for row in rows]
            axis.plot(
                [row["step"] for row in rows],
                values,
                label=f"{name} ({values[-1]:.3g})",
                linewidth=2 if name == "loss" else 1,
            )
        axis.set(title=f"{stage['stage']}, {stage['seconds'] / 60:.0f} min", xlabel="step", yscale="log")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of lada_rt_export.demo.train")
    parser.add_argument("png", type=Path)
    parser.add_argument("json", type=Path)
    args = parser.parse_args()
    order = ("codec", "mel_vae", "style", "flow", "predictor", "refine", "lengthen")
    files = [args.folder / f"{name}.losses.json" for name in order]
    stages = [json.loads(file.read_text()) for file in files if file.is_file()]
    if not stages:
        parser.error(f"expected *.losses.json in {args.folder}, found none; name the --out folder of a training")
    run = json.loads((args.folder / "run.json").read_text())
    args.json.write_text(json.dumps({**run, "stages": stages}) + "\n")
    draw(args.png, stages)


if __name__ == "__main__":
    main()
