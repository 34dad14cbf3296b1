"""What a check of one window and one channel does not see: the other channel, and where the next window goes on.

Each function returns an error of a recorded run, 0 where the run has nothing of the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lada_rt.bench.difference import relative_error
from lada_rt.decode import VOCODER_HALO_FRAMES, LatentStats
from lada_rt.geometry import CodecGeometry
from lada_rt.params import GenerationParams

__all__ = ["context_error", "next_state", "right_channel_error", "seam_error", "second_window_error"]

#: mel frames that are vocoded again
CHECKED_FRAMES = 64

Arrays = Mapping[str, np.ndarray]
#: stage -> index of a call -> (inputs, outputs)
Calls = Mapping[str, Mapping[int, tuple[Arrays, Arrays]]]
Reference = Callable[[str, Arrays], Arrays]


def right_channel_error(geometry: CodecGeometry, calls: Calls, audio: np.ndarray, reference: Reference) -> float:
    """The right channel's first frames against its own mel, vocoded again."""
    if 1 not in calls["mel_decoder"]:
        return 0.0
    n_samples = min(audio.shape[1], geometry.hop_samples, CHECKED_FRAMES * geometry.samples_per_mel_frame)
    mel = calls["mel_decoder"][1][1]["mel"][:1, :, : CHECKED_FRAMES + VOCODER_HALO_FRAMES]
    expected = reference("vocoder", {"mel": np.ascontiguousarray(mel)})["waveform"][0, :n_samples]
    return relative_error(audio[1, :n_samples], expected)


def second_window_error(geometry: CodecGeometry, calls: Calls, codes: np.ndarray, params: GenerationParams) -> float:
    """Share of the second window's codes that are not those of the song from there on."""
    if params.flow_steps not in calls["flow"]:
        return 0.0
    given = calls["flow"][params.flow_steps][0]["codes"][0]
    return float(np.mean(given != codes[(geometry.hop_codes + np.arange(geometry.window_codes)) % len(codes)]))


def next_state(call: tuple[Arrays, Arrays], params: GenerationParams) -> np.ndarray:
    """The state after one Euler step of a recorded flow call, [channels, L, bins] float64 (spec/mucodec 3.4)."""
    inputs, outputs = call
    velocity = outputs["velocity"].astype(np.float64)
    guided = velocity[0] if len(velocity) == 1 else velocity[0] + params.guidance * (velocity[1] - velocity[0])
    state: np.ndarray = inputs["x"][0] + guided / params.flow_steps
    return state


def context_error(geometry: CodecGeometry, calls: Calls, params: GenerationParams, stats: LatentStats) -> float:
    """What the second window continues from, against the last Euler step of the first (spec/mucodec 3.4, 5.5)."""
    flow, n_steps = calls["flow"], params.flow_steps
    if n_steps not in flow:
        return 0.0
    following, n_context = flow[n_steps][0], geometry.context_latents
    end = next_state(flow[n_steps - 1], params)[:, -n_context:]
    wanted = np.zeros(following["context"].shape[1:])
    wanted[:, :n_context] = stats.normalise(stats.denormalise(end))
    return max(relative_error(row, wanted) for row in following["context"])


def seam_error(geometry: CodecGeometry, calls: Calls, audio: np.ndarray, reference: Reference) -> float:
    """The left channel amid the first crossfade, against both mels vocoded again and mixed (spec/mucodec 5.6)."""
    if 2 not in calls["mel_decoder"]:
        return 0.0
    per_frame, halo = geometry.samples_per_mel_frame, VOCODER_HALO_FRAMES
    hop_frames, overlap_frames = geometry.hop_samples // per_frame, geometry.overlap_samples // per_frame
    start = overlap_frames // 2

    def wave(call: int, first: int) -> np.ndarray:
        mel = calls["mel_decoder"][call][1]["mel"][:1, :, first - halo : first + CHECKED_FRAMES + halo]
        found = reference("vocoder", {"mel": np.ascontiguousarray(mel)})["waveform"][0]
        return found[halo * per_frame : (halo + CHECKED_FRAMES) * per_frame]

    stretch = slice(start * per_frame, (start + CHECKED_FRAMES) * per_frame)
    rising = np.linspace(0.0, 1.0, geometry.overlap_samples)[stretch]
    mixed = wave(0, hop_frames + start) * (1 - rising) + wave(2, start) * rising
    return relative_error(audio[0, geometry.hop_samples :][stretch], mixed)
