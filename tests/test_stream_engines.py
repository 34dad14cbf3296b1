"""Streaming on the real networks of the embedded demo bundle: blocks of the vocoder, chunks, threads."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from lada_rt import GenerationCancelled, GenerationParams, Pipeline
from lada_rt.decode import VOCODER_HALO_FRAMES
from lada_rt.engines.base import released
from lada_rt.engines.onnxruntime import OnnxEngine
from lada_rt.geometry import CodecGeometry
from lada_rt.memory import return_freed
from lada_rt_export.models.stages_mucodec import VocoderStage
from lada_rt_export.models.vocoder import Vocoder, VocoderConfig
from lada_rt_export.torch_engine import TorchEngine
from stubs import no_threads_left, render_window, sung

GEOMETRY = CodecGeometry()
FAST = GenerationParams(steps=2, flow_steps=1, guidance=1.0)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.load()


class FixedMel:
    """A mel decoder that always gives one log-mel."""

    mel = np.random.default_rng(0).standard_normal((1, 256, 4096)).astype(np.float32) - 5

    def run(self, *, latents: np.ndarray) -> dict[str, np.ndarray]:
        return {"mel": self.mel}


def test_vocoder_blocks_equal_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The halo holds all that a sample depends on; what is left is the rounding of other summation orders.

    The demo's vocoder looks one frame to each side. This one has the released kernels and dilations, and is narrow.
    """
    torch.manual_seed(0)
    vocoder = Vocoder(VocoderConfig(initial_channels=32)).requires_grad_(False)
    engines = {"mel_decoder": FixedMel(), "vocoder": TorchEngine(VocoderStage(vocoder), ["waveform"])}
    latents = np.zeros((32, GEOMETRY.window_latents, 32), np.float32)
    n_frames = 700

    def render(block_frames: int) -> np.ndarray:
        return render_window(engines, latents, n_frames * 480, GEOMETRY, block_frames=block_frames)

    whole = render(FixedMel.mel.shape[2])
    assert np.abs(whole).max() > 1e-3
    for block_frames in (100, 512):
        np.testing.assert_allclose(render(block_frames), whole, atol=2e-6)  # measured 2e-7
    # The test sees a halo that is too small.
    monkeypatch.setattr("lada_rt.decode.VOCODER_HALO_FRAMES", VOCODER_HALO_FRAMES // 8)
    assert np.abs(render(100) - whole).max() > 1e-4


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident set from /proc")
def test_the_denoiser_gives_its_memory_back(pipe: Pipeline) -> None:
    """Two minutes, all masked, reserve 0.2 GB; once released nothing is left of it, and the next run is the same."""
    denoiser = pipe._engines["denoiser"]
    n_frames = 3001
    codes = np.full((1, n_frames), pipe.bundle.mask_id)
    prefix = np.zeros((1, 2, pipe.bundle.prefix_dim), np.float32)

    def run() -> np.ndarray:
        rows = np.arange(n_frames)
        return denoiser.run(vocal_codes=codes * 0, codes=codes, prefix=prefix, rows=rows)["logits"][::100].copy()

    with released(denoiser):
        pass
    before_mb = resident_mb()
    with released(denoiser):
        first = run()
        reserved_mb = resident_mb() - before_mb
    return_freed()
    assert reserved_mb > 100
    assert resident_mb() - before_mb < 0.2 * reserved_mb
    np.testing.assert_array_equal(run(), first)


def test_a_run_releases_the_denoiser(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a song and once in a region made anew, also when the run is cancelled."""
    calls: list[int] = []
    release = OnnxEngine.release

    def counted(self: OnnxEngine) -> None:
        assert self is pipe._engines["denoiser"]
        calls.append(1)
        release(self)

    monkeypatch.setattr(OnnxEngine, "release", counted)
    vocal = (sung(48_000), 48_000)
    result = pipe.generate(vocal, params=FAST)
    assert len(calls) == 1
    pipe.regenerate(result, 0, 0.5)
    assert len(calls) == 2
    with pytest.raises(GenerationCancelled):
        pipe.generate(vocal, params=FAST, on_progress=lambda progress: progress.stage != "denoise")
    assert len(calls) == 3


def test_chunks_joined_equal_generate(pipe: Pipeline) -> None:
    """Two windows; also at unequal speeds of producer and consumer."""
    n_samples = (GEOMETRY.window_codes + 2) * GEOMETRY.samples_per_code
    vocal = (sung(n_samples), 48_000)
    result = pipe.generate(vocal, text="", params=FAST)
    chunks = [chunk.samples for chunk in pipe.stream(vocal, text="", params=FAST)]
    assert [chunk.shape[1] for chunk in chunks] == [512 * 480] * 8 + [result.audio.shape[1] - 8 * 512 * 480]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), result.audio)
    assert no_threads_left()


def test_engines_are_thread_safe(pipe: Pipeline) -> None:
    """Several threads in one session give what one gives. (The pipeline's own state: test_pipeline.py.)"""
    engines = pipe._engines
    rng = np.random.default_rng(1)

    def inputs(n: int) -> dict[str, dict[str, np.ndarray]]:
        return {
            "text_encoder": {"ids": np.arange(3, 5 + n)[None], "positions": np.arange(2, 4 + n)[None]},
            "denoiser": {
                "vocal_codes": rng.integers(0, 60, (1, 50 * n)),
                "codes": np.full((1, 50 * n), pipe.bundle.mask_id),
                "prefix": rng.standard_normal((1, 2, pipe.bundle.prefix_dim)).astype(np.float32),
                "rows": np.arange(0, 50 * n, 3),
            },
            "vocoder": {"mel": rng.standard_normal((1, 256, 60 * n)).astype(np.float32)},
        }

    jobs = [(stage, given) for n in (1, 2, 3, 4) for stage, given in inputs(n).items()]
    serial = [engines[stage].run(**given) for stage, given in jobs]
    wrong: list[str] = []

    def work(order: np.ndarray) -> None:
        for i in order:
            stage, given = jobs[i]
            outputs = engines[stage].run(**given)
            wrong.extend(stage for name in outputs if not np.array_equal(outputs[name], serial[i][name]))

    threads = [threading.Thread(target=work, args=(rng.permutation(len(jobs)),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
