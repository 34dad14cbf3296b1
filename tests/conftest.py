"""Shared fixtures: where the goldens are, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


#: set by tests/cuda_standin/run.sh: torch sees a GPU, Triton must not
STANDIN = os.environ.get("LADA_RT_CUDA_STANDIN") == "1"


def _has_cuda() -> bool:
    return STANDIN or (shutil.which("nvidia-smi") is not None and os.path.exists("/dev/nvidiactl"))


if STANDIN or not _has_cuda():
    # Must be set before the first `import triton`.
    os.environ["TRITON_INTERPRET"] = "1"


def default_golden_dir() -> Path:
    shared = ROOT.parent / "shared" / "golden"
    return shared if shared.is_dir() else ROOT / "tests" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        default=None,
        help="folder of golden tensors (default: ../shared/golden if it exists, else tests/golden)",
    )


def golden_dir(config: pytest.Config) -> Path:
    given = config.getoption("--golden")
    folder = Path(given).resolve() if given else default_golden_dir()
    if not folder.is_dir():
        raise pytest.UsageError(f"--golden: {folder} is not a folder")
    return folder


@pytest.fixture(scope="session")
def golden(pytestconfig: pytest.Config) -> Path:
    return golden_dir(pytestconfig)


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """For networks too small to share: threads would only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def golden_cases(config: pytest.Config, pattern: str) -> list[Path]:
    """Sidecar JSON files that match `pattern`, sorted; test modules parametrise over them by name."""
    return sorted(golden_dir(config).glob(pattern))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.parametrize`-free discovery: a test with a `golden_case` argument and a module or function
    attribute `golden_pattern` runs once for every matching sidecar."""
    if "golden_case" not in metafunc.fixturenames:
        return
    pattern = getattr(metafunc.function, "golden_pattern", None) or metafunc.module.GOLDEN_PATTERN
    cases = golden_cases(metafunc.config, pattern)
    metafunc.parametrize("golden_case", cases, ids=[c.stem for c in cases])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _has_cuda():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
