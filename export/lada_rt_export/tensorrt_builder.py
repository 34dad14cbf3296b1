"""An ONNX graph to a TensorRT plan. Runs in a child process: see to_tensorrt.

Written against the type stub in export/typings and tried with a stand-in: it has not been run on TensorRT itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, SupportsInt

import onnx
from lada_rt.engines.tensorrt import make_logger, require_tensorrt
from lada_rt.errors import ExportError

from lada_rt_export.stored_halves import restore_floats

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["PlanJob", "build_plan"]

#: told (phase, steps done, steps in all); returns False to give up
OnPhase = Callable[[str, int, int], bool]


@dataclass(frozen=True, slots=True)
class PlanJob:
    """What to build.

    Attributes:
        graph: the .onnx file; large weights lie beside it.
        plan: file to write.
        profile: input -> (min, opt, max) shape, of every input.
        timing_cache: file of measured kernels, read if it is there and written; None for none.
        later_versions: the plan runs on later releases of TensorRT too, somewhat slower.
        hardware: "same_compute_capability", which is what an architecture in an engine's key says; "ampere_plus" for
            that and later ones; "same" model of GPU only, which no key tells apart from others.
    """

    graph: Path
    plan: Path
    profile: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    timing_cache: Path | None = None
    later_versions: bool = False
    hardware: str = "same_compute_capability"


def build_plan(job: PlanJob, on_phase: OnPhase, log: Callable[[str], None]) -> None:
    """Build one plan.

    The network is strongly typed: the graph's own dtypes decide every precision. TensorFloat-32 is off, so that float32
    means float32.

    Args:
        job: what to build.
        on_phase: told of progress.
        log: told TensorRT's warnings and errors.

    Raises:
        EngineError: TensorRT is missing.
        ExportError: TensorRT refuses the graph or fails to build it.
    """
    require_tensorrt()
    with tempfile.TemporaryDirectory(dir=job.plan.parent) as folder:
        _build(replace(job, graph=restore_floats(job.graph, Path(folder) / job.graph.name)), on_phase, log)


def _build(job: PlanJob, on_phase: OnPhase, log: Callable[[str], None]) -> None:
    import tensorrt as trt

    logger = make_logger(log)
    builder = trt.Builder(logger)
    # the flag is what 10.x needs; 11 knows no other kind of network and ignores it
    network = builder.create_network(1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED.value)
    parser = trt.OnnxParser(network, logger)
    # large weights are found from the path
    if not parser.parse(_parsed_graph(job.graph), str(job.graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        first = "; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors[:3])
        raise ExportError(
            f"{job.graph.name}: TensorRT {trt.__version__} refuses the graph: {first or 'no reason given'}"
        )
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if job.later_versions:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.hardware_compatibility_level = {
        "same": trt.HardwareCompatibilityLevel.NONE,
        "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }[job.hardware]
    _set_profile(job, builder, network, config)
    _load_timing_cache(job, config)
    # the builder keeps no reference of its own to the monitor
    monitor = _monitor(on_phase)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"{job.graph.name}: TensorRT {trt.__version__} built no engine; its messages are above")
    job.plan.write_bytes(plan)
    if job.timing_cache is not None:
        temporary = job.timing_cache.with_suffix(".new")
        temporary.write_bytes(config.get_timing_cache().serialize())
        temporary.replace(job.timing_cache)


def _parsed_graph(graph: Path) -> bytes:
    """A graph for the parser: attention may become several kernels where no fused one fits, as none does in float32.

    Unmarked, it becomes one kernel or nothing. The mark is the parser's own: ONNX Runtime refuses a graph with it.

    Source: onnx-tensorrt, onnxOpImporters.cpp, Attention; NvInfer.h, IAttention::setDecomposable.
    """
    model = onnx.load(str(graph), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))
    return bytes(model.SerializeToString())


def _set_profile(
    job: PlanJob, builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig
) -> None:
    import tensorrt as trt

    names = [network.get_input(index).name for index in range(network.num_inputs)]
    if set(names) != set(job.profile):
        raise ExportError(
            f"{job.graph.name}: expected inputs {', '.join(job.profile)}, TensorRT sees {', '.join(names)}; "
            "rebuild the graph"
        )
    profile = builder.create_optimization_profile()
    for name, (low, opt, high) in job.profile.items():
        profile.set_shape(name, trt.Dims(low), trt.Dims(opt), trt.Dims(high))
    if config.add_optimization_profile(profile) < 0:
        raise ExportError(
            f"{job.graph.name}: TensorRT refuses the profile {dict(job.profile)}; use another --max-seconds"
        )


def _load_timing_cache(job: PlanJob, config: trt.IBuilderConfig) -> None:
    if job.timing_cache is None:
        return
    known = job.timing_cache.read_bytes() if job.timing_cache.is_file() else b""
    # a cache of another GPU or release is refused, and an empty one started
    if not config.set_timing_cache(config.create_timing_cache(known), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _monitor(on_phase: OnPhase) -> trt.IProgressMonitor:
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: SupportsInt) -> None:
            # phases nest; the outermost is what a user can make sense of
            if not parent_phase:
                self._steps[phase_name] = int(num_steps)
                on_phase(phase_name, 0, int(num_steps))

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            steps = self._steps.get(phase_name)
            return True if steps is None else on_phase(phase_name, int(step) + 1, steps)

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()
