"""The main path: a vocal in, an accompaniment out.

    vocal -> encode -> codes -+
    text, reference -> prefix-+-> denoise -> codes -> flow -> mel -> waveform -> crossfade -> chunks

Everything up to the latents of a window runs in one thread, mel and waveform in the caller's, so that window i is
rendered while the flow of window i+1 is solved. `generate` is `stream` joined, so both give the same bytes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lada_rt.audio import AudioInput, LoadedAudio, load_audio
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.condition import assemble_prefix, encode_reference, encode_text, load_tokenizer
from lada_rt.decode import (
    Crossfade,
    LatentStats,
    decode_latents,
    render_window,
    rendered_samples,
    seeded_noise,
)
from lada_rt.denoise import denoise
from lada_rt.encode import encode
from lada_rt.engines import load_engines
from lada_rt.engines.base import Engine
from lada_rt.errors import EngineError, ParamError
from lada_rt.params import GenerationParams
from lada_rt.progress import OnProgress, Reporter
from lada_rt.stream import Cancel, run_ahead

__all__ = ["Chunk", "Pipeline", "Result", "Timings"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of final audio.

    Attributes:
        samples: [2, n] float32; the chunks of a run joined are its whole audio.
        sample_rate: in Hz.
        start_sample: where the piece begins.
        total_samples: length of the whole audio, known from the first chunk on.
    """

    samples: np.ndarray
    sample_rate: int
    start_sample: int
    total_samples: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall seconds of one run, reading and resampling the inputs included, loading the bundle and writing files not.

    Attributes:
        encode_s, condition_s, denoise_s, decode_s: the four stages; decode is everything after the last denoising step.
        total_s: from the request to the last sample.
        first_audio_s: from the request to the first sample (TTFA).
        audio_s: duration of the audio made.
        rtf: total_s / audio_s (LaDA-Band, appendix B.3); lower is better.
        engines_s: busy seconds of each engine; flow overlaps with mel decoder and vocoder.
    """

    encode_s: float
    condition_s: float
    denoise_s: float
    decode_s: float
    total_s: float
    first_audio_s: float
    audio_s: float
    rtf: float
    engines_s: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return {k: (dict(v) if isinstance(v, Mapping) else round(v, 6)) for k, v in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Result:
    """What one run made.

    Attributes:
        audio: [2, N] float32 accompaniment at `sample_rate`.
        sample_rate: 48000.
        codes: [T] int32 accompaniment codes.
        vocal: [C, M] float32, the vocal as it was read, at `sample_rate`.
        timings: seconds per stage, RTF, time to first audio.
        params: the options used.
        warnings: what had to be mended in the inputs.
    """

    audio: np.ndarray
    sample_rate: int
    codes: np.ndarray
    vocal: np.ndarray
    timings: Timings
    params: GenerationParams
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Request:
    vocal: AudioInput
    text: str | None
    reference: AudioInput | None
    params: GenerationParams
    start_s: float
    end_s: float | None


class Pipeline:
    """A loaded bundle. Thread-safe: every call has its own state; at most `max_concurrent` calls run at once."""

    def __init__(
        self,
        bundle: Bundle,
        engines: Mapping[str, Engine],
        *,
        backend: str,
        device: str,
        max_concurrent: int = 4,
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self.device = device
        self._engines = engines
        self._tokenizer = load_tokenizer(bundle.file_path(bundle.files["tokenizer.json"]))
        constants = bundle.constants()
        self._stats = LatentStats(constants["latent_mean"], constants["latent_std"])
        self._slots = threading.BoundedSemaphore(max_concurrent)
        self._pid = os.getpid()

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] | None = None,
        *,
        backend: str = "auto",
        device: str = "auto",
        n_threads: int | None = None,
        max_concurrent: int = 4,
        verify: bool = True,
    ) -> Pipeline:
        """Open a bundle and load an engine for each stage.

        Args:
            bundle: its folder; None is the embedded demo bundle, which is untrained.
            backend: `onnxruntime`, or `auto` for the best that fits.
            device: `cpu`, `cuda`, or `auto`.
            n_threads: CPU threads of one engine call; None is all CPUs this process may use.
            max_concurrent: calls that may run at once; more wait.
            verify: check every byte of the bundle against its manifest first.

        Raises:
            BundleError: the bundle is missing, damaged or of a newer format.
            EngineError: the backend or device is missing.
            ParamError: an unknown backend or device.
        """
        _check_count("max_concurrent", max_concurrent)
        if n_threads is not None:
            _check_count("n_threads", n_threads)
        opened = Bundle.open(Path(bundle) if bundle is not None else demo_bundle_path())
        if verify:
            opened.verify()
        engines, backend, device = load_engines(opened, backend=backend, device=device, n_threads=n_threads)
        return cls(opened, engines, backend=backend, device=device, max_concurrent=max_concurrent)

    def generate(
        self,
        vocal: AudioInput,
        *,
        text: str | None = None,
        reference: AudioInput | None = None,
        params: GenerationParams | None = None,
        start_s: float = 0.0,
        end_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Result:
        """Make the accompaniment of a vocal.

        Args:
            vocal: path, or (samples [N] or [C, N] float, sample rate).
            text: description of the music. An empty text is encoded, as by the released command line; None leaves the
                slot
                zero, as in training without text.
            reference: audio whose style to follow, read from `start_s` to its end; None leaves the slot zero.
            params: options; None is the released defaults.
            start_s, end_s: segment of the vocal in seconds.
            on_progress: told of every step; returning False cancels.

        Raises:
            AudioError, ParamError: an input cannot be used.
            EngineError: the backend failed, or the process was forked after `load`.
            GenerationCancelled: `on_progress` returned False.
        """
        run = self._run(vocal, text, reference, params, start_s, end_s, on_progress)
        return run.result(np.concatenate([chunk.samples for chunk in run.chunks()], axis=1))

    def stream(
        self,
        vocal: AudioInput,
        *,
        text: str | None = None,
        reference: AudioInput | None = None,
        params: GenerationParams | None = None,
        start_s: float = 0.0,
        end_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Iterator[Chunk]:
        """Like `generate`, but yield each piece of audio as soon as it is final.

        Work starts with the first `next`. A slow consumer holds the work back: at most one window is computed ahead.
        Closing the iterator stops the work within one step.
        """
        return self._run(vocal, text, reference, params, start_s, end_s, on_progress).chunks()

    def _run(
        self,
        vocal: AudioInput,
        text: str | None,
        reference: AudioInput | None,
        params: GenerationParams | None,
        start_s: float,
        end_s: float | None,
        on_progress: OnProgress | None,
    ) -> _Run:
        if text is not None and not isinstance(text, str):
            raise ParamError(f"text: expected text or None, got {type(text).__name__}")
        if params is not None and not isinstance(params, GenerationParams):
            raise ParamError(f"params: expected GenerationParams, got {type(params).__name__}")
        request = _Request(vocal, text, reference, params or GenerationParams(), start_s, end_s)
        return _Run(self, request, on_progress)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise EngineError(
                f"this Pipeline was loaded in process {self._pid} and the process was forked since; "
                "load it in the child, or start workers with the 'spawn' method"
            )


class _Run:
    """One generation: its inputs, its counters and what came out."""

    def __init__(self, pipeline: Pipeline, request: _Request, on_progress: OnProgress | None) -> None:
        self._pipeline = pipeline
        self._request = request
        self._on_progress = on_progress
        self._vocal: LoadedAudio
        self._warnings: tuple[str, ...] = ()
        self._codes: np.ndarray
        self._timings: Timings

    def chunks(self) -> Iterator[Chunk]:
        """Render each window as its latents arrive, and yield what is final."""
        pipeline, geometry = self._pipeline, self._pipeline.bundle.geometry
        pipeline._check_process()
        with pipeline._slots:
            report = Reporter(self._on_progress, Cancel())
            engines = report.timed_engines(pipeline._engines)
            first_audio_s = denoised_s = 0.0
            sent = 0
            for index, latents in enumerate(run_ahead(self._latents(engines, report), report.cancel)):
                n_windows = geometry.n_windows(len(self._codes))
                n_samples = geometry.n_samples(len(self._codes))
                if index == 0:
                    crossfade = Crossfade(geometry, n_samples)
                    denoised_s = report.stage_s["denoised"]
                    report.step("render", 0, n_windows)
                audio = render_window(engines, latents, rendered_samples(index, n_samples, geometry), geometry)
                samples = crossfade.push(audio, last=index + 1 == n_windows)
                first_audio_s = first_audio_s or report.elapsed_s()
                report.step("render", index + 1, n_windows)
                yield Chunk(samples, geometry.sample_rate_hz, sent, n_samples)
                sent += samples.shape[1]
            total_s = report.elapsed_s()
        self._timings = Timings(
            encode_s=report.stage_s["encode"],
            condition_s=report.stage_s["condition"],
            denoise_s=report.stage_s["denoise"],
            decode_s=total_s - denoised_s,
            total_s=total_s,
            first_audio_s=first_audio_s,
            audio_s=sent / geometry.sample_rate_hz,
            rtf=total_s * geometry.sample_rate_hz / sent,
            engines_s=report.engine_s,
        )

    def _latents(self, engines: Mapping[str, Engine], report: Reporter) -> Iterator[np.ndarray]:
        """From the inputs to the latents of each window, in order."""
        bundle, request = self._pipeline.bundle, self._request
        params, geometry = request.params, bundle.geometry
        with report.timed("encode"):
            self._vocal = load_audio(
                request.vocal,
                geometry.sample_rate_hz,
                start_s=request.start_s,
                end_s=request.end_s,
                max_seconds=bundle.max_seconds,
            )
            self._warnings += self._vocal.warnings
            vocal_codes = encode(engines["encoder"], self._vocal.samples, geometry, report.steps_of("encode"))
        with report.timed("condition"):
            prefix = self._prefix(engines, report)
        with report.timed("denoise"):
            codes = denoise(
                engines["denoiser"],
                vocal_codes,
                prefix,
                params,
                bundle.mask_id,
                on_step=report.steps_of("denoise"),
            )
        self._codes = codes
        report.stage_s["denoised"] = report.elapsed_s()
        yield from decode_latents(
            engines["flow"],
            codes,
            self._pipeline._stats,
            geometry,
            n_steps=params.flow_steps,
            guidance=params.guidance,
            noise=seeded_noise(params.seed, geometry),
            on_step=report.steps_of("flow"),
        )

    def _prefix(self, engines: Mapping[str, Engine], report: Reporter) -> np.ndarray:
        """The condition slots, [P, prefix_dim] float32 (spec/lada_band c)."""
        bundle, request = self._pipeline.bundle, self._request
        report.step("condition", 0, 2)
        text = reference = None
        if request.text is not None:
            text = encode_text(engines["text_encoder"], self._pipeline._tokenizer, request.text)
        report.step("condition", 1, 2)
        if request.reference is not None:
            audio = load_audio(
                request.reference, bundle.geometry.sample_rate_hz, start_s=request.start_s, what="reference"
            )
            self._warnings += audio.warnings
            mono = audio.samples.mean(axis=0, dtype=np.float32)
            hidden_size = bundle.stages["ref_encoder"].input_shape("frame_sum")[1]
            reference = encode_reference(
                engines["ref_encoder"],
                mono,
                chunk_samples=bundle.ref_chunk_samples,
                hidden_size=int(hidden_size),
            )
        report.step("condition", 2, 2)
        return assemble_prefix(text, reference, order=request.params.prefix_order, feature_size=bundle.prefix_dim)[0]

    def result(self, audio: np.ndarray) -> Result:
        return Result(
            audio=audio,
            sample_rate=self._pipeline.bundle.geometry.sample_rate_hz,
            codes=self._codes.astype(np.int32),
            vocal=self._vocal.samples,
            timings=self._timings,
            params=self._request.params,
            warnings=self._warnings,
        )


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
        raise ParamError(f"{name}: expected an integer from 1 to 1024, got {value!r}")
