"""For pytest (`-p plugin`) and `python -m plugin SCRIPT ...`: the stand-in for a GPU, before anything uses torch."""

from __future__ import annotations

import runpy
import sys

import operators

operators.install()

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
