"""The host code of AOTInductor packages: no instruction that the package's key does not name, CUDA found."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from lada_rt.engines.torch import device_key
from lada_rt.errors import EngineError, ExportError
from lada_rt_export import host_code, to_aoti
from lada_rt_export.demo.source import DEMO_WEIGHTS, TrainedSource
from lada_rt_export.host_code import check_compiler, host_compilation, why_not_compiled
from lada_rt_export.stages import stage_spec
from torch._inductor import config, cpp_builder
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch.utils import cpp_extension


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
    with host_compilation(torch.device("cuda")):
        assert flags() == []
    with host_compilation(torch.device("cpu")):
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


#: what stands for torch's headers of a GPU, and CUDA's
INCLUDED = "torch_cuda.h"
CUDA = {
    "cuda.h": "",
    "cuda_runtime_api.h": "#include <crt/host_defines.h>",
    "cuda_fp16.h": "#include <nv/target>",
    "crt/host_defines.h": "",
}


def home(folder: Path, *without: str) -> Path:
    """A folder with CUDA's headers."""
    for header, text in CUDA.items():
        if header not in without:
            (folder / "include" / header).parent.mkdir(parents=True, exist_ok=True)
            (folder / "include" / header).write_text(text)
    return folder


@pytest.fixture
def torch_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers that the compiler finds whatever torch this is, and which include CUDA's."""
    folder = tmp_path / "of torch"
    folder.mkdir()
    (folder / INCLUDED).write_text("#include <cuda.h>\n#include <cuda_runtime_api.h>\n#include <cuda_fp16.h>\n")
    monkeypatch.setattr(host_code, "_INCLUDED", INCLUDED)
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", str(folder))


def packages(monkeypatch: pytest.MonkeyPatch, **folders: Path) -> None:
    """Let `import name` find these folders, and no others of CUDA's."""

    class Spec:
        def __init__(self, folder: Path) -> None:
            self.submodule_search_locations = [str(folder)]

    found = {name: Spec(folder) for name, folder in folders.items()}
    monkeypatch.setattr(host_code.importlib.util, "find_spec", found.get)


@pytest.mark.usefixtures("torch_headers")
def test_cuda_headers_come_from_the_toolkit_then_from_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = home(tmp_path / "toolkit")
    # pip's runtime has no crt/: what it includes is in a package that torch does not need
    pip = home(tmp_path / "nvidia" / "cu13", "crt/host_defines.h")
    triton = home(tmp_path / "triton" / "backends" / "nvidia")
    packages(monkeypatch, nvidia=pip.parent, triton=tmp_path / "triton")
    cuda = torch.device("cuda")
    broken = home(tmp_path / "broken", "cuda_fp16.h")
    for given, used in ((toolkit, toolkit), (broken, triton), (tmp_path / "no", triton), (None, triton)):
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", given and str(given))
        with host_compilation(cuda):
            assert cpp_extension.include_paths("cuda")[-1] == str(used / "include")
        assert (given and str(given)) == cpp_extension.CUDA_HOME
    home(pip)
    with host_compilation(cuda):
        assert cpp_extension.include_paths("cuda")[-1] == str(pip / "include")


@pytest.mark.usefixtures("torch_headers")
def test_host_code_is_compiled_where_cuda_asks_for_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nv/target` is in neither torch's nor Triton's packages; where it is, as in a toolkit, it is taken."""
    toolkit = home(tmp_path / "toolkit")
    packages(monkeypatch)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit))
    asked = tmp_path / "asked.cpp"
    asked.write_text("#include <cuda_fp16.h>\nint f() { NV_IF_ELSE_TARGET(NV_IS_DEVICE, return 1;, return 0;) }\n")
    compiler = shutil.which("g++")
    assert compiler is not None
    compiled = [compiler, "-fsyntax-only", "-Werror", f"-I{toolkit / 'include'}", str(asked)]
    assert subprocess.run(compiled, check=False, capture_output=True).returncode != 0
    with host_compilation(torch.device("cuda")):
        subprocess.run(compiled, check=True)
        (toolkit / "include" / "nv").mkdir()
        (toolkit / "include" / "nv" / "target").write_text("#error the toolkit's\n")
        done = subprocess.run(compiled, check=False, capture_output=True, text=True)
        assert "the toolkit's" in done.stderr


@pytest.mark.usefixtures("torch_headers")
def test_what_is_missing_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    check_compiler("cpu")
    with pytest.raises(EngineError, match=r"no CUDA headers .*\(none are installed\); install the CUDA toolkit"):
        check_compiler("cuda")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home(tmp_path / "toolkit", "crt/host_defines.h")))
    with pytest.raises(EngineError, match=r"\(.*error: crt/host_defines.h: No such file or directory\); install"):
        check_compiler("cuda")
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(EngineError, match=r"no C\+\+ compiler .* in CXX"),
    ):
        check_compiler("cpu")


def test_the_driver_is_linked_under_its_versioned_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a driver and no toolkit: `libcuda.so.1` is there, `libcuda.so` is not."""
    source = tmp_path / "driver.c"
    source.write_text("int standin(void) { return 0; }")
    library = tmp_path / "with space" / "liblada_standin.so.1"
    library.parent.mkdir()
    compiler = shutil.which("g++")
    assert compiler is not None
    soname = f"-Wl,-soname,{library.name}"
    subprocess.run([compiler, "-x", "c", str(source), "-shared", "-fPIC", soname, "-o", str(library)], check=True)
    ctypes.CDLL(str(library))
    link = [compiler, "-shared", "-o", str(tmp_path / "linked.so"), "-llada_standin"]
    monkeypatch.setenv("LIBRARY_PATH", str(tmp_path / "of the user"))
    assert subprocess.run(link, check=False, capture_output=True).returncode != 0
    with host_code._driver_to_link(library.name):
        subprocess.run(link, check=True)
        assert host_code.os.environ["LIBRARY_PATH"].startswith(f"{tmp_path / 'of the user'}:")
    assert host_code.os.environ["LIBRARY_PATH"] == str(tmp_path / "of the user")
    with host_code._driver_to_link("libno_such_driver.so.1"):
        assert host_code.os.environ["LIBRARY_PATH"] == str(tmp_path / "of the user")


def test_the_reason_is_what_the_compiler_said() -> None:
    command = "C++ compile error\n\nCommand:\ng++ " + "-I/some/where " * 90
    missing = "In file included from x.h:1,\n                 from y.h:3:\nz.h:15:10: fatal error: cuda.h: No such file"
    assert (
        why_not_compiled(RuntimeError(f"{command}\n\nOutput:\n{missing}"))
        == "z.h:15:10: fatal error: cuda.h: No such file"
    )
    unlinked = "/usr/bin/ld: cannot find -lcuda: No such file or directory\ncollect2: error: ld returned 1 exit status"
    assert why_not_compiled(RuntimeError(f"{command}\n\nOutput:\n{unlinked}")).startswith(
        "/usr/bin/ld: cannot find -lcuda"
    )
    assert why_not_compiled(ValueError("two\nlines")) == "two lines"
