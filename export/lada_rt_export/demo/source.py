"""Trained networks as the source of a bundle, by way of one small file of weights.

`trained.safetensors` holds every network that inference needs under the key names of the released files, each after the
name of its network, and in its header, as JSON, the sizes' preset, the seed and the losses at the end. Optimizers, the
VAE's encoder, heads and discriminator stay in the training folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lada_rt.condition import CHUNK_SAMPLES
from lada_rt.errors import CheckpointError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from lada_rt_export.bundle_source import BundleHeader
from lada_rt_export.demo.tokenizer import byte_tokenizer
from lada_rt_export.demo.training.codec import Codec
from lada_rt_export.demo.training.flow import FlowModules
from lada_rt_export.demo.training.grains import grain_vocoder
from lada_rt_export.demo.training.lineage import check_lineage
from lada_rt_export.demo.training.loop import load_weights, weights_sha256
from lada_rt_export.demo.training.mel_vae import MelAutoencoder
from lada_rt_export.demo.training.predictor import PredictorModules
from lada_rt_export.demo.training.sizes import PRESETS, TrainingSizes
from lada_rt_export.demo.training.style import StyleModules
from lada_rt_export.models.clamp3 import Clamp3Audio, Clamp3Text
from lada_rt_export.models.flow import Flow
from lada_rt_export.models.latent_norm import LatentNorm
from lada_rt_export.models.mask_predictor import MaskPredictor
from lada_rt_export.models.mel_vae import MelVAE
from lada_rt_export.models.mert import Mert
from lada_rt_export.models.muq import MuQ
from lada_rt_export.models.stages_condition import RefEncoderStage, TextEncoderStage
from lada_rt_export.models.stages_denoiser import DenoiserStage
from lada_rt_export.models.stages_mucodec import EncoderStage, FlowStage, MelDecoderStage, VocoderStage
from lada_rt_export.models.vocoder import Vocoder
from lada_rt_export.models.vq import VQ, condition_linear
from lada_rt_export.stages import StageSizes
from lada_rt_export.stored_halves import exact_half

__all__ = ["DEMO_WEIGHTS", "WEIGHTS_FILE", "TrainedSource", "collect_weights"]

WEIGHTS_FILE = "trained.safetensors"
#: what the embedded bundle is built from
DEMO_WEIGHTS = Path(__file__).parent / WEIGHTS_FILE
#: entry of the file's header
_ABOUT = "training"
_RTD_KEYS = ("rtd_head.weight", "rtd_head.bias")
#: stage -> fields of TrainingSizes that shape its networks
_NETWORKS = {
    "encoder": ("muq", "vq"),
    "text_encoder": ("text",),
    "ref_encoder": ("mert", "audio"),
    "denoiser": ("predictor",),
    "flow": ("flow", "vq"),
    "mel_decoder": ("mel_vae",),
    "vocoder": ("vocoder",),
}
NOTE = (
    "The released architecture at the real rates, scaled down, trained on songs of a procedural generator and on "
    "nothing else: it knows five styles, synthetic voices and their English descriptions."
)
TOY_NOTE = "A test of the training pipeline, trained for a few steps: the output is noise, not music."


def _stored(tensor: Tensor) -> Tensor:
    """In half precision where that loses nothing: parameters were rounded to it, statistics were not."""
    half = exact_half(tensor.numpy()) if tensor.dtype == torch.float32 else None
    return tensor.contiguous().clone() if half is None else torch.from_numpy(half)


def collect_weights(sizes: TrainingSizes, folder: Path, seed: int) -> Path:
    """Write `trained.safetensors` from the finished stages of a training folder.

    Returns:
        Its path.

    Raises:
        ExportError: a stage is not finished, or has learned from other weights than those there now.
        CheckpointError: a checkpoint is damaged.
    """
    codec, mel, style = Codec(sizes), MelAutoencoder(sizes), StyleModules(sizes)
    flow, predictor = FlowModules(sizes), PredictorModules(sizes)
    stages: dict[str, nn.Module] = {
        "codec": codec,
        "mel_vae": mel,
        "style": style,
        "flow": flow,
        "lengthen": predictor,
    }
    for name, module in stages.items():
        load_weights(folder, name, module)
        check_lineage(sizes, folder, name)
    head = predictor.net.to_logits.weight
    head.copy_((head * sizes.logits_gain).half())
    networks: dict[str, nn.Module] = {
        "muq": codec.muq,
        "vq": codec.vq,
        "mel_vae": mel.vae,
        "vocoder": grain_vocoder(sizes.vocoder),
        "clamp3_text": style.text,
        "clamp3_audio": style.audio,
        "mert": style.mert,
        "flow": flow.flow,
        "condition": flow.condition,
        "normfeat": flow.norm,
        "mask_predictor": predictor.net,
    }
    tensors: dict[str, Tensor] = {}
    for name, module in networks.items():
        for key, tensor in module.state_dict().items():
            if not (name == "mask_predictor" and key in _RTD_KEYS):
                tensors[f"{name}.{key}"] = _stored(tensor)
    final = {}
    for name in stages:
        losses = json.loads((folder / f"{name}.losses.json").read_text())
        final[name] = {"steps": losses["steps"], "seconds": losses["seconds"], "last": losses["rows"][-1]}
    path = folder / WEIGHTS_FILE
    # a single entry: safetensors writes several in any order, and equal weights are to be equal files
    about = {"preset": sizes.name, "seed": seed, "losses": final}
    save_file(tensors, path, {_ABOUT: json.dumps(about, sort_keys=True)})
    return path


def _about(text: str) -> dict[str, Any]:
    """The header's entry; empty if it is none of ours."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class TrainedSource:
    """A `BundleSource` over `trained.safetensors`.

    Raises:
        CheckpointError: the file is missing, damaged or of other sizes than its preset.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                about = _about((file.metadata() or {}).get(_ABOUT, ""))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: expected trained weights, could not read them; train them anew") from error
        preset = str(about.get("preset", ""))
        if preset not in PRESETS:
            raise CheckpointError(f"{path.name}: expected a preset of {', '.join(PRESETS)}, got {preset!r}; train anew")
        self.training = PRESETS[preset]
        self.seed = about.get("seed", 0)
        self.tokenizer_json = byte_tokenizer()
        self._modules, norm = self._load(tensors)
        mean, std = norm.frozen_stats()
        self.latent_mean, self.latent_std = mean, std
        training, geometry = self.training, self.training.geometry
        self.sizes = StageSizes(
            geometry=geometry,
            vocab_size=training.predictor.n_codes,
            mask_id=training.predictor.mask_id,
            feature_size=training.text.output_size,
            ref_hidden_size=training.mert.hidden_size,
            ref_chunk_samples=CHUNK_SAMPLES,
            text_vocab_size=Tokenizer.from_str(self.tokenizer_json.decode()).get_vocab_size(),
            max_frames=geometry.n_codes(training.max_seconds * geometry.sample_rate_hz),
        )

    def _load(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, nn.Module], LatentNorm]:
        sizes = self.training
        rng_state = torch.random.get_rng_state()
        muq, vq, condition = MuQ(sizes.muq), VQ(sizes.vq), condition_linear(sizes.vq)
        predictor = MaskPredictor(replace(sizes.predictor, rtd_head=False))
        text, mert, audio = Clamp3Text(sizes.text), Mert(sizes.mert), Clamp3Audio(sizes.audio)
        vae, vocoder, flow = MelVAE(sizes.mel_vae), Vocoder(sizes.vocoder), Flow(sizes.flow)
        norm = LatentNorm(sizes.geometry.latent_channels, sizes.geometry.latent_bins)
        torch.random.set_rng_state(rng_state)
        networks: dict[str, nn.Module] = {
            "muq": muq,
            "vq": vq,
            "condition": condition,
            "mask_predictor": predictor,
            "clamp3_text": text,
            "mert": mert,
            "clamp3_audio": audio,
            "mel_vae": vae,
            "vocoder": vocoder,
            "flow": flow,
            "normfeat": norm,
        }
        for name, network in networks.items():
            own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            try:
                network.load_state_dict(own, strict=True)
            except RuntimeError as error:
                raise CheckpointError(
                    f"{self.path.name}: {name} does not fit preset {sizes.name}; train it anew"
                ) from error
        modules: dict[str, nn.Module] = {
            "encoder": EncoderStage(muq, vq),
            "text_encoder": TextEncoderStage(text),
            "ref_encoder": RefEncoderStage(mert, audio, do_normalize=False),
            "denoiser": DenoiserStage(predictor, sizes.geometry.n_codes(sizes.max_seconds * 48_000) + 2),
            "flow": FlowStage(flow, vq, condition),
            "mel_decoder": MelDecoderStage(vae),
            "vocoder": VocoderStage(vocoder),
        }
        return {name: module.eval().requires_grad_(False) for name, module in modules.items()}, norm

    def header(self, source_hashes: Mapping[Path, str]) -> BundleHeader:
        training = self.training
        return BundleHeader(
            name="lada-rt-demo" if training.sounds else "lada-rt-toy",
            trained=training.sounds,
            note=NOTE if training.sounds else TOY_NOTE,
            geometry=self.sizes.geometry,
            vocab_size=self.sizes.vocab_size,
            mask_id=self.sizes.mask_id,
            prefix_dim=self.sizes.feature_size,
            max_seconds=training.max_seconds,
            ref_chunk_samples=CHUNK_SAMPLES,
            sources=(
                {
                    "name": "songs of lada_rt_export.demo.songs",
                    "seed": self.seed,
                    "preset": training.name,
                    "sha256": source_hashes.get(self.path, ""),
                },
            ),
        )

    def source_files(self, stage: str | None = None) -> tuple[Path, ...]:
        return (self.path,) if stage is None else ()

    def facts(self, stage: str) -> dict[str, Any]:
        """A stage's own weights, for another stage's training must not rebuild it, and all sizes."""
        return {
            "weights": weights_sha256(self._modules[stage]),
            "networks": {name: asdict(getattr(self.training, name)) for name in _NETWORKS[stage]},
            "sizes": asdict(self.sizes),
        }

    def module(self, stage: str) -> nn.Module:
        return copy.deepcopy(self._modules[stage])

    def parameter_bytes(self, stage: str) -> int:
        return sum(p.numel() * p.element_size() for p in self._modules[stage].parameters())
