"""What the networks of a release must agree on with one another and with the codec's rates, which no shape shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lada_rt.condition import MAX_TOKENS, MIN_CHUNK_SAMPLES
from lada_rt.errors import CheckpointError
from lada_rt.geometry import CodecGeometry

from lada_rt_export.models.mert import MertConfig
from lada_rt_export.models.muq import MuQConfig
from lada_rt_export.release_sizes import SIZES_FILE, ReleaseSizes

__all__ = ["check_codec", "check_conditions"]


def check_codec(sizes: ReleaseSizes, geometry: CodecGeometry) -> None:
    """Compare the codec's networks with its rates and grids, before any of them is made.

    Raises:
        CheckpointError: they disagree; the first disagreement is named.
    """
    flow, mel, vocoder, muq, vq = sizes.flow, sizes.mel_vae, sizes.vocoder, sizes.muq, sizes.vq
    rates = MuQConfig()  # other sizes have the released ones
    finer = 2 ** (len(mel.multiples) - 1)
    _agree(
        {
            "flow.latent_frames": (flow.latent_frames, geometry.window_latents),
            "flow.frequencies": (flow.frequencies, geometry.latent_bins),
            "flow.out_channels": (flow.out_channels, geometry.latent_channels),
            "flow.in_channels": (flow.in_channels, 3 * geometry.latent_channels),
            "vq.condition_dim": (
                vq.condition_dim,
                geometry.latent_channels * geometry.latent_bins // geometry.codes_per_latent,
            ),
            "vq.dim, which is muq.dim,": (vq.dim, muq.dim),
            "muq.sample_rate": (muq.sample_rate, rates.sample_rate),
            "muq.hop_samples": (muq.hop_samples, rates.hop_samples),
            "mel_vae.embed_channels": (2 * mel.embed_channels, geometry.latent_channels),
            "mel_vae.out_channels": (mel.out_channels, 1),
            "frames of a latent by mel_vae.multiples": (finer, geometry.mel_frames_per_latent),
            "bins by mel_vae.multiples": (finer * geometry.latent_bins, geometry.mel_bins),
            "vocoder.n_mels": (vocoder.n_mels, geometry.mel_bins),
            "the product of vocoder.rates": (math.prod(vocoder.rates), geometry.samples_per_mel_frame),
        }
    )


def check_conditions(configs: Mapping[str, Any]) -> None:
    """Compare mask predictor, quantiser and CLaMP 3 with one another.

    Args:
        configs: network name -> configuration.

    Raises:
        CheckpointError: they disagree; the first disagreement is named.
    """
    predictor, text, audio = configs["mask_predictor"], configs["clamp3_text"], configs["clamp3_audio"]
    mert: MertConfig = configs["mert"]
    n_codes = configs["vq"].codebook_size
    _agree(
        {
            "mask_predictor.n_codes": (predictor.n_codes, n_codes),
            "mask_predictor.n_vocal_codes": (predictor.n_vocal_codes, n_codes),
            "clamp3_text.output_size": (text.output_size, predictor.condition_size),
            "clamp3_audio.output_size": (audio.output_size, predictor.condition_size),
            "clamp3_audio.hidden_size, which is MERT's,": (audio.hidden_size, mert.hidden_size),
        }
    )
    # positions count from 2 (spec/clamp3 2)
    if text.max_positions < MAX_TOKENS + 2:
        raise CheckpointError(
            f"{SIZES_FILE}: expected clamp3_text.max_positions to be {MAX_TOKENS + 2} or more, got "
            f"{text.max_positions}; correct the sizes"
        )
    if mert.n_frames(MIN_CHUNK_SAMPLES) < 1:
        raise CheckpointError(
            f"MERT config.json: expected conv_kernel and conv_stride that leave a frame of {MIN_CHUNK_SAMPLES} "
            f"samples, got {mert.conv_kernels} and {mert.conv_strides}; use the MERT-v1-95M folder"
        )


def _agree(pairs: Mapping[str, tuple[int, int]]) -> None:
    for what, (found, wanted) in pairs.items():
        if found != wanted:
            raise CheckpointError(f"{SIZES_FILE}: expected {what} to be {wanted}, got {found}; correct the sizes")
