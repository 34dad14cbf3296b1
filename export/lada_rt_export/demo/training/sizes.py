"""Every number of a training run: network sizes, crops, batches, steps. Two presets, `toy` for tests and `demo`.

Sizes of `demo` are chosen for a bundle under 12 MB and for the shape of the work at inference: attention of the flow
over 4096 tokens and the mel decoder's largest maps take two thirds of the time of a song of 40 s and most of it at
10 s. The mask predictor is deep for its width: where nobody sings, each layer carries the beat further.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lada_rt.errors import ParamError
from lada_rt.geometry import CodecGeometry

from lada_rt_export.models.clamp3 import Clamp3AudioConfig, Clamp3TextConfig
from lada_rt_export.models.flow import FlowConfig
from lada_rt_export.models.mask_predictor import MaskPredictorConfig
from lada_rt_export.models.mel_vae import MelVAEConfig
from lada_rt_export.models.mert import MertConfig
from lada_rt_export.models.muq import MuQConfig
from lada_rt_export.models.vocoder import VocoderConfig
from lada_rt_export.models.vq import VQConfig

__all__ = ["PRESETS", "STAGE_ORDER", "Budget", "TrainingSizes"]

#: the order of work; a stage needs the results of those before it
STAGE_ORDER = ("songs", "codec", "mel_vae", "style", "latents", "codes", "flow", "predictor", "refine", "lengthen")


@dataclass(frozen=True, slots=True)
class Budget:
    """Work of one trained stage.

    Attributes:
        n_steps: optimizer steps in all.
        batch_size: crops in a step.
        crops: (share of the steps after which it ends, length of a crop), the last share 1. Lengths count codes, but
            hundredths of a second of audio in `style`.
        learning_rate: the peak; it warms up over a fiftieth of the steps and falls to a tenth on a cosine.
        average: decay of the running mean of the weights that is exported; 0 exports the weights themselves.
        long_batch_size: crops in a step of the last crop length; 0 is batch_size.
    """

    n_steps: int
    batch_size: int
    crops: tuple[tuple[float, int], ...]
    learning_rate: float = 1e-3
    average: float = 0.0
    long_batch_size: int = 0

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.crops]
        if min(self.n_steps, self.batch_size) < 1 or not shares or shares != sorted(shares) or shares[-1] != 1:
            raise ParamError(f"budget: expected positive counts and shares rising to 1, got {self}; correct the preset")

    def crop(self, step: int) -> tuple[int, int]:
        """Batch size and length of a crop at a step."""
        for share, length in self.crops:
            if step < share * self.n_steps:
                last = length == self.crops[-1][1]
                return (self.long_batch_size or self.batch_size) if last else self.batch_size, length
        raise AssertionError(f"step {step} is past the last of {self.n_steps}")


@dataclass(frozen=True, slots=True)
class TrainingSizes:
    """Sizes of all networks and of the data.

    Attributes:
        geometry: rates and windows; the flow serves its window.
        n_codec_songs: songs, one decoder window long, that encoder, mel VAE and flow learn from.
        n_predictor_songs, song_s: songs that the mask predictor learns from, and their length.
        n_long_songs, long_song_s: songs that stage `lengthen` learns from, and their length; None draws 40 to 60.
        n_vocal_takes: vocals of a song, the first clean, the others disturbed.
        active_latents: channels of a latent side that carry the sound; two more say where they are, the others are zero
            (spec/mucodec has 16).
        logits_gain: what the logits of the collected mask predictor are multiplied by: a small network spreads its mass
            over codes that fit nowhere, and the runtime's default temperature is the released model's.
        held_out: song seeds below it train, those from it on never do.
        sounds: whether songs trained at this size are worth hearing: false for tests.
    """

    name: str
    geometry: CodecGeometry
    muq: MuQConfig
    vq: VQConfig
    flow: FlowConfig
    mel_vae: MelVAEConfig
    vocoder: VocoderConfig
    mert: MertConfig
    text: Clamp3TextConfig
    audio: Clamp3AudioConfig
    predictor: MaskPredictorConfig
    budgets: Mapping[str, Budget]
    n_codec_songs: int
    n_predictor_songs: int
    song_s: float
    n_long_songs: int
    long_song_s: float | None
    n_vocal_takes: int
    active_latents: int
    max_seconds: int
    logits_gain: float = 1.0
    held_out: int = 90_000
    sounds: bool = True

    def __post_init__(self) -> None:
        if self.predictor.n_codes != self.vq.codebook_size or self.predictor.n_vocal_codes != self.vq.codebook_size:
            raise ParamError("training sizes: predictor and quantiser must have one vocabulary; correct the preset")
        if self.flow.latent_frames != self.geometry.window_latents:
            raise ParamError("training sizes: the flow must serve the decoder window; correct the preset")
        if set(self.budgets) != {"codec", "mel_vae", "style", "flow", "predictor", "refine", "lengthen"}:
            raise ParamError("training sizes: expected one budget for each trained stage; correct the preset")


#: tokens of `byte_tokenizer`: 256 bytes and five specials
N_TEXT_TOKENS = 261


def _toy() -> TrainingSizes:
    # the real rates; windows of 5.12 s in place of 40.96, so that a test can run the whole path
    geometry = CodecGeometry(
        encode_window_samples=128 * 1920 + 480, encode_window_codes=128, window_codes=128, hop_codes=96
    )
    return TrainingSizes(
        name="toy",
        geometry=geometry,
        muq=MuQConfig(conv_dim=4, dim=16, n_layers=1, n_heads=2, ffn_dim=16),
        vq=VQConfig(dim=16, codebook_size=32, codebook_dim=4),
        flow=FlowConfig(n_layers=1, n_heads=1, head_dim=8, time_features=16, latent_frames=64),
        mel_vae=MelVAEConfig(channels=4, multiples=(1, 1, 1, 1), n_res_blocks=1, norm_groups=2),
        vocoder=VocoderConfig(initial_channels=224, resblock_kernels=(3,), dilations=((1,),)),
        mert=MertConfig(
            hidden_size=8, n_layers=1, n_heads=2, intermediate_size=8, conv_channels=(4,) * 7, pos_conv_groups=4
        ),
        text=Clamp3TextConfig(N_TEXT_TOKENS, 8, n_layers=1, n_heads=2, intermediate_size=8, output_size=8),
        audio=Clamp3AudioConfig(8, n_layers=1, n_heads=2, intermediate_size=8, output_size=8),
        predictor=MaskPredictorConfig(16, 1, 2, 2, 16, 32, 32, condition_size=8, rtd_head=True),
        budgets={
            "codec": Budget(3, 2, ((1.0, 64),)),
            "mel_vae": Budget(3, 2, ((0.5, 8), (1.0, 16)), average=0.9),
            "style": Budget(3, 4, ((1.0, 20),)),
            "flow": Budget(3, 2, ((0.5, 32), (1.0, 128)), average=0.9, long_batch_size=1),
            "predictor": Budget(3, 2, ((0.5, 32), (1.0, 96)), average=0.9),
            "refine": Budget(3, 2, ((1.0, 96),), average=0.9),
            "lengthen": Budget(3, 2, ((1.0, 160),), average=0.9),
        },
        n_codec_songs=2,
        n_predictor_songs=2,
        song_s=6.0,
        n_long_songs=1,
        long_song_s=8.0,
        n_vocal_takes=2,
        active_latents=2,
        max_seconds=30,
        logits_gain=2.0,
        sounds=False,
    )


def _demo() -> TrainingSizes:
    return TrainingSizes(
        name="demo",
        geometry=CodecGeometry(),
        muq=MuQConfig(conv_dim=12, dim=96, n_layers=2, n_heads=4, ffn_dim=128),
        vq=VQConfig(dim=96, codebook_size=1024, codebook_dim=32),
        # a token holds 2 x 2 positions of 2 x 8 active channels: 64 numbers must pass through its width
        flow=FlowConfig(n_layers=2, n_heads=1, head_dim=80, time_features=128),
        mel_vae=MelVAEConfig(channels=16, multiples=(1, 2, 3, 3), n_res_blocks=1, norm_groups=8),
        # 216 rows and their offset
        vocoder=VocoderConfig(initial_channels=224, resblock_kernels=(3,), dilations=((1,),)),
        mert=MertConfig(
            hidden_size=32, n_layers=2, n_heads=2, intermediate_size=64, conv_channels=(16,) * 7, pos_conv_groups=4
        ),
        text=Clamp3TextConfig(N_TEXT_TOKENS, 32, n_layers=2, n_heads=2, intermediate_size=64, output_size=32),
        audio=Clamp3AudioConfig(32, n_layers=2, n_heads=2, intermediate_size=64, output_size=32),
        # heads of 32: the graph carries a rotary table that grows with them
        predictor=MaskPredictorConfig(128, 8, 4, 2, 256, 1024, 1024, condition_size=32, rtd_head=True),
        budgets={
            "codec": Budget(4000, 6, ((0.8, 256), (1.0, 1024)), 1e-3, long_batch_size=2),
            "mel_vae": Budget(1800, 3, ((0.9, 32), (1.0, 192)), 2e-3, average=0.998, long_batch_size=1),
            "style": Budget(800, 20, ((1.0, 300),), 2e-3),
            "flow": Budget(6000, 16, ((0.9, 128), (1.0, 1024)), 1e-3, average=0.999, long_batch_size=2),
            "predictor": Budget(9000, 8, ((0.8, 256), (1.0, 1000)), 2e-3, average=0.999, long_batch_size=2),
            "refine": Budget(58000, 2, ((1.0, 1000),), 4e-3, average=0.999),
            "lengthen": Budget(3200, 2, ((1.0, 1500),), 8e-4, average=0.999),
        },
        n_codec_songs=320,
        n_predictor_songs=1800,
        # one encoder window
        song_s=40.9,
        n_long_songs=500,
        long_song_s=None,
        n_vocal_takes=2,
        active_latents=8,
        max_seconds=360,
        # more right chords than at 1, as many right onsets
        logits_gain=1.4,
    )


PRESETS: Mapping[str, TrainingSizes] = {sizes.name: sizes for sizes in (_toy(), _demo())}
