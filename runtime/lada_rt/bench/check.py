"""Is the result right that is about to be timed? One run of every configuration is taken apart and compared.

Each network's inputs and outputs are recorded in a real run and evaluated again by a reference: the bundle's graph, as
it was exported and proven, in ONNX Runtime on the CPU with all graph optimisation off. What lies between the networks
is recomputed in plain numpy: how many positions stay masked, whether each committed token lies in the nucleus, one
Euler step, the waveform in a single pass, and where a second window goes on from the first (seams.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lada_rt.bench.difference import relative_error
from lada_rt.bench.seams import context_error, next_state, right_channel_error, seam_error, second_window_error
from lada_rt.bundle import Bundle
from lada_rt.decode import VOCODER_HALO_FRAMES, LatentStats
from lada_rt.engines.base import Engine
from lada_rt.engines.onnxruntime import load_onnxruntime
from lada_rt.errors import EngineError
from lada_rt.params import GenerationParams
from lada_rt.schedule import mask_counts

__all__ = ["OnnxReference", "Recorder", "Reference", "check_run", "relative_error"]

#: largest difference over largest reference value, by the precision of the timed stage
TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 8e-2}
#: share of encoder codes that may differ: two codewords can be equally near within rounding
CODE_MISMATCH = 0.01
#: stages whose graph is larger are loaded for one evaluation and dropped
KEEP_BYTES = 1 << 30
#: results that are larger are not kept: logits, which no two runs share
KEEP_RESULT_BYTES = 16 << 20

#: evaluates a stage on recorded inputs
Reference = Callable[[str, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class OnnxReference:
    """The bundle's own graphs without optimisation. Results are kept by input, as runs share many."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._engines: dict[str, Any] = {}
        self._results: dict[bytes, Mapping[str, np.ndarray]] = {}

    def __call__(self, stage: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        key = _digest(stage, inputs)
        if key not in self._results:
            engine = self._engines.pop(stage, None) or _plain_session(self._bundle, stage)
            try:
                values = engine.run(None, dict(inputs))
            except Exception as error:
                raise EngineError(
                    f"check: the reference of stage {stage} cannot run on this CPU ({_one_line(error)}); "
                    "name an fp32 bundle of the same weights with --reference-bundle"
                ) from error
            results = dict(zip((o.name for o in engine.get_outputs()), values, strict=True))
            if self._bundle.stages[stage].bytes <= KEEP_BYTES:
                self._engines[stage] = engine
            if sum(value.nbytes for value in values) > KEEP_RESULT_BYTES:
                return results
            self._results[key] = results
        return self._results[key]

    def release(self) -> None:
        """Let go of the loaded graphs and of results, for memory is measured next."""
        self._engines.clear()
        self._results.clear()


def _plain_session(bundle: Bundle, stage: str) -> Any:
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # memory kept for later runs would count as the runtime's
    options.log_severity_level = 3
    path = bundle.file_path(bundle.stages[stage].graph)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EngineError(
            f"check: the reference of stage {stage} cannot be loaded on this CPU ({_one_line(error)}); "
            "name an fp32 bundle of the same weights with --reference-bundle"
        ) from error


def _digest(stage: str, inputs: Mapping[str, np.ndarray]) -> bytes:
    digest = hashlib.blake2b(stage.encode(), digest_size=16)
    for name in sorted(inputs):
        digest.update(f"{name}{inputs[name].shape}{inputs[name].dtype}".encode())
        digest.update(np.ascontiguousarray(inputs[name]).tobytes())
    return digest.digest()


class Recorder:
    """Engines that note what a run asked of them: all denoiser rows, and the inputs and outputs of chosen calls."""

    def __init__(self, engines: Mapping[str, Engine], n_steps: int, flow_steps: int) -> None:
        chosen = {
            "denoiser": {0, n_steps // 2, n_steps - 1},
            # first, second and last step of the first window, first step of the second
            "flow": {0, 1, flow_steps - 1, flow_steps},
            # left, right, and left of the second window
            "mel_decoder": {0, 1, 2},
        }
        self.rows: list[np.ndarray] = []
        self.states: list[np.ndarray] = []
        self.calls: dict[str, dict[int, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]] = {}
        self.engines: dict[str, Engine] = {
            name: _Recorded(name, engine, self, chosen.get(name, {0})) for name, engine in engines.items()
        }


class _Recorded:
    def __init__(self, name: str, engine: Engine, recorder: Recorder, chosen: set[int]) -> None:
        self._name, self._engine, self._recorder, self._chosen = name, engine, recorder, chosen
        self._n_calls = 0

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        index, self._n_calls = self._n_calls, self._n_calls + 1
        if self._name == "denoiser":
            self._recorder.rows.append(inputs["rows"].copy())
            self._recorder.states.append(inputs["codes"][0].copy())
        kept = {name: array.copy() for name, array in inputs.items()} if index in self._chosen else {}
        outputs = self._engine.run(**inputs)
        if kept:
            copies = {name: array.copy() for name, array in outputs.items()}
            self._recorder.calls.setdefault(self._name, {})[index] = (kept, copies)
        return outputs


def check_run(
    bundle: Bundle,
    recorder: Recorder,
    params: GenerationParams,
    codes: np.ndarray,
    audio: np.ndarray,
    reference: Reference,
) -> dict[str, float]:
    """Compare a recorded run with the reference.

    Args:
        bundle: what was run.
        recorder: of the run.
        params: of the run.
        codes: [T], its codes.
        audio: [2, N], its audio.
        reference: evaluates a stage.

    Returns:
        The largest error of each comparison, by name.

    Raises:
        EngineError: a comparison fails. A wrong result has no speed.
    """
    errors: dict[str, float] = {}
    limits: dict[str, float] = {}

    def note(name: str, error: float, limit: float) -> None:
        errors[name] = max(errors.get(name, 0.0), error)
        limits[name] = limit

    references: dict[tuple[str, int], Mapping[str, np.ndarray]] = {}
    for stage, calls in recorder.calls.items():
        if stage not in bundle.stages:
            continue  # a part of a stage that a backend has split
        limit = CODE_MISMATCH if stage == "encoder" else TOLERANCES[bundle.stages[stage].precision]
        for index, (inputs, outputs) in calls.items():
            if stage == "vocoder" or (stage == "mel_decoder" and index > 0):
                continue  # the vocoder is compared below, in one pass; one mel is like another
            expected = references[stage, index] = reference(stage, inputs)
            note(stage, max(relative_error(outputs[name], value) for name, value in expected.items()), limit)
    note("schedule", _schedule_error(recorder, params, len(codes)), 0.0)
    limit = TOLERANCES[bundle.stages["denoiser"].precision]
    for index in recorder.calls["denoiser"]:
        logits = references["denoiser", index]["logits"]
        note("nucleus", _outside_nucleus(recorder, index, logits, codes, bundle.mask_id, params, limit), 0.0)
    note("euler", _euler_error(recorder, params), 1e-5)
    note("window", _window_error(recorder, codes, bundle), 0.0)
    expected_audio = _single_pass(bundle, recorder, audio, reference)
    precision = bundle.stages["vocoder"].precision
    note("vocoder", relative_error(audio[0, : len(expected_audio)], expected_audio), TOLERANCES[precision])
    constants = bundle.constants()
    stats = LatentStats(constants["latent_mean"], constants["latent_std"])
    note("right channel", right_channel_error(bundle.geometry, recorder.calls, audio, reference), TOLERANCES[precision])
    note("second window", second_window_error(bundle.geometry, recorder.calls, codes, params), 0.0)
    note("context", context_error(bundle.geometry, recorder.calls, params, stats), 1e-4)
    note("seam", seam_error(bundle.geometry, recorder.calls, audio, reference), TOLERANCES[precision])
    n_samples = bundle.geometry.n_samples(len(codes))
    finite = audio.shape == (2, n_samples) and bool(np.isfinite(audio).all()) and float(np.abs(audio).max()) <= 1.0
    in_range = bool(((codes >= 0) & (codes < bundle.vocab_size)).all())
    note("form", 0.0 if finite and in_range else 1.0, 0.0)
    for name, error in errors.items():
        if not error <= limits[name]:
            raise EngineError(
                f"check: {name} differs from the reference by {error:.2e}, allowed {limits[name]:.0e}, with "
                f"{params.steps} steps and {len(codes)} codes; nothing is timed, rebuild the bundle or its engines"
            )
    return {name: float(f"{error:.3e}") for name, error in errors.items()}


def _schedule_error(recorder: Recorder, params: GenerationParams, n_frames: int) -> float:
    """1 unless exactly the known numbers of positions were masked, each of them one that was masked before."""
    n_steps = len(recorder.rows)
    expected = [n_frames, *mask_counts(n_frames, n_steps, params.schedule)[:-1]]
    counts = [len(rows) for rows in recorder.rows] == expected
    nested = all(np.isin(b, a).all() for a, b in zip(recorder.rows, recorder.rows[1:], strict=False))
    return 0.0 if counts and nested else 1.0


def _outside_nucleus(
    recorder: Recorder,
    index: int,
    logits: np.ndarray,
    codes: np.ndarray,
    mask_id: int,
    params: GenerationParams,
    tolerance: float,
) -> float:
    """Share of the tokens committed in step `index` that the filters remove (spec/lada_band d.4, on full sorts)."""
    rows = recorder.rows[index]
    after = recorder.states[index + 1] if index + 1 < len(recorder.states) else codes
    committed = np.flatnonzero(after[rows] != mask_id)
    if len(committed) == 0:
        return 0.0
    x = logits[committed].astype(np.float64)
    ordered = -np.sort(-x, axis=1)
    weights = np.exp(ordered - ordered[:, :1])
    before = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True) - weights / weights.sum(
        axis=1, keepdims=True
    )
    n_kept = (before <= params.top_p + tolerance).sum(axis=1)
    n_kept = np.minimum(n_kept, params.top_k or x.shape[1])
    lowest = ordered[np.arange(len(committed)), n_kept - 1]
    drawn = x[np.arange(len(committed)), after[rows[committed]]]
    return float(np.mean(drawn < lowest - tolerance * np.abs(x).max()))


def _euler_error(recorder: Recorder, params: GenerationParams) -> float:
    """The second state of the first window against an Euler step from the first (spec/mucodec 3.4)."""
    calls = recorder.calls["flow"]
    if 1 not in calls or params.flow_steps < 2:
        return 0.0
    return relative_error(calls[1][0]["x"][0], next_state(calls[0], params))


def _window_error(recorder: Recorder, codes: np.ndarray, bundle: Bundle) -> float:
    """Share of the first window's codes that are not those of the song, repeated."""
    given = recorder.calls["flow"][0][0]["codes"][0]
    return float(np.mean(given != codes[np.arange(bundle.geometry.window_codes) % len(codes)]))


def _single_pass(bundle: Bundle, recorder: Recorder, audio: np.ndarray, reference: Reference) -> np.ndarray:
    """Left channel of the first window up to the crossfade, vocoded in one pass: [n] float32."""
    geometry = bundle.geometry
    n_samples = min(audio.shape[1], geometry.hop_samples)
    n_frames = -(-n_samples // geometry.samples_per_mel_frame)
    mel = recorder.calls["mel_decoder"][0][1]["mel"][:1, :, : n_frames + VOCODER_HALO_FRAMES]
    return reference("vocoder", {"mel": np.ascontiguousarray(mel)})["waveform"][0, :n_samples]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
