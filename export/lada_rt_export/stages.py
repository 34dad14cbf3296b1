"""What each stage needs to become a graph: module, named inputs, dynamic axes, sizes to prove it at, tolerance.

The forward arguments of a stage module are the graph's inputs; everything that turns modules into engines reads this
table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from lada_rt.geometry import CodecGeometry
from torch import Tensor, nn

__all__ = ["StageSpec", "stage_specs"]

#: relative error (largest difference over largest reference value) a float32 graph may show against its module
FP32_TOLERANCE = 1e-4
#: share of codes that may differ: two codewords can be equally near within rounding
CODE_MISMATCH_TOLERANCE = 0.01

REF_PROOF_SAMPLES = (720, 24_000, 48_000)


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage, ready for export.

    Attributes:
        name: of the stage.
        module: its forward arguments and results are the interface.
        dynamic: input name -> {dimension: axis name}.
        outputs: names of the results, in order.
        output_shapes: result name -> dimensions, ints or axis names.
        proof_inputs: draws random inputs at the smallest, a typical and the largest size.
        tolerance: on the error defined by `to_onnx.output_error`.
    """

    name: str
    module: nn.Module
    dynamic: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    output_shapes: Mapping[str, tuple[int | str, ...]]
    proof_inputs: Callable[[torch.Generator], list[dict[str, Tensor]]]
    tolerance: float = FP32_TOLERANCE
    precision: str = "fp32"
    metadata: Mapping[str, str] = field(default_factory=dict)


def stage_specs(
    modules: Mapping[str, nn.Module],
    geometry: CodecGeometry,
    *,
    vocab_size: int,
    mask_id: int,
    feature_size: int,
    ref_hidden_size: int,
    text_vocab_size: int,
    max_frames: int,
) -> dict[str, StageSpec]:
    """The table for one model.

    Args:
        modules: stage name -> stage module in eval mode; a subset gives a subset of the table.
        geometry: rates and window sizes.
        vocab_size, mask_id: of the accompaniment codes.
        feature_size: width of a condition slot.
        ref_hidden_size: width of the reference encoder's frames.
        text_vocab_size: of the text encoder.
        max_frames: longest song in code frames.
    """
    g = geometry
    latents = (g.latent_channels, g.window_latents, g.latent_bins)

    def codes(rng: torch.Generator, *shape: int) -> Tensor:
        return torch.randint(0, vocab_size, shape, generator=rng)

    def encoder(rng: torch.Generator) -> list[dict[str, Tensor]]:
        return [{"audio": 0.1 * torch.randn(1, 2, g.encode_window_samples, generator=rng)}]

    def text_encoder(rng: torch.Generator) -> list[dict[str, Tensor]]:
        return [
            {
                "ids": torch.randint(4, text_vocab_size, (batch, n), generator=rng),
                "positions": torch.arange(2, n + 2).expand(batch, n).contiguous(),
            }
            for batch, n in ((1, 2), (2, 17), (1, 128))
        ]

    def ref_encoder(rng: torch.Generator) -> list[dict[str, Tensor]]:
        return [
            {
                "waveform": 0.1 * torch.randn(1, n, generator=rng),
                "frame_sum": torch.randn(1, ref_hidden_size, generator=rng) * count,
                "frame_count": torch.full((1,), float(count)),
            }
            for n, count in zip(REF_PROOF_SAMPLES, (0, 4499, 0), strict=True)
        ]

    def denoiser(rng: torch.Generator) -> list[dict[str, Tensor]]:
        cases = []
        for n_frames, n_rows, n_prefix in (
            (2, 1, 2),
            (251, 100, 0),
            (min(max_frames, 751), min(max_frames, 751), 2),
        ):
            given = codes(rng, 1, n_frames)
            given[:, ::2] = mask_id
            cases.append(
                {
                    "vocal_codes": codes(rng, 1, n_frames),
                    "codes": given,
                    "prefix": torch.randn(1, n_prefix, feature_size, generator=rng),
                    "rows": torch.randperm(n_frames, generator=rng)[:n_rows].sort().values,
                }
            )
        return cases

    def flow(rng: torch.Generator) -> list[dict[str, Tensor]]:
        cases = []
        for batch, n_context in ((1, 0), (2, g.context_latents)):
            context = torch.randn(batch, *latents, generator=rng)
            context[:, :, n_context:] = 0
            cases.append(
                {
                    "x": torch.randn(batch, *latents, generator=rng),
                    "context": context,
                    "codes": codes(rng, batch, g.window_codes),
                    "conditional": torch.arange(batch, dtype=torch.float32),
                    "t": torch.rand(batch, generator=rng),
                }
            )
        return cases

    def mel_decoder(rng: torch.Generator) -> list[dict[str, Tensor]]:
        return [{"latents": torch.randn(1, g.latent_channels // 2, *latents[1:], generator=rng)}]

    def vocoder(rng: torch.Generator) -> list[dict[str, Tensor]]:
        return [
            {"mel": torch.randn(batch, g.mel_bins, n, generator=rng) - 5} for batch, n in ((1, 1), (2, 48), (1, 558))
        ]

    mel_frames = g.window_latents * g.mel_frames_per_latent
    table: dict[str, StageSpec] = {}

    def add(
        name: str,
        dynamic: Mapping[str, Mapping[int, str]],
        output_shapes: Mapping[str, tuple[int | str, ...]],
        proof_inputs: Callable[[torch.Generator], list[dict[str, Tensor]]],
        tolerance: float = FP32_TOLERANCE,
    ) -> None:
        if name in modules:
            table[name] = StageSpec(
                name, modules[name], dynamic, tuple(output_shapes), output_shapes, proof_inputs, tolerance
            )

    batch = {0: "B"}
    add("encoder", {"audio": batch}, {"codes": ("B", g.encode_window_codes)}, encoder, CODE_MISMATCH_TOLERANCE)
    add(
        "text_encoder",
        {"ids": {0: "B", 1: "S"}, "positions": {0: "B", 1: "S"}},
        {"feature": ("B", feature_size)},
        text_encoder,
    )
    add(
        "ref_encoder",
        {"waveform": {1: "n"}, "frame_sum": {}, "frame_count": {}},
        {"frame_sum_out": (1, ref_hidden_size), "frame_count_out": (1,), "feature": (1, feature_size)},
        ref_encoder,
    )
    add(
        "denoiser",
        {"vocal_codes": {1: "T"}, "codes": {1: "T"}, "prefix": {1: "P"}, "rows": {0: "R"}},
        {"logits": ("R", vocab_size)},
        denoiser,
    )
    add(
        "flow",
        {name: batch for name in ("x", "context", "codes", "conditional", "t")},
        {"velocity": ("B", *latents)},
        flow,
    )
    add("mel_decoder", {"latents": batch}, {"mel": ("B", g.mel_bins, mel_frames)}, mel_decoder)
    add("vocoder", {"mel": {0: "B", 2: "F"}}, {"waveform": ("B", "N")}, vocoder)
    return table
