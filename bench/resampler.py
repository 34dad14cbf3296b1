"""How far is soxr (the runtime's resampler) from the windowed sinc of the released program?

Compares both on sung audio at the usual file rates, to 48 kHz: the difference in dB relative to the signal, in the
whole band and below 15 kHz, where the roll-offs of the two filters do not matter.

    python bench/resampler.py [VOCAL.wav] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from lada_rt.audio import load_audio
from lada_rt_export.demo.songs.voice import phrase_score, sing
from lada_rt_export.released_audio import resample_frac

RATE_OUT_HZ = 48_000


def relative_db(difference: np.ndarray, signal: np.ndarray, below_hz: float = np.inf) -> float:
    """Energy of `difference` over that of `signal`, both [N] at 48 kHz, in dB, within a band."""
    freqs = np.fft.rfftfreq(len(signal), 1 / RATE_OUT_HZ)
    band = freqs <= below_hz
    energy = [float((np.abs(np.fft.rfft(x)[band]) ** 2).sum()) for x in (difference, signal)]
    return 10 * float(np.log10(max(energy[0], 1e-30) / energy[1]))


def compare(samples: np.ndarray, rate_in_hz: int) -> dict[str, float | int]:
    """Both resamplers on [N] float32."""
    ours = load_audio((samples, rate_in_hz), RATE_OUT_HZ).samples
    theirs = resample_frac(samples[None], rate_in_hz, RATE_OUT_HZ)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    inner = slice(2000, -2000)  # the released program repeats the first and last sample beyond the edges
    difference = (ours - theirs)[0, inner]
    return {
        "rate_in_hz": rate_in_hz,
        "n_samples": ours.shape[1],
        "max_abs_difference": float(np.abs(difference).max()),
        "difference_db": relative_db(difference, theirs[0, inner]),
        "difference_db_below_15_khz": relative_db(difference, theirs[0, inner], 15_000),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("vocal", nargs="?", type=Path, help="a recording; default: only the project's own singer")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    notes = phrase_score(8.0, seed=7).notes
    for rate_hz in (22_050, 32_000, 44_100, 96_000):
        rows.append({"input": "sung phrase, seed 7", **compare(sing(notes, rate_hz=rate_hz, seed=7), rate_hz)})
    if args.vocal is not None:
        import soundfile

        samples, rate_hz = soundfile.read(args.vocal, dtype="float32", always_2d=True)
        rows.append({"input": args.vocal.name, **compare(np.ascontiguousarray(samples[:, 0]), rate_hz)})
    for row in rows:
        print(
            f"{row['input']:22} {row['rate_in_hz']:6d} Hz: {row['difference_db']:7.1f} dB, "
            f"below 15 kHz {row['difference_db_below_15_khz']:7.1f} dB, max {row['max_abs_difference']:.1e}"
        )
    if args.json is not None:
        report = {"what": "soxr VHQ against the released windowed sinc, to 48 kHz", "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
