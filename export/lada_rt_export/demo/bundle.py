"""The demo bundle: every network of the real architecture at the real rates, scaled down, random weights from a fixed
seed.

It shows the runtime at work on a laptop. It is untrained: what comes out is noise that follows the machinery, not
music.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lada_rt.bundle import Bundle
from lada_rt.geometry import CodecGeometry
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

from lada_rt_export.build import BuildOptions, build_bundle
from lada_rt_export.bundle_source import BundleHeader
from lada_rt_export.models.clamp3 import Clamp3Audio, Clamp3AudioConfig, Clamp3Text, Clamp3TextConfig
from lada_rt_export.models.flow import Flow, FlowConfig
from lada_rt_export.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from lada_rt_export.models.mel_vae import MelVAE, MelVAEConfig
from lada_rt_export.models.mert import Mert, MertConfig
from lada_rt_export.models.muq import MuQ, MuQConfig
from lada_rt_export.models.stages_condition import RefEncoderStage, TextEncoderStage
from lada_rt_export.models.stages_denoiser import DenoiserStage
from lada_rt_export.models.stages_mucodec import EncoderStage, FlowStage, MelDecoderStage, VocoderStage
from lada_rt_export.models.vocoder import Vocoder, VocoderConfig
from lada_rt_export.models.vq import VQ, VQConfig, condition_linear
from lada_rt_export.stages import StageSizes

__all__ = ["DemoSource", "build_demo_bundle", "byte_tokenizer", "demo_modules"]

SEED = 2604
MAX_SECONDS = 360
FEATURE_SIZE = 64
REF_CHUNK_SAMPLES = 1_440_000
NOTE = (
    "The real architecture at the real rates, scaled down, with random weights from a fixed seed. "
    "UNTRAINED: the output is noise, not music."
)

MASK_PREDICTOR = MaskPredictorConfig(
    hidden_size=32, n_layers=2, n_heads=2, n_kv_heads=1, intermediate_size=96, condition_size=FEATURE_SIZE
)
MUQ = MuQConfig(conv_dim=8, dim=64, n_layers=2, n_heads=4, ffn_dim=128)
QUANTISER = VQConfig(dim=64, codebook_dim=8)
FLOW = FlowConfig(n_layers=2, n_heads=1, head_dim=48)
MEL_VAE = MelVAEConfig(channels=16, multiples=(1, 1, 1, 2), n_res_blocks=1, norm_groups=8)
VOCODER = VocoderConfig(initial_channels=32)
MERT = MertConfig(
    hidden_size=32, n_layers=2, n_heads=2, intermediate_size=64, conv_channels=(16,) * 7, pos_conv_groups=4
)
TEXT = dict(hidden_size=32, n_layers=2, n_heads=2, intermediate_size=64, output_size=FEATURE_SIZE)
AUDIO = Clamp3AudioConfig(hidden_size=32, n_layers=2, n_heads=2, intermediate_size=64, output_size=FEATURE_SIZE)


def byte_tokenizer() -> bytes:
    """A tokenizer.json over bytes, with XLM-R's special ids: any text has tokens, none is unknown."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet, "<mask>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (*specials, "<mask>")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer.to_str().encode()


def demo_modules(text_vocab_size: int) -> dict[str, nn.Module]:
    """The stages with their random weights, in eval mode. The same on every machine: drawn on the CPU from one seed."""
    rng_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(SEED)
        vq = VQ(QUANTISER)
        text = Clamp3Text(Clamp3TextConfig(vocab_size=text_vocab_size, **TEXT))
        modules: dict[str, nn.Module] = {
            "encoder": EncoderStage(MuQ(MUQ).eval(), vq),
            "text_encoder": TextEncoderStage(text),
            "ref_encoder": RefEncoderStage(Mert(MERT), Clamp3Audio(AUDIO), do_normalize=False),
            "denoiser": DenoiserStage(MaskPredictor(MASK_PREDICTOR)),
            "flow": FlowStage(Flow(FLOW), vq, condition_linear(QUANTISER)),
            "mel_decoder": MelDecoderStage(MelVAE(MEL_VAE)),
            "vocoder": VocoderStage(Vocoder(VOCODER)),
        }
    finally:
        torch.random.set_rng_state(rng_state)
    return {name: module.eval().requires_grad_(False) for name, module in modules.items()}


class DemoSource:
    """The demo's networks as a source of stages. They are small, so all are made at once."""

    def __init__(self) -> None:
        self.tokenizer_json = byte_tokenizer()
        text_vocab_size = Tokenizer.from_str(self.tokenizer_json.decode()).get_vocab_size()
        self._modules = demo_modules(text_vocab_size)
        geometry = CodecGeometry()
        self.sizes = StageSizes(
            geometry=geometry,
            vocab_size=MASK_PREDICTOR.n_codes,
            mask_id=MASK_PREDICTOR.mask_id,
            feature_size=FEATURE_SIZE,
            ref_hidden_size=MERT.hidden_size,
            ref_chunk_samples=REF_CHUNK_SAMPLES,
            text_vocab_size=text_vocab_size,
            max_frames=geometry.n_codes(MAX_SECONDS * geometry.sample_rate_hz),
        )
        shape = (geometry.latent_channels, geometry.latent_bins)
        self.latent_mean, self.latent_std = np.zeros(shape, np.float32), np.ones(shape, np.float32)

    def header(self, source_hashes: Mapping[Path, str]) -> BundleHeader:
        return BundleHeader(
            name="lada-rt-demo",
            trained=False,
            note=NOTE,
            geometry=self.sizes.geometry,
            vocab_size=self.sizes.vocab_size,
            mask_id=self.sizes.mask_id,
            prefix_dim=FEATURE_SIZE,
            max_seconds=MAX_SECONDS,
            ref_chunk_samples=REF_CHUNK_SAMPLES,
            sources=({"name": "random weights", "seed": SEED},),
        )

    def source_files(self, stage: str | None = None) -> tuple[Path, ...]:
        return ()

    def facts(self, stage: str) -> dict[str, Any]:
        """The weights themselves: there is no file whose hash would stand for them."""
        digest = hashlib.sha256()
        for name, tensor in self._modules[stage].state_dict().items():
            digest.update(f"{name} {list(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return {"weights": digest.hexdigest()}

    def module(self, stage: str) -> nn.Module:
        return copy.deepcopy(self._modules[stage])

    def parameter_bytes(self, stage: str) -> int:
        return sum(p.numel() * p.element_size() for p in self._modules[stage].parameters())


def build_demo_bundle(
    out: Path, options: BuildOptions | None = None, log: Callable[[str], None] = lambda line: None
) -> Bundle | None:
    """Build the demo bundle at `out`; see `build_bundle`.

    Raises:
        ExportError: a stage cannot be exported or misses its tolerance, or `out` is something else.
    """
    return build_bundle(out, DemoSource(), options, log)
