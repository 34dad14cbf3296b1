"""bench/bench_kernels.py runs whole at a small shape, Triton in its interpreter included where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "bench_kernels.py"


def test_tiny_run_writes_rows_and_ratios(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    command = [sys.executable, "-P", str(SCRIPT), "--device", "cpu", "--tiny", "--threads", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {"torch_over_cpp", "cpp_over_sum"} <= set(report["ratios"])
    assert all({"op", "rows", "vocab", "dtype", "impl", "median_s"} <= set(row) for row in report["rows"])
    assert {row["impl"] for row in report["rows"] if row["op"] == "sample"} >= {"torch", "cpp", "triton"}
