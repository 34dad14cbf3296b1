"""CLaMP 3's encoders and MERT against the released classes' goldens, their key tables and ONNX Runtime."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_weights import select_weights
from lada_rt.condition import position_ids
from lada_rt.errors import CheckpointError, ParamError
from lada_rt_export.models import mert as mert_file
from lada_rt_export.models.clamp3 import (
    AUDIO_DEAD_KEYS,
    AUDIO_KEYS,
    TEXT_DEAD_KEYS,
    TEXT_KEYS,
    Clamp3Audio,
    Clamp3AudioConfig,
    Clamp3Text,
    Clamp3TextConfig,
)
from lada_rt_export.models.mert import Mert, MertConfig, fold_positional_conv, normalize_waveform
from lada_rt_export.models.stages_condition import RefEncoderStage, TextEncoderStage
from lada_rt_export.onnx_check import operators
from lada_rt_export.torch_engine import TorchEngine
from safetensors.torch import load_file
from torch import Tensor, nn

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

GOLDEN_PATTERN = "clamp3_*.json"
HERE = Path(__file__).resolve().parent
KEYS = json.loads((HERE / "data" / "clamp3_keys.json").read_text())
TENSORRT_OPS = set(operators())
ATOL = 5e-5


def branch_sizes(config: dict[str, Any], name: str) -> dict[str, Any]:
    c = config[name]
    return {
        "hidden_size": c["hidden_size"],
        "n_layers": c["num_hidden_layers"],
        "n_heads": c["num_attention_heads"],
        "intermediate_size": c["intermediate_size"],
        "max_positions": c["max_position_embeddings"],
        "n_token_types": c["type_vocab_size"],
        "layer_norm_eps": c["layer_norm_eps"],
        "output_size": config["clamp3_hidden_size"],
    }


def text_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> Clamp3Text:
    sizes = branch_sizes(config, "text_model")
    model = Clamp3Text(Clamp3TextConfig(vocab_size=config["text_model"]["vocab_size"], **sizes))
    model.load_state_dict(select_weights(tensors, drop=TEXT_DEAD_KEYS, keep=TEXT_KEYS), strict=True)
    return model.eval()


def audio_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> Clamp3Audio:
    model = Clamp3Audio(Clamp3AudioConfig(**branch_sizes(config, "audio_model")))
    model.load_state_dict(select_weights(tensors, drop=AUDIO_DEAD_KEYS, keep=AUDIO_KEYS), strict=True)
    return model.eval()


def mert_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> Mert:
    model = Mert(MertConfig.from_json(config["mert"]))
    own = fold_positional_conv(select_weights(tensors, drop=mert_file.DEAD_KEYS))
    model.load_state_dict(own, strict=True)
    return model.eval()


def cases_with(golden_dir: Path, *names: str) -> list[tuple[Path, dict[str, Any], dict[str, Tensor]]]:
    """Cases that hold all the named tensors and whose weights are there too."""
    found = []
    for path in sorted(golden_dir.glob(GOLDEN_PATTERN)):
        sidecar = json.loads(path.read_text())
        if not isinstance(sidecar, dict) or not set(names) <= set(sidecar.get("tensors", ())):
            continue
        needed = sidecar["mert_weights"] if "raw.hidden_states" in names else sidecar["weights"]
        if (golden_dir / needed).is_file():
            found.append((path, sidecar, load_file(path.with_suffix(".safetensors"))))
    return found


def close(ours: Tensor, stored: Tensor, what: str) -> None:
    assert ours.shape == stored.shape, what
    assert float((ours - stored).abs().max()) <= ATOL, what


def test_the_committed_goldens_cover_both_branches() -> None:
    folder = HERE / "golden"
    assert cases_with(folder, "input_ids", "position_ids", "hidden_states")
    assert cases_with(folder, "s1.inputs_embeds", "s7.inputs_embeds")


@torch.no_grad()
def test_text_encoder_matches(golden: Path) -> None:
    for path, sidecar, g in cases_with(golden, "input_ids", "position_ids", "hidden_states"):
        model = text_of(sidecar["config"], load_file(golden / sidecar["weights"]))
        ids, mask = g["input_ids"], g["attention_mask"]
        positions = position_ids(ids.numpy())
        np.testing.assert_array_equal(positions, g["position_ids"].numpy())
        seen: dict[str, Tensor] = {}
        feature = model(ids, torch.from_numpy(positions), mask, collect=seen)
        close(feature, g["feature_f32"], path.name)
        close(seen["pooled"], g["pooled"], path.name)
        real = mask.bool()
        for i in range(model.config.n_layers + 1):
            close(seen[f"hidden{i}"][real], g["hidden_states"][i][real], f"{path.name} hidden {i}")
        stage = TextEncoderStage(model)
        for row in range(len(ids)):  # the true length, as the runtime calls it
            n = int(mask[row].sum())
            own = stage(ids[row : row + 1, :n], torch.from_numpy(positions[row : row + 1, :n]))
            close(own[0], g["feature_f32"][row], f"{path.name} row {row} unpadded")


@torch.no_grad()
def test_audio_encoder_matches(golden: Path) -> None:
    for path, sidecar, g in cases_with(golden, "s1.inputs_embeds", "s7.inputs_embeds"):
        model = audio_of(sidecar["config"], load_file(golden / sidecar["weights"]))
        for tag in sorted({k.split(".")[0] for k in g}):
            x, mask = g[f"{tag}.inputs_embeds"], g[f"{tag}.attention_mask"]
            seen: dict[str, Tensor] = {}
            close(model(x, mask, collect=seen), g[f"{tag}.feature_f32"], f"{path.name} {tag}")
            close(seen["pooled"], g[f"{tag}.pooled"], f"{path.name} {tag}")
            for i in range(model.config.n_layers + 1):
                real = mask.bool()
                close(seen[f"hidden{i}"][real], g[f"{tag}.hidden_states"][i][real], f"{tag} hidden {i}")
            if x.shape[1] == 1:
                close(model.forward_single(x[:, 0]), g[f"{tag}.feature_f32"], f"{path.name} {tag} single")


@torch.no_grad()
def test_mert_matches(golden: Path) -> None:
    for path, sidecar, g in cases_with(golden, "waveform", "raw.hidden_states"):
        model = mert_of(sidecar["config"], load_file(golden / sidecar["mert_weights"]))
        folded = model.encoder.pos_conv_embed.conv.weight
        assert float((folded - g["pos_conv_weight_folded"]).abs().max()) <= 1e-6
        waveform = g["waveform"][None]
        inputs = {"raw": waveform, "norm": normalize_waveform(waveform)}
        for tag, x in inputs.items():
            close(x, g[f"{tag}.input_values"], f"{path.name} {tag}")
            seen: dict[str, Tensor] = {}
            close(model(x, collect=seen)[0], g[f"{tag}.layer_mean"], f"{path.name} {tag}")
            for i in range(model.config.n_layers + 1):
                close(seen[f"hidden{i}"][0], g[f"{tag}.hidden_states"][i], f"{path.name} {tag} hidden {i}")
            last = len(model.config.conv_kernels) - 1
            stored = {
                "conv_out": seen[f"conv{last}"],
                "projected": seen["projected"],
                "pos_conv": seen["pos_conv"],
            }
            for name in (k for k in g if k.startswith(f"{tag}.conv") and k.endswith("_head")):
                conv = seen[name.removeprefix(f"{tag}.").removesuffix("_head")]
                close(conv[..., : g[name].shape[-1]], g[name], name)
            for name, value in stored.items():
                if f"{tag}.{name}" in g:
                    close(value, g[f"{tag}.{name}"], f"{path.name} {tag} {name}")


def test_the_released_file_layout_loads(golden: Path) -> None:
    for file in sorted(golden.glob("clamp3_*release*.pth")):
        sidecars = [json.loads(p.read_text()) for p in golden.glob("clamp3_small_clamp3*.json")]
        checkpoint = torch.load(file, weights_only=True, mmap=True)
        for sidecar in sidecars:
            assert {k: list(v.shape) for k, v in checkpoint["model"].items()} == {
                k: v["shape"] for k, v in sidecar["tensors"].items()
            }
            text_of(sidecar["config"], checkpoint["model"])
            audio_of(sidecar["config"], checkpoint["model"])


def meta(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {k: torch.empty(v, device="meta") for k, v in shapes.items()}


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in tensors.items()}


def count(tensors: dict[str, Tensor]) -> int:
    return sum(v.numel() for v in tensors.values())


def test_full_size_clamp3_has_the_released_keys() -> None:
    groups = {use: meta(shapes) for use, shapes in KEYS["clamp3"].items()}
    totals = KEYS["totals"]["clamp3"]
    everything = {k: v for group in groups.values() for k, v in group.items()}
    assert (len(everything), count(everything)) == (totals["total"]["tensors"], totals["total"]["params"])
    with torch.device("meta"):
        text, audio = Clamp3Text(Clamp3TextConfig()), Clamp3Audio(Clamp3AudioConfig())
    own = select_weights(everything, drop=TEXT_DEAD_KEYS, keep=TEXT_KEYS)
    assert shapes_of(own) == shapes_of(groups["text"]) == shapes_of(text.state_dict())
    assert count(text.state_dict()) == totals["text"]["params"]
    own = select_weights(everything, drop=AUDIO_DEAD_KEYS, keep=AUDIO_KEYS)
    wanted = {**groups["audio"], **groups["audio_dead_at_S1"]}
    assert shapes_of(own) == shapes_of(wanted) == shapes_of(audio.state_dict())
    assert count(audio.state_dict()) == totals["audio"]["params"] + totals["audio_dead_at_S1"]["params"]


@pytest.mark.parametrize("spelling", ["legacy", "parametrized"])
def test_full_size_mert_has_the_released_keys(spelling: str) -> None:
    groups = {use: meta(shapes) for use, shapes in KEYS["mert"].items()}
    totals = KEYS["totals"]["mert"]
    assert count(groups["audio"]) == totals["audio"]["params"]
    alias = KEYS["mert_alias"] if spelling == "parametrized" else {}
    stored = {alias.get(k, k): v for group in groups.values() for k, v in group.items()}
    assert len(stored) == totals["total"]["tensors"]
    with torch.device("meta"):
        model = Mert(MertConfig())
    own = fold_positional_conv(select_weights(stored, drop=mert_file.DEAD_KEYS))
    assert shapes_of(own) == shapes_of(model.state_dict())
    # the gain is folded into the direction
    assert count(model.state_dict()) == totals["audio"]["params"] - model.config.pos_conv_kernel


def test_weight_norm_runs_along_the_kernel_axis() -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(8, 8, 6, groups=2)
    normed = nn.utils.parametrizations.weight_norm(conv, dim=2)
    with torch.no_grad():
        normed.parametrizations.weight.original0.mul_(torch.rand(1, 1, 6) + 0.5)
    prefix = "encoder.pos_conv_embed.conv."
    new = {prefix + k: v for k, v in normed.state_dict().items()}
    spelled = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    old = {prefix + spelled.get(k, k): v for k, v in normed.state_dict().items()}
    for stored in (new, old):
        folded = fold_positional_conv(stored)
        assert set(folded) == {prefix + "weight", prefix + "bias"}
        torch.testing.assert_close(folded[prefix + "weight"], normed.weight.detach(), rtol=0, atol=1e-6)
        assert fold_positional_conv(folded)[prefix + "weight"] is folded[prefix + "weight"]
    for lost in (prefix + "weight_g", prefix + "weight_v"):
        with pytest.raises(CheckpointError, match=lost):
            fold_positional_conv({k: v for k, v in old.items() if k != lost})
    with pytest.raises(CheckpointError, match="got neither"):
        fold_positional_conv({})


RELEASED_JSON = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "layer_norm_eps": 1e-5,
    "feature_extractor_cqt": False,
    "attention_relax": -1.0,
    "mask_time_prob": 0.05,
}


def test_mert_config_reads_the_folder() -> None:
    assert MertConfig.from_json(RELEASED_JSON) == MertConfig() == MertConfig.from_json({})
    small = MertConfig.from_json(RELEASED_JSON | {"conv_dim": [8, 16, 8, 8, 8, 8, 24], "hidden_size": 48})
    assert (small.conv_channels, small.hidden_size) == ((8, 16, 8, 8, 8, 8, 24), 48)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("feature_extractor_cqt", True),
        ("attention_relax", 32.0),
        ("deepnorm", True),
        ("do_stable_layer_norm", True),
        ("feat_extract_norm", "layer"),
        ("feat_extract_activation", "relu"),
        ("hidden_act", "gelu_new"),
        ("feat_proj_layer_norm", False),
        ("conv_bias", True),
        ("conv_bias", 0),
        ("conv_pos_batch_norm", True),
        ("hidden_size", "768"),
        ("hidden_size", True),
        ("hidden_size", 0),
        ("num_attention_heads", 7),
        ("num_conv_pos_embedding_groups", 7),
        ("conv_dim", 512),
        ("conv_dim", [512] * 6),
        ("conv_kernel", [10, 3, 3, 3, 3, 2, 2.5]),
        ("num_feat_extract_layers", 6),
        ("layer_norm_eps", None),
    ],
)
def test_mert_config_refuses_what_is_not_implemented(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match="MERT"):
        MertConfig.from_json({**RELEASED_JSON, key: value})


def test_mert_frame_counts() -> None:
    config = MertConfig()
    assert [config.n_frames(n) for n in (400, 719, 720, 1_440_000, 207_360)] == [1, 1, 2, 4499, 647]
    assert config.n_frames(399) == 0


def small_mert(**sizes: Any) -> Mert:
    torch.manual_seed(1)
    config = MertConfig(
        **{
            "hidden_size": 32,
            "n_layers": 2,
            "n_heads": 4,
            "intermediate_size": 40,
            "conv_channels": (8, 12, 8, 8, 16, 8, 24),
            "pos_conv_kernel": 16,
            "pos_conv_groups": 4,
            **sizes,
        }
    )
    return Mert(config).eval()


def small_text() -> Clamp3Text:
    torch.manual_seed(2)
    return Clamp3Text(Clamp3TextConfig(60, 32, 2, 4, 48, 140, 1, 1e-5, 24)).eval()


def small_audio() -> Clamp3Audio:
    torch.manual_seed(3)
    return Clamp3Audio(Clamp3AudioConfig(32, 2, 4, 48, 16, 2, 1e-12, 24)).eval()


@torch.no_grad()
@pytest.mark.parametrize("kernel", [16, 15])
def test_mert_equals_the_spec_written_out(kernel: int) -> None:
    """Section 4 of the spec in float64 with explicit loops over heads, groups and taps."""
    model = small_mert(pos_conv_kernel=kernel, n_layers=1)
    w = {k: v.double() for k, v in model.state_dict().items()}
    waveform = torch.randn(1, 1500) * 0.1
    x = waveform.double()[None]
    for i, stride in enumerate(model.config.conv_strides):
        name = f"feature_extractor.conv_layers.{i}"
        taps = x.unfold(-1, w[f"{name}.conv.weight"].shape[-1], stride)  # [1, C, T, k]
        x = torch.einsum("bctk,ock->bot", taps, w[f"{name}.conv.weight"])
        if i == 0:
            mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
            x = (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.layer_norm.weight"][:, None]
            x = x + w[f"{name}.layer_norm.bias"][:, None]
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))

    def norm(h: Tensor, name: str) -> Tensor:
        var = h.var(-1, keepdim=True, unbiased=False)
        return (h - h.mean(-1, keepdim=True)) / (var + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(h: Tensor, name: str) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    z = linear(norm(x[0].T, "feature_projection.layer_norm"), "feature_projection.projection")  # [T, H]
    t, padded = len(z), F.pad(z, (0, 0, kernel // 2, kernel))
    conv, per_group = "encoder.pos_conv_embed.conv", 32 // model.config.pos_conv_groups
    pos = torch.zeros_like(z)
    for out in range(32):
        first = out // per_group * per_group
        for tap in range(kernel):
            pos[:, out] += padded[tap : tap + t, first : first + per_group] @ w[f"{conv}.weight"][out, :, tap]
    pos = pos + w[f"{conv}.bias"]
    h0 = norm(z + pos * 0.5 * (1 + torch.erf(pos / 2**0.5)), "encoder.layer_norm")
    layer, heads = "encoder.layers.0", []
    for head in range(4):
        part = slice(head * 8, head * 8 + 8)
        q, k, v = (linear(h0, f"{layer}.attention.{n}_proj")[:, part] for n in "qkv")
        heads.append(torch.softmax(q @ k.T / 8**0.5, -1) @ v)
    a = norm(h0 + linear(torch.cat(heads, -1), f"{layer}.attention.out_proj"), f"{layer}.layer_norm")
    up = linear(a, f"{layer}.feed_forward.intermediate_dense")
    down = linear(up * 0.5 * (1 + torch.erf(up / 2**0.5)), f"{layer}.feed_forward.output_dense")
    h1 = norm(a + down, f"{layer}.final_layer_norm")
    close(model(waveform)[0], ((h0 + h1) / 2).float(), "layer mean")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_stay_in_float32(dtype: torch.dtype) -> None:
    audio = small_audio()
    quiet = torch.full((1, 32), 1e-4) * torch.linspace(-1, 1, 32)  # its variance underflows in half precision
    feature = audio.to(dtype).forward_single(quiet.to(dtype))
    assert torch.isfinite(feature).all()
    mert = small_mert().to(dtype)
    loud = mert(torch.randn(1, 4000) * 300)  # squares overflow in half precision
    assert loud.dtype == dtype
    assert torch.isfinite(loud).all()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ParamError):
        Clamp3AudioConfig(hidden_size=30)
    with pytest.raises(ParamError):
        Clamp3TextConfig(n_heads=7)
    with pytest.raises(ParamError):
        MertConfig(conv_strides=(5,))
    with pytest.raises(ParamError, match="one hidden_size"):
        RefEncoderStage(small_mert(hidden_size=16), small_audio(), False)


def export_onnx(
    stage: nn.Module, args: tuple[Tensor, ...], shapes: dict[str, Any], outputs: list[str], file: Path
) -> Any:
    import onnx
    import onnxruntime

    program = torch.onnx.export(
        stage,
        args,
        input_names=list(shapes),
        output_names=outputs,
        dynamo=True,
        opset_version=23,
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    program.save(file)
    graph = onnx.load(file).graph
    ops = {node.op_type for node in graph.node}
    assert ops <= TENSORRT_OPS
    assert {"Attention", "LayerNormalization", "Gelu"} <= ops
    assert [i.name for i in graph.input] == list(shapes)
    assert [o.name for o in graph.output] == outputs
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def test_the_text_stage_runs_in_onnx_runtime(tmp_path: Path) -> None:
    stage = TextEncoderStage(small_text())
    s = torch.export.Dim("S", min=2, max=128)
    example = (torch.randint(5, 60, (1, 9)), torch.arange(2, 11)[None])
    shapes = {"ids": {1: s}, "positions": {1: s}}
    session = export_onnx(stage.eval(), example, shapes, ["feature"], tmp_path / "text.onnx")
    engine = TorchEngine(stage, ["feature"])
    for n in (2, 3, 34, 128):
        ids = np.random.default_rng(n).integers(0, 60, (1, n))
        inputs = {"ids": ids, "positions": position_ids(ids)}
        feature = engine.run(**inputs)["feature"]
        assert feature.shape == (1, 24)
        np.testing.assert_allclose(session.run(None, inputs)[0], feature, rtol=0, atol=1e-5)


@pytest.mark.parametrize("do_normalize", [False, True])
def test_the_reference_stage_runs_in_onnx_runtime(tmp_path: Path, do_normalize: bool) -> None:
    stage = RefEncoderStage(small_mert(), small_audio(), do_normalize)
    example = (torch.randn(1, 8000), torch.zeros(1, 32), torch.zeros(1))
    shapes: dict[str, Any] = {"waveform": {1: torch.export.Dim("n", min=720, max=1_440_000)}}
    shapes |= {"frame_sum": None, "frame_count": None}
    outputs = ["frame_sum_out", "frame_count_out", "feature"]
    session = export_onnx(stage.eval(), example, shapes, outputs, tmp_path / "ref.onnx")
    engine = TorchEngine(stage, outputs)
    for n, before in ((720, 0), (721, 5), (1039, 0), (1040, 5), (8000, 4499), (24000, 0)):
        rng = np.random.default_rng(n)
        inputs = {
            "waveform": rng.normal(0, 0.1, (1, n)).astype(np.float32),
            "frame_sum": (before * rng.normal(size=(1, 32))).astype(np.float32),
            "frame_count": np.array([before], dtype=np.float32),
        }
        ours = engine.run(**inputs)
        theirs = dict(zip(outputs, session.run(None, inputs), strict=True))
        total = before + stage.mert.config.n_frames(n)
        assert ours["frame_count_out"] == theirs["frame_count_out"] == [total]
        np.testing.assert_allclose(theirs["feature"], ours["feature"], rtol=0, atol=1e-5)
        # a sum over frames carries their number times the error of one
        error = np.abs(theirs["frame_sum_out"] - ours["frame_sum_out"]).max()
        assert error / total <= 1e-5
