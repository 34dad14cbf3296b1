"""Songs rendered once and kept as what the stages learn from, and crops of them.

A codec song is one encoder window long. Its folder holds, as numpy files in half precision or 16-bit integers:

    encoder_mel [takes, 128, 4 n]  of the accompaniment, then of each take of the vocal
    chroma      [takes, n, 12]     the same tracks
    strength    [2, 8 L, 256]      the accompaniment's sides; see `grains`
    audio       [2, N]             the accompaniment

The first take of a vocal is as sung; the others are disturbed, so that a real recording is not foreign.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lada_rt.encode import encode_window, prepare_vocal
from torch import Tensor

from lada_rt_export.demo.songs.augment import augment_vocal
from lada_rt_export.demo.songs.song import Score, compose, render_accompaniment, render_vocal
from lada_rt_export.demo.training.features import code_chroma, encoder_mel
from lada_rt_export.demo.training.grains import CYCLE_FRAMES, strengths
from lada_rt_export.demo.training.sizes import PRESETS, TrainingSizes
from lada_rt_export.models.muq import MuQ

__all__ = ["CodecSongs", "predictor_score", "render_codec_songs", "run_jobs", "song_seed", "vocal_takes"]

_SCALE = 32_767
Job = TypeVar("Job")


def song_seed(sizes: TrainingSizes, seed: int, kind: str, index: int) -> int:
    """Seed of a song: below `held_out`, another for each kind, training seed and index until they wrap."""
    first = {"codec": 0, "predictor": sizes.held_out // 2}[kind]
    return first + (seed * 7919 + index) % (sizes.held_out // 2)


def predictor_score(sizes: TrainingSizes, seed: int, index: int) -> Score:
    """The song of an index: the `n_predictor_songs` of one length come first, then the `n_long_songs`."""
    duration_s = sizes.song_s if index < sizes.n_predictor_songs else sizes.long_song_s
    return compose(song_seed(sizes, seed, "predictor", index), duration_s=duration_s)


def vocal_takes(score: Score, n_takes: int) -> list[np.ndarray]:
    """The vocal of a score as sung, then `n_takes - 1` disturbed versions, [2, N] float32 each."""
    sung = render_vocal(score)
    return [sung] + [augment_vocal(sung, 1000 * score.seed + take) for take in range(1, n_takes)]


def run_jobs(job: Callable[[Job], None], jobs: Sequence[Job], n_workers: int, done: Callable[[], bool]) -> bool:
    """Run jobs in order, in processes when there is more than one worker, until `done` says that time is up.

    Returns:
        Whether all of them ran.
    """
    if n_workers <= 1:
        for one in jobs:
            if done():
                return False
            job(one)
        return True
    with ProcessPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        # short lots, so that the deadline is looked at between them
        for start in range(0, len(jobs), 4 * n_workers):
            if done():
                return False
            list(pool.map(job, jobs[start : start + 4 * n_workers]))
    return True


def _save(path: Path, array: np.ndarray) -> None:
    beside = path.with_suffix(".partial")
    with beside.open("wb") as file:
        np.save(file, array)
    os.replace(beside, path)


def _render_codec_song(job: tuple[str, str, int, int]) -> None:
    preset, root, seed, index = job
    sizes = PRESETS[preset]
    geometry = sizes.geometry
    folder = Path(root) / f"{index:05d}"
    # the last file to be written stands for all
    if (folder / "audio.npy").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    duration_s = geometry.window_samples / geometry.sample_rate_hz
    score = compose(song_seed(sizes, seed, "codec", index), duration_s=duration_s)
    accompaniment = render_accompaniment(score)
    tracks = [prepare_vocal(track) for track in (accompaniment, *vocal_takes(score, sizes.n_vocal_takes))]
    windows = np.stack([encode_window(track, 0, geometry) for track in tracks])
    muq = MuQ(sizes.muq)
    _save(folder / "encoder_mel.npy", encoder_mel(muq, torch.from_numpy(windows)).half().numpy())
    chroma = [code_chroma(window, geometry.encode_window_codes) for window in windows]
    _save(folder / "chroma.npy", np.stack(chroma).astype(np.float16))
    audio = tracks[0][:, : geometry.window_samples]
    _save(folder / "strength.npy", strengths(torch.from_numpy(audio)).transpose(1, 2).half().numpy())
    _save(folder / "audio.npy", np.round(audio * _SCALE).astype(np.int16))


def render_codec_songs(
    sizes: TrainingSizes, root: Path, seed: int, n_workers: int, done: Callable[[], bool] = lambda: False
) -> bool:
    """Render the codec songs that are not there yet; about 3 s and 15 MB each at the real window.

    Returns:
        Whether all are there.
    """
    jobs = [(sizes.name, str(root), seed, index) for index in range(sizes.n_codec_songs)]
    missing = [job for job in jobs if not (root / f"{job[3]:05d}" / "audio.npy").is_file()]
    return run_jobs(_render_codec_song, missing, n_workers, done)


class CodecSongs:
    """Random crops of the codec songs. Files are mapped, not read whole."""

    def __init__(self, sizes: TrainingSizes, root: Path, device: str) -> None:
        self.sizes, self.root, self.device = sizes, root, device

    def array(self, index: int, name: str) -> np.ndarray:
        """A file of a song, mapped; of the codec's, or `codes` [n] and `latents` [32, L, 32] of the next stage's."""
        return np.load(self.root / f"{index:05d}" / f"{name}.npy", mmap_mode="r")

    def _stack(self, arrays: Iterable[np.ndarray]) -> Tensor:
        stacked: Any = np.stack([np.asarray(a, np.float32) for a in arrays])
        return torch.from_numpy(stacked).to(self.device)

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.sizes.n_codec_songs))

    def encoder_crops(self, rng: np.random.Generator, batch: int, n_codes: int) -> tuple[Tensor, Tensor]:
        """Normalised mel [B, 128, 4 n] and chroma [B, n, 12], every other one of an accompaniment."""
        mels, chromas = [], []
        for row in range(batch):
            index = self.draw(rng)
            take = 0 if row % 2 == 0 else int(rng.integers(1, 1 + self.sizes.n_vocal_takes))
            start = int(rng.integers(self.sizes.geometry.encode_window_codes - n_codes + 1))
            mels.append(self.array(index, "encoder_mel")[take, :, 4 * start : 4 * (start + n_codes)])
            chromas.append(self.array(index, "chroma")[take, start : start + n_codes])
        return self._stack(mels), self._stack(chromas)

    def strength_crops(
        self, rng: np.random.Generator, batch: int, n_frames: int
    ) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Strengths [B, 256, n_frames] of random sides, and (song, side, first frame) of each; first frames begin a
        cycle of the textures."""
        geometry = self.sizes.geometry
        n_all = geometry.window_latents * geometry.mel_frames_per_latent
        places, crops = [], []
        for _ in range(batch):
            index, side = self.draw(rng), int(rng.integers(2))
            start = CYCLE_FRAMES * int(rng.integers((n_all - n_frames) // CYCLE_FRAMES + 1))
            places.append((index, side, start))
            crops.append(self.array(index, "strength")[side, start : start + n_frames].T)
        return self._stack(crops), places

    def audio_crops(self, places: Sequence[tuple[int, int, int]], n_frames: int) -> Tensor:
        """[B, 480 * n_frames] of the places of `strength_crops`."""
        hop = self.sizes.geometry.samples_per_mel_frame
        crops = [
            self.array(index, "audio")[side, start * hop : (start + n_frames) * hop] for index, side, start in places
        ]
        return self._stack(crops) / _SCALE

    def latent_crops(self, rng: np.random.Generator, batch: int, n_latents: int) -> tuple[Tensor, Tensor, int]:
        """Latents [B, 32, n, 32], codes [B, 2 n] and the even frame they start at, one for the whole batch."""
        start = 2 * int(rng.integers((self.sizes.geometry.window_latents - n_latents) // 2 + 1))
        songs = [self.draw(rng) for _ in range(batch)]
        latents = self._stack(self.array(i, "latents")[:, start : start + n_latents] for i in songs)
        codes = np.stack([self.array(i, "codes")[2 * start : 2 * (start + n_latents)] for i in songs]).astype(np.int64)
        return latents, torch.from_numpy(codes).to(self.device), start
