"""How many CPUs this process may use: what its affinity and its container's quota leave."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["cpu_count"]

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def cpu_count() -> int:
    """CPUs this process may keep busy, at least 1.

    A container is often limited to fewer than the machine has, by affinity or by a quota of time. Where threads use up
    the quota, all of them are stopped for the rest of its period.
    """
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min([n, *(math.ceil(quota) for quota in _quotas())]))


def _quotas() -> list[float]:
    """CPUs that control groups pay for, the process's own and all above it; versions 2 and 1."""
    found = []
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/").lstrip("/")
    for path in (own, *map(str, Path(own).parents)) if own else (".",):
        try:
            quota, period = (CGROUPS / path / "cpu.max").read_text().split()
            found.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):  # "max": no limit
            continue
    try:
        quota, period = ((CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        found.append(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        pass
    return [quota for quota in found if quota > 0]
