"""`lada-rt bench`: check every configuration once, then time it.

Inside the timing is what the paper's appendix B.3 counts: from the request, with reading and resampling the vocal, to
the last sample of the waveform. Loading the bundle, the first run and writing files are timed apart or not at all.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lada_rt.bench import machine, quality
from lada_rt.bench.check import OnnxReference, Recorder, check_run
from lada_rt.bench.graph_sizes import bundle_sizes
from lada_rt.bench.learned import LearnedMetrics
from lada_rt.bench.loops import check_loops, have_loops
from lada_rt.bench.roofline import ModelSizes, Peaks, floor_seconds, song_work
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.condition import load_tokenizer, tokenize
from lada_rt.engines import load_engines
from lada_rt.engines.base import Engine
from lada_rt.errors import EngineError, ParamError
from lada_rt.memory import return_freed
from lada_rt.params import GenerationParams
from lada_rt.pipeline import Pipeline, Result, Timings

__all__ = ["BenchOptions", "Opponent", "run_bench", "stage_seconds", "sung_vocal"]

FORMAT = "lada-rt bench 1"
NO_WEIGHTS = LearnedMetrics()
Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure.

    Attributes:
        steps: denoising steps, each a row; the largest is the reference of quality.
        seconds: lengths of the vocal.
        repeat: timed runs of each row.
        flow_steps: Euler steps of the decoder.
        seed: of the vocal and of the runs.
        text: description of the music.
        quality: report agreement with the best run, and how the output follows the vocal.
        learned: weights of further measures of quality.

    Raises:
        ParamError: an empty or senseless list, or weights for measures that are not reported.
    """

    steps: tuple[int, ...] = (8, 20, 60)
    seconds: tuple[float, ...] = (10.0, 30.0)
    repeat: int = 2
    flow_steps: int = 20
    seed: int = 13
    text: str = ""
    quality: bool = True
    learned: LearnedMetrics = NO_WEIGHTS

    def __post_init__(self) -> None:
        if not self.quality and self.learned != NO_WEIGHTS:
            raise ParamError("--no-quality: expected no weights for measures that are not reported; drop one of them")
        for name in ("steps", "seconds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values) or any(not 0 < v < 1e6 for v in values):
                raise ParamError(f"--{name}: expected different positive numbers, got {list(values)}")
        if not 1 <= self.repeat <= 1000:
            raise ParamError(f"--repeat: expected 1 to 1000, got {self.repeat}")
        for steps in self.steps:
            self.params(steps)

    def params(self, steps: int) -> GenerationParams:
        return GenerationParams(steps=steps, flow_steps=self.flow_steps, seed=self.seed)


class Opponent(Protocol):
    """Another program that does the same work, timed in turn with the runtime."""

    name: str

    def check(
        self, vocal: np.ndarray, rate_hz: int, text: str, params: GenerationParams, recorder: Recorder, result: Result
    ) -> Mapping[str, float]:
        """Errors of a recorded run of the runtime against this program on the same noise; raises EngineError."""
        ...

    def run(self, vocal: np.ndarray, rate_hz: int, text: str, params: GenerationParams) -> Mapping[str, float]:
        """One run: seconds of each stage, by the names of `stage_seconds`, and `total`."""
        ...


@dataclass(slots=True)
class _Samples:
    """Timed runs of one row."""

    timings: list[Timings] = field(default_factory=list)
    opponent: list[Mapping[str, float]] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def sung_vocal(seconds: float, seed: int, rate_hz: int) -> tuple[np.ndarray, str]:
    """A vocal to measure with, [1, N] float32, and what made it.

    The project's own singer where it is installed (from 4 s on), else tones with a vibrato.
    """
    n_samples = round(seconds * rate_hz)
    if seconds >= 4 and rate_hz == 48_000:
        try:
            from lada_rt_export.demo.songs.voice import sing_phrase
        except ImportError:
            pass
        else:
            return np.atleast_2d(sing_phrase(seconds, seed))[:, :n_samples], f"sung phrase, seed {seed}"
    t = np.arange(n_samples) / rate_hz
    rng = np.random.default_rng(seed)
    notes = rng.integers(0, 13, max(1, math.ceil(seconds * 2)))  # semitones, two notes a second
    pitch = 220 * 2 ** (notes[(t * 2).astype(int)] / 12)
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.01 * np.sin(2 * np.pi * 5.5 * t))) / rate_hz
    beat = np.exp(-3 * (t * 2 % 1))
    tone = sum(np.sin(k * phase) / k for k in range(1, 6))
    return (0.2 * beat * tone).astype(np.float32)[None], f"tones, seed {seed}"


def stage_seconds(timings: Timings) -> dict[str, float]:
    """Wall seconds of a run by stage; they add up to its total.

    The stages of the main path are sequential, but flow, mel decoder and vocoder overlap: the decoding time is shared
    out among them by how busy each was. `encoder` holds reading and resampling, `denoiser` sampling and remasking.
    """
    busy = {name: timings.engines_s.get(name, 0.0) for name in ("flow", "mel_decoder", "vocoder")}
    shared = timings.decode_s / max(sum(busy.values()), 1e-12)
    return {
        "encoder": timings.encode_s,
        "text_encoder": timings.condition_s,
        "denoiser": timings.denoise_s,
        **{name: seconds * shared for name, seconds in busy.items()},
    }


def run_bench(
    bundle_path: Path | None,
    options: BenchOptions,
    *,
    backend: str = "auto",
    device: str = "auto",
    reference_path: Path | None = None,
    peaks: Peaks | None = None,
    opponent: Callable[[Bundle], Opponent] | None = None,
    log: Log = lambda line: None,
) -> dict[str, Any]:
    """Measure a bundle.

    Args:
        bundle_path: its folder; None: the embedded demo bundle.
        options: what to measure.
        backend, device: as for `Pipeline.load`.
        reference_path: an fp32 bundle of the same weights to check against; None: the bundle itself.
        peaks: of the device; None measures those of the CPU, and leaves the floor out on other devices.
        opponent: makes the program to compare with; None: none.
        log: told one line per row.

    Returns:
        The report, plain data; see `report.py` for its form.

    Raises:
        EngineError: a configuration is wrong, or a backend fails.
        BundleError, ParamError: as for `Pipeline.load`.
    """
    started = time.perf_counter()
    measures = options.learned.open(options.text)
    bundle = Bundle.open(bundle_path if bundle_path is not None else demo_bundle_path())
    _check_lengths(options.seconds, bundle)
    bundle.verify()
    reference = OnnxReference(bundle if reference_path is None else Bundle.open(reference_path))
    load_start = time.perf_counter()
    engines, used_backend, used_device = load_engines(bundle, backend=backend, device=device)
    load_s = time.perf_counter() - load_start
    if peaks is None and used_device == "cpu":
        peaks = machine.measure_peaks()
    rival = None if opponent is None else opponent(bundle)
    bench = _Bench(bundle, engines, used_backend, used_device, options, reference, peaks, rival, measures, log)
    load_before = machine.load_average()
    rows = [row for seconds in options.seconds for row in bench.rows(seconds)]
    report: dict[str, Any] = {
        "format": FORMAT,
        "what": "end-to-end RTF of lada-rt by denoising steps and length",
        "timed": "from the request to the last sample: reading, resampling, encoding, denoising, decoding; "
        "not: loading, the first run, writing files",
        "date": time.strftime("%Y-%m-%d"),
        "commit": machine.commit(),
        "machine": machine.describe_machine(),
        "load_average": {"before": load_before, "after": machine.load_average()},
        "versions": machine.versions(),
        "bundle": {"name": bundle.name, "sha256": bundle.sha256, "trained": bundle.trained},
        "precision": {name: stage.precision for name, stage in bundle.stages.items()},
        "backend": used_backend,
        "device": used_device,
        "options": _plain(options),
        "vocal": bench.vocal_made_by,
        "load_s": round(load_s, 4),
        "first_run_s": bench.first_run_s,
        "peaks": None if peaks is None else asdict(peaks),
        "bench_s": round(time.perf_counter() - started, 2),
        "rows": rows,
    }
    if not bundle.trained:
        report["untrained"] = "the bundle is untrained: token agreement and musical figures mean nothing"
    if rival is not None:
        report["opponent"] = rival.name
        report["ratios"] = _overall_ratios(rows)
    return report


def _check_lengths(seconds: Sequence[float], bundle: Bundle) -> None:
    """Refuse lengths that the bundle cannot take, or that are the same in samples, before hours of measuring."""
    rate_hz = bundle.geometry.sample_rate_hz
    n_samples = [round(value * rate_hz) for value in seconds]
    if min(n_samples) < 1 or max(n_samples) > bundle.max_seconds * rate_hz or len(set(n_samples)) < len(n_samples):
        raise ParamError(
            f"--seconds: expected different lengths from 1 sample to the bundle's {bundle.max_seconds:g} s, got "
            f"{', '.join(f'{value:g}' for value in seconds)}"
        )


class _Bench:
    """The loaded bundle and what rows share."""

    def __init__(
        self,
        bundle: Bundle,
        engines: Mapping[str, Engine],
        backend: str,
        device: str,
        options: BenchOptions,
        reference: OnnxReference,
        peaks: Peaks | None,
        opponent: Opponent | None,
        measures: Mapping[str, quality.Measure],
        log: Log,
    ) -> None:
        self._bundle, self._engines = bundle, engines
        self._backend, self._device = backend, device
        self._options, self._reference, self._peaks = options, reference, peaks
        self._opponent, self._measures, self._log = opponent, measures, log
        self._pipeline = Pipeline(bundle, engines, backend=backend, device=device)
        self._sizes: ModelSizes = bundle_sizes(bundle)
        self.first_run_s: float | None = None
        self.vocal_made_by = ""

    def rows(self, seconds: float) -> Iterator[dict[str, Any]]:
        """All rows of one length; the most steps come first, as the others are compared with them."""
        rate_hz = self._bundle.geometry.sample_rate_hz
        vocal, self.vocal_made_by = sung_vocal(seconds, self._options.seed, rate_hz)
        best: Result | None = None
        rows = []
        for steps in sorted(self._options.steps, reverse=True):
            recorder, result, row = self._row(vocal, rate_hz, steps)
            best = best or result
            if self._options.quality:
                against = quality.against_reference(
                    result.codes, result.audio, recorder.rows, best.codes, best.audio, rate_hz
                )
                row["quality"] = {
                    "reference_steps": max(self._options.steps),
                    "against_reference": against,
                    "against_vocal": quality.against_vocal(result.audio, vocal, rate_hz),
                    **{name: measure(result.audio, rate_hz) for name, measure in self._measures.items()},
                }
            rows.append(row)
        yield from reversed(rows)

    def _generate(self, pipeline: Pipeline, vocal: np.ndarray, rate_hz: int, params: GenerationParams) -> Result:
        return pipeline.generate((vocal, rate_hz), text=self._options.text, params=params)

    def _row(self, vocal: np.ndarray, rate_hz: int, steps: int) -> tuple[Recorder, Result, dict[str, Any]]:
        options, params = self._options, self._options.params(steps)
        recorder = Recorder(self._engines, steps, options.flow_steps)
        probe = Pipeline(self._bundle, recorder.engines, backend=self._backend, device=self._device)
        result = self._generate(probe, vocal, rate_hz, params)
        if self.first_run_s is None:
            self.first_run_s = round(result.timings.total_s, 4)
        checked = check_run(self._bundle, recorder, params, result.codes, result.audio, self._reference)
        if self._opponent is not None:
            errors = self._opponent.check(vocal, rate_hz, options.text, params, recorder, result)
            checked |= {f"{self._opponent.name}: {name}": error for name, error in errors.items()}
        repeated = result
        if have_loops(self._engines):
            checked |= check_loops(self._bundle, self._engines, recorder, params, result)
            repeated = self._generate(self._pipeline, vocal, rate_hz, params)
        # what was kept for the checks would count as the runtime's memory
        recorder.calls.clear()
        self._reference.release()
        gc.collect()
        return_freed()
        samples = _Samples()
        machine.reset_peak_rss()
        for _ in range(options.repeat):
            cpu_start = time.process_time()
            timed = self._generate(self._pipeline, vocal, rate_hz, params)
            samples.cpu_s.append(time.process_time() - cpu_start)
            samples.timings.append(timed.timings)
            _same(timed, repeated, self._device)
            del timed  # or the next run's peak would hold two songs
            if self._opponent is not None:
                samples.opponent.append(self._opponent.run(vocal, rate_hz, options.text, params))
        row = self._describe(vocal.shape[1], steps, samples)
        row["checked"] = checked
        self._log(_line(row))
        return recorder, result, row

    def _describe(self, n_samples: int, steps: int, samples: _Samples) -> dict[str, Any]:
        rss_mb = machine.row_peak_rss_mb()
        geometry = self._bundle.geometry
        n_windows = geometry.n_windows(geometry.n_codes(n_samples))
        timings = samples.timings
        stages = [stage_seconds(t) for t in timings]
        medians = {name: _round(np.median([s[name] for s in stages])) for name in stages[0]}
        row: dict[str, Any] = {
            "steps": steps,
            "seconds": n_samples / geometry.sample_rate_hz,
            "audio_s": timings[0].audio_s,
            "rtf": _round(np.median([t.rtf for t in timings])),
            "ttfa_s": _round(np.median([t.first_audio_s for t in timings])),
            "total_s": _round(np.median([t.total_s for t in timings])),
            "stages": medians,
            "engines_s": {
                name: _round(np.median([t.engines_s.get(name, 0.0) for t in timings])) for name in timings[0].engines_s
            },
            "step_s": _round(medians["denoiser"] / steps),
            "flow_step_s": _round(medians["flow"] / (self._options.flow_steps * n_windows)),
            "peak_rss_mb": round(rss_mb, 1),
            "cpu_s": _round(np.median(samples.cpu_s)),
            "percentiles": {
                "rtf": _percentiles([t.rtf for t in timings]),
                "ttfa_s": _percentiles([t.first_audio_s for t in timings]),
                "stages": {name: _percentiles([s[name] for s in stages]) for name in stages[0]},
            },
            "runs_s": [_round(t.total_s) for t in timings],
        }
        if self._peaks is not None:
            row["floor"] = self._floor(n_samples, steps, row, self._peaks)
        if samples.opponent:
            row |= _against_opponent(stages, timings, samples.opponent)
        return row

    def _floor(self, n_samples: int, steps: int, row: Mapping[str, Any], peaks: Peaks) -> dict[str, Any]:
        """Least seconds at the device's peaks, and the fraction of them that was reached."""
        work = song_work(
            self._sizes,
            self._bundle.geometry,
            n_samples=n_samples,
            n_steps=steps,
            flow_steps=self._options.flow_steps,
            n_tokens=self._n_tokens(),
            value_bytes={name: 4 if stage.precision == "fp32" else 2 for name, stage in self._bundle.stages.items()},
        )
        floors = {name: floor_seconds(stage, peaks) for name, stage in work.items()}
        known = sum(row["stages"][name] for name in floors)
        return {
            "stages": {name: _round(seconds) for name, seconds in floors.items()},
            "fractions": {name: _round(s / max(row["stages"][name], 1e-12)) for name, s in floors.items()},
            "total_s": _round(sum(floors.values())),
            "fraction": _round(sum(floors.values()) / max(known, 1e-12)),
        }

    def _n_tokens(self) -> int:
        path = self._bundle.file_path(self._bundle.files["tokenizer.json"])
        return len(tokenize(load_tokenizer(path), self._options.text))


def _same(timed: Result, checked: Result, device: str) -> None:
    """A timed run must be the run that was checked: bit for bit on a CPU, in its codes elsewhere."""
    same_codes = np.array_equal(timed.codes, checked.codes)
    same_audio = np.array_equal(timed.audio, checked.audio)
    if not same_codes or (device == "cpu" and not same_audio):
        raise EngineError(
            "check: expected the timed run to repeat the checked one, its "
            f"{'audio' if same_codes else 'codes'} differ; nothing is reported, run lada-rt doctor"
        )


def _against_opponent(
    stages: Sequence[Mapping[str, float]], timings: Sequence[Timings], opponent: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    ours = {name: float(np.median([s[name] for s in stages])) for name in stages[0]}
    ours["total"] = float(np.median([t.total_s for t in timings]))
    theirs = {name: float(np.median([o[name] for o in opponent])) for name in ours}
    pairs = [o["total"] / t.total_s for o, t in zip(opponent, timings, strict=True)]
    return {
        "opponent_s": {name: _round(value) for name, value in theirs.items()},
        "opponent_runs_s": [_round(o["total"]) for o in opponent],
        "ratios": {name: _round(theirs[name] / max(ours[name], 1e-12)) for name in ours},
        "ratio_percentiles": _percentiles(pairs),
    }


def _overall_ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Opponent over runtime, stage by stage, of the seconds of all rows together."""
    names = rows[0]["ratios"]
    ours = {name: sum(r["stages"].get(name, r["total_s"]) for r in rows) for name in names}
    theirs = {name: sum(r["opponent_s"][name] for r in rows) for name in names}
    return {name: _round(theirs[name] / max(ours[name], 1e-12)) for name in names}


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {str(q): _round(np.percentile(values, q)) for q in (20, 50, 80)}


def _plain(options: BenchOptions) -> dict[str, Any]:
    """Options for the report; of weights only the names of their files, as their folders mean nothing elsewhere."""
    learned = {n: v.name if isinstance(v, Path) else v for n, v in asdict(options.learned).items() if v is not None}
    return asdict(options) | {"steps": list(options.steps), "seconds": list(options.seconds), "learned": learned}


def _round(value: Any) -> float:
    return float(f"{float(value):.5g}")


def _line(row: Mapping[str, Any]) -> str:
    extra = f", {row['ratios']['total']:.2f} times the opponent's speed" if "ratios" in row else ""
    return f"{row['seconds']:g} s, {row['steps']} steps: RTF {row['rtf']:.3f}, TTFA {row['ttfa_s']:.2f} s{extra}"
