"""The masked-diffusion loop with the real network: whole recorded trajectories, closed loop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden_io import read_sidecar, read_tensors
from golden_weights import select_weights
from lada_rt import _C
from lada_rt.cpus import cpu_count
from lada_rt.denoise import RecordedNoise, denoise
from lada_rt.errors import EngineError
from lada_rt.params import GenerationParams
from lada_rt.pipeline import Pipeline
from lada_rt_export.models.mask_predictor import (
    DEAD_KEYS,
    KEY_PREFIX,
    RTD_KEYS,
    MaskPredictor,
    MaskPredictorConfig,
)
from lada_rt_export.models.stages_denoiser import DenoiserStage
from lada_rt_export.torch_engine import TorchEngine
from stubs import stub_pipeline, sung

# Every trajectory; not the weights, not the autoregressive ablation.
GOLDEN_PATTERN = "lada_band_gen_[!wa]*.json"


class Recorder:
    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine
        self.codes_in: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.codes_in.append(inputs["codes"][0].copy())
        self.rows.append(inputs["rows"].copy())
        return self.engine.run(**inputs)


def denoiser_of(golden: Path, sidecar: dict) -> TorchEngine:
    c = sidecar["config"]
    config = MaskPredictorConfig(
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
    )
    network = MaskPredictor(config)
    weights = read_tensors((golden / sidecar["weights"]).with_suffix(".json"))
    network.load_state_dict(select_weights(weights, prefix=KEY_PREFIX, drop=(*DEAD_KEYS, *RTD_KEYS)))
    return TorchEngine(DenoiserStage(network), ["logits"])


def test_closed_loop_matches_golden(golden: Path, golden_case: Path) -> None:
    sidecar, tensors = read_sidecar(golden_case), read_tensors(golden_case)
    args = sidecar["args"]
    engine = Recorder(denoiser_of(golden, sidecar))
    prefix = tensors.get("clamp_embeds", torch.zeros(1, 0, sidecar["config"]["clamp_dim"]))
    select_noise = tensors.get("select_noise")
    params = GenerationParams(
        steps=args["sampling_steps"],
        schedule=args.get("remask_ratios") or args["remask_schedule"],
        strategy=args["remask_strategy"],
        top_k=args["top_k"],
        top_p=1.0 if args["top_p"] is None else args["top_p"],
        temperature=args["temperature"],
        mask_temperature=args["mask_temperature"],
    )
    codes = denoise(
        engine,
        tensors["voc_ids"].flatten().numpy(),
        prefix.reshape(-1, prefix.shape[-1]).numpy(),
        params,
        sidecar["config"]["acc_mask"],
        recorded=RecordedNoise(
            draw=tensors["exp_noise"].numpy(), remask=None if select_noise is None else select_noise.numpy()
        ),
    )
    steps = sidecar["steps_executed"]
    assert len(engine.codes_in) == steps
    for step in range(steps):
        given = tensors["acc_ids_in"][step].numpy()
        np.testing.assert_array_equal(engine.codes_in[step], given, err_msg=f"input of step {step}")
        np.testing.assert_array_equal(engine.rows[step], np.flatnonzero(given == sidecar["config"]["acc_mask"]))
    np.testing.assert_array_equal(codes, tensors["final_tokens"].flatten().numpy())


class Constant:
    """Every row wants token 3."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def run(self, *, rows: np.ndarray, **_: np.ndarray) -> dict[str, np.ndarray]:
        logits = np.full((len(rows), 8), self.value, np.float32)
        logits[:, 3] += 20
        return {"logits": logits}


@pytest.mark.parametrize("n_frames", [1, 2, 7])
@pytest.mark.parametrize("strategy", ["low_confidence", "random", "fixed_position", "one_shot"])
def test_everything_is_drawn(n_frames: int, strategy: str) -> None:
    params = GenerationParams(steps=5, strategy=strategy, top_k=1)
    codes = denoise(Constant(), np.zeros(n_frames, np.int64), np.zeros((0, 4), np.float32), params, 8)
    np.testing.assert_array_equal(codes, 3)


def test_the_last_step_keeps_all_whatever_the_ratios_say() -> None:
    params = GenerationParams(steps=3, schedule=[0.9, 0.8, 0.7], top_k=1)
    codes = denoise(Constant(), np.zeros(10, np.int64), np.zeros((0, 4), np.float32), params, 8)
    np.testing.assert_array_equal(codes, 3)


def test_nothing_to_draw_is_what_is_known() -> None:
    known = np.arange(4)
    codes = denoise(Constant(), np.zeros(4, np.int64), np.zeros((0, 4), np.float32), GenerationParams(), 8, known=known)
    np.testing.assert_array_equal(codes, known)
    assert codes is not known


def test_the_pipelines_threads_reach_the_sampler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--threads 1` means one, in the draw too."""
    asked = []
    draw = _C.sample

    def sample(*args: Any, n_threads: int, **options: Any) -> Any:
        asked.append(n_threads)
        return draw(*args, n_threads=n_threads, **options)

    monkeypatch.setattr("lada_rt.denoise._C", SimpleNamespace(sample=sample, remask=_C.remask))
    host = stub_pipeline(tmp_path)
    pipe = Pipeline(host.bundle, host._engines, backend="stub", device="cpu", n_threads=3)
    result = pipe.generate((sung(4800), 48_000), params=GenerationParams(steps=2, flow_steps=1))
    pipe.regenerate(result, 0.0, 0.04)
    assert set(asked) == {3}
    asked.clear()
    host.generate((sung(4800), 48_000), params=GenerationParams(steps=2, flow_steps=1))
    assert set(asked) == {cpu_count()}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_the_engines_fault(value: float) -> None:
    with pytest.raises(EngineError, match="denoiser"):
        denoise(Constant(value), np.zeros(4, np.int64), np.zeros((0, 4), np.float32), GenerationParams(steps=2), 8)
