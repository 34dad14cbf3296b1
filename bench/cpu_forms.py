"""What makes the graphs faster on a CPU: session options, forms of attention, mel frames vocoded at once.

    python bench/cpu_forms.py --json FILE

Variants run in turn, and the least wall and CPU seconds of each count, as other work on the machine only adds. Each
result is compared with the first variant's before it is timed. Needs onnx and torch beside the runtime.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lada_rt.bench import machine
from lada_rt.bench.check import relative_error
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.decode import VOCODER_HALO_FRAMES
from lada_rt.engines.onnxruntime import cpu_count, load_onnxruntime
from onnx import TensorProto, helper

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
    n_frames, per_frame, halo = mel.shape[2], bundle.geometry.samples_per_mel_frame, VOCODER_HALO_FRAMES

    def run(block: int) -> np.ndarray:
        audio = []
        for start in range(0, n_frames, block):
            left, stop = max(start - halo, 0), min(start + block, n_frames)
            part = np.ascontiguousarray(mel[:, :, left : min(stop + halo, n_frames)])
            wave = engine.run(None, {"mel": part})[0][0]
            audio.append(wave[(start - left) * per_frame : (stop - left) * per_frame])
        return np.concatenate(audio)

    return least({str(block): lambda block=block: run(block) for block in (512, 128, 256, 1024, 2048, 4096)}, repeat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(cpu_count())
    bundle = Bundle.open(demo_bundle_path())
    load = machine.load_average()
    report = {
        "what": "least milliseconds of each variant, run in turn",
        "commit": machine.commit(),
        "machine": machine.describe_machine(),
        "versions": machine.versions(),
        "load_average": load,
        "session options, demo stages": session_options(bundle, args.repeat),
        "attention [2, 1, 4096, 48] (flow, demo)": attention(2, 1, 4096, 4096, 48, args.repeat),
        "attention [2, 10, 4096, 72] (flow, mid-size)": attention(2, 10, 4096, 4096, 72, args.repeat),
        "attention [1, 1, 1024 of 16384, 32] (mel decoder, demo)": attention(1, 1, 1024, 16384, 32, args.repeat),
        "vocoder, mel frames at once": vocoder_blocks(bundle, args.repeat),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
