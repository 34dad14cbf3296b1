"""The command line: lada-rt generate | build-engine | inspect | doctor.

Results go to stdout, progress and messages to stderr. An error is one line. Exit codes: 0 done, 2 usage or option, 3
audio input, 4 bundle or checkpoint, 5 backend or device, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

import lada_rt
from lada_rt.errors import EngineError, LadaError, ParamError

PathArg = click.Path(path_type=Path)


def backend_options(command: Any) -> Any:
    command = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")(command)
    return click.option("--backend", default="auto", show_default=True, help="auto or onnxruntime.")(command)


json_option = click.option("--json", "json_file", type=PathArg, metavar="FILE", help="Write a report for machines.")
debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
bundle_option = click.option(
    "--bundle",
    type=PathArg,
    metavar="B",
    help="Bundle folder. Default: the embedded demo bundle, which is untrained.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(lada_rt.__version__, package_name="lada-rt", message="lada-rt %(version)s")
def app() -> None:
    """A sung vocal in, a full-song accompaniment out: inference runtime for LaDA-Band."""


@app.command()
@click.argument("vocal", type=PathArg)
@click.option("-o", "--out", required=True, metavar="OUT", help="Output .wav, .flac or .ogg, or - for WAV on stdout.")
@bundle_option
@click.option(
    "--text",
    default="",
    help="Description of the music. An empty text is encoded too, as by the released program.",
)
@click.option(
    "--reference",
    type=PathArg,
    metavar="FILE",
    help="Audio whose style to follow, read from --start to its end.",
)
@click.option("--steps", type=int, default=60, show_default=True, help="Denoising steps.")
@click.option(
    "--schedule",
    default="cosine",
    show_default=True,
    help="cosine, linear, sqrt, square, cubic or power:<p>.",
)
@click.option(
    "--strategy",
    default="low_confidence",
    show_default=True,
    help="low_confidence, random, fixed_position or one_shot.",
)
@click.option("--top-k", type=int, default=100, show_default=True, help="Draw from the k likeliest tokens.")
@click.option(
    "--top-p",
    type=float,
    default=0.9,
    show_default=True,
    help="Draw from the smallest set of this mass; 1 is off.",
)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of the token draw.")
@click.option(
    "--mask-temperature",
    type=float,
    default=10.5,
    show_default=True,
    help="Noise on the confidence, annealed to 0.",
)
@click.option("--flow-steps", type=int, default=20, show_default=True, help="Steps of the flow decoder.")
@click.option(
    "--guidance",
    type=float,
    default=1.5,
    show_default=True,
    help="Of the flow decoder; 1 is off and halves its work.",
)
@click.option("--seed", type=int, default=13, show_default=True, help="Same inputs, options and seed: same bytes.")
@click.option(
    "--prefix-order",
    default="ref,text",
    show_default=True,
    help="Condition slots: ref,text (as released) or text,ref (as trained).",
)
@click.option("--start", type=float, default=0.0, metavar="S", help="Start of the segment in seconds.")
@click.option("--end", type=float, metavar="E", help="End of the segment in seconds. Default: end of the file.")
@click.option("--mix", is_flag=True, help="Add the vocal at unity gain; the output gets the vocal's length.")
@backend_options
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress bars.")
@debug_option
def generate(
    vocal: Path,
    out: str,
    bundle: Path | None,
    text: str,
    reference: Path | None,
    start: float,
    end: float | None,
    mix: bool,
    backend: str,
    device: str,
    json_file: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Make the accompaniment of the sung VOCAL: WAV, FLAC, OGG or MP3, any rate and channel count."""
    from lada_rt.audio import check_output_path, mix_vocal, to_pcm16, wav_header, write_audio
    from lada_rt.params import GenerationParams
    from lada_rt.pipeline import Pipeline
    from lada_rt.terminal import ProgressBars, print_summary, write_json_report

    params = GenerationParams(**options)
    to_stdout = out == "-"
    if not to_stdout:
        check_output_path(Path(out), vocal)
    check_report_path(json_file)

    pipeline = Pipeline.load(bundle, backend=backend, device=device)
    if not pipeline.bundle.trained:
        note(f"bundle {pipeline.bundle.name} is UNTRAINED: its output is noise, not music")
    with ProgressBars(enabled=not quiet and sys.stderr.isatty()) as bars:
        result = pipeline.generate(
            vocal,
            text=text,
            reference=reference,
            params=params,
            start_s=start,
            end_s=end,
            on_progress=bars.update,
        )
    for line in result.warnings:
        note(line)
    audio = mix_vocal(result.audio, result.vocal) if mix else result.audio
    peak = float(abs(audio).max())
    if peak > 1.0:
        note(f"the output's peak is {peak:.2f} and is clipped to full scale")
    if to_stdout:
        write_stdout(wav_header(audio.shape[1], result.sample_rate) + to_pcm16(audio).tobytes())
    else:
        write_audio(Path(out), audio, result.sample_rate)
    if json_file is not None:
        write_json_report(json_file, pipeline, result, vocal=vocal, out=out, text=text, reference=reference, mix=mix)
    print_summary(pipeline, result, out, audio.shape[1], file=sys.stderr if to_stdout else sys.stdout)


@app.command("build-engine")
@click.option("--checkpoint", type=PathArg, metavar="F", help="The LaDA-Band checkpoint.")
@click.option("--pretrained-root", type=PathArg, metavar="D", help="Folder of mucodec/, clamp3/, MERT-v1-95M/, hub/.")
@click.option("--tokenizer", type=PathArg, metavar="F", help="XLM-R tokenizer.json, where it is not under hub/.")
@click.option("--out", type=PathArg, required=True, metavar="B", help="Bundle folder to write.")
@click.option(
    "--backend",
    default="onnxruntime",
    show_default=True,
    help="onnxruntime runs the graphs; tensorrt and torch add engines compiled for this machine.",
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="fp32, bf16 or fp16 for denoiser and flow; ,STAGE=PRECISION sets single stages: bf16,vocoder=fp16.",
)
@click.option("--max-seconds", type=int, default=360, show_default=True, help="Longest song, 1 to 360.")
@click.option("--stages", metavar="A,B", help="Build these only; the others are kept if they are up to date.")
@click.option("--demo", is_flag=True, help="Build the demo bundle: the real architecture, small, untrained.")
@debug_option
def build_engine(
    checkpoint: Path | None,
    pretrained_root: Path | None,
    tokenizer: Path | None,
    out: Path,
    backend: str,
    precision: str,
    max_seconds: int,
    stages: str | None,
    demo: bool,
) -> None:
    """Turn checkpoints into a bundle of verified engines. Interrupted, it goes on where it was."""
    if demo and (checkpoint, pretrained_root, tokenizer) != (None, None, None):
        raise ParamError("build-engine: expected either --demo or --checkpoint and --pretrained-root, got both")
    if not demo and (checkpoint is None or pretrained_root is None):
        raise ParamError("build-engine: expected --checkpoint and --pretrained-root, or --demo; see --help")
    if not 1 <= max_seconds <= 360:
        raise ParamError(f"--max-seconds: expected 1 to 360, got {max_seconds}")
    try:
        from lada_rt_export.command import build
    except ImportError as error:
        raise EngineError(
            f'build-engine: {error.name} is missing; install it with: pip install "lada-rt[export,cpu]"'
        ) from None
    build(
        out,
        checkpoint=checkpoint,
        pretrained_root=pretrained_root,
        tokenizer=tokenizer,
        backend=backend,
        precision=precision,
        max_seconds=max_seconds,
        stages=stages,
        log=note,
    )
    print(out)


@app.command()
@click.argument("bundle", type=PathArg, required=False)
@json_option
@debug_option
def inspect(bundle: Path | None, json_file: Path | None) -> None:
    """Show a BUNDLE: stages, shapes, measured errors; verify its checksums. Default: the embedded demo bundle."""
    from lada_rt.bundle import Bundle, demo_bundle_path
    from lada_rt.terminal import print_bundle, write_json

    check_report_path(json_file)
    opened = Bundle.open(bundle if bundle is not None else demo_bundle_path())
    opened.verify()
    print_bundle(opened)
    if json_file is not None:
        write_json(
            json_file,
            {"path": str(opened.path), "sha256": opened.sha256, "verified": True, **opened.summary()},
        )


@app.command()
@json_option
@debug_option
def doctor(json_file: Path | None) -> None:
    """Show backends, devices and versions, what is missing and how to get it."""
    from lada_rt.doctor import examine
    from lada_rt.terminal import print_doctor, write_json

    check_report_path(json_file)
    report = examine()
    print_doctor(report)
    if json_file is not None:
        write_json(json_file, report)


def check_report_path(json_file: Path | None) -> None:
    """Refuse a report that cannot be written before any work is done."""
    if json_file is not None and (not json_file.parent.is_dir() or json_file.is_dir()):
        raise ParamError(f"--json: {json_file}: cannot be written; give a file name in a folder that exists")


def write_stdout(data: bytes) -> None:
    """Write bytes to stdout; when the reader has gone, end quietly, as there is nobody left to serve."""
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # Keep the interpreter from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(0) from None


def note(message: str) -> None:
    print(f"lada-rt: {message}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Entry point: run a command and turn every error into one line and an exit code."""
    args = sys.argv[1:] if argv is None else argv
    sys.exit(run(args))


def run(args: list[str]) -> int:
    try:
        app.main(args, prog_name="lada-rt", standalone_mode=False)
        return 0
    except LadaError as error:
        if "--debug" in args:
            raise
        note(f"{type(error).__name__}: {error}")
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except click.UsageError as error:
        hint = f" (see: {error.ctx.command_path} --help)" if error.ctx is not None else ""
        note(f"{' '.join(error.format_message().split())}{hint}")
        return 2
    except (KeyboardInterrupt, click.Abort):
        note("interrupted")
        return 130
    except MemoryError:
        if "--debug" in args:
            raise
        note("out of memory; use a shorter segment (--start, --end) or a smaller bundle")
        return 5


if __name__ == "__main__":
    main()
