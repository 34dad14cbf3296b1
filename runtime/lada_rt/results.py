"""What a run takes and what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lada_rt.audio import AudioInput
from lada_rt.params import GenerationParams

__all__ = ["Chunk", "Layer", "Origin", "Result", "Song", "Timings"]


@dataclass(frozen=True, slots=True)
class Song:
    """The inputs of one run.

    Attributes:
        vocal: path, or (samples [N] or [C, N] float, sample rate).
        text: description of the music. An empty text is encoded, as by the released command line; None leaves the slot
            zero, as in training without text.
        reference: audio whose style to follow; None leaves the slot zero.
        start_s, end_s: segment of the vocal in seconds; end None is its end.
        long: accept a vocal beyond the bundle's `max_seconds` and denoise it in overlapping spans.
        reference_start_s: where the reference is read from, for at most the bundle's `max_seconds`; None is `start_s`,
            as in the released program.
    """

    vocal: AudioInput
    text: str | None = None
    reference: AudioInput | None = None
    start_s: float = 0.0
    end_s: float | None = None
    long: bool = False
    reference_start_s: float | None = None


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
        total_s: from the start of the work to the last sample.
        first_audio_s: from the start of the work to the first sample (TTFA).
        first_window_s: busy seconds of flow, mel decoder and vocoder until then: flow and mel of one window, and the
            waveform of its first seconds.
        queue_s: waiting for a free slot of the pipeline before the work started; not in total_s.
        audio_s: duration of the audio made.
        rtf: total_s / audio_s (LaDA-Band, appendix B.3); lower is better.
        engines_s: busy seconds of each engine; flow overlaps with mel decoder and vocoder. Engines on a GPU run their
            loops whole: `denoiser` then includes sampling, and `mel_decoder` the vocoder.
    """

    encode_s: float
    condition_s: float
    denoise_s: float
    decode_s: float
    total_s: float
    first_audio_s: float
    first_window_s: float
    queue_s: float
    audio_s: float
    rtf: float
    engines_s: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return {k: (dict(v) if isinstance(v, Mapping) else round(v, 6)) for k, v in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Layer:
    """Decoded windows and the stretch of the audio they make. A later layer lies over an earlier one.

    Attributes:
        first_window: index of the first decoder window.
        latents: [W, 32, L, 32] float32, of W windows in a row.
        start_sample, stop_sample: the stretch; outside it the layer fades into what lies below.
    """

    first_window: int
    latents: np.ndarray
    start_sample: int
    stop_sample: int


@dataclass(frozen=True, slots=True)
class Origin:
    """What a result was made from, and all that `regenerate` needs to change a part of it.

    Attributes:
        vocal_codes: [T] int64.
        prefix: [P, D] float32 condition slots.
        layers: latents of the whole song, then of each region made anew since.
        flow_seed: seed of the flow's start noise; regions keep it, so that what did not change sounds the same.
        bundle_sha256: of the bundle used.
        start_s, end_s: segment of the vocal.
        long: whether the song may exceed the bundle's `max_seconds`.
    """

    vocal_codes: np.ndarray
    prefix: np.ndarray
    layers: tuple[Layer, ...]
    flow_seed: int
    bundle_sha256: str
    start_s: float = 0.0
    end_s: float | None = None
    long: bool = False


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
        origin: what `regenerate` and `save_codes` need; None when the run was told not to keep it.
    """

    audio: np.ndarray
    sample_rate: int
    codes: np.ndarray
    vocal: np.ndarray
    timings: Timings
    params: GenerationParams
    warnings: tuple[str, ...]
    origin: Origin | None = None
