"""CPUs that a container leaves to a process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lada_rt import _C, GenerationParams, cpus
from lada_rt.cpus import cpu_count
from lada_rt.denoise import denoise
from stubs import StubDenoiser


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """16 CPUs by affinity, and a folder of control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(cpus, "CGROUPS", tmp_path)
    monkeypatch.setattr(cpus, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("0::/\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("max 100000", 16),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("5000 100000", 1),
        ("99900000 100000", 16),
        ("nonsense", 16),
        ("1 0", 16),
        ("", 16),
    ],
)
def test_a_quota_counts(machine: Path, text: str, n: int) -> None:
    (machine / "cpu.max").write_text(text + "\n")
    assert cpu_count() == n


def test_a_quota_above_the_process_counts_too(machine: Path) -> None:
    (machine / "own").write_text("12:cpu:/elsewhere\n0::/a.slice/b.service\n")
    (machine / "a.slice" / "b.service").mkdir(parents=True)
    (machine / "a.slice" / "b.service" / "cpu.max").write_text("max 100000\n")
    (machine / "a.slice" / "cpu.max").write_text("300000 100000\n")
    assert cpu_count() == 3


@pytest.mark.parametrize(("quota", "n"), [("400000", 4), ("-1", 16)])
def test_the_older_control_groups(machine: Path, quota: str, n: int) -> None:
    (machine / "cpu").mkdir()
    (machine / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (machine / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert cpu_count() == n


def test_without_control_groups(machine: Path) -> None:
    (machine / "own").unlink()
    assert cpu_count() == 16


def test_the_sampler_heeds_it(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "cpu.max").write_text("300000 100000")
    seen: list[int] = []
    sample = _C.sample

    def spy(*args: Any, n_threads: int, **options: Any) -> Any:
        seen.append(n_threads)
        return sample(*args, n_threads=n_threads, **options)

    monkeypatch.setattr(_C, "sample", spy)
    engine: Any = StubDenoiser()
    denoise(engine, np.zeros(40, np.int64), np.zeros((2, 8), np.float32), GenerationParams(steps=2), 64)
    assert seen == [3, 3]
