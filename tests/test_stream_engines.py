"""Streaming on the real networks of the embedded demo bundle: blocks of the vocoder, chunks, threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from lada_rt import GenerationParams, Pipeline
from lada_rt.decode import VOCODER_HALO_FRAMES, render_window
from lada_rt.geometry import CodecGeometry
from stubs import no_threads_left, sung

GEOMETRY = CodecGeometry()
FAST = GenerationParams(steps=2, flow_steps=1, guidance=1.0)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.load()


class KeepMel:
    """Runs the mel decoder once and repeats its answer."""

    def __init__(self, pipe: Pipeline) -> None:
        latents = np.random.default_rng(0).standard_normal((1, 16, GEOMETRY.window_latents, 32)).astype(np.float32)
        self.mel = pipe._engines["mel_decoder"].run(latents=latents)["mel"]

    def run(self, *, latents: np.ndarray) -> dict[str, np.ndarray]:
        return {"mel": self.mel}


@pytest.fixture(scope="module")
def mel(pipe: Pipeline) -> KeepMel:
    return KeepMel(pipe)


def test_vocoder_blocks_equal_one_pass(pipe: Pipeline, mel: KeepMel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The halo holds all that a sample depends on; what is left is the rounding of other summation orders."""
    engines = {"mel_decoder": mel, "vocoder": pipe._engines["vocoder"]}
    latents = np.zeros((32, GEOMETRY.window_latents, 32), np.float32)
    n_frames = 700

    def render(block_frames: int) -> np.ndarray:
        return render_window(engines, latents, n_frames * 480, GEOMETRY, block_frames=block_frames)

    whole = render(mel.mel.shape[2])
    assert np.abs(whole).max() > 1e-3
    for block_frames in (100, 512):
        np.testing.assert_allclose(render(block_frames), whole, atol=2e-6)  # measured 2e-7
    # The test sees a halo that is too small.
    monkeypatch.setattr("lada_rt.decode.VOCODER_HALO_FRAMES", VOCODER_HALO_FRAMES // 8)
    assert np.abs(render(100) - whole).max() > 1e-4


def test_chunks_joined_equal_generate(pipe: Pipeline) -> None:
    """Two windows; also at unequal speeds of producer and consumer."""
    n_samples = (GEOMETRY.window_codes + 2) * GEOMETRY.samples_per_code
    vocal = (sung(n_samples), 48_000)
    result = pipe.generate(vocal, text="", params=FAST)
    chunks = [chunk.samples for chunk in pipe.stream(vocal, text="", params=FAST)]
    assert len(chunks) == 2
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
