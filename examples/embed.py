"""Embed the runtime: load once, hand each piece of audio on as soon as it is final.

python examples/embed.py vocal.wav out.wav [BUNDLE]
"""

import sys

import soundfile
from lada_rt import GenerationParams, LadaError, Pipeline

vocal, out, *bundle = sys.argv[1:]
try:
    pipe = Pipeline.load(*bundle)  # once for a process; safe to use from many threads
    params = GenerationParams(steps=8, flow_steps=4, seed=13)  # fewer steps than the defaults: faster, plainer
    with (
        pipe.stream(vocal, text="warm city pop", params=params) as stream,
        soundfile.SoundFile(out, "w", stream.sample_rate, 2) as file,
    ):
        for chunk in stream:  # an audio device or a socket would do as well
            file.write(chunk.samples.T)
            print(f"{(chunk.start_sample + chunk.samples.shape[1]) / chunk.sample_rate:.2f} s ready")
    print(f"{out}: RTF {stream.timings.rtf:.2f}, first audio after {stream.timings.first_audio_s:.2f} s")
except LadaError as error:  # one line: what was expected, what came, the remedy
    sys.exit(f"{type(error).__name__}: {error}")
