"""What `lada-rt generate` does, behind the command line's options: run, deliver, report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lada_rt.audio import check_output_path
from lada_rt.delivery import Delivery
from lada_rt.errors import GenerationCancelled
from lada_rt.files import check_different
from lada_rt.notes import note
from lada_rt.params import GenerationParams
from lada_rt.pipeline import Pipeline
from lada_rt.progress import Progress
from lada_rt.results import Result, Song
from lada_rt.saved_run import save_codes
from lada_rt.terminal import ProgressBars, check_report_path, print_summary, write_json_report

__all__ = ["GenerateCommand", "Targets"]


@dataclass(frozen=True, slots=True)
class Targets:
    """Where one result goes.

    Attributes:
        out: the audio file; None is stdout.
        json_file: the report, or None.
        codes_file: codes and latents, or None.
    """

    out: Path | None
    json_file: Path | None
    codes_file: Path | None

    def of_seed(self, seed: int) -> Targets:
        """The files of one of several variations: band.wav becomes band-seed14.wav, which `--seed 14` makes alone."""
        files = (self.out, self.json_file, self.codes_file)
        return Targets(*(file and file.with_name(f"{file.stem}-seed{seed}{file.suffix}") for file in files))

    def check(self, vocal: Path, reference: Path | None, keep: Path | None) -> None:
        """Refuse what cannot be written before any work is done. Codes may replace those that the run starts from.

        Raises:
            ParamError: a file cannot be written, is one of the inputs, or two are the same.
        """
        if self.out is not None:
            check_output_path(self.out, vocal, reference, keep)
        check_report_path(self.json_file, "--json", vocal, reference, keep)
        check_report_path(self.codes_file, "--save-codes", vocal, reference)
        check_different({"output": self.out, "--json": self.json_file, "--save-codes": self.codes_file})


class GenerateCommand:
    """One call of the command: what is made, and how its results are handed over."""

    def __init__(self, pipeline: Pipeline, song: Song, params: GenerationParams, *, mix: bool, bars: bool) -> None:
        """
        Args:
            pipeline: to run.
            song: its vocal is a path.
            params: options of the run.
            mix: add the vocal.
            bars: show progress.
        """
        self.pipeline, self.song, self.params = pipeline, song, params
        self._mix, self._show_bars = mix, bars

    def bars(self) -> ProgressBars:
        """Progress of one result."""
        return ProgressBars(enabled=self._show_bars)

    def stream(self, targets: Targets) -> None:
        """Make the song, writing it as it is made; a reader of stdout that is gone ends the work quietly."""
        delivery, bars = self._delivery(targets), self.bars()

        def watch(progress: Progress) -> bool:
            bars.update(progress)
            if stream.total_samples is not None and stream.vocal is not None:
                delivery.begin(stream.total_samples, stream.vocal)
            return not delivery.reader_gone()

        try:
            with (
                bars,
                delivery,
                self.pipeline.stream(
                    self.song.vocal,
                    text=self.song.text,
                    reference=self.song.reference,
                    params=self.params,
                    start_s=self.song.start_s,
                    end_s=self.song.end_s,
                    long=self.song.long,
                    reference_start_s=self.song.reference_start_s,
                    on_progress=watch,
                    keep_latents=targets.codes_file is not None,
                ) as stream,
            ):
                for chunk in stream:
                    delivery.write(chunk.samples)
                result = stream.result()
        except (BrokenPipeError, GenerationCancelled):
            delivery.abandon()
            return
        self._finish(result, delivery, targets)

    def variations(self, targets: Sequence[Targets]) -> None:
        """Make a result for each of `targets`, with the seeds params.seed, params.seed + 1, ...

        Encoding, conditioning and the first denoising step are done once. A result is written when it is complete and
        stays, whatever becomes of the next.
        """
        bars = self.bars()
        results = self.pipeline.generate_batch(
            [self.song],
            params=self.params,
            variations=len(targets),
            on_progress=lambda progress: bars.update(progress),  # of the result in the making
        )
        for each in targets:
            bars = self.bars()
            with bars:
                result = next(results)
            self.deliver(result, each)

    def deliver(self, result: Result, targets: Targets) -> None:
        """Write a finished result."""
        delivery = self._delivery(targets)
        try:
            with delivery:
                delivery.begin(result.audio.shape[1], result.vocal)
                delivery.write(result.audio)
        except BrokenPipeError:
            delivery.abandon()
            return
        self._finish(result, delivery, targets)

    def _delivery(self, targets: Targets) -> Delivery:
        rate_hz = self.pipeline.bundle.geometry.sample_rate_hz
        return Delivery(targets.out, rate_hz, mix=self._mix, measure=targets.json_file is not None)

    def _finish(self, result: Result, delivery: Delivery, targets: Targets) -> None:
        """Notes, codes, report and summary, once the audio is complete. What the inputs lacked was said when they were
        read."""
        gain = delivery.gain
        if gain is not None and gain.lowest_gain_db < 0:
            note(
                f"the mix was turned down by up to {-gain.lowest_gain_db:.1f} dB, for {gain.limited_s:.2f} s in all, "
                "to stay below its true-peak ceiling"
            )
        if targets.codes_file is not None:
            save_codes(targets.codes_file, result)
        out = "-" if targets.out is None else str(targets.out)
        if targets.json_file is not None:
            write_json_report(targets.json_file, self.pipeline, self.song, result, delivery, out=out, mix=self._mix)
        # a WAV on stdout leaves no room for words there
        file = sys.stderr if targets.out is None else sys.stdout
        print_summary(self.pipeline, result, out, delivery.n_samples or 0, file=file)
