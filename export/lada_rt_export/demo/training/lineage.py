"""Which weights a stage learned from: where they were trained anew, a stage is not finished, whatever its step says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch
from lada_rt.errors import ExportError
from torch import nn

from lada_rt_export.demo.training.codec import Codec
from lada_rt_export.demo.training.loop import load_weights, weights_sha256
from lada_rt_export.demo.training.mel_vae import MelAutoencoder
from lada_rt_export.demo.training.predictor import PredictorModules
from lada_rt_export.demo.training.sizes import TrainingSizes
from lada_rt_export.demo.training.style import StyleModules

__all__ = ["check_lineage", "start_lineage"]

#: stage -> the stages whose weights made what it learns from
_MAKERS: Final[Mapping[str, tuple[str, ...]]] = {
    "flow": ("codec", "mel_vae"),
    "predictor": ("codec", "style"),
    "refine": ("codec", "style", "predictor"),
}
_MODULES: Final[Mapping[str, Callable[[TrainingSizes], nn.Module]]] = {
    "codec": Codec,
    "mel_vae": MelAutoencoder,
    "style": StyleModules,
    "predictor": PredictorModules,
}


def start_lineage(sizes: TrainingSizes, folder: Path, stage: str) -> None:
    """Note the makers of a stage that has not begun, and compare those of one that has.

    Raises:
        ExportError: it has learned from other weights than those there now, or a maker is not finished.
        CheckpointError: a maker's checkpoint is damaged.
    """
    if stage not in _MAKERS:
        return
    if (folder / f"{stage}.pt").is_file():
        check_lineage(sizes, folder, stage)
        return
    path = _file(folder, stage)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(_makers(sizes, folder, stage)) + "\n")
    os.replace(beside, path)


def check_lineage(sizes: TrainingSizes, folder: Path, stage: str) -> None:
    """Compare the weights that a stage has learned from with those there now. A checkpoint without a note is let be.

    Raises:
        ExportError: they are others.
        CheckpointError: a maker's checkpoint is damaged.
    """
    path = _file(folder, stage)
    if not path.is_file():
        return
    noted = json.loads(path.read_text())
    others = [name for name, found in _makers(sizes, folder, stage).items() if noted.get(name) != found]
    if others:
        raise ExportError(
            f"stage {stage} has learned from another {' and '.join(others)}; remove {stage}.pt and train it anew"
        )


def _file(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.made_by.json"


def _makers(sizes: TrainingSizes, folder: Path, stage: str) -> dict[str, str]:
    """The hash of each maker's weights as they are shipped."""
    rng_state = torch.random.get_rng_state()  # new modules draw weights, and training's are to be drawn as without us
    try:
        found = {}
        for name in _MAKERS[stage]:
            module = _MODULES[name](sizes)
            load_weights(folder, name, module)
            found[name] = weights_sha256(module)
        return found
    finally:
        torch.random.set_rng_state(rng_state)
