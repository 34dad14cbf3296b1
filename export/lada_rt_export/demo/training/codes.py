"""Between the codec and what learns from its codes: codes and latents of the codec songs, codes and features of the
predictor songs, computed once.

A predictor song becomes one small file; its sound is not kept:

    accompaniment [T] int16, vocals [takes, T] int16, texts [n, F] and references [2, F] float32
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lada_rt.condition import round_bf16
from lada_rt.encode import encode
from lada_rt.errors import ExportError
from tokenizers import Tokenizer
from torch import nn

from lada_rt_export.demo.songs.song import render_accompaniment
from lada_rt_export.demo.tokenizer import byte_tokenizer
from lada_rt_export.demo.training.codec import Codec
from lada_rt_export.demo.training.data import predictor_score, run_jobs, vocal_takes
from lada_rt_export.demo.training.features import encoder_mel
from lada_rt_export.demo.training.lineage import changed_makers, note_makers
from lada_rt_export.demo.training.loop import load_weights
from lada_rt_export.demo.training.mel_vae import MelAutoencoder
from lada_rt_export.demo.training.sizes import PRESETS, TrainingSizes
from lada_rt_export.demo.training.style import StyleModules

__all__ = ["CodecEngine", "encode_codec_songs", "encode_predictor_songs"]

_MIN_REFERENCE_S, _MAX_REFERENCE_S = 5.0, 20.48


class CodecEngine:
    """The encoder stage as the runtime calls it, over the modules in training."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    @torch.no_grad()
    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """audio [B, 2, N] float32 -> codes [B, N // 1920] int64."""
        mel = encoder_mel(self.codec.muq, torch.from_numpy(np.ascontiguousarray(inputs["audio"])))
        return {"codes": self.codec.latents(mel)[1].numpy()}


@functools.lru_cache(maxsize=1)
def _codec(preset: str, folder: str) -> Codec:
    codec = Codec(PRESETS[preset])
    load_weights(Path(folder), "codec", codec)
    return codec


@functools.lru_cache(maxsize=1)
def _autoencoder(preset: str, folder: str) -> MelAutoencoder:
    autoencoder = MelAutoencoder(PRESETS[preset])
    load_weights(Path(folder), "mel_vae", autoencoder)
    return autoencoder


@functools.lru_cache(maxsize=1)
def _style(preset: str, folder: str) -> tuple[StyleModules, Tokenizer]:
    style = StyleModules(PRESETS[preset])
    load_weights(Path(folder), "style", style)
    return style, Tokenizer.from_str(byte_tokenizer().decode())


def _forget() -> None:
    """The same folder may hold other weights by now."""
    for cached in (_codec, _autoencoder, _style):
        cached.cache_clear()


def _check_makers(folder: Path, makers: dict[str, nn.Module]) -> None:
    """Refuse to go on with what other networks encoded: features of two trainings would be mixed.

    Raises:
        ExportError: `folder` holds such.
    """
    path = folder / "made_by.json"
    if not path.is_file():
        note_makers(path, makers)
    elif others := changed_makers(path, makers):
        raise ExportError(f"{folder} was encoded by another {' and '.join(others)}; remove it and run its stage again")


def _replace(path: Path, write: Callable[[Any], None]) -> None:
    beside = path.with_suffix(".partial")
    with beside.open("wb") as file:
        write(file)
    os.replace(beside, path)


@torch.no_grad()
def _encode_codec_song(job: tuple[str, str, int]) -> None:
    preset, folder, index = job
    codec, autoencoder = _codec(preset, folder), _autoencoder(preset, folder)
    song = Path(folder) / "songs" / f"{index:05d}"
    strength = torch.from_numpy(np.load(song / "strength.npy").astype(np.float32)).transpose(1, 2)  # [2, 256, 8 L]
    latents = autoencoder.latents(strength)  # [2, 16, L, 32]: the left side's channels come first
    _replace(song / "latents.npy", lambda f: np.save(f, latents.flatten(0, 1).half().numpy()))
    encoder_input = torch.from_numpy(np.load(song / "encoder_mel.npy", mmap_mode="r")[:1].astype(np.float32))
    codes = codec.latents(encoder_input)[1][0].numpy()
    _replace(song / "codes.npy", lambda f: np.save(f, codes.astype(np.int16)))


@torch.no_grad()
def _encode_predictor_song(job: tuple[str, str, int, int]) -> None:
    preset, folder, seed, index = job
    sizes = PRESETS[preset]
    codec, (style, tokenizer) = _codec(preset, folder), _style(preset, folder)
    score = predictor_score(sizes, seed, index)
    accompaniment = render_accompaniment(score)
    engine = CodecEngine(codec)
    codes = [encode(engine, track, sizes.geometry) for track in vocal_takes(score, sizes.n_vocal_takes)]
    rng = np.random.default_rng([score.seed, 77])
    mono = round_bf16(accompaniment.mean(axis=0))
    references = []
    for _ in range(2):
        n = min(len(mono), round(48_000 * rng.uniform(_MIN_REFERENCE_S, _MAX_REFERENCE_S)))
        start = int(rng.integers(len(mono) - n + 1))
        references.append(style.audio_features(torch.from_numpy(mono[None, start : start + n])))
    arrays: dict[str, Any] = {
        "accompaniment": encode(engine, accompaniment, sizes.geometry).astype(np.int16),
        "vocals": np.stack(codes).astype(np.int16),
        "texts": round_bf16(style.text_features(tokenizer, [*score.texts, ""], "cpu").numpy()),
        "references": round_bf16(torch.cat(references).numpy()),
    }
    _replace(Path(folder) / "predictor" / f"{index:05d}.npz", lambda f: np.savez(f, **arrays))


def encode_codec_songs(
    sizes: TrainingSizes, folder: Path, n_workers: int, done: Callable[[], bool] = lambda: False
) -> bool:
    """Write codes and latents beside the codec songs that lack them. Returns whether all have them.

    Raises:
        ExportError: what is there is of another codec or mel VAE, or one of them is not trained.
    """
    _forget()
    makers: dict[str, nn.Module] = {
        "codec": _codec(sizes.name, str(folder)),
        "mel_vae": _autoencoder(sizes.name, str(folder)),
    }
    _check_makers(folder / "songs", makers)
    jobs = [(sizes.name, str(folder), i) for i in range(sizes.n_codec_songs)]
    missing = [job for job in jobs if not (folder / "songs" / f"{job[2]:05d}" / "codes.npy").is_file()]
    return run_jobs(_encode_codec_song, missing, n_workers, done)


def encode_predictor_songs(
    sizes: TrainingSizes, folder: Path, seed: int, n_workers: int, done: Callable[[], bool] = lambda: False
) -> bool:
    """Render and encode the predictor songs that are not there yet.

    Returns:
        Whether all are there.

    Raises:
        ExportError: what is there is of another codec or style, or one of them is not trained.
    """
    _forget()
    (folder / "predictor").mkdir(exist_ok=True)
    makers: dict[str, nn.Module] = {
        "codec": _codec(sizes.name, str(folder)),
        "style": _style(sizes.name, str(folder))[0],
    }
    _check_makers(folder / "predictor", makers)
    jobs = [(sizes.name, str(folder), seed, i) for i in range(sizes.n_predictor_songs + sizes.n_long_songs)]
    missing = [job for job in jobs if not (folder / "predictor" / f"{job[3]:05d}.npz").is_file()]
    return run_jobs(_encode_predictor_song, missing, n_workers, done)
