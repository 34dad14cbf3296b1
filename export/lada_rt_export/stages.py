"""What each stage needs to become an engine: module, named inputs, dynamic axes, profiles, proof sizes, tolerances.

The forward arguments of a stage module are the graph's inputs; everything that turns modules into engines reads this
table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from lada_rt.bundle import STAGES, TensorEntry
from lada_rt.errors import ParamError
from lada_rt.geometry import CodecGeometry
from torch import Tensor, nn

__all__ = [
    "DTYPES",
    "PRECISIONS",
    "TOLERANCES",
    "ProofCase",
    "StageSizes",
    "StageSpec",
    "stage_precisions",
    "stage_spec",
]

DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS: Final = tuple(DTYPES)
#: stage -> the precisions it may have. The encoder's codes flip with rounding, and its power spectrum spans 15 decades
#: (spec/mucodec 9, 11.1). Text and reference encoder run once per song, in float32 in the release (spec/clamp3 6).
ALLOWED: Final[Mapping[str, tuple[str, ...]]] = {
    "encoder": ("fp32",),
    "text_encoder": ("fp32",),
    "ref_encoder": ("fp32",),
    "denoiser": PRECISIONS,
    "flow": PRECISIONS,
    "mel_decoder": PRECISIONS,
    "vocoder": PRECISIONS,
}
#: stages that follow `--precision`; the others do only when named. Mel decoder and vocoder are float32 in the release
#: (spec/mucodec 9), and what they lose in half precision is heard, not resampled away.
FOLLOWS: Final = ("denoiser", "flow")
#: precision -> allowed largest difference over largest reference value, both of the float32 module
TOLERANCES: Final[Mapping[str, float]] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 4e-2}
#: what mel decoder and vocoder may lose in half precision: -60 dB
SOUND_TOLERANCE: Final = 1e-3
#: share of codes that may differ: two codewords can be equally near within rounding
CODE_MISMATCH_TOLERANCE: Final = 0.01

#: one proof at full size holds inputs, results and this much beside
_SPARE_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class StageSizes:
    """What the shapes of a bundle's stages depend on.

    Attributes:
        geometry: rates and window sizes.
        vocab_size, mask_id: of the accompaniment codes.
        feature_size: width of a condition slot.
        ref_hidden_size: width of the reference encoder's frames.
        ref_chunk_samples: longest reference chunk.
        text_vocab_size: of the text encoder.
        max_frames: longest song in code frames.
    """

    geometry: CodecGeometry
    vocab_size: int
    mask_id: int
    feature_size: int
    ref_hidden_size: int
    ref_chunk_samples: int
    text_vocab_size: int
    max_frames: int


@dataclass(frozen=True, slots=True)
class ProofCase:
    """Random inputs of one size.

    Attributes:
        size: "smallest", "typical" or "largest".
        inputs: name -> tensor.
        activation_bytes: rough peak of the run beside the weights, for the choice of what fits.
    """

    size: str
    inputs: dict[str, Tensor]
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage, ready for export.

    Attributes:
        name: of the stage.
        module: its forward arguments and results are the interface; float32.
        dynamic: input name -> {dimension: axis name}.
        output_shapes: result name -> dimensions, ints or axis names, in order of the results.
        profile: axis name -> (min, opt, max).
        draw_cases: draws the proof's inputs, from the smallest to the largest.
        compare: turns results into what is compared, where that is not the results themselves.
        precision: of the engine to be built.
    """

    name: str
    module: nn.Module
    dynamic: Mapping[str, Mapping[int, str]]
    output_shapes: Mapping[str, tuple[int | str, ...]]
    profile: Mapping[str, tuple[int, int, int]]
    draw_cases: Callable[[torch.Generator], list[ProofCase]]
    compare: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    precision: str = "fp32"

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self.output_shapes)

    @property
    def tolerance(self) -> float:
        if self.name == "encoder":
            return CODE_MISMATCH_TOLERANCE
        heard = self.name in ("mel_decoder", "vocoder")
        return min(TOLERANCES[self.precision], SOUND_TOLERANCE) if heard else TOLERANCES[self.precision]

    def cases(self) -> list[ProofCase]:
        """The proof's inputs, the same at every call."""
        return self.draw_cases(torch.Generator().manual_seed(PROOF_SEED))

    def input_entries(self) -> tuple[TensorEntry, ...]:
        """Names, dtypes and shapes for the manifest."""
        return tuple(
            TensorEntry(
                name,
                str(tensor.dtype).removeprefix("torch."),
                tuple(self.dynamic.get(name, {}).get(d, n) for d, n in enumerate(tensor.shape)),
            )
            for name, tensor in self.cases()[-1].inputs.items()
        )

    def output_entries(self) -> tuple[TensorEntry, ...]:
        """Names, dtypes and shapes for the manifest. Whatever the weights are, results are float32 or int64."""
        return tuple(
            TensorEntry(name, "int64" if name == "codes" else "float32", shape)
            for name, shape in self.output_shapes.items()
        )


PROOF_SEED: Final = 20_240


def stage_precisions(option: str) -> dict[str, str]:
    """The precision of every stage from the command line's option.

    Args:
        option: "fp32", "fp16" or "bf16", then optionally ",stage=precision" for single stages.

    Raises:
        ParamError: unknown precision or stage, or one the stage may not have.
    """
    first, *others = option.split(",")
    if first not in PRECISIONS:
        raise ParamError(f"--precision: expected one of {', '.join(PRECISIONS)}, got {first!r}; see --help")
    chosen = {name: first if name in FOLLOWS else "fp32" for name in STAGES}
    for other in others:
        name, _, precision = other.partition("=")
        if name not in chosen or precision not in ALLOWED[name]:
            wanted = "; ".join(f"{stage}={'|'.join(ALLOWED[stage])}" for stage in STAGES)
            raise ParamError(f"--precision: expected single stages as {wanted}, got {other!r}")
        chosen[name] = precision
    return chosen


def stage_spec(name: str, module: nn.Module, sizes: StageSizes, precision: str = "fp32") -> StageSpec:
    """The table's row for one stage.

    Args:
        name: of the stage.
        module: float32, in eval mode.
        sizes: of the bundle.
        precision: of the engine.
    """
    dynamic, shapes, profile, draw = _ROWS[name](sizes)
    compare = _mean_and_feature if name == "ref_encoder" else dict
    return StageSpec(name, module, dynamic, shapes, profile, draw, compare, precision)


def _mean_and_feature(results: Mapping[str, Any]) -> dict[str, Any]:
    """The frame sum grows with the song and would hide the feature's error in its own scale."""
    mean = results["frame_sum_out"] / results["frame_count_out"][:, None]
    return {"mean_frame": mean, "feature": results["feature"]}


_Dynamic = Mapping[str, Mapping[int, str]]
_Shapes = Mapping[str, tuple[int | str, ...]]
_Profile = Mapping[str, tuple[int, int, int]]
_Row = tuple[_Dynamic, _Shapes, _Profile, Callable[[torch.Generator], list[ProofCase]]]
_BATCH: Final = {0: "B"}


def _codes(rng: torch.Generator, n_codes: int, *shape: int) -> Tensor:
    return torch.randint(0, n_codes, shape, generator=rng)


def _phrases(rng: torch.Generator, batch: int, n_samples: int, rate_hz: int) -> Tensor:
    """Notes of changing pitch, breath and loudness with rests between: steady noise meets only a few codes."""
    note_samples = rate_hz // 5
    n_notes = n_samples // note_samples + 1
    draws = torch.rand(4, batch, n_notes, generator=rng)
    # one value for each sample: pitch over five octaves, loudness over 60 dB with every third note a rest
    pitch_hz = 55.0 * 2.0 ** (5 * draws[0])
    level = 10.0 ** (-3 * draws[1]) * (draws[2] > 0.3)
    pitch_hz, level, breath = (x.repeat_interleave(note_samples, 1)[:, :n_samples] for x in (pitch_hz, level, draws[3]))
    phase = (2 * torch.pi / rate_hz * pitch_hz).double().cumsum(1)
    tone = torch.stack([torch.sin(k * phase).float() / k for k in (1, 2, 3, 5)]).sum(0)
    noise = torch.randn(batch, 2, n_samples, generator=rng)
    audio = (
        level[:, None] * (0.25 * (1 - breath[:, None]) * tone[:, None] + 0.2 * breath[:, None] * noise) + 1e-4 * noise
    )
    return audio.clamp(-0.8, 0.8)


def _encoder(s: StageSizes) -> _Row:
    g = s.geometry

    def draw(rng: torch.Generator) -> list[ProofCase]:
        return [
            ProofCase(
                size,
                {"audio": _phrases(rng, batch, g.encode_window_samples, g.sample_rate_hz)},
                batch * (3 << 30) + _SPARE_BYTES,
            )
            for size, batch in (("smallest", 1), ("typical", 1), ("largest", 2))
        ]

    return {"audio": _BATCH}, {"codes": ("B", g.encode_window_codes)}, {"B": (1, 1, 3)}, draw


def _text_encoder(s: StageSizes) -> _Row:
    def draw(rng: torch.Generator) -> list[ProofCase]:
        return [
            ProofCase(
                size,
                {
                    "ids": torch.randint(4, s.text_vocab_size, (batch, n), generator=rng),
                    "positions": torch.arange(2, n + 2).expand(batch, n).contiguous(),
                },
                _SPARE_BYTES,
            )
            for size, batch, n in (("smallest", 1, 2), ("typical", 2, 17), ("largest", 1, 128))
        ]

    axes = {0: "B", 1: "S"}
    return (
        {"ids": axes, "positions": axes},
        {"feature": ("B", s.feature_size)},
        {"B": (1, 1, 4), "S": (2, 32, 128)},
        draw,
    )


def _ref_encoder(s: StageSizes) -> _Row:
    hidden = s.ref_hidden_size

    def draw(rng: torch.Generator) -> list[ProofCase]:
        cases = []
        # the second one continues a song; a full chunk is left to the golden comparison, it is 2 TFLOP
        for size, n, count in (("smallest", 720, 0), ("typical", 24_000, 4499), ("largest", 240_000, 0)):
            audio = _phrases(rng, 1, n, s.geometry.sample_rate_hz)[:, 0]
            frames = torch.randn(1, hidden, generator=rng) * count
            inputs = {"waveform": audio, "frame_sum": frames, "frame_count": torch.full((1,), float(count))}
            cases.append(ProofCase(size, inputs, n * 4000 + _SPARE_BYTES))
        return cases

    return (
        {"waveform": {1: "n"}, "frame_sum": {}, "frame_count": {}},
        {"frame_sum_out": (1, hidden), "frame_count_out": (1,), "feature": (1, s.feature_size)},
        {"n": (720, s.ref_chunk_samples, s.ref_chunk_samples)},
        draw,
    )


def _denoiser(s: StageSizes) -> _Row:
    typical = min(s.max_frames, 751)

    def draw(rng: torch.Generator) -> list[ProofCase]:
        cases = []
        for size, n_frames, n_rows, n_prefix in (
            ("smallest", 2, 1, 2),
            ("typical", min(s.max_frames, 251), 100, 0),
            ("largest", typical, typical, 2),
        ):
            given = _codes(rng, s.vocab_size, 1, n_frames)
            given[:, ::2] = s.mask_id
            inputs = {
                "vocal_codes": _codes(rng, s.vocab_size, 1, n_frames),
                "codes": given,
                "prefix": torch.randn(1, n_prefix, s.feature_size, generator=rng),
                "rows": torch.randperm(n_frames, generator=rng)[:n_rows].sort().values,
            }
            cases.append(ProofCase(size, inputs, n_frames * n_frames * 512 + n_rows * s.vocab_size * 16 + _SPARE_BYTES))
        return cases

    return (
        {"vocal_codes": {1: "T"}, "codes": {1: "T"}, "prefix": {1: "P"}, "rows": {0: "R"}},
        {"logits": ("R", s.vocab_size)},
        {"T": (1, typical, s.max_frames), "P": (0, 2, 2), "R": (1, typical, s.max_frames)},
        draw,
    )


def _flow(s: StageSizes) -> _Row:
    g = s.geometry
    latents = (g.latent_channels, g.window_latents, g.latent_bins)

    def draw(rng: torch.Generator) -> list[ProofCase]:
        cases = []
        # the pair of rows is how guidance runs it, and nothing runs it with more
        for size, batch, n_context in (("smallest", 1, 0), ("largest", 2, g.context_latents)):
            context = torch.randn(batch, *latents, generator=rng)
            context[:, :, n_context:] = 0
            inputs = {
                "x": torch.randn(batch, *latents, generator=rng),
                "context": context,
                "codes": _codes(rng, s.vocab_size, batch, g.window_codes),
                "conditional": torch.arange(batch, dtype=torch.float32),
                "t": torch.rand(batch, generator=rng),
            }
            # scores of every head over all patches, twice: before and after the softmax
            tokens = g.window_latents * g.latent_bins // 4
            cases.append(ProofCase(size, inputs, batch * 22 * tokens * tokens * 8 + _SPARE_BYTES))
        return cases

    return (
        {name: _BATCH for name in ("x", "context", "codes", "conditional", "t")},
        {"velocity": ("B", *latents)},
        {"B": (1, 2, 2)},
        draw,
    )


def _mel_decoder(s: StageSizes) -> _Row:
    g = s.geometry
    frames = g.window_latents * g.mel_frames_per_latent

    def draw(rng: torch.Generator) -> list[ProofCase]:
        shape = (g.latent_channels // 2, g.window_latents, g.latent_bins)
        # one audio channel per call is how the runtime decodes; at 256 channels its largest maps are 1 GB each
        return [
            ProofCase(size, {"latents": torch.randn(batch, *shape, generator=rng)}, batch * frames * g.mel_bins * 6144)
            for size, batch in (("smallest", 1), ("largest", 2))
        ]

    return {"latents": _BATCH}, {"mel": ("B", g.mel_bins, frames)}, {"B": (1, 1, 2)}, draw


def _vocoder(s: StageSizes) -> _Row:
    g = s.geometry

    def draw(rng: torch.Generator) -> list[ProofCase]:
        # the runtime vocodes blocks of 512 frames and 23 on each side; whole windows are for roomy GPUs
        return [
            ProofCase(
                size,
                {"mel": torch.randn(batch, g.mel_bins, n, generator=rng) - 5},
                batch * n * (1 << 20) + _SPARE_BYTES,
            )
            for size, batch, n in (("smallest", 1, 1), ("typical", 2, 48), ("largest", 1, 558))
        ]

    longest = g.window_latents * g.mel_frames_per_latent
    return {"mel": {0: "B", 2: "F"}}, {"waveform": ("B", "N")}, {"B": (1, 1, 2), "F": (1, 558, longest)}, draw


_ROWS: Final[Mapping[str, Callable[[StageSizes], _Row]]] = {
    "encoder": _encoder,
    "text_encoder": _text_encoder,
    "ref_encoder": _ref_encoder,
    "denoiser": _denoiser,
    "flow": _flow,
    "mel_decoder": _mel_decoder,
    "vocoder": _vocoder,
}
