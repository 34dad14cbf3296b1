"""Sizes of a bundle's networks, read off its graphs without the onnx package.

Names and shapes of the weights are enough, and the number of attention nodes; this reads just those fields of the
protobuf files and skips over the weights themselves.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lada_rt.bench.roofline import (
    DenoiserSizes,
    EncoderSizes,
    FlowSizes,
    MelDecoderSizes,
    ModelSizes,
    TextEncoderSizes,
    VocoderSizes,
)
from lada_rt.bundle import Bundle

__all__ = ["HALF_SUFFIX", "GraphShapes", "bundle_sizes", "read_shapes"]

# field numbers of onnx.proto
_GRAPH = 7
_NODE, _INITIALIZER = 1, 5
_OP_TYPE, _NODE_INPUT = 4, 1
_DIMS, _TENSOR_NAME = 1, 8
#: ends the name of a weight that the exporter stores in half precision and a Cast restores
HALF_SUFFIX = ".half"


@dataclass(frozen=True, slots=True)
class GraphShapes:
    """Weights by name with their dimensions, and the nodes as (operator, input names)."""

    weights: Mapping[str, tuple[int, ...]]
    nodes: tuple[tuple[str, tuple[str, ...]], ...]

    def count(self, *operators: str) -> int:
        return sum(op in operators for op, _ in self.nodes)

    def matrices(self) -> list[tuple[int, ...]]:
        """Shapes of the two-dimensional weights that a MatMul or Gemm reads, once for each node."""
        found = []
        for op, inputs in self.nodes:
            if op in ("MatMul", "Gemm", "FusedMatMul"):
                found += [self.weights[i] for i in inputs[:2] if len(self.weights.get(i, ())) == 2]
        return found


def read_shapes(graph: Path) -> GraphShapes:
    """Read a graph's weight shapes and nodes.

    Raises:
        ValueError: not a protobuf file of the expected form.
    """
    weights: dict[str, tuple[int, ...]] = {}
    nodes: list[tuple[str, tuple[str, ...]]] = []
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for field, start, stop in _fields(data, 0, len(data)):
            if field != _GRAPH:
                continue
            for part, first, last in _fields(data, start, stop):
                if part == _INITIALIZER:
                    name, dims = _tensor(data, first, last)
                    weights[name.removesuffix(HALF_SUFFIX)] = dims
                elif part == _NODE:
                    nodes.append(_node(data, first, last))
    return GraphShapes(weights, tuple(nodes))


def _tensor(data: Any, start: int, stop: int) -> tuple[str, tuple[int, ...]]:
    name, dims = "", []
    for field, first, last in _fields(data, start, stop):
        if field == _TENSOR_NAME:
            name = bytes(data[first:last]).decode()
        elif field == _DIMS:  # packed or one by one: both are a run of varints
            while first < last:
                value, first = _varint(data, first)
                dims.append(value)
    return name, tuple(dims)


def _node(data: Any, start: int, stop: int) -> tuple[str, tuple[str, ...]]:
    operator, inputs = "", []
    for field, first, last in _fields(data, start, stop):
        if field == _OP_TYPE:
            operator = bytes(data[first:last]).decode()
        elif field == _NODE_INPUT:
            inputs.append(bytes(data[first:last]).decode())
    return operator, tuple(inputs)


def _fields(data: Any, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(field number, first byte, past the last byte) of every field of a message."""
    while start < stop:
        tag, start = _varint(data, start)
        kind = tag & 7
        if kind == 0:
            _, end = _varint(data, start)
        elif kind == 1:
            end = start + 8
        elif kind == 2:
            length, start = _varint(data, start)
            end = start + length
        elif kind == 5:
            end = start + 4
        else:
            raise ValueError(f"wire type {kind}")
        if end > stop:
            raise ValueError("a field passes the end of its message")
        yield tag >> 3, start, end
        start = end


def _varint(data: Any, start: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        if start >= len(data):
            raise ValueError("truncated")
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, start
    raise ValueError("a number of more than 64 bits")


def bundle_sizes(bundle: Bundle) -> ModelSizes:
    """Sizes of a bundle's stages; None for a stage whose graph has another form than this exporter's."""

    def stage(name: str, read: Callable[[GraphShapes, Bundle], Any]) -> Any:
        try:
            return read(read_shapes(bundle.file_path(bundle.stages[name].graph)), bundle)
        except (ValueError, KeyError, IndexError, UnicodeDecodeError, OSError):
            return None

    return ModelSizes(
        encoder=stage("encoder", _encoder),
        text_encoder=stage("text_encoder", _text_encoder),
        denoiser=stage("denoiser", _denoiser),
        flow=stage("flow", _flow),
        mel_decoder=stage("mel_decoder", _mel_decoder),
        vocoder=stage("vocoder", _vocoder),
    )


def _ending(shapes: GraphShapes, suffix: str) -> tuple[int, ...]:
    return next(dims for name, dims in shapes.weights.items() if name.endswith(suffix))


def _indices(shapes: GraphShapes, pattern: str) -> list[int]:
    found = {int(m.group(1)) for name in shapes.weights if (m := re.search(pattern, name))}
    if not found:
        raise KeyError(pattern)
    return sorted(found)


def _denoiser(shapes: GraphShapes, bundle: Bundle) -> DenoiserSizes:
    hidden = 2 * shapes.weights["mask_predictor.voc_embed.weight"][1]
    n_layers = shapes.count("Attention", "MultiHeadAttention", "Softmax")
    inner = [d for d in shapes.matrices() if bundle.vocab_size not in d]
    inner.remove((bundle.prefix_dim, hidden))  # the prefix projection; 7 matrices in each layer are left
    intermediate = max(max(d) for d in inner)
    per_layer = sum(a * b for a, b in inner) // n_layers
    kv_width = (per_layer // hidden - 2 * hidden - 3 * intermediate) // 2
    sizes = DenoiserSizes(hidden, n_layers, kv_width, intermediate, bundle.vocab_size)
    if sizes.layer_params != per_layer or kv_width < 1:
        raise ValueError("the denoiser's matrices do not add up")
    return sizes


def _flow(shapes: GraphShapes, bundle: Bundle) -> FlowSizes:
    patch = shapes.weights["flow.pos_embed.proj.weight"]
    blocks = _indices(shapes, r"transformer_blocks\.(\d+)\.")
    (ffn,) = _ending(shapes, "transformer_blocks.0.ff.net.0.proj.bias")
    (features, _) = reversed(_ending(shapes, "timestep_embedder.linear_1.weight"))
    area = patch[2] * patch[3]
    out = area * bundle.geometry.latent_channels
    return FlowSizes(patch[0], len(blocks), ffn, patch[1], out, area, features)


def _mel_decoder(shapes: GraphShapes, bundle: Bundle) -> MelDecoderSizes:
    levels = _indices(shapes, r"decoder\.up\.(\d+)\.")
    widths = tuple(_ending(shapes, f"decoder.up.{level}.block.0.conv2.bias")[0] for level in levels)
    blocks = _indices(shapes, r"decoder\.up\.0\.block\.(\d+)\.")
    return MelDecoderSizes(widths, len(blocks) - 1, bundle.geometry.latent_channels // 2)


def _vocoder(shapes: GraphShapes, bundle: Bundle) -> VocoderSizes:
    stages = _indices(shapes, r"vocoder\.ups\.(\d+)\.weight")
    ups = [_ending(shapes, f"vocoder.ups.{i}.weight") for i in stages]
    n_blocks = len(_indices(shapes, r"vocoder\.resblocks\.(\d+)\.")) // len(stages)
    kernels = tuple(_ending(shapes, f"vocoder.resblocks.{i}.convs1.0.weight")[2] for i in range(n_blocks))
    dilations = len(_indices(shapes, r"vocoder\.resblocks\.0\.convs1\.(\d+)\."))
    # all kernels but those of uneven stages are twice their rate (spec/mucodec 7)
    rates = tuple(dims[2] // 2 for dims in ups)
    pre = _ending(shapes, "vocoder.conv_pre.weight")
    return VocoderSizes(pre[1], pre[0], rates, tuple(dims[2] for dims in ups), kernels, dilations)


def _encoder(shapes: GraphShapes, bundle: Bundle) -> EncoderSizes:
    width = _ending(shapes, "conv.conv.0.conv2.weight")[0]
    (dim,) = _ending(shapes, "conformer.layers.0.ffn1.output_dense.bias")
    (ffn,) = _ending(shapes, "conformer.layers.0.ffn1.intermediate_dense.bias")
    layers = _indices(shapes, r"conformer\.layers\.(\d+)\.")
    codebook_dim, codebook = shapes.weights["directions"]
    n_mels = _ending(shapes, "front_end.filterbank")[0]
    depthwise = _ending(shapes, "conv_module.depthwise_conv.weight")[2]
    return EncoderSizes(width, dim, len(layers), ffn, depthwise, codebook, codebook_dim, n_mels)


def _text_encoder(shapes: GraphShapes, bundle: Bundle) -> TextEncoderSizes:
    hidden = _ending(shapes, "embeddings.word_embeddings.weight")[1]
    layers = _indices(shapes, r"encoder\.layer\.(\d+)\.")
    (intermediate,) = _ending(shapes, "encoder.layer.0.intermediate.dense.bias")
    return TextEncoderSizes(hidden, len(layers), intermediate, bundle.prefix_dim)
