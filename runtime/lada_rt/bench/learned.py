"""Quality measures that need trained weights; each takes the path to them, and is left out when none is given.

FAD is the Fréchet distance between Gaussians fitted to embeddings of generated and of reference audio (Kilgour et al.,
arXiv 1812.08466). The CLaMP score is the cosine of the features of a text and of audio (Wu et al., arXiv 2502.10362).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lada_rt.audio import load_audio
from lada_rt.bench.quality import Measure
from lada_rt.bundle import Bundle
from lada_rt.condition import encode_reference, encode_text, load_tokenizer
from lada_rt.engines.onnxruntime import OnnxEngine
from lada_rt.errors import EngineError, ParamError

__all__ = ["ClampScore", "FrechetDistance", "LearnedMetrics", "frechet_distance"]

#: of silence, to see what a model gives
PROBE_SECONDS = 10
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LearnedMetrics:
    """Where the weights are.

    Attributes:
        fad_model: ONNX file, mono audio [1, N] float32 to embeddings [n, D]; None leaves FAD out.
        fad_rate_hz: sample rate that the model expects.
        fad_reference: folder of audio files, or an .npz with `mean` [D] and `covariance` [D, D].
        clamp_bundle: bundle whose text and reference encoder are CLaMP 3's; None leaves the CLaMP score out.

    Raises:
        ParamError: a part of FAD is missing.
    """

    fad_model: Path | None = None
    fad_rate_hz: int | None = None
    fad_reference: Path | None = None
    clamp_bundle: Path | None = None

    def __post_init__(self) -> None:
        given = [self.fad_model is not None, self.fad_rate_hz is not None, self.fad_reference is not None]
        if any(given) and not all(given):
            raise ParamError("FAD: expected --fad-model, --fad-rate and --fad-reference together, or none of them")
        if self.fad_rate_hz is not None and not 1_000 <= self.fad_rate_hz <= 768_000:
            raise ParamError(f"--fad-rate: expected a sample rate of 1000 to 768000 Hz, got {self.fad_rate_hz}")

    def open(self, text: str) -> dict[str, Measure]:
        """Load what is there: measure name -> function of audio [C, N] and its rate.

        Raises:
            ParamError: a file has another form, or the CLaMP score has no text to compare with.
            AudioError, BundleError: a file cannot be read.
            EngineError: ONNX Runtime is missing.
        """
        measures: dict[str, Measure] = {}
        if self.fad_model is not None and self.fad_rate_hz is not None and self.fad_reference is not None:
            measures["fad"] = FrechetDistance(self.fad_model, self.fad_rate_hz, self.fad_reference)
        if self.clamp_bundle is not None:
            measures["clamp_score"] = ClampScore(self.clamp_bundle, text)
        return measures


@dataclass(frozen=True, slots=True)
class _Gaussian:
    """Mean [D] and covariance [D, D] of embeddings, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


def frechet_distance(a: _Gaussian, b: _Gaussian) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), at least 0.

    The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2): no root of an asymmetric product,
    whose rounding gives complex numbers where a covariance is singular.
    """
    roots = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False)
    apart = float(((a.mean - b.mean) ** 2).sum())
    return max(0.0, apart + float(np.trace(a.covariance) + np.trace(b.covariance)) - 2 * float(roots.sum()))


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return root


class FrechetDistance:
    """Distance of audio from a set of reference audio, in the space of an embedding model.

    With a single song it compares that song's moments with the set's; read it beside others of the same length.
    """

    def __init__(self, model: Path, rate_hz: int, reference: Path) -> None:
        if not model.is_file():
            raise ParamError(f"--fad-model: {model}: no such file; give an ONNX file of an audio embedding model")
        self._model, self._rate_hz = model, rate_hz
        self._engine = OnnxEngine(model)
        names = self._engine.input_names
        if len(names) != 1:
            raise ParamError(
                f"--fad-model: {model}: expected one input, mono audio [1, N], got {', '.join(names) or 'none'}"
            )
        (self._input,) = names
        self._reference = self._saved(reference) if reference.suffix == ".npz" else self._of_folder(reference)
        # an hour of measuring is not the time to find out
        width = self._embeddings((np.zeros(PROBE_SECONDS * rate_hz, np.float32), rate_hz)).shape[1]
        if width != len(self._reference.mean):
            raise ParamError(
                f"--fad-reference: expected statistics of {width} numbers, as {model} gives, got "
                f"{len(self._reference.mean)}"
            )

    def __call__(self, audio: Floats, rate_hz: int) -> float:
        """Distance of [C, N] at `rate_hz`; channels are averaged."""
        return frechet_distance(_fit([self._embeddings((audio, rate_hz))], "the generated audio"), self._reference)

    def _embeddings(self, source: Any) -> NDArray[np.float64]:
        mono = load_audio(source, self._rate_hz, what="FAD").samples.mean(axis=0, dtype=np.float32)
        try:
            values = next(iter(self._engine.run(**{self._input: mono[None]}).values()))
        except EngineError as error:
            raise ParamError(
                f"--fad-model: {self._model}: expected a model of mono audio [1, N] float32 ({error})"
            ) from None
        if values.ndim != 2 or not np.isfinite(values).all():
            raise ParamError(
                f"--fad-model: {self._model}: expected finite embeddings [n, D], got shape {list(values.shape)}"
            )
        return values.astype(np.float64)

    def _of_folder(self, folder: Path) -> _Gaussian:
        files = sorted(p for p in folder.glob("*") if p.suffix.lower() in AUDIO_SUFFIXES) if folder.is_dir() else []
        if not files:
            raise ParamError(f"--fad-reference: {folder}: expected a folder of audio files or an .npz with statistics")
        return _fit((self._embeddings(path) for path in files), str(folder))

    @staticmethod
    def _saved(path: Path) -> _Gaussian:
        try:
            with np.load(path, allow_pickle=False) as archive:
                mean, covariance = (archive[name].astype(np.float64) for name in ("mean", "covariance"))
        except Exception as error:  # numpy raises what the archive's bytes make of it
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise ParamError(f"--fad-reference: {path}: expected `mean` and `covariance`, {reason}") from None
        if mean.ndim != 1 or covariance.shape != (*mean.shape, *mean.shape):
            raise ParamError(
                f"--fad-reference: {path}: expected mean [D] and covariance [D, D], got {list(mean.shape)} and "
                f"{list(covariance.shape)}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):  # NaN would come out as the distance 0
            raise ParamError(f"--fad-reference: {path}: expected finite numbers, got NaN or infinity; make it anew")
        return _Gaussian(mean, covariance)


def _fit(parts: Iterable[NDArray[np.float64]], of: str) -> _Gaussian:
    rows = np.concatenate(list(parts))
    if len(rows) < 2:
        raise ParamError(f"FAD: expected two embeddings at least from {of}, got {len(rows)}; use longer audio")
    return _Gaussian(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False)))


class ClampScore:
    """Cosine of a text's feature and an audio's, in [-1, 1], by the encoders of a bundle."""

    def __init__(self, bundle_path: Path, text: str) -> None:
        if not text.strip():
            raise ParamError("--clamp-bundle: expected a description to compare the audio with, got none; add --text")
        bundle = Bundle.open(bundle_path)
        bundle.verify()
        self._bundle = bundle
        stages = {name: bundle.stages[name].graph for name in ("text_encoder", "ref_encoder")}
        engines = {name: OnnxEngine(bundle.file_path(graph)) for name, graph in stages.items()}
        self._audio = engines["ref_encoder"]
        tokenizer = load_tokenizer(bundle.file_path(bundle.files["tokenizer.json"]))
        self._text = encode_text(engines["text_encoder"], tokenizer, text)

    def __call__(self, audio: Floats, rate_hz: int) -> float:
        """Score of [C, N] at `rate_hz`; channels are averaged."""
        bundle = self._bundle
        mono = load_audio((audio, rate_hz), bundle.geometry.sample_rate_hz, what="CLaMP score").samples.mean(axis=0)
        feature = encode_reference(
            self._audio,
            mono,
            chunk_samples=bundle.ref_chunk_samples,
            hidden_size=int(bundle.stages["ref_encoder"].input_shape("frame_sum")[1]),
        )
        lengths = float(np.linalg.norm(self._text)) * float(np.linalg.norm(feature))
        return float(self._text @ feature) / max(lengths, 1e-12)
