"""A pipeline whose networks are trivial functions at the real rates: exact, instant, and sensitive to every mistake."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
from lada_rt.bundle import FORMAT_NAME, FORMAT_VERSION, STAGES, Bundle, file_sha256
from lada_rt.decode import render_pieces
from lada_rt.geometry import CodecGeometry
from lada_rt.pipeline import Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB = 64
GEOMETRY = CodecGeometry()


def render_window(*args: Any, **options: Any) -> np.ndarray:
    """What `lada_rt.decode.render_pieces` yields, joined."""
    return np.concatenate(list(render_pieces(*args, **options)), axis=1)


class StubEncoder:
    """The code of a frame is its mean level."""

    def run(self, *, audio: np.ndarray) -> dict[str, np.ndarray]:
        frames = audio[0, :, : 1024 * 1920].reshape(2, 1024, 1920)
        return {"codes": (np.abs(frames).mean(axis=(0, 2)) * 1000).astype(np.int64)[None] % VOCAB}


class StubDenoiser:
    """Logits that depend on vocal, known codes, prefix and row."""

    def __init__(self) -> None:
        self.rows_seen: list[int] = []
        self.prefixes: list[np.ndarray] = []
        self.gate: threading.Event | None = None

    def run(
        self, *, vocal_codes: np.ndarray, codes: np.ndarray, prefix: np.ndarray, rows: np.ndarray
    ) -> dict[str, np.ndarray]:
        if self.gate is not None:
            assert self.gate.wait(10)
        self.rows_seen.append(len(rows))
        self.prefixes.append(prefix)
        known = int((codes[0] * (codes[0] < VOCAB)).sum())
        phase = vocal_codes[0, rows, None] * 0.37 + rows[:, None] * 0.11 + known * 0.013 + float(prefix.sum())
        return {"logits": (3 * np.sin(phase + np.arange(VOCAB) * 0.71)).astype(np.float32)}


class StubFlow:
    """Pulls the state towards a function of the codes, conditioned rows only."""

    def run(
        self, *, x: np.ndarray, context: np.ndarray, codes: np.ndarray, conditional: np.ndarray, t: np.ndarray
    ) -> dict[str, np.ndarray]:
        target = (codes.reshape(len(codes), 1, -1, 2).mean(axis=3) / VOCAB)[..., None] * conditional[
            :, None, None, None
        ]
        return {"velocity": (target - x).astype(np.float32) + 0.01 * context}


class StubMelDecoder:
    def run(self, *, latents: np.ndarray) -> dict[str, np.ndarray]:
        level = latents.mean(axis=(1, 3))  # [B, L]
        return {"mel": np.repeat(np.repeat(level, 8, axis=1)[:, None], 256, axis=1).astype(np.float32)}


class StubVocoder:
    """A frame's audio depends on its neighbours, so a missing halo shows."""

    def run(self, *, mel: np.ndarray) -> dict[str, np.ndarray]:
        level = mel[:, 0]
        smooth = np.stack([np.convolve(row, np.ones(9) / 9, mode="same") for row in level])
        wave = np.repeat(smooth, 480, axis=1) * np.tile(np.linspace(0.5, 1, 480), level.shape[1])
        return {"waveform": np.pad(np.tanh(wave), ((0, 0), (0, 16))).astype(np.float32)}


class StubText:
    def run(self, *, ids: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        return {"feature": np.full((len(ids), 8), ids.sum() % 17 + 1, np.float32)}


class StubReference:
    def run(self, *, waveform: np.ndarray, frame_sum: np.ndarray, frame_count: np.ndarray) -> dict[str, np.ndarray]:
        total = frame_sum + np.abs(waveform).sum() * np.ones((1, 8), np.float32)
        count = frame_count + waveform.shape[1]
        return {
            "frame_sum_out": total.astype(np.float32),
            "frame_count_out": count,
            "feature": (total / count).astype(np.float32),
        }


def stub_engines() -> dict[str, object]:
    return {
        "encoder": StubEncoder(),
        "text_encoder": StubText(),
        "ref_encoder": StubReference(),
        "denoiser": StubDenoiser(),
        "flow": StubFlow(),
        "mel_decoder": StubMelDecoder(),
        "vocoder": StubVocoder(),
    }


def write_stub_bundle(folder: Path, **changes: object) -> Path:
    """A valid bundle folder whose graphs are empty files."""
    (folder / "graphs").mkdir(parents=True)

    def entry(name: str, data: bytes) -> dict[str, object]:
        (folder / name).write_bytes(data)
        return {"path": name, "sha256": file_sha256(folder / name), "bytes": len(data)}

    stages = {
        name: {
            "graph": entry(f"graphs/{name}.onnx", name.encode()),
            "external_data": [],
            "precision": "fp32",
            "inputs": [{"name": "frame_sum", "dtype": "float32", "shape": [1, 8]}] if name == "ref_encoder" else [],
            "outputs": [],
            "proof": {"max_rel_error": 1e-7},
        }
        for name in STAGES
    }
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "soul": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    constants = io.BytesIO()
    np.savez(constants, latent_mean=np.full((32, 32), 0.1, np.float32), latent_std=np.full((32, 32), 0.5, np.float32))
    manifest = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "name": "stub",
        "trained": False,
        "note": "",
        "geometry": GEOMETRY.to_json(),
        "vocab_size": VOCAB,
        "mask_id": VOCAB,
        "prefix_dim": 8,
        "max_seconds": 360,
        "ref_chunk_samples": 1_440_000,
        "sources": [],
        "stages": stages,
        "files": {
            "tokenizer.json": entry("tokenizer.json", tokenizer.to_str().encode()),
            "constants.npz": entry("constants.npz", constants.getvalue()),
        },
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def stub_pipeline(folder: Path, *, max_concurrent: int = 4, **changes: object) -> Pipeline:
    """A loaded pipeline on stub engines; `pipeline._engines` holds them. `changes` go to the manifest."""
    bundle = Bundle.open(write_stub_bundle(folder / "stub.bundle", **changes))
    bundle.verify()
    return Pipeline(bundle, stub_engines(), backend="stub", device="cpu", max_concurrent=max_concurrent)


def no_threads_left() -> bool:
    return not any(t.name.startswith("lada-rt") for t in threading.enumerate())


def sung(n_samples: int, seed: int = 0) -> np.ndarray:
    """A deterministic stand-in for a vocal, [n_samples] float32 at 48 kHz."""
    rng = np.random.default_rng(seed)
    t = np.arange(n_samples) / 48_000
    return (0.4 * np.sin(2 * np.pi * (220 + 30 * np.sin(3 * t)) * t) * rng.uniform(0.5, 1)).astype(np.float32)
