"""Train the embedded default: `python -m lada_rt_export.demo.train --out DIR --preset demo --seed 1`."""

from __future__ import annotations

import sys

from lada_rt_export.demo.training.runner import main

if __name__ == "__main__":
    sys.exit(main())
