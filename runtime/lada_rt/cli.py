"""The command line: lada-rt generate | build-engine | bench | inspect | doctor.

Results go to stdout, progress and messages to stderr. An error is one line. `lada-rt --help` lists the exit codes.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

import lada_rt
from lada_rt.errors import LadaError, ParamError, missing_for_export
from lada_rt.notes import note
from lada_rt.params import GenerationParams

if TYPE_CHECKING:
    from lada_rt.pipeline import Pipeline
    from lada_rt.progress import OnProgress
    from lada_rt.results import Result

PathArg = click.Path(path_type=Path)

DEFAULTS = {field.name: field.default for field in dataclasses.fields(GenerationParams)}
#: options of `generate` that say how codes are drawn and decoded
DRAWING_OPTIONS = tuple(name for name in DEFAULTS if name != "prefix_order")


def param_option(name: str, text: str) -> Any:
    """An option for a field of GenerationParams, with its default and type."""
    default: Any = DEFAULTS[name]
    return click.option(
        f"--{name.replace('_', '-')}", type=type(default), default=default, show_default=True, help=text
    )


def backend_options(command: Any) -> Any:
    command = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")(command)
    return click.option("--backend", default="auto", show_default=True, help="auto, onnxruntime, tensorrt or torch.")(
        command
    )


json_option = click.option("--json", "json_file", type=PathArg, metavar="FILE", help="Write a JSON report.")
debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
bundle_option = click.option(
    "--bundle",
    type=PathArg,
    metavar="B",
    help="Bundle folder. Default: the embedded demo bundle, a small model of synthetic songs.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(lada_rt.__version__, package_name="lada-rt", message="lada-rt %(version)s")
def app() -> None:
    """A sung vocal in, a full-song accompaniment out: inference runtime for LaDA-Band.

    Exit codes: 0 done, 1 bench --compare found a regression, 2 usage, option or output file, 3 audio input, 4 bundle,
    checkpoint or export, 5 backend, device or memory, 130 interrupted, 143 terminated.
    """


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
    help="Audio whose style to follow.",
)
@click.option(
    "--reference-start",
    type=float,
    metavar="S",
    help="Where to begin in the reference, in seconds. Default: --start, as the released program.",
)
@param_option("steps", "Denoising steps.")
@param_option("schedule", "cosine, linear, sqrt, square, cubic or power:<p>.")
@param_option("strategy", "low_confidence, random, fixed_position or one_shot.")
@param_option("top_k", "Draw from the k likeliest tokens.")
@param_option("top_p", "Draw from the smallest set of this mass; 1 is off.")
@param_option("temperature", "Of the token draw.")
@param_option("mask_temperature", "Noise on the confidence, annealed to 0.")
@param_option("flow_steps", "Steps of the flow decoder.")
@param_option("guidance", "Of the flow decoder; 1 is off and halves its work.")
@param_option("seed", "Same inputs, options, bundle, backend and machine: same bytes.")
@param_option("prefix_order", "Condition slots: ref,text (as released) or text,ref (as trained).")
@click.option(
    "--variations",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Results to make, with the seeds S, S + 1, ...; OUT.wav becomes OUT-seedS.wav, ..., reports likewise.",
)
@click.option("--start", type=float, default=0.0, metavar="S", help="Start of the segment in seconds.")
@click.option("--end", type=float, metavar="E", help="End of the segment in seconds. Default: end of the file.")
@click.option("--mix", is_flag=True, help="Add the vocal at unity gain, limited to -1 dBTP; as long as the vocal.")
@click.option("--long", is_flag=True, help="Take a vocal beyond the bundle's limit: denoise overlapping spans of it.")
@click.option("--save-codes", type=PathArg, metavar="NPZ", help="Keep codes and latents, for --keep.")
@click.option("--keep", type=PathArg, metavar="NPZ", help="Start from a saved run of this VOCAL, and its options.")
@click.option("--redo", metavar="S:E", help="With --keep: draw these seconds anew, such as 30:45, and keep the rest.")
@backend_options
@click.option(
    "--threads",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Of each stage on the CPU. Default: all it may use.",
)
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress bars.")
@debug_option
def generate(
    vocal: Path,
    out: str,
    bundle: Path | None,
    text: str,
    reference: Path | None,
    reference_start: float | None,
    variations: int,
    start: float,
    end: float | None,
    mix: bool,
    long: bool,
    save_codes: Path | None,
    keep: Path | None,
    redo: str | None,
    backend: str,
    device: str,
    threads: int | None,
    json_file: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Make the accompaniment of the sung VOCAL: WAV, FLAC, OGG or MP3, any rate and channel count."""
    from lada_rt.files import check_source
    from lada_rt.generate_command import GenerateCommand, Targets
    from lada_rt.pipeline import N_SEEDS, Pipeline
    from lada_rt.results import Song

    params = GenerationParams(**options)
    region = check_keep(keep, redo)
    targets = [Targets(None if out == "-" else Path(out), json_file, save_codes)]
    if variations != 1:
        check_variations(out, keep)
        targets = [targets[0].of_seed((params.seed + index) % N_SEEDS) for index in range(variations)]
    for each in targets:
        each.check(vocal, reference, keep)
    check_source(vocal, "vocal")
    if reference is not None:
        check_source(reference, "reference")
    elif reference_start is not None:
        raise ParamError("--reference-start: expected --reference FILE with it, got none; give it, or leave this out")

    pipeline = Pipeline.load(bundle, backend=backend, device=device, n_threads=threads)
    if bundle is None:
        note(f"no --bundle: using the embedded {pipeline.bundle.name}, a small model trained on synthetic songs alone")
    elif not pipeline.bundle.trained:
        note(f"bundle {pipeline.bundle.name} is UNTRAINED: its output is noise, not music")
    song = Song(vocal, text if keep is None else None, reference, start, end, long, reference_start)
    command = GenerateCommand(pipeline, song, params, mix=mix, bars=not quiet and sys.stderr.isatty())
    if variations != 1:
        command.variations(targets)
    elif keep is None:
        command.stream(targets[0])
    else:
        with command.bars() as bars:
            result = redo_saved(pipeline, keep, vocal, region, params, bars.update)
        command.deliver(result, targets[0])


def check_variations(out: str, keep: Path | None) -> None:
    """Refuse what several results cannot be made from, or written to."""
    if out == "-":
        raise ParamError("--variations: expected a file name as OUT, got - for stdout, which holds one result")
    if keep is not None:
        raise ParamError("--variations: expected none with --keep; give each its --seed instead")


def check_keep(keep: Path | None, redo: str | None) -> tuple[float, float] | None:
    """The region of --redo in seconds; refuse options that --keep leaves without effect."""
    given = {
        name.replace("_", "-")
        for name in click.get_current_context().params
        if click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    fixed = given & {"text", "reference", "reference-start", "start", "end", "long", "prefix-order"}
    drawing = given & {name.replace("_", "-") for name in DRAWING_OPTIONS}
    if keep is not None and fixed:
        raise ParamError(f"--{min(fixed)}: expected none with --keep, which brings its own; leave it out")
    if keep is not None and redo is None and drawing:
        raise ParamError(f"--{min(drawing)}: has no effect, as --keep alone draws nothing; add --redo S:E")
    if redo is None:
        return None
    if keep is None:
        raise ParamError("--redo: expected --keep NPZ with it, the run to change; make one with --save-codes NPZ")
    try:
        start, end = (float(part) for part in redo.split(":"))
    except ValueError:
        raise ParamError(f"--redo: expected seconds as start:end, such as 30:45, got {redo!r}") from None
    return start, end


def redo_saved(
    pipeline: Pipeline,
    keep: Path,
    vocal: Path,
    region: tuple[float, float] | None,
    params: GenerationParams,
    on_progress: OnProgress,
) -> Result:
    """Bring a saved run back and draw a region of it anew, with its own options where the command line names none."""
    from lada_rt.saved_run import load_codes

    context = click.get_current_context()
    result = pipeline.restore(load_codes(keep), vocal, on_progress=on_progress)
    if region is None:
        return result
    given = {
        name: getattr(params, name)
        for name in DRAWING_OPTIONS
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    seed = given.pop("seed", None)
    options = dataclasses.replace(result.params, **given)
    return pipeline.regenerate(result, *region, seed=seed, params=options, on_progress=on_progress)


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
    help="Of denoiser and flow: fp32, bf16 or fp16; of single stages after it, as in bf16,vocoder=fp16. Default: bf16 "
    "for engines on a GPU, else fp32.",
)
@click.option("--device", default="auto", show_default=True, help="Where torch engines run: auto, cpu or cuda.")
@click.option(
    "--compatibility",
    metavar="A,B",
    help="Make TensorRT engines portable at the cost of speed: later-versions, ampere-plus or both.",
)
@click.option("--max-seconds", type=int, default=360, show_default=True, help="Longest song, 1 to 360.")
@click.option(
    "--memory-gb",
    type=click.FloatRange(1),
    default=16.0,
    show_default=True,
    help="What the build may take; proofs that need more are left out and named in the manifest.",
)
@click.option("--stages", metavar="A,B", help="Build these only; the others are kept if they are up to date.")
@click.option("--demo", is_flag=True, help="Build the demo bundle: small, trained on synthetic songs.")
@debug_option
def build_engine(
    checkpoint: Path | None,
    pretrained_root: Path | None,
    tokenizer: Path | None,
    out: Path,
    backend: str,
    precision: str | None,
    device: str,
    compatibility: str | None,
    max_seconds: int,
    memory_gb: float,
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
        raise missing_for_export("build-engine", error) from None
    built = build(
        out,
        checkpoint=checkpoint,
        pretrained_root=pretrained_root,
        tokenizer=tokenizer,
        backend=backend,
        precision=precision,
        device=device,
        compatibility=compatibility,
        max_seconds=max_seconds,
        memory_gb=memory_gb,
        stages=stages,
        log=note,
    )
    if built is not None:
        print(out)


@app.command()
@click.argument("bundle", type=PathArg, required=False)
@click.option("--device", type=click.Choice(["cuda"]), help="cuda: add the memory plan, which needs no GPU.")
@json_option
@debug_option
def inspect(bundle: Path | None, device: str | None, json_file: Path | None) -> None:
    """Show a BUNDLE: stages, shapes, measured errors, engines; verify its checksums. Default: the embedded demo."""
    from lada_rt.bundle import Bundle, demo_bundle_path
    from lada_rt.engines.cache import engine_report, list_engines
    from lada_rt.terminal import check_report_path, print_bundle, print_memory_plans, write_json
    from lada_rt.torch_loop.memory import bundle_plans

    check_report_path(json_file)
    opened = Bundle.open(bundle if bundle is not None else demo_bundle_path())
    opened.verify()
    for entry in list_engines(opened):
        entry.verify()
    print_bundle(opened)
    engines = engine_report(opened)
    for engine in engines:
        fit = "fits this machine" if engine["misfit"] is None else f"does not run here: it {engine['misfit']}"
        print(f"{engine['engine']}: error {engine['proof']['max_rel_error']:.1e}, {fit}")
    print(f"{len(engines)} compiled engines; stages without one run on onnxruntime")
    plans = bundle_plans(opened) if device == "cuda" else {}
    print_memory_plans(plans)
    if json_file is not None:
        facts = {"path": str(opened.path), "sha256": opened.sha256, "verified": True}
        facts |= {"memory_plans": {f"{s:g}": dataclasses.asdict(plan) for s, plan in plans.items()}} if plans else {}
        write_json(json_file, {**facts, **opened.summary(), "engines": engines})


@app.command()
@bundle_option
@click.option("--steps", default="8,20,60", show_default=True, help="Denoising steps to measure, separated by commas.")
@click.option("--seconds", default="10,30", show_default=True, help="Lengths of the vocal, which is sung for you.")
@click.option("--repeat", type=int, default=2, show_default=True, help="Timed runs of each combination.")
@param_option("flow_steps", "Steps of the flow decoder.")
@param_option("seed", "Of the vocal and of the runs.")
@click.option("--text", default="", help="Description of the music.")
@click.option("--quality/--no-quality", default=True, show_default=True, help="What fewer steps cost, beside the time.")
@click.option(
    "--fad-model", type=PathArg, metavar="F.onnx", help="Embedding model, mono audio [1, N] to [n, D]: adds FAD."
)
@click.option("--fad-rate", type=int, metavar="HZ", help="Sample rate that the embedding model expects.")
@click.option("--fad-reference", type=PathArg, metavar="D", help="Folder of audio, or .npz with mean and covariance.")
@click.option("--clamp-bundle", type=PathArg, metavar="B", help="Bundle with CLaMP 3's encoders: adds the CLaMP score.")
@click.option("--peaks", metavar="TFLOPS,GBPS", help="Of the device, for the floor. Default: measured on a CPU.")
@click.option("--reference-bundle", type=PathArg, metavar="B", help="fp32 bundle of the same weights to check against.")
@click.option("--baseline", is_flag=True, help="Time eager torch on the same weights too; needs the export extra.")
@click.option(
    "--checkpoint", type=PathArg, metavar="F", help="The bundle's checkpoint or trained weights, for --baseline."
)
@click.option("--pretrained-root", type=PathArg, metavar="D", help="Its pretrained files, for --baseline.")
@click.option("--plot", type=PathArg, metavar="F.png", help="Draw RTF against steps, stacked by stage.")
@click.option("--compare", nargs=2, type=PathArg, metavar="A B", help="Compare two --json reports; measure nothing.")
@click.option("--max-regression", default="10%", show_default=True, help="With --compare: exit 1 past this.")
@backend_options
@json_option
@debug_option
def bench(compare: tuple[Path, Path] | None, max_regression: str, **options: Any) -> None:
    """Measure RTF, TTFA and memory across step counts and lengths; every configuration is checked first."""
    from lada_rt.bench.command import compare_files, run_command

    if compare is not None:
        if not compare_files(*compare, max_regression):
            raise click.exceptions.Exit(1)
        return
    run_command(**options, log=note)


@app.command()
@json_option
@debug_option
def doctor(json_file: Path | None) -> None:
    """Show backends, devices and versions, what is missing and how to get it."""
    from lada_rt.doctor import examine
    from lada_rt.terminal import check_report_path, print_doctor, write_json

    check_report_path(json_file)
    report = examine()
    print_doctor(report)
    if json_file is not None:
        write_json(json_file, report)


def main(argv: list[str] | None = None) -> None:
    """Entry point: run a command and turn every error into one line and an exit code."""
    args = sys.argv[1:] if argv is None else argv
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a name that is not UTF-8 is printed in its own bytes
    sys.exit(run(args))


def _terminate(number: int, frame: FrameType | None) -> None:
    """What a service manager's stop does: end as an error does, so that no partial file stays."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + number)


class _Notes(logging.Handler):
    """The library's warnings as notes on stderr: a slower backend, for one, is never taken silently."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def run(args: list[str]) -> int:
    log = logging.getLogger("lada_rt")
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes(logging.WARNING))
    try:
        return app.main(args, prog_name="lada-rt", standalone_mode=False) or 0
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
