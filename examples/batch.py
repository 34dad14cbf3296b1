"""Make the accompaniments of a folder of vocals. Stopped at any point, it goes on where it was when started again.

What is in OUT already is kept, whatever the options: take a new folder for others.

python examples/batch.py VOCALS OUT [--bundle B] [--text T] [--steps 60] [--flow-steps 20] [--seed 13]
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from lada_rt import AudioError, GenerationParams, Pipeline, Progress
from lada_rt.audio import write_audio
from rich.progress import Progress as Bars
from rich.progress import TaskID

#: work of a run in each stage, roughly, so that the bar moves evenly
SHARES = {"encode": (0.0, 0.1), "denoise": (0.1, 0.4), "render": (0.4, 1.0)}


def move(bars: Bars, task: TaskID, progress: Progress) -> None:
    """Show how far a song is."""
    if progress.stage in SHARES:
        start, stop = SHARES[progress.stage]
        bars.update(task, completed=start + (stop - start) * progress.step / progress.total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vocals", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundle")
    parser.add_argument("--text", default="")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--flow-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=13)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    if args.out.resolve() == args.vocals.resolve():
        parser.error("OUT: expected another folder than VOCALS, whose files would count as done")
    vocals = sorted(p for p in args.vocals.iterdir() if p.suffix.lower() in (".wav", ".flac", ".ogg", ".mp3"))
    # A file is written under another name first, so what exists is whole and need not be made again.
    stems = Counter(p.stem for p in vocals)
    todo = [(vocal, args.out / f"{vocal.stem if stems[vocal.stem] == 1 else vocal.name}.wav") for vocal in vocals]
    done = [vocal for vocal, out in todo if out.exists()]
    print(f"{len(vocals)} vocals, {len(done)} done before")

    pipe = Pipeline.load(args.bundle)
    params = GenerationParams(steps=args.steps, flow_steps=args.flow_steps, seed=args.seed)
    failed = 0
    with Bars() as bars:
        songs = bars.add_task("songs", total=len(vocals), completed=len(done))
        for vocal, out in todo:
            if vocal in done:
                continue
            task = bars.add_task(vocal.name, total=1.0)
            try:
                result = pipe.generate(
                    vocal, text=args.text, params=params, on_progress=lambda p, task=task: move(bars, task, p)
                )
            except AudioError as error:  # a bad file is no reason to stop
                print(f"{vocal.name}: {error}", file=sys.stderr)
                failed += 1
            else:
                write_audio(out, result.audio, result.sample_rate)
                print(f"{out}: {result.timings.audio_s:.1f} s, RTF {result.timings.rtf:.2f}")
            bars.remove_task(task)
            bars.advance(songs)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
