"""Which weights a stage, or encoded data, came from: where those were trained anew it is out of date, whatever its
step or its number of files says."""

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

__all__ = ["changed_makers", "check_lineage", "note_makers", "start_lineage"]

#: stage -> the stages whose weights made what it learns from
_MAKERS: Final[Mapping[str, tuple[str, ...]]] = {
    "flow": ("codec", "mel_vae"),
    "predictor": ("codec", "style"),
    "refine": ("codec", "style", "predictor"),
    "lengthen": ("codec", "style", "refine"),
}
_MODULES: Final[Mapping[str, Callable[[TrainingSizes], nn.Module]]] = {
    "codec": Codec,
    "mel_vae": MelAutoencoder,
    "style": StyleModules,
    "predictor": PredictorModules,
    "refine": PredictorModules,
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
    note_makers(_file(folder, stage), _makers(sizes, folder, stage))


def check_lineage(sizes: TrainingSizes, folder: Path, stage: str) -> None:
    """Compare the weights that a stage has learned from with those there now. A checkpoint without a note is let be.

    Raises:
        ExportError: they are others.
        CheckpointError: a maker's checkpoint is damaged.
    """
    path = _file(folder, stage)
    if not path.is_file():
        return
    others = changed_makers(path, _makers(sizes, folder, stage))
    if others:
        raise ExportError(
            f"stage {stage} has learned from another {' and '.join(others)}; remove {stage}.pt and train it anew"
        )


def note_makers(path: Path, makers: Mapping[str, nn.Module]) -> None:
    """Write the hash of each maker's weights."""
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps({name: weights_sha256(module) for name, module in makers.items()}) + "\n")
    os.replace(beside, path)


def changed_makers(path: Path, makers: Mapping[str, nn.Module]) -> list[str]:
    """Names of those whose weights are not the ones that were noted."""
    noted = json.loads(path.read_text())
    return [name for name, module in makers.items() if noted.get(name) != weights_sha256(module)]


def _file(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.made_by.json"


def _makers(sizes: TrainingSizes, folder: Path, stage: str) -> dict[str, nn.Module]:
    """The makers of a stage with their weights as they are shipped."""
    rng_state = torch.random.get_rng_state()  # new modules draw weights, and training's are to be drawn as without us
    try:
        found = {name: _MODULES[name](sizes) for name in _MAKERS[stage]}
    finally:
        torch.random.set_rng_state(rng_state)
    for name, module in found.items():
        load_weights(folder, name, module)
    return found
