"""One generation: its inputs, its threads, its counters, and what came out.

Everything up to the latents of a window runs in a thread of its own, mel and waveform in the caller's, so that window i
is rendered while the flow of window i+1 is solved. The first sound is what somebody waits for: until it is out nothing
competes with it, and it comes with the first block of the vocoder.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from lada_rt.audio import LoadedAudio, load_audio
from lada_rt.bundle import Bundle
from lada_rt.condition import assemble_prefix, checked_text, encode_reference, encode_text
from lada_rt.decode import LatentStats, SeededNoise, decode_latents, render_windows
from lada_rt.denoise import FirstStep
from lada_rt.encode import encode
from lada_rt.engines.base import Engine, released
from lada_rt.errors import EngineError, GenerationCancelled, ParamError
from lada_rt.long_song import denoise_spans
from lada_rt.params import GenerationParams
from lada_rt.progress import OnProgress, Reporter
from lada_rt.results import Chunk, Layer, Origin, Result, Song, Timings
from lada_rt.slots import Slots
from lada_rt.stream import Cancel, run_ahead

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Loaded", "Prepared", "Run", "Stream", "join"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What every run of a pipeline shares and none changes."""

    bundle: Bundle
    engines: Mapping[str, Engine]
    tokenizer: Tokenizer
    stats: LatentStats
    n_threads: int | None
    slots: Slots
    pid: int

    def check_process(self) -> None:
        """Raise `EngineError` in a process forked since the engines were loaded: their threads stayed behind."""
        if os.getpid() != self.pid:
            raise EngineError(
                f"this Pipeline was loaded in process {self.pid} and the process was forked since; "
                "load it in the child, or start workers with the 'spawn' method"
            )

    @property
    def max_codes(self) -> int:
        """Frames the denoiser takes at once."""
        geometry = self.bundle.geometry
        return geometry.n_codes(int(self.bundle.max_seconds * geometry.sample_rate_hz))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A song up to the first denoising step, which variations share."""

    vocal: LoadedAudio
    vocal_codes: np.ndarray
    prefix: np.ndarray
    warnings: tuple[str, ...]
    first_step: FirstStep | None


class Run:
    """One generation in progress."""

    def __init__(
        self,
        loaded: Loaded,
        song: Song,
        params: GenerationParams,
        on_progress: OnProgress | None,
        *,
        prepared: Prepared | None = None,
        share_first_step: bool = False,
        keep_latents: bool = False,
    ) -> None:
        self._loaded = loaded
        self._song = song
        self._params = params
        self._report = Reporter(on_progress, Cancel())
        self._engines = self._report.timed_engines(loaded.engines)
        self._share_first_step = share_first_step
        self._layer: list[ArrayLike] | None = [] if keep_latents else None
        self.prepared = prepared
        self.vocal: LoadedAudio | None = None if prepared is None else prepared.vocal
        self.warnings: tuple[str, ...] = ()
        self.codes: np.ndarray | None = None
        self.timings: Timings | None = None
        self.total_samples: int | None = None

    def cancel(self) -> None:
        """Stop the work at its next step; from any thread."""
        self._report.cancel.cancel()

    @property
    def cancelled(self) -> bool:
        """Whether it was told to stop, or has ended."""
        return self._report.cancel.cancelled

    def chunks(self) -> Generator[Chunk, None, None]:
        """Render each window as its latents arrive, and yield what is final, block by block of the vocoder."""
        geometry, report = self._loaded.bundle.geometry, self._report
        self._loaded.check_process()
        with report.holding(self._loaded.slots), closing(run_ahead(self._latents(), report.cancel)) as latents:
            first = next(latents)
            assert self.codes is not None
            n_windows = geometry.n_windows(len(self.codes))
            n_samples = geometry.n_samples(len(self.codes))
            report.step("render", 0, n_windows)
            pieces = render_windows(
                self._engines,
                itertools.chain([first], latents),
                geometry,
                windows=range(n_windows),
                stop_sample=n_samples,
                on_window=report.steps_of("render"),
            )
            sent = 0
            for samples in pieces:
                report.mark_first_audio()
                yield Chunk(samples, geometry.sample_rate_hz, sent, n_samples)
                sent += samples.shape[1]
            self.timings = report.timings(sent / geometry.sample_rate_hz)

    def _latents(self) -> Iterator[ArrayLike]:
        """From the inputs to the latents of each window, in order."""
        loaded, params, report = self._loaded, self._params, self._report
        geometry = loaded.bundle.geometry
        prepared = self.prepared = self.prepared or self._prepare()
        self.warnings = prepared.warnings
        self.total_samples = geometry.n_samples(len(prepared.vocal_codes))
        with report.timed("denoise"), released(loaded.engines["denoiser"]):
            self.codes = denoise_spans(
                self._engines["denoiser"],
                prepared.vocal_codes,
                prepared.prefix,
                params,
                loaded.bundle.mask_id,
                max_codes=loaded.max_codes,
                first_step=prepared.first_step,
                on_step=report.steps_of("denoise"),
                n_threads=loaded.n_threads,
            )
        report.mark_denoised()
        windows = decode_latents(
            self._engines["flow"],
            self.codes,
            loaded.stats,
            geometry,
            n_steps=params.flow_steps,
            guidance=params.guidance,
            noise=SeededNoise(params.seed, geometry),
            on_step=report.steps_of("flow"),
        )
        for index, latents in enumerate(windows):
            if self._layer is not None:
                self._layer.append(latents)
            yield latents
            if index == 0:
                report.wait_first_audio()

    def _prepare(self) -> Prepared:
        """Encode the vocal and the conditions."""
        bundle, song, report = self._loaded.bundle, self._song, self._report
        with report.timed("encode"):
            self.vocal = load_audio(
                song.vocal,
                bundle.geometry.sample_rate_hz,
                start_s=song.start_s,
                end_s=song.end_s,
                max_seconds=float("inf") if song.long else bundle.max_seconds,
                check=report.cancel.check,
            )
            self.total_samples = bundle.geometry.n_samples(bundle.geometry.n_codes(self.vocal.samples.shape[1]))
        with report.timed("condition"):  # read first: what is wrong with them shows before the vocal is encoded
            reference = self._reference()
            if song.text is not None:
                checked_text(song.text)
        with report.timed("encode"):
            codes = encode(self._engines["encoder"], self.vocal.samples, bundle.geometry, report.steps_of("encode"))
        with report.timed("condition"):
            prefix = self._prefix(reference)
        warnings = self.vocal.warnings + (() if reference is None else reference.warnings)
        first_step = FirstStep() if self._share_first_step else None
        return Prepared(self.vocal, codes, prefix, warnings, first_step)

    def _reference(self) -> LoadedAudio | None:
        song = self._song
        if song.reference is None:
            return None
        start_s = song.start_s if song.reference_start_s is None else song.reference_start_s
        bundle = self._loaded.bundle
        return load_audio(
            song.reference,
            bundle.geometry.sample_rate_hz,
            start_s=start_s,
            # also of a long song: it is averaged, so that more of it says little more
            max_seconds=bundle.max_seconds,
            cut=True,
            what="reference",
            mono=True,
            check=self._report.cancel.check,
        )

    def _prefix(self, audio: LoadedAudio | None) -> np.ndarray:
        """The condition slots, [P, prefix_dim] float32 (spec/lada_band c)."""
        bundle, song, report = self._loaded.bundle, self._song, self._report
        report.step("condition", 0, 2)
        text = reference = None
        if song.text is not None:
            text = encode_text(self._engines["text_encoder"], self._loaded.tokenizer, song.text)
        report.step("condition", 1, 2)
        if audio is not None:
            reference = encode_reference(
                self._engines["ref_encoder"],
                audio.samples[0],
                chunk_samples=bundle.ref_chunk_samples,
                hidden_size=bundle.ref_hidden_size(),
                check=lambda: report.step("condition", 1, 2),
            )
        report.step("condition", 2, 2)
        order = self._params.prefix_order
        return assemble_prefix(text, reference, order=order, feature_size=bundle.prefix_dim)[0]

    def result(self, audio: np.ndarray) -> Result:
        """What the finished run made; `audio` is its chunks joined."""
        assert self.prepared is not None
        assert self.codes is not None
        assert self.timings is not None
        assert self.total_samples is not None
        song, origin = self._song, None
        if self._layer is not None:
            origin = Origin(
                vocal_codes=self.prepared.vocal_codes,
                prefix=self.prepared.prefix,
                layers=(Layer(0, np.stack(self._layer), 0, self.total_samples),),
                flow_seed=self._params.seed,
                bundle_sha256=self._loaded.bundle.sha256,
                start_s=float(song.start_s),
                end_s=None if song.end_s is None else float(song.end_s),
                long=song.long,
            )
        return Result(
            audio=audio,
            sample_rate=self._loaded.bundle.geometry.sample_rate_hz,
            codes=self.codes.astype(np.int32),
            vocal=self.prepared.vocal.samples,
            timings=self.timings,
            params=self._params,
            warnings=self.warnings,
            origin=origin,
        )


class Stream(Iterator[Chunk]):
    """The chunks of one run, in order; also a context manager that closes it.

    Closing, an error in the consumer inside the `with` block, or dropping the object stops the work within one step and
    ends its thread. An object that `on_progress` refers to is not dropped before the run has ended: close it.

    What was cut never looks whole: who takes chunks of a stream that is closed meanwhile gets `GenerationCancelled`.
    """

    def __init__(self, run: Run, sample_rate: int) -> None:
        self._run = run
        self._chunks = run.chunks()
        self.sample_rate = sample_rate
        #: a chunk was given out, and neither the end nor an error since
        self._under_way = False

    def __next__(self) -> Chunk:
        under_way, self._under_way = self._under_way, False
        try:
            chunk = next(self._chunks)
        except StopIteration:
            if under_way and self._run.timings is None:  # closed while the last chunk was looked at
                raise GenerationCancelled("generation cancelled") from None
            raise
        if self._run.cancelled:  # closed by another thread, which could not close what was running here
            self._chunks.close()
            raise GenerationCancelled("generation cancelled")
        self._under_way = True
        return chunk

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the work; does nothing once the last chunk is out.

        From any thread: where another waits for a chunk, it gets `GenerationCancelled` instead within one step, and at
        its next chunk where it does not wait.
        """
        self._run.cancel()
        try:
            self._chunks.close()
        except ValueError as error:
            if str(error) != "generator already executing":
                raise

    @property
    def total_samples(self) -> int | None:
        """Length of the whole audio; known once the vocal has been read, long before the first chunk."""
        return self._run.total_samples

    @property
    def vocal(self) -> np.ndarray | None:
        """[C, M] float32, the vocal as it was read; known when `total_samples` is."""
        return None if self._run.vocal is None else self._run.vocal.samples

    @property
    def codes(self) -> np.ndarray | None:
        """[T] int32; known from the first chunk on."""
        return None if self._run.codes is None else self._run.codes.astype(np.int32)

    @property
    def timings(self) -> Timings | None:
        """Known after the last chunk."""
        return self._run.timings

    @property
    def warnings(self) -> tuple[str, ...]:
        """What had to be mended in the inputs; known from the first chunk on."""
        return self._run.warnings

    def result(self, audio: np.ndarray | None = None) -> Result:
        """The run as `generate` returns it, after the last chunk.

        Args:
            audio: the chunks joined; None leaves the result without audio.

        Raises:
            ParamError: chunks are still to come.
        """
        if self._run.timings is None:
            raise ParamError("result: expected a finished stream, chunks are still to come; take them all first")
        return self._run.result(np.zeros((2, 0), np.float32) if audio is None else audio)


def join(chunks: Iterable[Chunk]) -> np.ndarray:
    """All chunks of a run as one array [2, N], without a second copy of it."""
    audio = None
    for chunk in chunks:
        if audio is None:
            audio = np.empty((chunk.samples.shape[0], chunk.total_samples), np.float32)
        audio[:, chunk.start_sample : chunk.start_sample + chunk.samples.shape[1]] = chunk.samples
    assert audio is not None
    return audio
