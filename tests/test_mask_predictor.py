"""The mask predictor against the released classes' goldens, and its stage against ONNX Runtime."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_weights import select_weights
from lada_rt.errors import EngineError, ParamError
from lada_rt_export.models.mask_predictor import (
    DEAD_KEYS,
    FOREIGN_KEYS,
    KEY_PREFIX,
    RTD_KEYS,
    MaskPredictor,
    MaskPredictorConfig,
    rope_tables,
)
from lada_rt_export.models.stages_denoiser import MAX_POSITIONS, DenoiserStage
from lada_rt_export.onnx_check import operators
from lada_rt_export.torch_engine import TorchEngine
from safetensors.torch import load_file
from torch import Tensor

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

GOLDEN_PATTERN = "lada_band_fwd_*.json"
HERE = Path(__file__).resolve().parent
KEYS = json.loads((HERE / "data" / "lada_band_keys.json").read_text())
TENSORRT_OPS = set(operators())


def config_of(sidecar: dict[str, Any], rtd_head: bool = True) -> MaskPredictorConfig:
    c = sidecar["config"]
    return MaskPredictorConfig(
        hidden_size=c["hidden_size"],
        n_layers=c["num_hidden_layers"],
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        intermediate_size=c["intermediate_size"],
        n_vocal_codes=c["voc_size"],
        n_codes=c["acc_size"],
        condition_size=c["clamp_dim"],
        rope_theta=c["rope_theta"],
        rms_norm_eps=c["rms_norm_eps"],
        rtd_head=rtd_head and bool(c.get("rtd_head")),
    )


def load(case: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sidecar = json.loads(case.read_text())
    file = case.with_suffix(".safetensors")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == sidecar["sha256"], f"{file.name} is damaged"
    return sidecar, load_file(file)


def network(case: Path, sidecar: dict[str, Any], rtd_head: bool = True) -> MaskPredictor:
    config = config_of(sidecar, rtd_head)
    drop = DEAD_KEYS if config.rtd_head else (*DEAD_KEYS, *RTD_KEYS)
    stored = load_file(case.parent / sidecar["weights"])
    model = MaskPredictor(config)
    model.load_state_dict(select_weights(stored, KEY_PREFIX, drop), strict=True)
    return model.eval()


def random_network(seed: int = 0, **sizes: Any) -> MaskPredictor:
    torch.manual_seed(seed)
    config = MaskPredictorConfig(
        **{
            "hidden_size": 32,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "intermediate_size": 48,
            "n_vocal_codes": 40,
            "n_codes": 56,
            "condition_size": 24,
            **sizes,
        }
    )
    return MaskPredictor(config).eval()


def random_inputs(
    config: MaskPredictorConfig, t: int, p: int, r: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randint(config.n_vocal_codes, (1, t), generator=g),
        torch.randint(config.n_codes + 1, (1, t), generator=g),
        torch.randn(1, p, config.condition_size, generator=g),
        torch.randperm(t, generator=g)[:r],
    )


def max_error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max()) if a.numel() else 0.0


def relative_rms(a: Tensor, b: Tensor) -> float:
    return float(((a.float() - b).square().mean() / b.square().mean()).sqrt())


def is_causal(sidecar: dict[str, Any]) -> bool:
    # The sidecar has the flag of this ablation in words only.
    return bool(sidecar.get("causal", "causal_attention=True" in sidecar.get("note", "")))


@torch.no_grad()
def test_forward_matches_the_released_classes(golden_case: Path) -> None:
    sidecar, g = load(golden_case)
    if sidecar["kind"] == "weights":
        assert all(k.startswith(KEY_PREFIX) for k in g)
        return
    if sidecar["kind"] == "forward_bf16":
        check_bf16_budget(golden_case, sidecar, g)
        return
    assert sidecar["kind"] == "forward"
    limit = sidecar["tolerance"]["fp32_max_abs"]
    model = network(golden_case, sidecar)
    # Without a stored mask the release hides the frames of padded vocal codes.
    padded = g["voc_ids"] == model.config.vocal_pad
    key_mask = g["attention_mask"].bool() if "attention_mask" in g else ~padded if padded.any() else None
    checked = 0
    for name in [k for k in g if k == "logits" or k.startswith("logits_")]:
        tag = name.removeprefix("logits")
        none = torch.zeros(g["voc_ids"].shape[0], 0, model.config.condition_size)
        prefix = g.get(f"clamp_embeds{tag}", none)
        if prefix.shape[1] == 1:
            assert torch.equal(
                *(model(g["voc_ids"], g["acc_ids"], p, key_mask=key_mask) for p in (prefix, prefix[:, 0]))
            )
        seen: dict[str, Tensor] = {}
        causal = is_causal(sidecar)
        logits = model(g["voc_ids"], g["acc_ids"], prefix, key_mask=key_mask, causal=causal, collect=seen)
        assert max_error(logits, g[name]) <= limit, name
        checked += 1
        if tag:
            continue
        stages = {"input_embeds": "input_embeds", "last_hidden_state": "hidden"}
        stages |= {f"layer{i}_out": f"layer{i}_out" for i in range(model.config.n_layers)}
        for stored, ours in stages.items():
            if stored in g:
                assert max_error(seen[ours], g[stored]) <= limit, stored
        if "rtd_logits" in g:
            assert max_error(model.rtd_logits(seen["hidden"]), g["rtd_logits"]) <= limit
        t = g["voc_ids"].shape[1]
        for rows in (torch.arange(t), torch.tensor([t - 1]), torch.randperm(t)[: max(1, t // 3)]):
            part = model(g["voc_ids"], g["acc_ids"], prefix, rows=rows, key_mask=key_mask, causal=causal)
            assert max_error(part, g[name][:, rows + prefix.shape[1]]) <= limit
    assert checked, f"{golden_case.name} holds no logits"


def check_bf16_budget(case: Path, sidecar: dict[str, Any], g: dict[str, Tensor]) -> None:
    model = network(case, sidecar).to(torch.bfloat16)
    logits = model(g["voc_ids"], g["acc_ids"], g["clamp_embeds"])
    assert logits.dtype == torch.bfloat16
    budget = 2 * sidecar["vs_fp32"]["bf16_model"]["rms_rel"]
    assert relative_rms(logits, g["logits_fp32"]) <= budget
    # And weights rounded to bf16 under float32 arithmetic, which pins the weights' own share.
    widened = model.to(torch.float32)(g["voc_ids"], g["acc_ids"], g["clamp_embeds"])
    assert max_error(widened, g["logits_fp32_bf16weights"]) <= 2e-4


def test_the_committed_goldens_cover_every_kind() -> None:
    kinds: dict[str, int] = {}
    causal = padded = variants = 0
    for case in (HERE / "golden").glob(GOLDEN_PATTERN):
        sidecar = json.loads(case.read_text())
        kinds[sidecar["kind"]] = kinds.get(sidecar["kind"], 0) + 1
        causal += is_causal(sidecar)
        padded += "attention_mask" in sidecar["tensors"]
        variants += any(k.startswith("logits_") for k in sidecar["tensors"]) and sidecar["kind"] == "forward"
    assert kinds.get("weights")
    assert kinds.get("forward_bf16")
    assert kinds.get("forward", 0) >= 3
    assert causal
    assert padded
    assert variants


@torch.no_grad()
@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("mode", ["plain", "masked", "causal", "causal masked"])
def test_chosen_rows_equal_the_full_pass(p: int, n_layers: int, mode: str) -> None:
    model = random_network(n_layers=n_layers)
    vocal, codes, prefix, _ = random_inputs(model.config, 13, p, 1)
    batch = [x.expand(2, *x.shape[1:]) for x in (vocal, codes, prefix)]
    key_mask = torch.arange(13)[None] < torch.tensor([[13], [9]]) if "masked" in mode else None
    kwargs: dict[str, Any] = {"key_mask": key_mask, "causal": "causal" in mode}
    full = model(*batch, **kwargs)
    for rows in (torch.tensor([0]), torch.tensor([12, 3, 3, 7]), torch.arange(13)):
        assert max_error(model(*batch, rows=rows, **kwargs), full[:, rows + p]) <= 1e-6


@torch.no_grad()
def test_masked_keys_change_nothing() -> None:
    model = random_network()
    vocal, codes, prefix, _ = random_inputs(model.config, 9, 2, 1)
    padded_vocal = torch.cat((vocal, torch.full((1, 4), model.config.vocal_pad)), dim=1)
    padded_codes = torch.cat((codes, torch.full((1, 4), model.config.pad_id)), dim=1)
    key_mask = padded_vocal != model.config.vocal_pad
    padded = model(padded_vocal, padded_codes, prefix, key_mask=key_mask)[:, :11]
    assert max_error(padded, model(vocal, codes, prefix)) <= 1e-6


@torch.no_grad()
def test_a_causal_row_does_not_see_later_frames() -> None:
    model = random_network()
    vocal, codes, prefix, _ = random_inputs(model.config, 9, 1, 1)
    changed = codes.clone()
    changed[0, 5] = (changed[0, 5] + 1) % model.config.n_codes
    before, after = (model(vocal, c, prefix, causal=True) for c in (codes, changed))
    assert torch.equal(before[:, :6], after[:, :6])
    assert max_error(before[:, 6:], after[:, 6:]) > 1e-3


@torch.no_grad()
def test_norm_statistics_stay_in_float32() -> None:
    norm = random_network(hidden_size=64).lm.norm.to(torch.float16)
    x = torch.full((1, 1, 64), 600.0, dtype=torch.float16)  # its square overflows half precision
    assert max_error(norm(x).float(), torch.ones(1, 1, 64)) <= 1e-3


def test_rotary_angles_are_right_at_the_longest_song() -> None:
    for head_dim in (64, 128):
        cos, sin = rope_tables(MAX_POSITIONS, head_dim, 10000.0)
        assert cos.dtype == sin.dtype == torch.float32
        inv_freq = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
        angles = np.arange(MAX_POSITIONS)[:, None] * inv_freq
        # An angle of 9002 has a float32 spacing of 2**-10; half precision would be off by radians.
        assert np.abs(cos.numpy() - np.cos(angles)).max() <= 2**-10
        assert np.abs(sin.numpy() - np.sin(angles)).max() <= 2**-10


@torch.no_grad()
def test_half_precision_keeps_positions_apart_in_long_songs() -> None:
    model = random_network(hidden_size=64, seed=3)
    for name, weight in model.named_parameters():  # sharp attention, so that a wrong angle shows
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(8)
    inputs = random_inputs(model.config, 3000, 2, 64)
    full = model(*inputs)
    # Measured 0.023; positions rounded to bfloat16 before the product give 0.48 (second assertion).
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert relative_rms(half(*inputs), full) <= 0.04
    coarse = torch.arange(3002).to(torch.bfloat16).float()[:, None]
    angles = coarse * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    assert relative_rms(half(*inputs, rope=(angles.cos(), angles.sin())), full) > 0.1


@pytest.mark.parametrize("size", ["1B", "3B"])
def test_full_size_has_the_released_keys(size: str) -> None:
    table = KEYS[size]
    config = {"1B": MaskPredictorConfig.lm_1b, "3B": MaskPredictorConfig.lm_3b}[size]()
    c = table["config"]
    assert config.head_dim == c["head_dim"]
    assert (config.rope_theta, config.rms_norm_eps) == (c["rope_theta"], c["rms_norm_eps"])
    assert (config.vocal_pad, config.mask_id, config.pad_id) == (c["voc_pad"], c["acc_mask"], c["acc_pad"])
    stored = {k: torch.empty(v, device="meta") for k, v in table["keys"].items()}
    assert len(stored) == table["num_tensors"]
    with torch.device("meta"):
        plain = MaskPredictor(config)
    wanted = select_weights(stored, KEY_PREFIX, (*DEAD_KEYS, *RTD_KEYS))
    have = plain.state_dict()
    assert {k: v.shape for k, v in have.items()} == {k: v.shape for k, v in wanted.items()}
    assert sum(v.numel() for v in have.values()) == table["parameters_without_rtd_and_embed_tokens"]
    linear = sum(v.numel() for k, v in have.items() if k.startswith("lm.layers.") and "proj" in k)
    assert linear == table["layer_linear_parameters"]
    dropped = set(stored) - {KEY_PREFIX + k for k in wanted}
    assert dropped == {*table["optional_keys"], *table["unused_keys"]}


def test_other_groups_and_adapters_are_recognised() -> None:
    tensor = torch.zeros(1)
    keys = ("model.lm.norm.weight", "clamp3.model.lm.norm.weight", "model.lm.embed_tokens.weight")
    picked = select_weights({k: tensor for k in keys}, KEY_PREFIX, DEAD_KEYS)
    assert list(picked) == ["lm.norm.weight"]
    adapter = {"model.lm.layers.0.mlp.up_proj.lora_A": tensor, "model.to_logits.weight": tensor}
    assert list(select_weights(adapter, KEY_PREFIX, keep=FOREIGN_KEYS)) == ["lm.layers.0.mlp.up_proj.lora_A"]


@pytest.mark.parametrize(
    "sizes", [{"hidden_size": 30}, {"n_kv_heads": 3}, {"n_layers": 0}, {"hidden_size": 36, "n_heads": 4}]
)
def test_impossible_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ParamError, match="check the model size"):
        random_network(**sizes)


def test_the_replaced_token_head_is_optional() -> None:
    model = random_network()
    with pytest.raises(ParamError, match="rtd_head"):
        model.rtd_logits(torch.zeros(1, 1, 32))
    assert random_network(rtd_head=True).rtd_logits(torch.zeros(2, 3, 32)).shape == (2, 3)


INPUTS = ("vocal_codes", "codes", "prefix", "rows")


def export_onnx(stage: DenoiserStage, folder: Path) -> Path:
    dim = torch.export.Dim
    t = dim("T", min=1, max=stage.max_positions - 2)
    shapes = {"vocal_codes": {1: t}, "codes": {1: t}, "prefix": {1: dim("P", min=0, max=2)}}
    shapes["rows"] = {0: dim("R", min=1, max=stage.max_positions - 2)}
    program = torch.onnx.export(
        stage,
        random_inputs(stage.mask_predictor.config, 20, 2, 7),
        input_names=list(INPUTS),
        output_names=["logits"],
        dynamo=True,
        opset_version=23,
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    program.save(folder / "denoiser.onnx")
    return folder / "denoiser.onnx"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[DenoiserStage, Path]:
    # Grouped-query and a prefix, as in the release.
    stage = DenoiserStage(random_network(), max_positions=128).eval()
    return stage, export_onnx(stage, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def session(exported: tuple[DenoiserStage, Path]) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(exported[1], providers=["CPUExecutionProvider"])


def test_the_graph_uses_native_operators_that_tensorrt_takes(exported: tuple[DenoiserStage, Path]) -> None:
    import onnx

    graph = onnx.load(exported[1]).graph
    ops = {node.op_type for node in graph.node}
    assert ops <= TENSORRT_OPS
    assert {"Attention", "RMSNormalization", "RotaryEmbedding"} <= ops
    assert not {"Cos", "Sin", "Softmax", "ReduceMean"} & ops
    assert [i.name for i in graph.input] == list(INPUTS)
    assert [o.name for o in graph.output] == ["logits"]


@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize(("t", "r"), [(1, 1), (2, 1), (2, 2), (3, 3), (26, 1), (26, 11), (126, 1), (126, 126)])
def test_onnx_runtime_agrees(exported: tuple[DenoiserStage, Path], session: Any, t: int, r: int, p: int) -> None:
    stage = exported[0]
    inputs = {k: v.numpy() for k, v in zip(INPUTS, random_inputs(stage.mask_predictor.config, t, p, r), strict=True)}
    logits = TorchEngine(stage, ["logits"]).run(**inputs)["logits"]
    assert logits.shape == (r, stage.mask_predictor.config.n_codes)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(session.run(None, inputs)[0], logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_stage_equals_the_network() -> None:
    model = random_network()
    vocal, codes, prefix, rows = random_inputs(model.config, 50, 2, 9)
    full = model(vocal, codes, prefix)[0, rows + 2]
    assert max_error(DenoiserStage(model)(vocal, codes, prefix, rows), full) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_stage_in_half_precision_returns_float32(dtype: torch.dtype) -> None:
    model = random_network()
    inputs = random_inputs(model.config, 50, 2, 9)
    full = DenoiserStage(model, 64)(*inputs)
    before = DenoiserStage(copy.deepcopy(model).to(dtype), 64)
    after = DenoiserStage(copy.deepcopy(model), 64).to(dtype)
    assert torch.equal(before(*inputs), after(*inputs))
    assert before(*inputs).dtype == torch.float32
    # measured 6e-4 and 4.3e-3
    assert relative_rms(before(*inputs), full) <= {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


def test_the_stage_refuses_more_frames_than_its_table_holds() -> None:
    stage = DenoiserStage(random_network(), max_positions=16)
    with pytest.raises(RuntimeError):
        stage(*random_inputs(stage.mask_predictor.config, 15, 2, 3))
    with pytest.raises(ParamError):
        DenoiserStage(random_network(), max_positions=0)


def test_torch_engine_checks_names() -> None:
    engine = TorchEngine(DenoiserStage(random_network(), 16), ["logits", "extra"])
    inputs = {k: v.numpy() for k, v in zip(INPUTS, random_inputs(random_network().config, 3, 1, 1), strict=True)}
    with pytest.raises(EngineError, match="expected inputs vocal_codes"):
        engine.run(codes=inputs["codes"])
    with pytest.raises(EngineError, match="expected 2 outputs"):
        engine.run(**inputs)
