"""The training loop: steps that depend on nothing but seed and step number, checkpoints, losses.

Each step draws its data and noise from generators seeded by (seed, stage, step). A checkpoint therefore needs weights,
optimizer and step: the position in the data and the state of every generator follow. A run cut anywhere and resumed
ends in the same bits as one in a piece, on the same machine, device and number of threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lada_rt.errors import CheckpointError, ExportError
from torch import Tensor, nn

from lada_rt_export.demo.training.sizes import Budget

__all__ = ["Losses", "RunOptions", "Task", "load_weights", "step_generators", "train", "weights_sha256"]

#: name -> scalar; "loss" is what is minimised
Losses = dict[str, Tensor]
Log = Callable[[str], None]


class Task(Protocol):
    """What one stage trains."""

    #: also the name of the checkpoint
    name: str
    budget: Budget

    @property
    def modules(self) -> nn.Module:
        """Everything that is saved, buffers included."""
        ...

    def step(self, step: int, rng: np.random.Generator) -> Losses:
        """The losses of a step; torch's global generator is seeded for it."""
        ...


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run.

    Attributes:
        folder: of checkpoints and losses.
        seed: of the whole training.
        device: "cpu" or "cuda".
        deadline: of `time.monotonic`; past it the stage saves and stops. None runs to the end.
        save_every_s: seconds between checkpoints.
        log_every: steps whose mean is one line of the losses.
        log: told one line at each of them.
        stop_after: steps to make in this run at most; None is all.
    """

    folder: Path
    seed: int
    device: str = "cpu"
    deadline: float | None = None
    save_every_s: float = 120.0
    log_every: int = 50
    log: Log = lambda line: None
    stop_after: int | None = None


@dataclass(slots=True)
class _State:
    step: int = 0
    seconds: float = 0.0
    losses: list[dict[str, float]] = field(default_factory=list)
    #: sums since the last line of the losses
    pending: dict[str, float] = field(default_factory=dict)
    n_pending: int = 0


def _stage_key(name: str) -> int:
    return zlib.crc32(name.encode())


def step_generators(seed: int, stage: str, step: int) -> np.random.Generator:
    """Seed torch for a step and return numpy's generator for it."""
    torch.manual_seed(int(np.random.SeedSequence([seed, _stage_key(stage), step]).generate_state(1, np.uint64)[0] >> 1))
    return np.random.default_rng([seed, _stage_key(stage), step, 1])


def _learning_rate(budget: Budget, step: int) -> float:
    warm_up = max(1, budget.n_steps // 50)
    rising = min(1.0, (step + 1) / warm_up)
    return budget.learning_rate * rising * (0.55 + 0.45 * math.cos(math.pi * step / budget.n_steps))


def _write(path: Path, data: dict[str, Any]) -> None:
    beside = path.with_suffix(".partial")
    torch.save(data, beside)
    os.replace(beside, path)


def _read(path: Path, device: str) -> dict[str, Any]:
    try:
        data = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises a different class for every way in which a file can be broken
        raise CheckpointError(f"{path.name}: expected a training checkpoint, could not read it; remove it") from error
    if not isinstance(data, dict) or {"step", "modules", "average", "seed", "n_steps"} - set(data):
        raise CheckpointError(f"{path.name}: expected a training checkpoint, got other data; remove it")
    return data


def load_weights(folder: Path, name: str, modules: nn.Module) -> None:
    """Load what a finished stage exports, its averaged weights where it keeps them, and freeze the modules.

    Parameters are rounded to half precision, in which the bundle stores them: later stages learn from what is shipped.

    Raises:
        ExportError: the stage is not finished.
        CheckpointError: the file is damaged or of other sizes.
    """
    path = folder / f"{name}.pt"
    if not path.is_file():
        raise ExportError(f"stage {name} is not trained, {path} is missing; run the stages in order")
    data = _read(path, "cpu")
    if data["step"] < data["n_steps"]:
        raise ExportError(f"stage {name} stopped at step {data['step']} of {data['n_steps']}; resume it first")
    try:
        modules.load_state_dict({**data["modules"], **data["average"]})
    except RuntimeError as error:
        raise CheckpointError(f"{path.name} does not fit the preset's sizes; train into another folder") from error
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.copy_(parameter.half())
    modules.eval().requires_grad_(False)


def weights_sha256(module: nn.Module) -> str:
    """Of names, shapes and values of everything in a module's state."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Run:
    """One stage between two checkpoints."""

    def __init__(self, task: Task, options: RunOptions) -> None:
        self.task, self.options = task, options
        self.path = options.folder / f"{task.name}.pt"
        task.modules.to(options.device)
        self.parameters = [p for p in task.modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=task.budget.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.state = _State()
        self.average: dict[str, Tensor] = {}
        if self.path.is_file():
            self._resume()
        elif task.budget.average:
            self.average = {name: p.detach().clone() for name, p in task.modules.named_parameters()}

    def _resume(self) -> None:
        data = _read(self.path, self.options.device)
        found = (data["seed"], data["n_steps"])
        if found != (self.options.seed, self.task.budget.n_steps):
            raise CheckpointError(
                f"{self.path.name} belongs to seed {found[0]} and {found[1]} steps, not to seed {self.options.seed} "
                f"and {self.task.budget.n_steps} steps; train into another folder"
            )
        try:
            self.task.modules.load_state_dict(data["modules"])
            self.optimizer.load_state_dict(data["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.path.name} does not fit the preset's sizes; train into another folder"
            ) from error
        self.average = data["average"]
        self.state = _State(**data["state"])

    def save(self) -> None:
        state = self.state
        _write(
            self.path,
            {
                "step": state.step,
                "n_steps": self.task.budget.n_steps,
                "seed": self.options.seed,
                "modules": self.task.modules.state_dict(),
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "state": {name: getattr(state, name) for name in _State.__dataclass_fields__},
            },
        )
        losses = {
            "stage": self.task.name,
            "steps": state.step,
            "seconds": round(state.seconds, 1),
            "rows": state.losses,
        }
        (self.options.folder / f"{self.task.name}.losses.json").write_text(json.dumps(losses, indent=1) + "\n")

    def one_step(self) -> None:
        task, state = self.task, self.state
        rng = step_generators(self.options.seed, task.name, state.step)
        on_gpu = self.options.device != "cpu"
        # bfloat16 for products on a GPU; a CPU gains a fifth at most, too little for the bits it loses
        with torch.autocast(self.options.device, torch.bfloat16, enabled=on_gpu):
            losses = task.step(state.step, rng)
        self.optimizer.param_groups[0]["lr"] = _learning_rate(task.budget, state.step)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if not torch.isfinite(norm):
            raise ExportError(
                f"stage {task.name} diverged at step {state.step}; lower its learning rate and train it anew"
            )
        self.optimizer.step()
        for name, value in losses.items():
            state.pending[name] = state.pending.get(name, 0.0) + float(value.detach())
        if self.average:
            decay = min(task.budget.average, (1 + state.step) / (10 + state.step))
            with torch.no_grad():
                for name, p in task.modules.named_parameters():
                    self.average[name].lerp_(p, 1 - decay)
        state.step += 1
        state.n_pending += 1
        if state.step % self.options.log_every == 0 or state.step == task.budget.n_steps:
            row = {name: round(total / state.n_pending, 6) for name, total in state.pending.items()}
            state.losses.append({"step": state.step, **row})
            state.pending, state.n_pending = {}, 0
            shown = " ".join(f"{name} {value:.4f}" for name, value in row.items())
            self.options.log(f"{task.name} {state.step}/{task.budget.n_steps} {shown}")


def train(task: Task, options: RunOptions) -> bool:
    """Train a stage, from its checkpoint if there is one.

    Returns:
        Whether the stage is finished; if not, call again.

    Raises:
        CheckpointError: the checkpoint is damaged or of another run.
        ExportError: the losses are not finite.
    """
    options.folder.mkdir(parents=True, exist_ok=True)
    run = _Run(task, options)
    n_steps, first = task.budget.n_steps, run.state.step
    saved = last = time.monotonic()
    while run.state.step < n_steps:
        made = run.state.step - first
        late = options.deadline is not None and last >= options.deadline
        if late or (options.stop_after is not None and made >= options.stop_after):
            break
        run.one_step()
        now = time.monotonic()
        run.state.seconds += now - last
        last = now
        if now - saved >= options.save_every_s:
            run.save()
            saved = now
    run.save()
    return run.state.step >= n_steps
