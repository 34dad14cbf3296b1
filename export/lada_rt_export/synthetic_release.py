"""Write a complete synthetic release: every file of the released layout, random weights.

    python -m lada_rt_export.synthetic_release DIR --scale tiny|mid|full --seed N

It stands in for the real files wherever the whole of build-engine is to be tried. What it sings is noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from lada_rt.errors import ExportError, LadaError, ParamError

from lada_rt_export.release_files import CLAMP3_FILE, HUB_FOLDERS
from lada_rt_export.release_modules import SYNTHETIC_CHECKPOINT
from lada_rt_export.release_sizes import SIZES_FILE
from lada_rt_export.synthetic_tables import (
    SCALES,
    SyntheticSizes,
    Table,
    audioldm_table,
    clamp3_table,
    mask_predictor_table,
    mert_table,
    mucodec_table,
    muq_table,
)
from lada_rt_export.synthetic_tokenizer import synthetic_tokenizer_json
from lada_rt_export.synthetic_values import tensor_values
from lada_rt_export.synthetic_writer import PlannedTensor, write_torch_zip

__all__ = ["SyntheticRelease", "main", "write_synthetic_release"]

_CONFIG_MODULE: Final = "synthetic_training_config"


@dataclass(frozen=True, slots=True)
class SyntheticRelease:
    """Where a synthetic release was written: what `Release.locate` takes."""

    checkpoint: Path
    pretrained_root: Path
    n_bytes: int


def write_synthetic_release(
    folder: Path, scale: str, seed: int, log: Callable[[str], None] = lambda line: None
) -> SyntheticRelease:
    """Write every file of a release.

    Args:
        folder: where; created if needed, files in it are replaced.
        scale: "tiny" (megabytes), "mid" (a denoiser of 100 M parameters) or "full" (the released sizes, 12 GB).
            Rates, windows, latent grid and the 16384 codes are the released ones at every scale.
        seed: the same seed gives the same bytes.
        log: told one line per file.

    Returns:
        The checkpoint's path, the pretrained root and the total size.

    Raises:
        ParamError: an unknown scale.
        ExportError: not enough free disk space.
    """
    if scale not in SCALES:
        raise ParamError(f"expected a scale of {', '.join(SCALES)}, got {scale!r}; choose one of them")
    sizes = SCALES[scale]
    files = _torch_files(sizes, seed)
    n_bytes = sum(_planned_bytes(structure) for structure in files.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    log(f"{scale}: {n_bytes / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB free")
    # metadata, tokenizer and headers are small
    needed = n_bytes + (64 << 20)
    if free < needed:
        raise ExportError(
            f"{folder}: expected {needed / 1e9:.2f} GB of free space, got {free / 1e9:.2f} GB; "
            "free some, or choose a smaller scale"
        )
    root = folder / "pretrained"
    for name, structure in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _unimportable_config():
            write_torch_zip(path, structure)
        log(f"{path.stat().st_size / 1e6:10.1f} MB  {name}")
    _write_mert_config(root / "MERT-v1-95M", sizes)
    _write_tokenizer(root / "hub" / HUB_FOLDERS[0])
    sizes_path = folder / SIZES_FILE
    if scale == "full":
        sizes_path.unlink(missing_ok=True)
    else:
        _write_json(sizes_path, sizes.sizes.to_json())
    return SyntheticRelease(folder / SYNTHETIC_CHECKPOINT, root, n_bytes)


def _torch_files(sizes: SyntheticSizes, seed: int) -> dict[str, Any]:
    """Relative path -> what torch.save would be given, in the containers of the release."""
    s = sizes.sizes
    plan = partial(_plan, seed=seed)
    frozen = {  # frozen copies that a reader must leave alone: their names contain "model." further in
        "clamp3.model.text_proj.weight": (8, 8),
        "codec_model.model.conv.weight": (4, 4),
        "codec_vae.model.decoder.weight": (4, 4),
        "codec_stft.window": (16,),
    }
    lightning = {
        "epoch": 3,
        "global_step": 40000,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": plan(mask_predictor_table(sizes.denoiser) | frozen),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4, "completed": 3}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_path": "step=40000.ckpt"}},
        "optimizer_states": [{"state": {0: plan({"exp_avg": (8, 8)})}, "param_groups": [{"lr": 1e-5}]}],
        "lr_schedulers": [{"last_epoch": 40000}],
    }
    fairseq = {
        "args": None,
        "cfg": {"_name": None, "model": _TrainingConfig(s.muq.conv_dim, s.muq.dim), "task": {"_name": "mert"}},
        "model": plan(muq_table(s.muq)),
        "criterion": None,
        "optimizer_history": [{"num_updates": 100, "optimizer_name": "FairseqAdam"}],
        "task_state": {},
        "extra_state": {"epoch": 2},
    }
    diffusion = {
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "cond_stage_model.text.weight": (8, 8),
        "logvar": (10,),
    }
    contrastive = {
        "model": plan(clamp3_table(s.clamp3_text, s.clamp3_audio)),
        "optimizer": {"state": {0: plan({"step": (), "exp_avg": (8, 8)})}, "param_groups": [{"lr": 1e-5}]},
        "lr_sched": {"last_epoch": 7},
        "epoch": 7,
        "best_epoch": 7,
        "min_eval_loss": 0.5,
        "modality": "saas",
    }
    return {
        SYNTHETIC_CHECKPOINT: lightning,
        "pretrained/mucodec/mucodec.pt": plan(mucodec_table(s)),
        "pretrained/mucodec/muq.pt": fairseq,
        "pretrained/mucodec/audioldm_48k.pth": {"state_dict": plan(audioldm_table(s) | diffusion)},
        f"pretrained/clamp3/{CLAMP3_FILE}": contrastive,
        "pretrained/MERT-v1-95M/pytorch_model.bin": plan(mert_table(sizes.mert)),
    }


def _plan(table: Table, seed: int) -> dict[str, PlannedTensor]:
    return {
        name: PlannedTensor(
            shape,
            partial(tensor_values, name, shape, seed),
            "int64" if name.endswith("num_batches_tracked") else "float32",
        )
        for name, shape in table.items()
    }


def _planned_bytes(structure: Any) -> int:
    if isinstance(structure, PlannedTensor):
        return structure.n_bytes
    if isinstance(structure, dict):
        return sum(map(_planned_bytes, structure.values()))
    return sum(map(_planned_bytes, structure)) if isinstance(structure, list) else 0


class _TrainingConfig:
    """Stands for the configuration object that the training framework pickles into muq.pt."""

    def __init__(self, conv_dim: int, encoder_dim: int) -> None:
        self.label_rate = 25
        self.n_mels = 128
        self.hop_length = 240
        self.conv_dim = conv_dim
        self.encoder_dim = encoder_dim
        self.is_flash = False
        self.stat_path = "/nowhere/stat.json"


# the name in the file; `_unimportable_config` makes it resolvable while the file is written, and no longer
_TrainingConfig.__module__ = _CONFIG_MODULE
_TrainingConfig.__qualname__ = _TrainingConfig.__name__ = "TrainingConfig"


@contextmanager
def _unimportable_config() -> Iterator[None]:
    module = types.ModuleType(_CONFIG_MODULE)
    module.TrainingConfig = _TrainingConfig  # type: ignore[attr-defined]  # a module made here
    sys.modules[_CONFIG_MODULE] = module
    try:
        yield
    finally:
        del sys.modules[_CONFIG_MODULE]


def _write_mert_config(folder: Path, sizes: SyntheticSizes) -> None:
    m = sizes.mert
    config = {
        "model_type": "mert_model",
        "hidden_size": m.hidden_size,
        "num_hidden_layers": m.n_layers,
        "num_attention_heads": m.n_heads,
        "intermediate_size": m.intermediate_size,
        "conv_dim": m.conv_channels,
        "conv_kernel": m.conv_kernels,
        "conv_stride": m.conv_strides,
        "num_feat_extract_layers": len(m.conv_channels),
        "num_conv_pos_embeddings": m.pos_conv_kernel,
        "num_conv_pos_embedding_groups": m.pos_conv_groups,
        "layer_norm_eps": m.layer_norm_eps,
        "conv_bias": False,
        "feat_extract_norm": "group",
        "feat_extract_activation": "gelu",
        "feat_proj_layer_norm": True,
        "do_stable_layer_norm": False,
        "hidden_act": "gelu",
        "feature_extractor_cqt": False,
        "attention_relax": -1.0,
        "deepnorm": False,
        "sample_rate": 24000,
    }
    _write_json(folder / "config.json", config)
    preprocessor = {"do_normalize": False, "feature_size": 1, "return_attention_mask": True, "sampling_rate": 24000}
    _write_json(folder / "preprocessor_config.json", preprocessor)


def _write_tokenizer(cache: Path) -> None:
    """The hub's cache layout: a revision in refs/main, snapshots whose entries link into blobs/."""
    data = synthetic_tokenizer_json()
    digest = hashlib.sha256(data).hexdigest()
    revision = digest[:40]
    snapshot = cache / "snapshots" / revision
    for folder in (cache / "refs", cache / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (cache / "refs" / "main").write_text(revision, encoding="ascii")
    (cache / "blobs" / digest).write_bytes(data)
    link = snapshot / "tokenizer.json"
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(os.path.join("..", "..", "blobs", digest))
    except OSError:  # file systems without links
        link.write_bytes(data)


def _write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the paths written go to stdout, progress to stderr. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lada_rt_export.synthetic_release",
        description="Write a complete release with random weights, to try build-engine without the real files.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--scale", choices=tuple(SCALES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        made = write_synthetic_release(
            options.folder, options.scale, options.seed, lambda line: print(line, file=sys.stderr)
        )
    except (LadaError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, LadaError) else 1
    print(f"--checkpoint {made.checkpoint} --pretrained-root {made.pretrained_root}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
