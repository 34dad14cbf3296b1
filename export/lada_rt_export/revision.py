"""What this exporter is called in build keys and engine keys, so that an upgrade rebuilds what it would build anew."""

from __future__ import annotations

from typing import Final

import lada_rt

__all__ = ["EXPORTER", "EXPORTER_REVISION"]

#: bump when exporter, stage modules, the parts and options of compiled engines, or proof change in a way that a version
#: number of lada-rt does not show
EXPORTER_REVISION: Final = 3
EXPORTER: Final = f"lada-rt {lada_rt.__version__}, revision {EXPORTER_REVISION}"
