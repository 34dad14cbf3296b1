"""CUDA tensors that are computed on the CPU: torch's operators for a GPU that `runtime.c` pretends is there.

What that GPU calls its memory is the host's. So each operator that torch has a CUDA kernel for is given one that runs
the CPU's over the same bytes; what only looks at shapes and strides, and all of torch above the kernels (streams,
events, allocator, pinned memory, checks of devices) stays CUDA's own. Triton's kernels run in its interpreter.

A captured graph is a list of calls. As on a GPU, what is captured is not computed until the graph is replayed, and
what would wait for the device meanwhile is an error.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten, tree_map

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(1)
#: views, allocation and bookkeeping do what they should without a kernel
AS_THEY_ARE = (
    *("empty", "empty_strided", "resize_", "resize_as_", "_resize_output_", "set_", "is_set_to", "is_pinned"),
    *("_pin_memory", "pin_memory", "record_stream", "_fused_sdp_choice", "_efficientzerotensor", "_make_dual"),
)
#: other libraries' operators, which the CPU has not
FOREIGN = ("_cudnn", "cudnn", "miopen", "_foreach", "_fused_adam", "_fused_sgd", "_fused_moving", "_nested")
#: composite operators that would choose one of those
ALSO = ("aten::copy_", "aten::convolution", "aten::convolution_overrideable")
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2")

_library = torch.library.Library("aten", "IMPL")
_capture = threading.local()


def install() -> int:
    """Give every CUDA operator its stand-in, and CUDA graphs theirs; the number of operators."""
    torch.backends.cudnn.enabled = False
    names = {*torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"), *ALSO}
    operators = [op for name in sorted(names) if (op := _operator(name)) is not None]
    for op in operators:
        _library.impl(op, _standin(op), "CUDA", allow_override=True)
    torch.cuda.CUDAGraph = Graph  # type: ignore[misc]
    _record_triton()
    return len(operators)


def host_view(tensor: Tensor) -> Tensor:
    """The same bytes as a CPU tensor."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    bytes_ = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(bytes_, tensor.storage_offset(), tensor.shape, tensor.stride())


def compute(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operator on the CPU; results on the device, or the arguments it writes to."""
    special = _special(op)
    if special is not None:
        return special(op, args, kwargs)
    arguments, returns = op._schema.arguments, op._schema.returns
    host_args, host_kwargs = tree_map(_to_host, args), tree_map(_to_host, kwargs)
    # a number takes the place of a tensor where the operator was called with one
    host_args = tuple(
        torch.tensor(value) if isinstance(value, int | float) and str(argument.type) == "Tensor" else value
        for value, argument in zip(host_args, arguments, strict=False)
    )
    result = op(*host_args, **host_kwargs)
    written = []
    for index in _written(op):
        given, host = _at(op, index, args, kwargs), _at(op, index, host_args, host_kwargs)
        written.append(given)
        if isinstance(given, Tensor) and host.shape != given.shape:  # an `out` that had to grow
            given.resize_(host.shape)
            host_view(given).copy_(host)
    if not returns:
        return None
    if returns[0].alias_info is not None:
        return written[0] if len(written) == 1 else tuple(written)
    return tree_map(_to_device, result)


class Graph(torch.cuda.CUDAGraph):
    """A captured graph as the calls that were made meanwhile."""

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        super().capture_begin(*args, **kwargs)
        self._calls: list[Call] = []
        _capture.calls = self._calls

    def capture_end(self) -> None:
        _capture.calls = None
        super().capture_end()

    def replay(self) -> None:
        for function, args, kwargs, result in self._calls:
            if not isinstance(function, OpOverload):
                function(*args, **kwargs)
                continue
            again = compute(function, args, kwargs)
            for kept, new in zip(_tensors(result), _tensors(again), strict=False):
                host_view(kept).copy_(host_view(new))

    def reset(self) -> None:
        self._calls = []
        super().reset()


def _operator(name: str) -> OpOverload | None:
    """The operator of a registration, if it computes something."""
    space, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    if space != "aten" or base in AS_THEY_ARE or base.startswith(FOREIGN):
        return None
    op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
    if op is None or any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns):
        return None
    return op


def _standin(op: OpOverload) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        calls = getattr(_capture, "calls", None)
        return compute(op, args, kwargs) if calls is None else _recorded(calls, op, args, kwargs)

    return run


def _recorded(calls: list[Call], op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add a call to a graph. It is run for the shapes of its results, and leaves nothing behind."""
    name = op._schema.name
    pageable = name == "aten::copy_" and any(t.device.type == "cpu" and not t.is_pinned() for t in args[:2])
    if name in WAITING or pageable:
        raise RuntimeError(f"{name} waits for the device while a graph is captured")
    written = [t for i in _written(op) for t in _tensors(_at(op, i, args, kwargs)) if t.device.type == "cuda"]
    before = [host_view(tensor).clone() for tensor in written]
    result = compute(op, args, kwargs)
    for tensor, old in zip(written, before, strict=True):
        if tensor.shape == old.shape:
            host_view(tensor).copy_(old)
    if not written:
        for tensor in _tensors(result):
            host_view(tensor).zero_()
    calls.append((op, args, kwargs, None if written else result))
    return result


def _record_triton() -> None:
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = getattr(_capture, "calls", None)
        if calls is None:
            return launch(self, *args, **kwargs)
        calls.append((lambda *a, **k: launch(self, *a, **k), args, kwargs, None))
        return None

    GridExecutor.__call__ = call


def _special(op: OpOverload) -> Callable[..., Any] | None:
    """Operators that the CPU has under no name."""
    if op._schema.name.startswith("aten::_scaled_dot_product_"):
        return _attention
    return _rms_norm if op._schema.name == "aten::_fused_rms_norm" else None


def _attention(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    named = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)} | kwargs
    query, key, value = (host_view(named[name]).float() for name in ("query", "key", "value"))
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scale = named.get("scale") or 1 / math.sqrt(query.shape[-1])
    scores = query @ key.transpose(-2, -1) * scale
    if named.get("attn_bias") is not None:
        scores = scores + host_view(named["attn_bias"]).float()
    if named.get("is_causal"):
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    result = _to_device((scores.softmax(-1) @ value).to(named["query"].dtype))
    others = (torch.zeros(1, device="cuda") if str(r.type) == "Tensor" else 0 for r in op._schema.returns[1:])
    return (result, *others)


def _rms_norm(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    named = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)} | kwargs
    x = host_view(named["input"])
    eps = torch.finfo(x.dtype).eps if named["eps"] is None else named["eps"]
    rate = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    scaled = x.float() * rate
    if named["weight"] is not None:
        scaled = scaled * host_view(named["weight"]).float()
    return _to_device(scaled.to(x.dtype)), _to_device(rate)


def _written(op: OpOverload) -> list[int]:
    return [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def _at(op: OpOverload, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[index] if index < len(args) else kwargs.get(op._schema.arguments[index].name)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return host_view(value) if value.device.type == "cuda" else value
    if isinstance(value, torch.device):
        return CPU
    return GENERATOR if isinstance(value, torch.Generator) and value.device.type == "cuda" else value


def _to_device(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    expanded = any(step == 0 and n > 1 for step, n in zip(value.stride(), value.shape, strict=True))
    strides = torch.empty(value.shape, device="meta").stride() if expanded else value.stride()
    result = torch.empty_strided(value.shape, strides, dtype=value.dtype, device="cuda")
    host_view(result).copy_(value)
    return result
