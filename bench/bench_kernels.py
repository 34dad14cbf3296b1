"""Time of the sampler's kernels against the plain torch formulation, FlashInfer where installed, and a plain sum.

    python bench/bench_kernels.py --device cpu --json bench/results/DATE-DEVICE-kernels.json [--tiny]

Correctness is checked first, against the torch reference. On CPU the timing includes everything a call does; on CUDA
it is the time between events around one call, with the level-2 cache overwritten in between. `--tiny` runs small
shapes, Triton in its interpreter included, so that the script cannot rot on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
parser.add_argument("--json", type=Path, help="where to write the result")
parser.add_argument("--tiny", action="store_true", help="small shapes, one repetition")
parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
ARGS = parser.parse_args()
if ARGS.device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import numpy as np  # noqa: E402  # TRITON_INTERPRET first
import torch  # noqa: E402
from lada_rt import _C  # noqa: E402
from lada_rt.schedule import mask_counts, selection_temperatures  # noqa: E402
from lada_rt_kernels import remask, sample  # noqa: E402
from torch import Tensor  # noqa: E402

TOP_K, TOP_P = 100, 0.9
SETTING: dict[str, Any] = {"seed": 13, "step": 0, "top_k": TOP_K, "top_p": TOP_P}


def torch_formulation(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What the released program does: sort, cumulative sum, scatter, top-k, softmax, multinomial."""
    x = logits.float()
    ordered, ids = x.sort(dim=1, descending=True)
    removed = ordered.softmax(1).cumsum(1) > TOP_P
    removed[:, 1:] = removed[:, :-1].clone()
    removed[:, 0] = False
    x = x.masked_fill(removed.scatter(1, ids, removed), -torch.inf)
    x = x.masked_fill(x < x.topk(TOP_K, dim=1).values[:, -1:], -torch.inf)
    probs = x.softmax(1)
    tokens = torch.multinomial(probs, 1)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0]


def flashinfer_sampler() -> Callable[[Tensor], Tensor] | None:
    """FlashInfer's joint top-k and top-p sampler, where the package is installed. It returns no confidence."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    flashinfer = importlib.import_module("flashinfer")
    return lambda logits: flashinfer.sampling.top_k_top_p_sampling_from_logits(
        logits.float(), TOP_K, TOP_P, filter_apply_order="joint"
    )


def times_of(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs, after two to warm up."""
    call()
    call()
    taken = []
    if ARGS.device == "cuda":
        flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        for _ in range(repeats):
            flush.zero_()  # the level-2 cache is cold, and the host gets ahead: its own time is not measured
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        return taken
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return taken


def row_of(op: str, shape: tuple[int, int], dtype: torch.dtype, impl: str, taken: list[float], n_bytes: int) -> Any:
    ordered = sorted(taken)
    median = statistics.median(ordered)
    row: dict[str, Any] = {
        "op": op,
        "rows": shape[0],
        "vocab": shape[1],
        "dtype": str(dtype).removeprefix("torch."),
        "impl": impl,
        "median_s": median,
        "p20_s": ordered[len(ordered) // 5],
        "p80_s": ordered[-1 - len(ordered) // 5],
        "min_s": ordered[0],
        "runs": len(ordered),
        "bytes": n_bytes,
        "bytes_per_s": n_bytes / median,
    }
    print(
        f"{op:12} {shape[0]:5} x {shape[1]:5} {row['dtype']:9} {impl:11} median {median * 1e3:9.3f} ms  "
        f"{row['bytes_per_s'] / 1e9:7.2f} GB/s",
        flush=True,
    )
    return row


def check_sampler(logits: Tensor, positions: Tensor, impl: str) -> None:
    expected = sample(logits.cpu(), positions.cpu(), impl="torch", **SETTING)
    got = sample(logits, positions, impl=impl, **SETTING)
    if not all(torch.equal(a, b.cpu()) for a, b in zip(expected, got, strict=True)):
        raise SystemExit(f"{impl} does not match the reference at {list(logits.shape)} {logits.dtype}: not timed")


def fast_sampler(logits: torch.Tensor, positions: torch.Tensor, impl: str) -> Callable[[], Any]:
    """The call to be timed, on the CPU with as many threads as torch has."""
    if impl == "triton":
        return lambda: sample(logits, positions, impl=impl, check_values=False, **SETTING)
    arrays = logits.numpy(), positions.numpy()
    return lambda: _C.sample(*arrays, temperature=1.0, n_threads=ARGS.threads, **SETTING)


def bench_sampling(shape: tuple[int, int], dtype: torch.dtype, repeats: int) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=g) * 3).to(dtype).to(ARGS.device)
    positions = torch.arange(shape[0], device=ARGS.device)
    n_bytes = logits.numel() * logits.element_size()
    fast = "triton" if ARGS.device == "cuda" else "cpp"
    check_sampler(logits[:64], positions[:64], fast)
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "torch": (lambda: torch_formulation(logits), max(3, repeats // 8)),
        "sum": (lambda: logits.sum(), repeats),
        fast: (fast_sampler(logits, positions, fast), repeats),
    }
    flashinfer = flashinfer_sampler() if ARGS.device == "cuda" else None
    if flashinfer is not None:
        calls["flashinfer"] = (lambda: flashinfer(logits), repeats)
    rows = []
    for impl, (call, n) in calls.items():
        rows.append(row_of("sample", shape, dtype, impl, times_of(call, n), n_bytes))
    if ARGS.tiny and ARGS.device == "cpu":  # the interpreter takes its time: two rows
        few, at = logits[:2], positions[:2]
        check_sampler(few, at, "triton")
        times = times_of(lambda: sample(few, at, impl="triton", **SETTING), 1)
        rows.append(row_of("sample", (2, shape[1]), dtype, "triton", times, few.numel() * few.element_size()))
    return rows


def bench_remask(n_frames: int, repeats: int) -> Any:
    impl = "triton" if ARGS.device == "cuda" else "cpp"
    rows = torch.arange(n_frames, device=ARGS.device)
    tokens = torch.zeros(n_frames, dtype=torch.int32, device=ARGS.device)
    confidence = torch.linspace(-8, 0, n_frames, device=ARGS.device)
    setting: dict[str, Any] = {
        "n_masked": n_frames // 2,
        "tau": 5.0,
        "strategy": "low_confidence",
        "mask_id": 16384,
        "seed": 13,
        "step": 3,
    }

    def call(which: str) -> Tensor:
        codes = torch.full((n_frames,), 16384, device=ARGS.device)
        return remask(codes, rows, tokens, confidence, impl=which, **setting)

    if not torch.equal(call(impl), call("torch")):
        raise SystemExit(f"remask {impl} does not match the reference: not timed")
    return row_of("remask", (n_frames, 1), torch.float32, impl, times_of(lambda: call(impl), repeats), 28 * n_frames)


def bench_loop(n_frames: int, vocab: int, n_steps: int) -> dict[str, Any]:
    """A whole sampling loop over recorded logits on CPU: how much time is spent outside the two kernels."""
    g = np.random.default_rng(0)
    # One block of logits stands for the network; each step reads a different window of it, as views.
    spare = 257 if n_frames > 257 else 1
    logits = (g.standard_normal((n_frames + spare, vocab), dtype=np.float32)) * 3
    counts = mask_counts(n_frames, n_steps)
    taus = selection_temperatures(n_steps, 10.5)
    codes = np.full(n_frames, vocab, dtype=np.int64)
    rows = np.arange(n_frames, dtype=np.int64)
    inside = 0.0
    began = time.perf_counter()
    for step in range(n_steps):
        start = step % spare
        step_logits = logits[start : start + len(rows)]  # [R, V]
        t0 = time.perf_counter()
        tokens, confidence = _C.sample(
            step_logits,
            rows,
            seed=13,
            step=step,
            top_k=TOP_K,
            top_p=TOP_P,
            temperature=1.0,
            n_threads=ARGS.threads,
        )
        rows = _C.remask(
            codes,
            rows,
            tokens,
            confidence,
            n_masked=counts[step],
            tau=taus[step],
            strategy="low_confidence",
            mask_id=vocab,
            seed=13,
            step=step,
        )
        inside += time.perf_counter() - t0
    total = time.perf_counter() - began
    if len(rows) or (codes == vocab).any():
        raise SystemExit("the loop left positions masked")
    outside = (total - inside) / total
    print(f"loop of {n_steps} steps, T = {n_frames}: {total:.3f} s, {100 * outside:.2f} % outside the kernels")
    return {
        "op": "loop",
        "rows": n_frames,
        "vocab": vocab,
        "dtype": "float32",
        "impl": "cpp",
        "n_steps": n_steps,
        "median_s": total,
        "runs": 1,
        "outside_kernels": outside,
    }


def median_of(rows: list[Any], op: str, impl: str, dtype: str) -> float | None:
    found = [row["median_s"] for row in rows if (row["op"], row["impl"], row["dtype"]) == (op, impl, dtype)]
    return found[0] if found else None


def ratios_of(rows: list[Any]) -> dict[str, float]:
    dtype = "float32" if ARGS.device == "cpu" else "bfloat16"
    fast = "cpp" if ARGS.device == "cpu" else "triton"
    baseline, ours, plain = (median_of(rows, "sample", impl, dtype) for impl in ("torch", fast, "sum"))
    if baseline is None or ours is None or plain is None:
        raise SystemExit("the run holds no pair to compare")
    ratios = {f"torch_over_{fast}": baseline / ours, f"{fast}_over_sum": ours / plain}
    other = median_of(rows, "sample", "flashinfer", dtype)
    if other is not None:
        ratios[f"flashinfer_over_{fast}"] = other / ours
    return ratios


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if ARGS.device == "cuda" else name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if ARGS.device == "cuda":
        found["cuda"] = torch.version.cuda
    return found


def main() -> None:
    if ARGS.device == "cuda" and not torch.cuda.is_available():
        sys.exit("expected a CUDA device, found none; use --device cpu")
    if ARGS.threads:
        torch.set_num_threads(ARGS.threads)
    info = machine()
    repeats = 3 if ARGS.tiny else 40
    if ARGS.device == "cpu":
        shape = (32, 2048) if ARGS.tiny else (1500, 16384)
        rows = bench_sampling(shape, torch.float32, repeats)
        rows.append(bench_remask(256 if ARGS.tiny else 4096, repeats))
        rows.append(bench_loop(64, 512, 6) if ARGS.tiny else bench_loop(4096, 16384, 60))
    else:
        shape = (64, 16384) if ARGS.tiny else (4096, 16384)
        rows = [row for dtype in (torch.bfloat16, torch.float32) for row in bench_sampling(shape, dtype, repeats)]
        rows.append(bench_remask(shape[0], repeats))
    ratios = ratios_of(rows)
    print(", ".join(f"{name} {value:.1f}" for name, value in ratios.items()))
    if ARGS.json:
        ARGS.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": info, "tiny": ARGS.tiny, "rows": rows, "ratios": ratios}
        ARGS.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
