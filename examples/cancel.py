"""Watch a run and stop it: one callback does both. Here the run gets a time limit.

python examples/cancel.py vocal.wav SECONDS [BUNDLE]
"""

import sys
import time

from lada_rt import GenerationCancelled, Pipeline, Progress

vocal, seconds, *bundle = sys.argv[1:]
pipe = Pipeline.load(*bundle)
deadline = time.monotonic() + float(seconds)


def watch(progress: Progress) -> bool:
    """Called after every step, from whichever thread did it. False cancels within one more step."""
    print(f"{progress.stage:>9} {progress.step}/{progress.total}")
    return time.monotonic() < deadline


try:
    result = pipe.generate(vocal, on_progress=watch)
    print(f"made {result.timings.audio_s:.1f} s in time")
except GenerationCancelled:
    print("out of time; the pipeline is ready for the next run")
