"""The stages in order, resumable at any moment; what `python -m lada_rt_export.demo.train` runs.

Budget of the `demo` preset on a CPU, in processor seconds of one core (AMD EPYC with AVX-512), measured. Two cores take
half of the sum if two stages run side by side: mel_vae beside codec or codes, flow beside predictor.

    songs      320 songs            3 s each                                    0.3 h
    codec      4000 steps           0.29 s                                      0.4 h
    mel_vae    1800 steps           0.6 s, long crops 1.3 s                     0.3 h
    style      800 steps            0.8 s                                       0.2 h
    latents    320 songs            0.3 s                                       0.1 h
    codes      2300 songs           2.8 s, long ones 4.4 s                      2.0 h
    flow       6000 steps           0.38 s, whole windows 0.9 s                 0.7 h
    predictor  9000 steps           0.6 s, whole songs 0.7 s                    1.6 h
    refine     58000 steps          1.0 s                                      16.2 h
    lengthen   3200 steps           1.9 s                                       1.7 h
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lada_rt.errors import EngineError, ExportError, LadaError, ParamError
from torch import nn

from lada_rt_export.build import build_bundle
from lada_rt_export.demo.source import TrainedSource, collect_weights
from lada_rt_export.demo.training.codec import Codec, CodecTask
from lada_rt_export.demo.training.codes import encode_codec_songs, encode_predictor_songs
from lada_rt_export.demo.training.data import CodecSongs, render_codec_songs
from lada_rt_export.demo.training.flow import FlowTask
from lada_rt_export.demo.training.lineage import start_lineage
from lada_rt_export.demo.training.loop import RunOptions, Task, load_weights, train
from lada_rt_export.demo.training.mel_vae import MelVAETask
from lada_rt_export.demo.training.predictor import PredictorSongs, PredictorTask
from lada_rt_export.demo.training.sizes import PRESETS, STAGE_ORDER, TrainingSizes
from lada_rt_export.demo.training.style import StyleTask

__all__ = ["claim", "main", "run_stage", "train_all"]

RUN_FILE = "run.json"
#: exit code of a run that stopped for time: sysexits.h calls it a temporary failure, to be tried again
MORE_TO_DO = 75
#: stage -> the one whose weights it starts from
GOES_ON_FROM = {"refine": "predictor", "lengthen": "refine"}
#: stage -> the one that encodes what it learns from
_ENCODED_BY = {"flow": "latents", "predictor": "codes", "refine": "codes", "lengthen": "codes"}


def claim(sizes: TrainingSizes, options: RunOptions) -> None:
    """Make a folder, which belongs to one preset and seed: its songs and codes are not those of another.

    Raises:
        ParamError: it belongs to another training.
    """
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / RUN_FILE
    wanted = {"preset": sizes.name, "seed": options.seed}
    if path.is_file():
        found = json.loads(path.read_text())
        if found != wanted:
            raise ParamError(f"{options.folder} holds a training of {found}, not of {wanted}; choose another --out")
        return
    # whole at once: two stages may start side by side
    beside = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    beside.write_text(json.dumps(wanted) + "\n")
    os.replace(beside, path)


def _loaded(folder: Path, name: str, module: nn.Module, device: str) -> None:
    load_weights(folder, name, module)
    module.to(device)


def _task(sizes: TrainingSizes, options: RunOptions, stage: str) -> Task:
    folder, device = options.folder, options.device
    # the first weights are drawn from the seed, whatever was trained before in this process
    torch.manual_seed(options.seed * 1000 + STAGE_ORDER.index(stage))
    songs = CodecSongs(sizes, folder / "songs", device)
    if stage == "codec":
        return CodecTask(sizes, songs)
    if stage == "mel_vae":
        return MelVAETask(sizes, songs)
    if stage == "style":
        return StyleTask(sizes, songs, options.seed)
    if stage == "flow":
        codec = Codec(sizes)
        _loaded(folder, "codec", codec, device)
        return FlowTask(sizes, songs, codec.vq)
    long = stage == "lengthen"
    task = PredictorTask(sizes, PredictorSongs(sizes, folder / "predictor", options.seed, device, long=long), stage)
    if stage in GOES_ON_FROM:
        load_weights(folder, GOES_ON_FROM[stage], task.modules)
        task.modules.train().requires_grad_(True)
    return task


def run_stage(sizes: TrainingSizes, options: RunOptions, stage: str, n_workers: int = 1) -> bool:
    """Run or resume one stage of STAGE_ORDER.

    Returns:
        Whether it is finished.

    Raises:
        ParamError: an unknown stage, or a folder of another training.
        ExportError: an earlier stage is missing, or the stage diverged.
        CheckpointError: a checkpoint is damaged.
    """
    if stage not in STAGE_ORDER:
        raise ParamError(f"--stage: expected one of {', '.join(STAGE_ORDER)}, got {stage!r}")
    claim(sizes, options)

    def late() -> bool:
        return options.deadline is not None and time.monotonic() >= options.deadline

    if stage == "songs":
        return render_codec_songs(sizes, options.folder / "songs", options.seed, n_workers, late)
    if not render_codec_songs(sizes, options.folder / "songs", options.seed, n_workers, lambda: True):
        raise ExportError(f"stage {stage} needs the songs, some are missing; run --stage songs first")
    encoded: dict[str, Callable[[Callable[[], bool]], bool]] = {
        "latents": lambda done: encode_codec_songs(sizes, options.folder, n_workers, done),
        "codes": lambda done: encode_predictor_songs(sizes, options.folder, options.seed, n_workers, done),
    }
    if stage in encoded:
        return encoded[stage](late)
    needed = _ENCODED_BY.get(stage)
    if needed is not None and not encoded[needed](lambda: True):
        raise ExportError(f"stage {stage} needs the {needed}, some are missing; run --stage {needed} first")
    start_lineage(sizes, options.folder, stage)
    return train(_task(sizes, options, stage), options)


def train_all(
    sizes: TrainingSizes, options: RunOptions, stages: Sequence[str] = STAGE_ORDER, n_workers: int = 1
) -> bool:
    """Run the stages in order until all are finished or time is up; arguments and errors as for `run_stage`.

    Returns:
        Whether all of them are finished.
    """
    for stage in stages:
        began = time.monotonic()
        finished = run_stage(sizes, options, stage, n_workers)
        options.log(f"{stage}: {'finished' if finished else 'to be continued'}, {time.monotonic() - began:.0f} s")
        if not finished:
            return False
    return True


def _log(line: str) -> None:
    print(line, flush=True)


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineError("--device cuda: no CUDA device was found; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def main(argv: list[str] | None = None, log: Callable[[str], None] = _log) -> int:
    """The command line; returns 0 when everything is finished, 75 when time ran out, else the error's code."""
    parser = argparse.ArgumentParser(prog="python -m lada_rt_export.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of songs, checkpoints and losses")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--stage", action="append", help="one of " + ", ".join(STAGE_ORDER) + "; repeatable, all if absent"
    )
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on from there")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that render songs")
    parser.add_argument("--stop-after", type=int, help="steps to make in each stage at most, to time them")
    parser.add_argument("--bundle", type=Path, help="once trained, build the bundle here")
    args = parser.parse_args(argv)
    try:
        deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
        sizes = PRESETS[args.preset]
        options = RunOptions(
            args.out, args.seed, device=_device(args.device), deadline=deadline, log=log, stop_after=args.stop_after
        )
        finished = train_all(sizes, options, args.stage or STAGE_ORDER, args.workers)
        if args.stage is None and finished:
            path = collect_weights(sizes, args.out, args.seed)
            log(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")
            if args.bundle is not None:
                build_bundle(args.bundle, TrainedSource(path), log=log)
    except LadaError as error:
        log(f"{type(error).__name__}: {error}")
        return error.exit_code
    return 0 if finished else MORE_TO_DO
