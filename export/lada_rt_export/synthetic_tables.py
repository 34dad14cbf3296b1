"""Every tensor name and shape of the released files, for any sizes.

Names that a network reads come from the torch modules themselves; the others, which a reader has to ignore, are
written out here. At the released sizes the tables equal those of spec/*_state_dict.json.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from lada_rt_export.models import clamp3, flow, mask_predictor, mel_vae, mert, muq, vocoder, vq
from lada_rt_export.models.latent_norm import KEY_PREFIX as NORM_PREFIX
from lada_rt_export.models.latent_norm import LatentNorm
from lada_rt_export.models.mask_predictor import MaskPredictorConfig
from lada_rt_export.release import shapes_of
from lada_rt_export.release_sizes import ReleaseSizes

__all__ = [
    "SCALES",
    "SyntheticSizes",
    "Table",
    "audioldm_table",
    "clamp3_table",
    "mask_predictor_table",
    "mert_table",
    "mucodec_table",
    "muq_table",
]

Table = dict[str, tuple[int, ...]]

#: rows of the projection and codebook that MuQ's training targets use
_TARGET_ROWS: Final = 4096
_TARGET_WIDTH: Final = 16
#: symbolic music patches: 64 tokens of 128 kinds
_PATCH_SIZE: Final = 64 * 128
_N_SYMBOLIC_POSITIONS: Final = 512


@dataclass(frozen=True, slots=True)
class SyntheticSizes:
    """Sizes of one synthetic release; `sizes.mask_predictor` is never None here."""

    sizes: ReleaseSizes
    mert: mert.MertConfig

    @property
    def denoiser(self) -> MaskPredictorConfig:
        assert self.sizes.mask_predictor is not None
        return self.sizes.mask_predictor


_TINY: Final = SyntheticSizes(
    ReleaseSizes(
        mask_predictor=MaskPredictorConfig(hidden_size=32, n_layers=2, n_heads=4, n_kv_heads=2, intermediate_size=64),
        clamp3_text=clamp3.Clamp3TextConfig(
            vocab_size=512, hidden_size=32, n_layers=2, n_heads=4, intermediate_size=64
        ),
        clamp3_audio=clamp3.Clamp3AudioConfig(hidden_size=32, n_layers=2, n_heads=4, intermediate_size=64),
        muq=muq.MuQConfig(conv_dim=4, dim=32, n_layers=2, n_heads=2, ffn_dim=64),
        vq=vq.VQConfig(dim=32),
        flow=flow.FlowConfig(n_layers=1, n_heads=1, head_dim=16),
        mel_vae=mel_vae.MelVAEConfig(channels=4, multiples=(1, 1, 2, 2), n_res_blocks=1, norm_groups=2),
        vocoder=vocoder.VocoderConfig(initial_channels=32, resblock_kernels=(3, 7), dilations=((1, 3), (1, 3))),
    ),
    mert.MertConfig(
        hidden_size=32, n_layers=2, n_heads=4, intermediate_size=64, conv_channels=(8,) * 7, pos_conv_groups=4
    ),
)
_MID: Final = SyntheticSizes(
    ReleaseSizes(
        mask_predictor=MaskPredictorConfig(
            hidden_size=768, n_layers=12, n_heads=12, n_kv_heads=4, intermediate_size=2048
        ),
        clamp3_text=clamp3.Clamp3TextConfig(
            vocab_size=512, hidden_size=256, n_layers=4, n_heads=4, intermediate_size=1024
        ),
        clamp3_audio=clamp3.Clamp3AudioConfig(hidden_size=256, n_layers=4, n_heads=4, intermediate_size=1024),
        muq=muq.MuQConfig(conv_dim=128, dim=320, n_layers=3, n_heads=5, ffn_dim=1280),
        vq=vq.VQConfig(dim=320),
        flow=flow.FlowConfig(n_layers=8, n_heads=10, head_dim=72),
        mel_vae=mel_vae.MelVAEConfig(channels=32),
        vocoder=vocoder.VocoderConfig(initial_channels=480),
    ),
    mert.MertConfig(hidden_size=256, n_layers=4, n_heads=4, intermediate_size=1024, conv_channels=(128,) * 7),
)
_FULL: Final = SyntheticSizes(ReleaseSizes(mask_predictor=MaskPredictorConfig()), mert.MertConfig())

#: scale name -> sizes. Rates, windows, grids and the code vocabulary are the released ones at every scale.
SCALES: Final = {"tiny": _TINY, "mid": _MID, "full": _FULL}


def _under(prefix: str, table: Table) -> Table:
    return {prefix + name: shape for name, shape in table.items()}


def mask_predictor_table(config: MaskPredictorConfig) -> Table:
    """The `model.` group of the LaDA-Band checkpoint."""
    table = shapes_of(mask_predictor.MaskPredictor, replace(config, rtd_head=True))
    return _under(mask_predictor.KEY_PREFIX, {"lm.embed_tokens.weight": (1, config.hidden_size)} | table)


def mucodec_table(sizes: ReleaseSizes) -> Table:
    """mucodec.pt."""
    grid = (sizes.flow.out_channels, sizes.flow.frequencies)
    norm = shapes_of(lambda size: LatentNorm(*size), grid)
    return {
        "zero_cond_embedding1": (grid[0] * grid[1],),
        **_under(NORM_PREFIX, norm | {"sum_target_x2": grid}),
        "rsp48toclap.kernel": (1, 1, 28),
        "rsq48towav2vec.kernel": (1, 1, 41),
        muq.RESAMPLE_KERNEL_KEY: (1, 1, 28),
        **_under(vq.KEY_PREFIX, {"stale_counter": (sizes.vq.codebook_size,)} | shapes_of(vq.VQ, sizes.vq)),
        **_under(vq.CONDITION_KEY_PREFIX, shapes_of(vq.condition_linear, sizes.vq)),
        **_under(flow.KEY_PREFIX, shapes_of(flow.Flow, sizes.flow)),
    }


def muq_table(config: muq.MuQConfig) -> Table:
    """The `model` entry of muq.pt: twice the conformer layers that are read, as in the release."""
    stored = replace(config, n_layers=2 * config.n_layers, final_norm=True)
    live = shapes_of(muq.MuQ, stored)
    counters: Table = {
        name.removesuffix("running_var") + "num_batches_tracked": () for name in live if name.endswith("running_var")
    }
    dim = config.dim
    return _under(
        muq.KEY_PREFIX,
        {
            "cls_token": (dim,),
            muq.CONSTANT_KEYS["window"]: (config.n_fft,),
            muq.CONSTANT_KEYS["filterbank"]: (config.n_fft // 2 + 1, config.n_mels),
            muq.CONSTANT_KEYS["inv_freq"]: (dim // config.n_heads // 2,),
            "quantizer_melspec_2048.random_projection": (4 * config.n_mels, _TARGET_WIDTH),
            "quantizer_melspec_2048.codebook": (_TARGET_ROWS, _TARGET_WIDTH),
            **live,
            **counters,
            "conformer.pos_conv_embed.conv.bias": (dim,),
            "conformer.pos_conv_embed.conv.parametrizations.weight.original0": (1, 1, 128),
            "conformer.pos_conv_embed.conv.parametrizations.weight.original1": (dim, dim // 16, 128),
            "linear.weight": (_TARGET_ROWS, dim),
            "linear.bias": (_TARGET_ROWS,),
        },
    )


def audioldm_table(sizes: ReleaseSizes) -> Table:
    """The part of audioldm_48k.pth's `state_dict` that is read, with the VAE encoder that goes with it."""
    live = shapes_of(mel_vae.MelVAE, sizes.mel_vae)
    scale = mel_vae.SCALE_FACTOR_KEY
    return {
        **_under(mel_vae.KEY_PREFIX, _vae_encoder(sizes.mel_vae)),
        **_under(mel_vae.KEY_PREFIX, {name: shape for name, shape in live.items() if name != scale}),
        **_under(vocoder.KEY_PREFIX, shapes_of(vocoder.Vocoder, sizes.vocoder)),
        scale: live[scale],
    }


def _vae_encoder(config: mel_vae.MelVAEConfig) -> Table:
    table: Table = {}

    def conv(name: str, c_out: int, c_in: int, size: int = 3) -> None:
        table[f"{name}.weight"] = (c_out, c_in, size, size)
        table[f"{name}.bias"] = (c_out,)

    def norm(name: str, channels: int) -> None:
        table[f"{name}.weight"] = table[f"{name}.bias"] = (channels,)

    def block(name: str, c_in: int, c_out: int) -> None:
        norm(f"{name}.norm1", c_in)
        conv(f"{name}.conv1", c_out, c_in)
        norm(f"{name}.norm2", c_out)
        conv(f"{name}.conv2", c_out, c_out)
        if c_in != c_out:
            conv(f"{name}.nin_shortcut", c_out, c_in, 1)

    width = config.channels
    conv("encoder.conv_in", width, config.out_channels)
    for level, multiple in enumerate(config.multiples):
        for i in range(config.n_res_blocks):
            block(f"encoder.down.{level}.block.{i}", width, config.channels * multiple)
            width = config.channels * multiple
        if level + 1 < len(config.multiples):
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    block("encoder.mid.block_1", width, width)
    norm("encoder.mid.attn_1.norm", width)
    for name in ("q", "k", "v", "proj_out"):
        conv(f"encoder.mid.attn_1.{name}", width, width, 1)
    block("encoder.mid.block_2", width, width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", 2 * config.latent_channels, width)  # mean and log variance
    conv("quant_conv", 2 * config.embed_channels, 2 * config.latent_channels, 1)
    return table


def clamp3_table(text: clamp3.Clamp3TextConfig, audio: clamp3.Clamp3AudioConfig) -> Table:
    """The `model` entry of the CLaMP 3 file: text, audio and symbolic branches."""
    audio_live = shapes_of(clamp3.Clamp3Audio, audio)
    hidden = audio.hidden_size
    symbolic = {
        name.replace("audio_model.", "symbolic_model.base.").replace("audio_proj.", "symbolic_proj."): shape
        for name, shape in audio_live.items()
    }
    symbolic["symbolic_model.base.embeddings.position_embeddings.weight"] = (_N_SYMBOLIC_POSITIONS, hidden)
    table = {
        **shapes_of(clamp3.Clamp3Text, text),
        **audio_live,
        **symbolic,
        "symbolic_model.patch_embedding.weight": (hidden, _PATCH_SIZE),
        "symbolic_model.patch_embedding.bias": (hidden,),
    }
    for branch in ("audio_model", "symbolic_model.base"):
        table[f"{branch}.embeddings.word_embeddings.weight"] = (1, hidden)
    for branch, width in (
        ("text_model", text.hidden_size),
        ("audio_model", hidden),
        ("symbolic_model.base", hidden),
    ):
        table[f"{branch}.pooler.dense.weight"] = (width, width)
        table[f"{branch}.pooler.dense.bias"] = (width,)
    return table


def mert_table(config: mert.MertConfig) -> Table:
    """pytorch_model.bin of the MERT folder, in the older spelling of the weight norm."""
    table = shapes_of(mert.Mert, config)
    weight = table.pop("encoder.pos_conv_embed.conv.weight")
    return {
        "masked_spec_embed": (config.hidden_size,),
        **table,
        "encoder.pos_conv_embed.conv.weight_g": (1, 1, weight[-1]),
        "encoder.pos_conv_embed.conv.weight_v": weight,
    }
