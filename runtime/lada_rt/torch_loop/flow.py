"""The flow solver on the device: one graph replay for each Euler step, several songs in one batch.

Source: spec/mucodec 3.4. The values are those of lada_rt/decode.py: same tables, same order of operations.

Two kinds of engine serve it. The `flow` stage as it is, or its two parts (`flow_prepare`, `flow_step`): what depends
on the window but not on the state, and what depends on the time but not on the window, is then computed once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from lada_rt.euler import EulerTable
from lada_rt.torch_loop.device import DeviceEngine, GraphPool, Pace, Replay, Turn, on_device, to_device

__all__ = ["FlowSolver"]

#: batch sizes, guidance forms and numbers of steps whose graphs are kept
MAX_WINDOWS = 8


class _Window:
    """Fixed tensors and the captured Euler step of one batch size, guidance form and number of steps."""

    def __init__(
        self,
        engines: Mapping[str, DeviceEngine],
        shape: tuple[int, ...],
        n_codes: int,
        halves: int,
        n_steps: int,
        pool: GraphPool,
    ) -> None:
        device, n_songs = pool.device, shape[0]
        batch = halves * n_songs
        self._engines = engines
        self._halves = halves
        table = EulerTable.of(n_steps)
        self._t, self._dt, self._fade = (to_device(a, device) for a in (table.t, table.dt, table.fade))
        # dtypes are named: the process may have another default, and packages do not check what they are given
        self.x = torch.zeros(shape, dtype=torch.float32, device=device)
        self.noise = torch.zeros(shape, dtype=torch.float32, device=device)
        self.context = torch.zeros(shape, dtype=torch.float32, device=device)  # zero where there is none
        self.known = torch.zeros(1, 1, shape[2], 1, dtype=torch.bool, device=device)
        self.codes = torch.zeros(n_songs, n_codes, dtype=torch.int64, device=device)
        self.guidance = torch.ones(1, dtype=torch.float32, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        # all unconditioned rows, then all conditioned ones
        conditional = torch.zeros(batch, dtype=torch.float32, device=device)
        conditional[batch - n_songs :] = 1.0
        self._conditional = conditional
        self._split = "flow_step" in engines
        if self._split:
            self._prepared = self._prepare()
        self.advance = Replay(self._advance, pool)

    def _rows(self, tensor: Tensor) -> Tensor:
        """[songs, ...] for each half: [halves * songs, ...], contiguous."""
        return torch.cat([tensor] * self._halves) if self._halves > 1 else tensor

    def _prepare(self) -> dict[str, Tensor]:
        return self._engines["flow_prepare"].run_device(
            context=self._rows(self.context),
            codes=self._rows(self.codes),
            conditional=self._conditional,
            times=self._t,
        )

    def start(self) -> None:
        """Begin with the window whose noise, context and codes have been filled in."""
        self.x.copy_(self.noise)
        self._step.zero_()
        if self._split:
            for name, tensor in self._prepare().items():
                self._prepared[name].copy_(tensor)

    def _velocity(self, t: Tensor) -> Tensor:
        x = self._rows(self.x)
        if self._split:
            found = self._engines["flow_step"].run_device(
                x=x,
                condition=self._prepared["condition"],
                modulation=self._prepared["modulation"].index_select(0, self._step)[0],
                closing=self._prepared["closing"].index_select(0, self._step)[0],
            )
        else:
            found = self._engines["flow"].run_device(
                x=x,
                context=self._rows(self.context),
                codes=self._rows(self.codes),
                conditional=self._conditional,
                t=t.expand(x.shape[0]).contiguous(),
            )
        return found["velocity"]  # [halves * songs, C, L, F]

    def _advance(self) -> None:
        t, dt, fade = (a.index_select(0, self._step) for a in (self._t, self._dt, self._fade))  # [1] each
        blended = fade * self.noise + t * self.context
        self.x.copy_(torch.where(self.known, blended, self.x))
        velocity = self._velocity(t)
        if self._halves > 1:
            free, conditioned = velocity.chunk(2)
            velocity = free + self.guidance * (conditioned - free)
        self.x += dt * velocity
        self._step += 1

    def result(self) -> Tensor:
        return torch.where(self.known, self.context, self.x)


class FlowSolver:
    """The flow of one window, for one song or several. Thread-safe: windows take turns."""

    def __init__(self, engines: Mapping[str, DeviceEngine], device: torch.device, *, capture: bool = True) -> None:
        """Args: engines: `flow`, or `flow_prepare` and `flow_step`; capture: use CUDA graphs."""
        self._engines = engines
        self._device = device
        self._pool = GraphPool(device, capture=capture)
        self._turn = Turn(device)
        self._windows: OrderedDict[tuple[int, ...], _Window] = OrderedDict()

    def solve(
        self,
        codes: Tensor,
        noise: Tensor,
        context: Tensor,
        *,
        n_steps: int,
        guidance: float,
        on_step: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """Integrate from noise to normalised latents, as `lada_rt.decode.solve_flow` does for each song.

        Args:
            codes: [S, 2 L] int64, a window of each of S songs.
            noise: [S, 32, L, 32] float32.
            context: [S, 32, K, 32] float32, normalised latents that the windows start with; K = 0 for none.
            n_steps: Euler steps.
            guidance: velocity is u + guidance * (c - u); at 1 only the conditioned half is evaluated.
            on_step: called with the steps queued; the device is at most four behind.

        Returns:
            [S, 32, L, 32] float32, not waited for; the first K frames equal `context`.
        """
        n_context = context.shape[2]
        with self._turn.taken(partial(on_step, 0)), on_device("flow", self._device):
            window = self._window(tuple(noise.shape), codes.shape[1], 1 if guidance == 1.0 else 2, n_steps)
            window.codes.copy_(codes)
            window.noise.copy_(noise)
            window.context.zero_()
            window.context[:, :, :n_context].copy_(context)
            window.known.zero_()
            window.known[:, :, :n_context].fill_(True)
            window.guidance.fill_(guidance)
            window.start()
            pace = Pace(self._device)
            for step in range(n_steps):
                window.advance()
                pace.tick()
                on_step(step + 1)
            return window.result()

    def _window(self, shape: tuple[int, ...], n_codes: int, halves: int, n_steps: int) -> _Window:
        key = (*shape, n_codes, halves, n_steps)
        if key not in self._windows:
            while len(self._windows) >= MAX_WINDOWS:
                self._windows.popitem(last=False)[1].advance.release()
            self._windows[key] = _Window(self._engines, shape, n_codes, halves, n_steps, self._pool)
        self._windows.move_to_end(key)
        return self._windows[key]
