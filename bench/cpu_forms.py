"""What makes the graphs faster on a CPU: session options, forms of attention, mel frames vocoded at once, the flow's
own graph, the DFT in two factors, forms of convolutions.

    python bench/cpu_forms.py [--only flow,dft] --json FILE

Variants run in turn, and the least wall and CPU seconds of each count, as other work on the machine only adds. Each
result is compared with the first variant's before it is timed. Needs onnx and torch beside the runtime.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lada_rt.bench import machine
from lada_rt.bench.check import relative_error
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.cpus import cpu_count
from lada_rt.decode import with_halo
from lada_rt.engines.onnxruntime import load_onnxruntime
from lada_rt_export.models.mel_vae import Upsample
from lada_rt_export.models.muq import MelFrontEnd, MuQConfig
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

Run = Callable[[], np.ndarray]
TOLERANCE = 1e-4
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "as in engines/onnxruntime.py": {},
    "spinning threads": {"config": {"session.intra_op.allow_spinning": "1"}},
    "no arena": {"enable_cpu_mem_arena": False},
    "one thread": {"intra_op_num_threads": 1},
    "denormals as zero": {"config": {"session.set_denormal_as_zero": "1"}},
    "dynamic blocks of 4": {"config": {"session.dynamic_block_base": "4"}},
}


def session(model: bytes | str, changes: Mapping[str, Any]) -> Any:
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = cpu_count()
    options.log_severity_level = 3
    config = {"session.intra_op.allow_spinning": "0"} | changes.get("config", {})
    for name, value in config.items():
        options.add_session_config_entry(name, value)
    for name, value in changes.items():
        if name != "config":
            setattr(options, name, value)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def least(runs: Mapping[str, Run], repeat: int) -> dict[str, dict[str, float]]:
    """Least wall and CPU milliseconds of each variant, run in turn after one checked run."""
    expected = None
    found: dict[str, dict[str, float]] = {}
    for _ in range(repeat + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            result = run()
            took = {"wall_ms": 1e3 * (time.perf_counter() - wall), "cpu_ms": 1e3 * (time.process_time() - cpu)}
            if name not in found:
                expected = result if expected is None else expected
                error = relative_error(result, expected)
                assert error <= TOLERANCE, (name, error)
                found[name] = dict.fromkeys(took, float("inf"))
                continue
            found[name] = {key: round(min(value, found[name][key]), 2) for key, value in took.items()}
    return found


def session_options(bundle: Bundle, repeat: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    codes = rng.integers(0, bundle.vocab_size, (2, 1024))
    inputs = {
        "flow": {
            "x": normal(2, 32, 512, 32),
            "context": normal(2, 32, 512, 32),
            "codes": codes,
            "conditional": np.array([0, 1], np.float32),
            "t": np.full(2, 0.3, np.float32),
        },
        "mel_decoder": {"latents": normal(1, 16, 512, 32)},
        "vocoder": {"mel": normal(1, 256, 558) - 5},
        "denoiser": {
            "vocal_codes": codes[:1, :751],
            "codes": codes[1:, :751],
            "prefix": normal(1, 2, bundle.prefix_dim),
            "rows": np.arange(500),
        },
    }
    found = {}
    for stage, given in inputs.items():
        graph = str(bundle.file_path(bundle.stages[stage].graph))
        sessions = {name: session(graph, changes) for name, changes in OPTIONS.items()}
        runs: dict[str, Run] = {name: lambda s=s, given=given: s.run(None, given)[0] for name, s in sessions.items()}
        found[stage] = least(runs, repeat)
    return found


def attention(batch: int, heads: int, queries: int, keys: int, width: int, repeat: int) -> dict[str, Any]:
    """ONNX Attention, in one piece and in blocks of queries, ONNX Runtime's MultiHeadAttention, and torch."""
    rng = np.random.default_rng(0)
    shapes = {"q": (batch, heads, queries, width), "k": (batch, heads, keys, width), "v": (batch, heads, keys, width)}
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def graph(nodes: list[Any], constants: list[Any] | None = None) -> Any:
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
        out = helper.make_tensor_value_info("out", TensorProto.FLOAT, shapes["q"])
        made = helper.make_graph(nodes, "attention", values, [out], constants or [])
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(made, opset_imports=opsets, ir_version=11)
        return session(model.SerializeToString(), {})

    sessions = {"Attention": graph([helper.make_node("Attention", ["q", "k", "v"], ["out"])])}
    for block in (128, 512):
        if queries % block == 0 and queries > block:
            parts = [f"q{i}" for i in range(queries // block)]
            nodes = [helper.make_node("Split", ["q"], parts, axis=2, num_outputs=len(parts))]
            nodes += [helper.make_node("Attention", [part, "k", "v"], [f"out_{part}"]) for part in parts]
            nodes += [helper.make_node("Concat", [f"out_{part}" for part in parts], ["out"], axis=2)]
            sessions[f"Attention, {block} queries at once"] = graph(nodes)
    nodes = []
    for name in "qkv":
        nodes += [
            helper.make_node("Transpose", [name], [f"{name}_t"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"{name}_t", "flat"], [f"{name}_3"]),
        ]
    nodes += [
        helper.make_node("MultiHeadAttention", ["q_3", "k_3", "v_3"], ["o_3"], domain="com.microsoft", num_heads=heads),
        helper.make_node("Reshape", ["o_3", "split"], ["o_t"]),
        helper.make_node("Transpose", ["o_t"], ["out"], perm=[0, 2, 1, 3]),
    ]
    constants = [
        helper.make_tensor("flat", TensorProto.INT64, [3], [0, 0, heads * width]),
        helper.make_tensor("split", TensorProto.INT64, [4], [0, 0, heads, width]),
    ]
    sessions["MultiHeadAttention"] = graph(nodes, constants)
    runs: dict[str, Run] = {name: lambda s=s: s.run(None, given)[0] for name, s in sessions.items()}
    tensors = [torch.from_numpy(given[name]) for name in "qkv"]
    runs["torch"] = lambda: torch.nn.functional.scaled_dot_product_attention(*tensors).numpy()
    return least(runs, repeat)


def vocoder_blocks(bundle: Bundle, repeat: int) -> dict[str, Any]:
    """A whole window of one channel, so many mel frames at a time with the halo around them."""
    engine = session(str(bundle.file_path(bundle.stages["vocoder"].graph)), {})
    mel = np.random.default_rng(0).standard_normal((1, 256, 4096)).astype(np.float32) - 5
    n_frames, per_frame = mel.shape[2], bundle.geometry.samples_per_mel_frame

    def run(block: int) -> np.ndarray:
        audio = []
        for start in range(0, n_frames, block):
            stop = min(start + block, n_frames)
            span = with_halo(start, stop, n_frames)
            wave = engine.run(None, {"mel": np.ascontiguousarray(mel[:, :, span])})[0][0]
            audio.append(wave[(start - span.start) * per_frame : (stop - span.start) * per_frame])
        return np.concatenate(audio)

    return least({str(block): lambda block=block: run(block) for block in (512, 128, 256, 1024, 2048, 4096)}, repeat)


def exported(module: nn.Module, given: Tensor) -> Any:
    """A session of a module's graph."""
    with torch.inference_mode():
        program = torch.onnx.export(module.eval(), (given,), dynamo=True, opset_version=23, verbose=False)
    assert program is not None
    return session(program.model_proto.SerializeToString(), {})


def flow_graphs(bundle: Bundle, repeat: int) -> dict[str, Any]:
    """One step of the flow: the shared graph, the CPU's, and the CPU's with each row of the guidance on one thread."""
    rng, g = np.random.default_rng(0), bundle.geometry
    shape = (2, g.latent_channels, g.window_latents, g.latent_bins)
    given = {
        "x": rng.standard_normal(shape).astype(np.float32),
        "context": np.zeros(shape, np.float32),
        "codes": rng.integers(0, bundle.vocab_size, (2, g.window_codes)),
        "conditional": np.array([0, 1], np.float32),
        "t": np.full(2, 0.3, np.float32),
    }
    stage = bundle.stages["flow"]
    assert stage.cpu_graph is not None, "the bundle has no flow graph for CPUs; rebuild it"
    shared, own = (session(str(bundle.file_path(file)), {}) for file in (stage.graph, stage.cpu_graph))
    single = session(str(bundle.file_path(stage.cpu_graph)), {"intra_op_num_threads": 1})
    rows = [{name: array[i : i + 1] for name, array in given.items()} for i in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        return least(
            {
                "flow.onnx": lambda: shared.run(None, given)[0],
                "flow.cpu.onnx": lambda: own.run(None, given)[0],
                "flow.cpu.onnx, a row on each thread": lambda: np.concatenate(
                    list(pool.map(lambda row: single.run(None, row)[0], rows))
                ),
            },
            repeat,
        )


class WholeDft(MelFrontEnd):
    """The mel front end with one matrix over all samples and bins."""

    def __init__(self, config: MuQConfig) -> None:
        super().__init__(config)
        n = torch.arange(config.n_fft, dtype=torch.int64)
        phase = n[: config.n_fft // 2 + 1, None] * n
        index = torch.cat([phase, phase + 3 * config.n_fft // 4]) % config.n_fft
        self.register_buffer("basis", (self.cosines[index] * self.window).unsqueeze(1))

    def mel_power(self, wav: Tensor, *, keep_last: bool = False) -> Tensor:
        half, hop = self.config.n_fft // 2, self.config.hop_samples
        padded = F.pad(wav.unsqueeze(1), (half, half if keep_last else half - hop), mode="reflect")
        real, imag = F.conv1d(padded, self.get_buffer("basis"), stride=hop).chunk(2, dim=1)
        return torch.matmul(self.filterbank, real * real + imag * imag)


def dft(repeat: int) -> dict[str, Any]:
    """The mel front end of one encoder window."""
    wav = 0.1 * torch.randn(1, 983_040, generator=torch.Generator().manual_seed(0))
    given = wav.numpy()
    runs: dict[str, Run] = {}
    for name, front in (("one matrix", WholeDft(MuQConfig())), ("two factors", MelFrontEnd(MuQConfig()))):
        engine = exported(front, wav)
        runs[name] = lambda s=engine: s.run(None, {s.get_inputs()[0].name: given})[0]
    return least(runs, repeat)


def convolution(channels: int, samples: int, kernel: int, dilation: int, repeat: int) -> dict[str, Any]:
    """Four convolutions of the vocoder's kind, as such and as two-dimensional ones of height one."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((channels, channels, kernel)) / (channels * kernel) ** 0.5).astype(np.float32)
    given = rng.standard_normal((1, channels, samples)).astype(np.float32)
    reach = dilation * (kernel - 1) // 2
    runs: dict[str, Run] = {}
    for name, height in (("one-dimensional", ()), ("two-dimensional", (1,))):
        shape = [1, channels, *height, samples]
        options = {
            "kernel_shape": [*height, kernel],
            "dilations": [*height, dilation],
            "pads": [0] * len(height) + [reach] + [0] * len(height) + [reach],
        }
        nodes = []
        for i in range(4):
            nodes += [
                helper.make_node("Conv", [f"x{i}", "weight"], [f"y{i}"], **options),
                helper.make_node("LeakyRelu", [f"y{i}"], [f"x{i + 1}"], alpha=0.1),
            ]
        stored = numpy_helper.from_array(weight.reshape(channels, channels, *height, kernel), "weight")
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x0", "x4")]
        graph = helper.make_graph(nodes, "convolutions", ends[:1], ends[1:], [stored])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        engine = session(model.SerializeToString(), {})
        runs[name] = lambda s=engine, shape=shape: s.run(None, {"x0": given.reshape(shape)})[0].reshape(given.shape)
    return least(runs, repeat)


class PhasedUpsample(nn.Module):
    """Nearest upsampling and a 3x3 convolution as four 2x2 convolutions, one for each phase of the output."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()

        def folded(weight: Tensor, dim: int, phase: int) -> Tensor:
            a, b, c = weight.unbind(dim)
            return torch.stack([a + b, c] if phase else [a, b + c], dim)

        weight = conv.weight.detach().double()
        parts = [folded(folded(weight, 2, p), 3, q) for p in (0, 1) for q in (0, 1)]
        assert conv.bias is not None
        self.register_buffer("weight", torch.cat(parts).float())
        self.register_buffer("bias", conv.bias.detach().repeat(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.get_buffer("weight"), self.get_buffer("bias"))
        height, width = x.shape[2:]
        phases = [
            part[:, :, i // 2 : i // 2 + height, i % 2 : i % 2 + width] for i, part in enumerate(y.chunk(4, dim=1))
        ]
        grid = torch.stack(phases, 2).unflatten(2, (2, 2))  # [B, C, 2, 2, H, W]
        return grid.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


def upsampling(channels: int, height: int, width: int, repeat: int) -> dict[str, Any]:
    """The mel decoder's step to the next resolution."""
    torch.manual_seed(0)
    plain = Upsample(channels)
    x = torch.randn(1, channels, height, width)
    runs: dict[str, Run] = {}
    for name, module in (("repeat, then 3x3", plain), ("four phases of 2x2", PhasedUpsample(plain.conv))):
        engine = exported(module, x)
        runs[name] = lambda s=engine: s.run(None, {s.get_inputs()[0].name: x.numpy()})[0]
    return least(runs, repeat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", help="parts separated by commas: " + ", ".join(PARTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    wanted = list(PARTS) if args.only is None else args.only.split(",")
    if not set(wanted) <= set(PARTS):
        parser.error(f"--only: expected some of {', '.join(PARTS)}")
    torch.set_num_threads(cpu_count())
    bundle = Bundle.open(demo_bundle_path())
    load = machine.load_average()
    report = {
        "what": "least milliseconds of each variant, run in turn",
        "commit": machine.commit(),
        "machine": machine.describe_machine(),
        "versions": machine.versions(),
        "load_average": load,
    }
    for name in wanted:
        report |= PARTS[name](bundle, args.repeat)
    text = json.dumps(report, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


#: parts of the report by the name that --only takes
PARTS: Mapping[str, Callable[[Bundle, int], dict[str, Any]]] = {
    "options": lambda bundle, n: {"session options, demo stages": session_options(bundle, n)},
    "attention": lambda bundle, n: {
        "attention [2, 1, 4096, 48] (flow, demo)": attention(2, 1, 4096, 4096, 48, n),
        "attention [2, 10, 4096, 72] (flow, mid-size)": attention(2, 10, 4096, 4096, 72, n),
        "attention [1, 1, 1024 of 16384, 32] (mel decoder, demo)": attention(1, 1, 1024, 16384, 32, n),
    },
    "vocoder": lambda bundle, n: {"vocoder, mel frames at once": vocoder_blocks(bundle, n)},
    "flow": lambda bundle, n: {f"one flow step of {bundle.name}": flow_graphs(bundle, n)},
    "dft": lambda bundle, n: {"mel front end of one encoder window": dft(n)},
    "convolution": lambda bundle, n: {
        "convolutions [1, 240, 3348], kernel 7, dilation 3": convolution(240, 3348, 7, 3, n),
        "convolutions [1, 60, 66960], kernel 7, dilation 5": convolution(60, 66960, 7, 5, n),
        "convolutions [1, 12, 66960], kernel 7, dilation 3": convolution(12, 66960, 7, 3, n),
    },
    "upsampling": lambda bundle, n: {
        "upsampling [1, 16, 2048, 128] (mel decoder, demo)": upsampling(16, 2048, 128, n),
        "upsampling [1, 64, 2048, 128] (mel decoder, mid-size)": upsampling(64, 2048, 128, n),
    },
}

if __name__ == "__main__":
    main()
