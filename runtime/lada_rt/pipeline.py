"""The main path: a vocal in, an accompaniment out.

    vocal -> encode -> codes -+
    text, reference -> prefix-+-> denoise -> codes -> flow -> mel -> waveform -> crossfade -> chunks

`Run` in run.py takes these stages in order; `generate` is `stream` joined, so both give the same bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lada_rt.audio import AudioInput
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.condition import load_tokenizer
from lada_rt.decode import LatentStats
from lada_rt.engines import load_engines
from lada_rt.engines.base import Engine
from lada_rt.errors import ParamError
from lada_rt.params import GenerationParams
from lada_rt.progress import OnProgress
from lada_rt.regenerate import redo, restore
from lada_rt.results import Chunk, Result, Song, Timings
from lada_rt.run import Loaded, Run, Stream, join
from lada_rt.saved_run import SavedRun
from lada_rt.slots import Slots

__all__ = ["Chunk", "Pipeline", "Result", "Song", "Stream", "Timings"]

#: seeds are 64-bit and wrap
N_SEEDS = 2**64


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
        n_threads: int | None = None,
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self.device = device
        self._engines = engines
        constants = bundle.constants()
        self._loaded = Loaded(
            bundle,
            engines,
            load_tokenizer(bundle.file_path(bundle.files["tokenizer.json"])),
            LatentStats(constants["latent_mean"], constants["latent_std"]),
            n_threads,
            Slots(max_concurrent),
            os.getpid(),
        )

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
        warmup_s: float | None = None,
    ) -> Pipeline:
        """Open a bundle and load an engine for each stage.

        Args:
            bundle: its folder; None is the embedded demo bundle.
            backend: `onnxruntime`, `tensorrt`, `torch`, or `auto` for the best that fits.
            device: `cpu`, `cuda`, or `auto`.
            n_threads: threads of each ONNX Runtime session and of the sampler on the CPU; None is every CPU that
                affinity and the container's quota leave. A song may keep two sessions busy at once. Engines of other
                backends do not heed it.
            max_concurrent: calls that may run at once; more wait.
            verify: check every byte of the bundle against its manifest first.
            warmup_s: call `warmup` for songs of this length; None leaves it to the first song.

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
        pipeline = cls(
            opened, engines, backend=backend, device=device, max_concurrent=max_concurrent, n_threads=n_threads
        )
        if warmup_s is not None:
            pipeline.warmup(warmup_s)
        return pipeline

    def warmup(self, seconds: float = 30.0, params: GenerationParams | None = None) -> None:
        """Make a song of silence once and throw it away, so that the next one finds everything loaded.

        Backends load kernels, size their workspaces and, on a GPU, capture graphs when they first meet a size: for the
        denoiser that is the length of the song, for the other stages any.

        Args:
            seconds: length of the songs to come; call it once for each of the usual ones.
            params: options of the runs to come; their numbers of steps matter.

        Raises:
            ParamError: the length is not above 0.
            AudioError: it is more than the bundle takes.
            EngineError: the backend failed.
        """
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise ParamError(f"seconds: expected a length above 0, got {seconds!r}")
        rate_hz = self.bundle.geometry.sample_rate_hz
        silence = np.zeros((1, max(1, round(seconds * rate_hz))), np.float32)
        reference = (np.zeros((1, rate_hz), np.float32), rate_hz)
        for _ in self.stream((silence, rate_hz), text="", reference=reference, params=params):
            pass

    def generate(
        self,
        vocal: AudioInput,
        *,
        text: str | None = None,
        reference: AudioInput | None = None,
        params: GenerationParams | None = None,
        start_s: float = 0.0,
        end_s: float | None = None,
        long: bool = False,
        reference_start_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Result:
        """Make the accompaniment of a vocal.

        Args:
            vocal: path, or (samples [N] or [C, N] float, sample rate).
            text: description of the music. An empty text is encoded, as by the released command line; None leaves the
                slot zero, as in training without text.
            reference: audio whose style to follow; None leaves the slot zero.
            params: options; None is the released defaults.
            start_s, end_s: segment of the vocal in seconds.
            long: accept a vocal beyond the bundle's `max_seconds` and denoise it in overlapping spans.
            reference_start_s: where the reference is read from, for at most the bundle's `max_seconds`; None is
                `start_s`, as in the released program.
            on_progress: told of every step; returning False cancels.

        Raises:
            AudioError, ParamError: an input cannot be used.
            EngineError: the backend failed, or the process was forked after `load`.
            GenerationCancelled: `on_progress` returned False.
        """
        song = Song(vocal, text, reference, start_s, end_s, long, reference_start_s)
        with self._stream(song, params, on_progress, keep_latents=True) as stream:
            return stream.result(join(stream))

    def stream(
        self,
        vocal: AudioInput,
        *,
        text: str | None = None,
        reference: AudioInput | None = None,
        params: GenerationParams | None = None,
        start_s: float = 0.0,
        end_s: float | None = None,
        long: bool = False,
        reference_start_s: float | None = None,
        on_progress: OnProgress | None = None,
        keep_latents: bool = False,
    ) -> Stream:
        """Like `generate`, but yield each piece of audio as soon as it is final.

        Work starts with the first `next`. A slow consumer holds the work back: at most two windows are computed ahead.
        Closing the stream stops the work within one step.

        Args:
            keep_latents: hold the latents (2 MB for each 31 s), so that `Stream.result` can be regenerated or saved.
        """
        song = Song(vocal, text, reference, start_s, end_s, long, reference_start_s)
        return self._stream(song, params, on_progress, keep_latents=keep_latents)

    def generate_batch(
        self,
        songs: Iterable[Song | AudioInput],
        *,
        params: GenerationParams | None = None,
        variations: int = 1,
        on_progress: OnProgress | None = None,
    ) -> Iterator[Result]:
        """Make the accompaniments of many songs, each the same bytes as alone.

        A song is made when its result is asked for, so that no more than one is held. Encoding, conditioning and the
        denoiser's first step, which sees nothing but masks, are done once for all variations of a song. An error ends
        its song, not the batch: the next `next` goes on with the song after it.

        Args:
            songs: of any lengths; a vocal alone is a song without text or reference.
            params: options of all songs.
            variations: results for each song, with the seeds params.seed, params.seed + 1, ...
            on_progress: told of every step of every result in turn; returning False cancels.

        Yields:
            For each song its variations in order.

        Raises:
            As `generate`, when the song in question is reached.
        """
        _check_count("variations", variations)
        if isinstance(songs, str | os.PathLike | tuple) or not isinstance(songs, Iterable):
            raise ParamError(f"songs: expected a list of songs, got {type(songs).__name__}; put it in a list")
        params = self._checked_params(params)
        return _Batch(self._variations(song, params, variations, on_progress) for song in songs)

    def _variations(
        self, given: Song | AudioInput, params: GenerationParams, n_variations: int, on_progress: OnProgress | None
    ) -> Iterator[Result]:
        song = given if isinstance(given, Song) else Song(given)
        prepared = None
        for index in range(n_variations):
            seeded = replace(params, seed=(params.seed + index) % N_SEEDS)
            run = self._new_run(
                song,
                seeded,
                on_progress,
                prepared=prepared,
                share_first_step=n_variations > 1,
                keep_latents=True,
            )
            with Stream(run, self.bundle.geometry.sample_rate_hz) as stream:
                yield stream.result(join(stream))
            prepared = run.prepared

    def regenerate(
        self,
        result: Result,
        start_s: float,
        end_s: float,
        *,
        seed: int | None = None,
        params: GenerationParams | None = None,
        on_progress: OnProgress | None = None,
    ) -> Result:
        """Draw a region of a result anew and keep the rest (see regenerate.py for what stays equal, and how).

        Args:
            result: of this bundle; its codes outside the region are kept.
            start_s, end_s: the region in seconds of the result, widened to whole codes (40 ms).
            seed: of the new codes; None is the result's, plus one.
            params: options of the redrawing; None is the result's.
            on_progress: told of every step; returning False cancels.

        Returns:
            The whole song. Its audio is equal to the old one, bit for bit, further than `SEAM_S` from the region.

        Raises:
            ParamError: the region is empty or outside the song, or the result does not fit.
            EngineError, GenerationCancelled: as `generate`.
        """
        if not isinstance(result, Result):
            raise ParamError(f"result: expected a Result, got {type(result).__name__}")
        params = self._checked_params(params if params is not None else result.params)
        if params.prefix_order != result.params.prefix_order:
            raise ParamError(
                f"params: expected prefix_order {result.params.prefix_order!r}, the result's own, got "
                f"{params.prefix_order!r}; the condition is drawn with as it is"
            )
        params = replace(params, seed=(result.params.seed + 1) % N_SEEDS if seed is None else seed)
        return redo(self._loaded, result, start_s, end_s, params, _checked_callback(on_progress))

    def restore(self, saved: SavedRun, vocal: AudioInput, *, on_progress: OnProgress | None = None) -> Result:
        """Bring a saved run back, rendered anew from its latents: the same bytes on the same backend.

        Args:
            saved: from `load_codes`.
            vocal: the vocal it was made for.
            on_progress: told of every step; returning False cancels.

        Raises:
            ParamError: another bundle or vocal than the saved run's.
            AudioError, EngineError, GenerationCancelled: as `generate`.
        """
        return restore(self._loaded, saved, vocal, _checked_callback(on_progress))

    def _stream(
        self, song: Song, params: GenerationParams | None, on_progress: OnProgress | None, *, keep_latents: bool
    ) -> Stream:
        run = self._new_run(song, self._checked_params(params), on_progress, keep_latents=keep_latents)
        return Stream(run, self.bundle.geometry.sample_rate_hz)

    def _new_run(self, song: Song, params: GenerationParams, on_progress: OnProgress | None, **options: Any) -> Run:
        if song.text is not None and not isinstance(song.text, str):
            raise ParamError(f"text: expected text or None, got {type(song.text).__name__}")
        if not isinstance(song.long, bool):
            raise ParamError(f"long: expected True or False, got {song.long!r}")
        return Run(self._loaded, song, params, _checked_callback(on_progress), **options)

    def _checked_params(self, params: GenerationParams | None) -> GenerationParams:
        if params is not None and not isinstance(params, GenerationParams):
            raise ParamError(f"params: expected GenerationParams, got {type(params).__name__}")
        return params or GenerationParams()


class _Batch(Iterator[Result]):
    """The results of many songs in a row. A generator would have ended with the first song that raised."""

    def __init__(self, songs: Iterator[Iterator[Result]]) -> None:
        self._songs = songs
        self._results: Iterator[Result] = iter(())

    def __next__(self) -> Result:
        while True:
            for result in self._results:  # nothing is left of a song that raised
                return result
            self._results = next(self._songs)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
        raise ParamError(f"{name}: expected an integer from 1 to 1024, got {value!r}")


def _checked_callback(on_progress: OnProgress | None) -> OnProgress | None:
    if on_progress is not None and not callable(on_progress):
        raise ParamError(f"on_progress: expected a function or None, got {type(on_progress).__name__}")
    return on_progress
