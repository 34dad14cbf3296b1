"""A release as a source of stages: each stage's module made when it is asked for, so that only one is in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from lada_rt.geometry import CodecGeometry
from torch import nn

from lada_rt_export.bundle_source import BundleHeader
from lada_rt_export.models import latent_norm, vq
from lada_rt_export.models.clamp3 import Clamp3Audio, Clamp3Text
from lada_rt_export.models.flow import Flow
from lada_rt_export.models.mask_predictor import MaskPredictor
from lada_rt_export.models.mel_vae import MelVAE
from lada_rt_export.models.mert import Mert
from lada_rt_export.models.muq import KEY_PREFIX as MUQ_PREFIX
from lada_rt_export.models.muq import MuQ
from lada_rt_export.models.stages_condition import RefEncoderStage, TextEncoderStage
from lada_rt_export.models.stages_denoiser import DenoiserStage
from lada_rt_export.models.stages_mucodec import EncoderStage, FlowStage, MelDecoderStage, VocoderStage
from lada_rt_export.models.vocoder import Vocoder
from lada_rt_export.release import Network, Release
from lada_rt_export.release_agreement import check_codec, check_conditions
from lada_rt_export.stages import StageSizes

__all__ = ["ReleaseSource"]

#: samples of a full reference chunk (spec/clamp3 3.3)
REF_CHUNK_SAMPLES: Final = 1_440_000
#: what `synthetic_release` calls its checkpoint: a bundle made from it must say that it is noise
SYNTHETIC_CHECKPOINT: Final = "lada_band_synthetic.ckpt"
#: condition slots before the frames
PREFIX_SLOTS: Final = 2

#: stage -> the files its weights come from, by the names of `ReleaseFiles`
_FILES: Final[Mapping[str, tuple[str, ...]]] = {
    "encoder": ("muq", "mucodec"),
    "text_encoder": ("clamp3",),
    "ref_encoder": ("mert_config", "mert_preprocessor", "mert_weights", "clamp3"),
    "denoiser": ("checkpoint",),
    "flow": ("mucodec",),
    "mel_decoder": ("audioldm",),
    "vocoder": ("audioldm",),
}


class ReleaseSource:
    """The stages of a located release.

    Raises:
        CheckpointError: a file is damaged, or holds other tensors than expected. All files are looked through here,
            before any work; the tensors' own bytes are read when their stage is built.
    """

    def __init__(self, release: Release, max_seconds: int = 360) -> None:
        self.release = release
        self.max_seconds = max_seconds
        self.geometry = CodecGeometry()
        networks: dict[str, Callable[[], Network[Any]]] = {
            "mask_predictor": release.mask_predictor,
            "muq": release.muq,
            "vq": release.vq,
            "condition": release.condition,
            "flow": release.flow,
            "mel_vae": release.mel_vae,
            "vocoder": release.vocoder,
            "clamp3_text": release.clamp3_text,
            "clamp3_audio": release.clamp3_audio,
            "mert": release.mert,
        }
        check_codec(release.sizes, self.geometry)
        configs = {name: network().config for name, network in networks.items()}
        check_conditions(configs)
        self._configs = {name: asdict(config) for name, config in configs.items()}
        release.resample_kernel()
        release.mert_normalizes()
        self.tokenizer_json = release.tokenizer_json()
        norm = release.latent_norm().build(lambda grid: latent_norm.LatentNorm(*grid))
        self.latent_mean, self.latent_std = norm.frozen_stats()
        denoiser, text, mert = configs["mask_predictor"], configs["clamp3_text"], configs["mert"]
        self.sizes = StageSizes(
            geometry=self.geometry,
            vocab_size=denoiser.n_codes,
            mask_id=denoiser.mask_id,
            feature_size=denoiser.condition_size,
            ref_hidden_size=mert.hidden_size,
            ref_chunk_samples=REF_CHUNK_SAMPLES,
            text_vocab_size=text.vocab_size,
            max_frames=self.geometry.n_codes(max_seconds * self.geometry.sample_rate_hz),
        )

    def header(self, source_hashes: Mapping[Path, str]) -> BundleHeader:
        """The manifest's part that is not about files.

        Args:
            source_hashes: path -> sha256 of every file of `source_files`.
        """
        files = self.release.files
        synthetic = files.checkpoint.name == SYNTHETIC_CHECKPOINT
        return BundleHeader(
            name=files.checkpoint.stem,
            trained=not synthetic,
            note="A synthetic release: random weights, UNTRAINED, the output is noise." if synthetic else "",
            geometry=self.geometry,
            vocab_size=self.sizes.vocab_size,
            mask_id=self.sizes.mask_id,
            prefix_dim=self.sizes.feature_size,
            max_seconds=self.max_seconds,
            ref_chunk_samples=self.sizes.ref_chunk_samples,
            sources=tuple(
                {"name": path.name, "sha256": source_hashes[path], "bytes": path.stat().st_size}
                for path in dict.fromkeys(files.all())
            ),
        )

    def source_files(self, stage: str | None = None) -> tuple[Path, ...]:
        """The files a stage reads, or all files of the release."""
        if stage is None:
            return tuple(dict.fromkeys(self.release.files.all()))
        return tuple(getattr(self.release.files, name) for name in _FILES[stage])

    def facts(self, stage: str) -> dict[str, Any]:
        """What beside its files a stage's graph depends on, as plain data."""
        networks = {
            "encoder": ("muq", "vq"),
            "text_encoder": ("clamp3_text",),
            "ref_encoder": ("mert", "clamp3_audio"),
            "denoiser": ("mask_predictor",),
            "flow": ("flow", "vq"),
            "mel_decoder": ("mel_vae",),
            "vocoder": ("vocoder",),
        }[stage]
        facts: dict[str, Any] = {"sizes": {name: self._configs[name] for name in networks}}
        if stage == "denoiser":
            facts["max_frames"] = self.sizes.max_frames
        return facts

    def module(self, stage: str) -> nn.Module:
        """The stage's module, float32, in eval mode; its weights are views of the files where they can be.

        Raises:
            CheckpointError: a tensor's bytes are damaged.
        """
        return self._makers[stage]().eval().requires_grad_(False)

    def parameter_bytes(self, stage: str) -> int:
        """Bytes of the stage's weights in float32, for estimates before any of them is read."""
        networks: dict[str, tuple[Callable[[], Network[Any]], ...]] = {
            "encoder": (self.release.muq, self.release.vq),
            "text_encoder": (self.release.clamp3_text,),
            "ref_encoder": (self.release.mert, self.release.clamp3_audio),
            "denoiser": (self.release.mask_predictor,),
            "flow": (self.release.flow, self.release.vq),
            "mel_decoder": (self.release.mel_vae,),
            "vocoder": (self.release.vocoder,),
        }
        return sum(4 * t.n_elements for network in networks[stage] for t in network().tensors.values())

    @cached_property
    def _makers(self) -> Mapping[str, Callable[[], nn.Module]]:
        return {
            "encoder": self._encoder,
            "text_encoder": lambda: TextEncoderStage(self.release.clamp3_text().build(Clamp3Text)),
            "ref_encoder": self._ref_encoder,
            "denoiser": self._denoiser,
            "flow": self._flow,
            "mel_decoder": lambda: MelDecoderStage(self.release.mel_vae().build(MelVAE)),
            "vocoder": lambda: VocoderStage(self.release.vocoder().build(Vocoder)),
        }

    def _encoder(self) -> nn.Module:
        network = self.release.muq()
        muq = network.build(MuQ)
        muq.load_constants(
            {name.removeprefix(MUQ_PREFIX): t.torch(widen=True) for name, t in network.constants.items()}
        )
        kernel = self.release.resample_kernel()
        return EncoderStage(muq, self.release.vq().build(vq.VQ), None if kernel is None else kernel.torch(widen=True))

    def _ref_encoder(self) -> nn.Module:
        mert = self.release.mert().build(Mert)
        audio = self.release.clamp3_audio().build(Clamp3Audio)
        return RefEncoderStage(mert, audio, self.release.mert_normalizes())

    def _denoiser(self) -> nn.Module:
        predictor = self.release.mask_predictor().build(MaskPredictor)
        return DenoiserStage(predictor, self.sizes.max_frames + PREFIX_SLOTS)

    def _flow(self) -> nn.Module:
        condition = self.release.condition().build(vq.condition_linear)
        return FlowStage(self.release.flow().build(Flow), self.release.vq().build(vq.VQ), condition)
