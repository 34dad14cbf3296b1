"""Run a torch module through the runtime's engine interface, to compare engines with it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from lada_rt.errors import EngineError
from torch import Tensor, nn

__all__ = ["TorchEngine"]


class TorchEngine:
    """A stage module behind named numpy arrays.

    Args:
        module: a stage; the names of its `forward` arguments are the input names.
        output_names: one name per returned tensor.
    """

    def __init__(self, module: nn.Module, output_names: Sequence[str]) -> None:
        self.module = module.eval()
        self.input_names = tuple(inspect.signature(module.forward).parameters)
        self.output_names = tuple(output_names)
        first = next(module.parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            inputs: one array per input name; copied to the module's device, dtype unchanged.

        Returns:
            Output name to array, in the module's own output dtypes.

        Raises:
            EngineError: missing or unknown inputs, or a number of outputs other than promised.
        """
        if set(inputs) != set(self.input_names):
            raise EngineError(
                f"expected inputs {', '.join(self.input_names)}, got {', '.join(sorted(inputs)) or 'none'}; "
                "pass each once, by name"
            )
        # A copy: the caller may reuse its array, and torch refuses read-only ones.
        tensors = {k: torch.from_numpy(np.array(v)).to(self.device) for k, v in inputs.items()}
        with torch.inference_mode():
            result = self.module(**tensors)
        outputs = (result,) if isinstance(result, Tensor) else tuple(result)
        if len(outputs) != len(self.output_names):
            raise EngineError(
                f"expected {len(self.output_names)} outputs ({', '.join(self.output_names)}), "
                f"got {len(outputs)}; name each output of the stage"
            )
        return {k: v.cpu().numpy() for k, v in zip(self.output_names, outputs, strict=True)}
