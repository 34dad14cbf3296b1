"""The host code of AOTInductor packages: no instruction that the package's key does not name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lada_rt.engines.torch import device_key
from lada_rt.errors import ExportError
from lada_rt_export import host_code, to_aoti
from lada_rt_export.demo.source import DEMO_WEIGHTS, TrainedSource
from lada_rt_export.host_code import no_native_code
from lada_rt_export.stages import stage_spec
from torch._inductor import config, cpp_builder
from torch._inductor.cpu_vec_isa import pick_vec_isa


def flags() -> list[str]:
    """What the compiler is told of the processor: natively, and by the choice of vector instructions."""
    compiler, _ = cpp_builder._get_optimization_cflags("g++")
    return [flag for flag in compiler if flag.startswith(("march", "mcpu"))] + pick_vec_isa().build_arch_flags().split()


@pytest.mark.parametrize("has_setting", [True, False], ids=["torch 2.13", "before"])
def test_code_is_for_a_kind_of_processor(monkeypatch: pytest.MonkeyPatch, has_setting: bool) -> None:
    if has_setting and not hasattr(config.cpp, "march"):
        pytest.skip("this torch has no such setting")
    monkeypatch.setattr(host_code, "_has_setting", lambda: has_setting)
    native = flags()
    with no_native_code(torch.device("cuda")):
        assert flags() == []
    with no_native_code(torch.device("cpu")):
        assert flags() == pick_vec_isa().build_arch_flags().split()
    assert flags() == native
    assert device_key("cpu").split("-")[2] in (str(pick_vec_isa()).split()[0], "default")


def test_packages_are_compiled_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def compiled(*arguments: object) -> None:
        seen.append(flags())
        raise ExportError("enough")

    monkeypatch.setattr(to_aoti, "_compile", compiled)
    source = TrainedSource(DEMO_WEIGHTS)
    spec = stage_spec("text_encoder", source.module("text_encoder"), source.sizes)
    with pytest.raises(ExportError, match="enough"):
        to_aoti.build_engine(spec, tmp_path, precision="fp32", device="cpu")
    assert seen == [pick_vec_isa().build_arch_flags().split()]
