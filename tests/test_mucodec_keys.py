"""MuCodec configs: names, shapes and counts of the full-size networks against the released files, refused sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_weights import mel_vae_state, select_weights
from lada_rt.errors import ParamError
from lada_rt_export.models import flow, latent_norm, mel_vae, muq, vocoder, vq
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
KEY_FILE = ROOT / "tests" / "data" / "mucodec_keys.json"
SPEC_KEYS = ROOT.parent / "shared" / "spec" / "mucodec_state_dict.json"


def needed_keys(spec: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    """File -> name -> shape, of what inference needs, out of the full table."""
    return {
        file: {name: e["shape"] for name, e in spec[file]["keys"].items() if e["needed_for_inference"]}
        for file in ("mucodec.pt", "muq.pt", "audioldm_48k.pth")
    }


def released_modules() -> list[tuple[str, str, nn.Module]]:
    """(file, prefix, full-size module without storage)."""
    with torch.device("meta"):
        return [
            ("muq.pt", muq.KEY_PREFIX, muq.MuQ()),
            ("mucodec.pt", vq.KEY_PREFIX, vq.VQ()),
            ("mucodec.pt", vq.CONDITION_KEY_PREFIX, vq.condition_linear(vq.VQConfig())),
            ("mucodec.pt", flow.KEY_PREFIX, flow.Flow()),
            ("mucodec.pt", latent_norm.KEY_PREFIX, latent_norm.LatentNorm()),
            ("audioldm_48k.pth", mel_vae.KEY_PREFIX, mel_vae.MelVAE()),
            ("audioldm_48k.pth", vocoder.KEY_PREFIX, vocoder.Vocoder()),
        ]


def test_released_names_and_shapes() -> None:
    have: dict[str, dict[str, list[int]]] = {"muq.pt": {}, "mucodec.pt": {}, "audioldm_48k.pth": {}}
    for file, prefix, module in released_modules():
        for name, tensor in module.state_dict().items():
            full = name if name == mel_vae.SCALE_FACTOR_KEY else prefix + name
            have[file][full] = list(tensor.shape)
    # constants come from formulas and are read from the file where it has them
    have["mucodec.pt"][muq.RESAMPLE_KERNEL_KEY] = list(muq.resample_kernel().shape)
    config = muq.MuQConfig()
    n_bins = config.n_fft // 2 + 1
    for short, shape in {
        "window": [config.n_fft],
        "filterbank": [n_bins, config.n_mels],
        "inv_freq": [config.dim // config.n_heads // 2],
    }.items():
        have["muq.pt"][muq.KEY_PREFIX + muq.CONSTANT_KEYS[short]] = shape
    assert have == json.loads(KEY_FILE.read_text())


def test_committed_names_are_those_of_the_full_table() -> None:
    if not SPEC_KEYS.is_file():
        pytest.skip("the full table is not beside this checkout; the committed copy is what is tested")
    assert json.loads(KEY_FILE.read_text()) == needed_keys(json.loads(SPEC_KEYS.read_text()))


def test_dead_keys_leave_exactly_the_needed_names() -> None:
    """Whatever else the released files hold is dropped before a strict load."""
    kept = json.loads(KEY_FILE.read_text())
    extra = {
        "muq.pt": [
            "cls_token",
            "linear.weight",
            "quantizer_melspec_2048.codebook",
            "rvq.codebook.weight",
            "conv.conv.0.bn1.num_batches_tracked",
            "conformer.layer_norm.weight",
            "conformer.layers.6.ffn1.output_dense.bias",
            "conformer.layers.11.ffn1.output_dense.bias",
            "conformer.pos_conv_embed.conv.weight_g",
            "conformer.pos_conv_embed.conv.parametrizations.weight.original0",
        ],
        "mucodec.pt": ["stale_counter", "sum_target_x2", "pos_embed.pos_embed"],
        "audioldm_48k.pth": ["encoder.conv_in.weight", "quant_conv.bias"],
    }
    dead = {
        muq.KEY_PREFIX: muq.dead_keys(muq.MuQConfig()),
        vq.KEY_PREFIX: vq.DEAD_KEYS,
        flow.KEY_PREFIX: flow.DEAD_KEYS,
        latent_norm.KEY_PREFIX: latent_norm.DEAD_KEYS,
    }
    one = torch.zeros(())
    for file, prefix, module in released_modules():
        stored = {name: one for name in kept[file]} | {prefix + name: one for name in extra[file]}
        if prefix == mel_vae.KEY_PREFIX:
            state = mel_vae_state(stored)
        elif file == "audioldm_48k.pth" or prefix == vq.CONDITION_KEY_PREFIX:
            state = select_weights({name: one for name in kept[file]}, prefix)
        else:
            own = {prefix + name: one for name in extra[file] if any(re.fullmatch(p, name) for p in dead[prefix])}
            assert own
            state = select_weights({name: one for name in kept[file]} | own, prefix, dead[prefix])
        assert state.keys() == module.state_dict().keys()


def test_parameter_counts() -> None:
    """mucodec spec 8.4."""
    modules = {prefix: module for _, prefix, module in released_modules()}

    def count(*parts: nn.Module) -> int:
        return sum(p.numel() for part in parts for p in part.parameters())

    encoder = modules[muq.KEY_PREFIX]
    assert isinstance(encoder, muq.MuQ)
    assert count(encoder.conv) == 26_233_856
    assert count(encoder.conformer) == 145_053_696
    assert count(modules[vq.KEY_PREFIX], modules[vq.CONDITION_KEY_PREFIX]) == 1_116_736
    assert count(modules[flow.KEY_PREFIX]) == 742_381_328
    assert count(modules[mel_vae.KEY_PREFIX]) == 133_524_241
    assert count(modules[vocoder.KEY_PREFIX]) == 190_281_889


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (muq.MuQConfig, {"dim": 10, "n_heads": 3}),
        (muq.MuQConfig, {"n_layers": -1}),
        (muq.MuQConfig, {"depthwise_kernel": 30}),
        (vq.VQConfig, {"codebook_size": 0}),
        (flow.FlowConfig, {"n_heads": 3, "head_dim": 3}),
        (flow.FlowConfig, {"latent_frames": 511}),
        (mel_vae.MelVAEConfig, {"multiples": ()}),
        (mel_vae.MelVAEConfig, {"channels": 40}),
        (vocoder.VocoderConfig, {"rates": (2,)}),
        (vocoder.VocoderConfig, {"dilations": ((1,),)}),
        (vocoder.VocoderConfig, {"initial_channels": 48}),
    ],
)
def test_impossible_sizes_are_refused(config: Callable[..., object], options: dict[str, Any]) -> None:
    with pytest.raises(ParamError):
        config(**options)
