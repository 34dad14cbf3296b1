"""Compile every stage of the torch backend for a GPU that is not there: `packages.py [tiny|full] [precision]`.

Inductor, Triton, ptxas, the C++ compiler, the linker and torch's loader all do their work; what the packages compute is
not looked at, for no kernel in them runs. Full size takes five minutes and 13 GB.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import torch  # noqa: E402  the tree has to be on the path first
from gpu_models import FULL, OUTPUTS, TINY, make_stage, stage_sizes  # noqa: E402
from lada_rt_export import to_aoti  # noqa: E402
from lada_rt_export.stages import ALLOWED, stage_spec  # noqa: E402


def _nothing(*args: Any, **options: Any) -> dict[str, float]:
    """In place of a proof, which would look at results."""
    return {}


def main(scale: str = "tiny", precision: str = "bf16") -> None:
    size = {"tiny": TINY, "full": FULL}[scale]
    to_aoti.reference = to_aoti.prove = _nothing
    for name in OUTPUTS:
        begin = time.monotonic()
        chosen = precision if precision in ALLOWED[name] else "fp32"
        spec = stage_spec(name, make_stage(name, size, torch.device("cpu")), stage_sizes(size))
        with tempfile.TemporaryDirectory() as folder:
            found = to_aoti.build_engine(spec, Path(folder), precision=chosen, device="cuda")
        sizes = ", ".join(f"{part['name']} {part['bytes'] / 1e6:.1f} MB" for part in found["parts"])
        print(f"{name}: {chosen}, {found['device_key']}, {sizes}, {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
