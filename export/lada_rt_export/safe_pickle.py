"""Read a pickle as data: a small virtual machine that builds values and never calls or imports anything.

`pickle.Unpickler` with a restricted `find_class` is not used. Its opcodes still run code on our side (BUILD
sets attributes on whatever the file points at, a memo index of 2**31 allocates gigabytes before any check),
and every allowed callable is one more thing to audit. Here the standard library only splits the bytes into
opcodes (`pickletools.genops`, which executes nothing); what an opcode means is written below. A class or
function of the file is a name, an object made from it is a `Foreign` that keeps that name, the arguments and
the state.

Limits bound the work for hostile input: opcodes, bytes, size of one integer. Only plain scalars become
dictionary keys: hashing nested tuples or chosen integers can take exponential or quadratic time.
"""

from __future__ import annotations

import io
import itertools
import pickletools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from lada_rt.errors import CheckpointError

__all__ = ["MAX_OPCODES", "MAX_PICKLE_BYTES", "Foreign", "Hooks", "plain", "read_pickle"]

#: the largest released file lists about two thousand tensors, some 60 thousand opcodes and one megabyte
MAX_PICKLE_BYTES: Final = 64 << 20
MAX_OPCODES: Final = 4_000_000
_MAX_INT_BITS: Final = 8192
#: characters of module and class
_MAX_NAME: Final = 1000
#: integers below this hash to themselves, so they cannot be chosen to collide
_MAX_KEY_INT: Final = 1 << 60

_Item = TypeVar("_Item")
_PLAIN_DEPTH: Final = 64
_PLAIN_NODES: Final = 200_000


@dataclass(slots=True, eq=False)
class Foreign:
    """A class or function named in a pickle, or an object made from one: inert, never imported or called.

    `args` is None for the bare name. `state` is what BUILD handed over, `elements` and `pairs` what was
    appended or set on it as if it were a list or a dictionary.
    """

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None
    elements: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def __repr__(self) -> str:  # bounded: arguments may be deep or cyclic
        return f"<{ascii(self.name)[1:-1][:200]}>"


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the caller understands; each returns NotImplemented for anything else, which stays a `Foreign`.

    `call(name, args)` replaces an object made by calling `module.name`. It must not copy its arguments: a
    file can pass the same large list a million times. `persistent(pid)` replaces a persistent id.
    """

    call: Callable[[str, tuple[Any, ...]], Any] = lambda name, args: NotImplemented
    persistent: Callable[[Any], Any] = lambda pid: NotImplemented


class _Bad(Exception):
    """The pickle contradicts itself or passes a limit; becomes a CheckpointError that names the file."""


def read_pickle(data: bytes | io.BytesIO, source: str, hooks: Hooks | None = None) -> Any:
    """The value of one pickle, with every foreign object as an inert `Foreign`.

    Args:
        data: one pickle of any protocol (0 to 5), or a stream at the start of one, left just behind it.
        source: the file, for the error message.
        hooks: how to read the few callables and persistent ids that stand for tensors.

    Returns:
        None, bool, int, float, str, bytes, bytearray, list, tuple, dict, `Foreign`, or what the hooks return.
        Sets are lists. Structures may be shared and cyclic, as in the file: use `plain` before walking them.

    Raises:
        CheckpointError: the pickle is damaged, cut short, or larger than the limits above.
    """
    stream = data if isinstance(data, io.BytesIO) else io.BytesIO(data)
    if stream.getbuffer().nbytes > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{source}: expected at most {MAX_PICKLE_BYTES} bytes of pickled structure, got "
            f"{stream.getbuffer().nbytes}; save the weights as a plain state_dict or as .safetensors"
        )
    machine = _Machine(hooks or Hooks())
    try:
        return machine.run(stream)
    except _Bad as error:
        reason = str(error)
    except Exception as error:  # genops and the hooks meet arbitrary bytes: whatever they raise means a damaged file
        reason = f"{type(error).__name__} while reading opcode {machine.n_opcodes}"
    raise CheckpointError(
        f"{source}: expected an intact pickle, got one that cannot be read ({reason}); download the file again"
    )


class _Machine:
    """The pickle stack machine. Values are data only; no opcode reaches a callable that the file names."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.n_opcodes = 0

    def charge(self, n: int) -> None:
        self.n_opcodes += n
        if self.n_opcodes > MAX_OPCODES:
            raise _Bad(f"more than {MAX_OPCODES} opcodes")

    def run(self, stream: io.BytesIO) -> Any:
        for opcode, arg, _ in pickletools.genops(stream):
            self.charge(1)
            name = opcode.name
            if name in _LITERALS:
                self.stack.append(_literal(arg))
            elif name == "STOP":
                if self.marks or len(self.stack) != 1:
                    raise _Bad("values left on the stack")
                return self.stack[0]
            else:
                action = _ACTIONS.get(name)
                if action is None:
                    raise _Bad(f"opcode {name}")
                action(self, arg)
        raise _Bad("no STOP opcode")

    def pop(self) -> Any:
        if not self.stack:
            raise _Bad("stack underflow")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise _Bad("stack underflow")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise _Bad("no mark")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def construct(self, callee: Any, args: Any) -> Any:
        arguments = args if isinstance(args, tuple) else (args,)
        if not isinstance(callee, Foreign) or callee.args is not None:
            # calling an instance, or a value that is no name at all
            return Foreign(callee.name if isinstance(callee, Foreign) else type(callee).__name__, arguments)
        made = self.hooks.call(callee.name, arguments)
        return Foreign(callee.name, arguments) if made is NotImplemented else made

    def set_items(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            raise _Bad("a key without a value")
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, dict):
            for key, value in pairs:
                target[_safe_key(key)] = value
        elif isinstance(target, Foreign):
            target.pairs.extend(pairs)
        else:
            raise _Bad(f"items set on a {type(target).__name__}")

    def extend(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Foreign):
            target.elements.extend(items)
        else:
            raise _Bad(f"items appended to a {type(target).__name__}")


def _literal(arg: Any) -> Any:
    if isinstance(arg, int) and arg.bit_length() > _MAX_INT_BITS:
        raise _Bad(f"an integer of {arg.bit_length()} bits")
    return arg


def _safe_key(key: Any) -> Any:
    if key is None or isinstance(key, (str, bytes, float)):
        return key
    if isinstance(key, int) and -_MAX_KEY_INT < key < _MAX_KEY_INT:
        return key
    return key if isinstance(key, Foreign) else Foreign(f"key of type {type(key).__name__}")


def _global(module: Any, name: Any) -> Foreign:
    if not isinstance(module, str) or not isinstance(name, str):
        raise _Bad("a class name that is not text")
    # two long texts, stored once, would be joined anew at every opcode that names them
    if len(module) + len(name) > _MAX_NAME:
        raise _Bad(f"a class name of {len(module) + len(name)} characters")
    if module == "__builtin__":
        module = "builtins"
    return Foreign(f"{module}.{name}")


def _op_stack_global(m: _Machine, _: Any) -> None:
    name, module = m.pop(), m.pop()
    m.stack.append(_global(module, name))


def _op_global(m: _Machine, arg: Any) -> None:
    module, _, name = arg.partition(" ")
    m.stack.append(_global(module, name))


def _op_inst(m: _Machine, arg: Any) -> None:
    module, _, name = arg.partition(" ")
    args = tuple(m.pop_to_mark())
    m.stack.append(m.construct(_global(module, name), args))


def _op_obj(m: _Machine, _: Any) -> None:
    items = m.pop_to_mark()
    if not items:
        raise _Bad("OBJ without a class")
    m.stack.append(m.construct(items[0], tuple(items[1:])))


def _op_reduce(m: _Machine, _: Any) -> None:
    args, callee = m.pop(), m.pop()
    m.stack.append(m.construct(callee, args))


def _op_newobj_ex(m: _Machine, _: Any) -> None:
    kwargs, args, callee = m.pop(), m.pop(), m.pop()
    m.stack.append(Foreign(callee.name if isinstance(callee, Foreign) else "object", (args, kwargs)))


def _op_build(m: _Machine, _: Any) -> None:
    state, target = m.pop(), m.top()
    if isinstance(target, Foreign):
        target.state = state
    # state on a dict or a tensor (such as the _metadata of a state_dict) carries no weights


def _op_put(m: _Machine, arg: Any) -> None:
    m.memo[arg] = m.top()  # a dictionary: an index of 2**31 costs one entry


def _op_memoize(m: _Machine, _: Any) -> None:
    m.memo[len(m.memo)] = m.top()


def _op_get(m: _Machine, arg: Any) -> None:
    if arg not in m.memo:
        raise _Bad(f"memo {arg} before it was stored")
    m.stack.append(m.memo[arg])


def _op_persistent(m: _Machine, pid: Any) -> None:
    found = m.hooks.persistent(pid)
    m.stack.append(Foreign("persistent id", (pid,)) if found is NotImplemented else found)


def _op_tuple(n: int) -> Callable[[_Machine, Any], None]:
    def action(m: _Machine, _: Any) -> None:
        items = [m.pop() for _ in range(n)]
        m.stack.append(tuple(reversed(items)))

    return action


def _op_set_item(m: _Machine, _: Any) -> None:
    value, key = m.pop(), m.pop()
    m.set_items(m.top(), [key, value])


def _op_set_items(m: _Machine, _: Any) -> None:
    items = m.pop_to_mark()
    m.set_items(m.top(), items)


def _op_dict(m: _Machine, _: Any) -> None:
    made: dict[Any, Any] = {}
    m.set_items(made, m.pop_to_mark())
    m.stack.append(made)


def _op_append(m: _Machine, _: Any) -> None:
    value = m.pop()
    m.extend(m.top(), [value])


def _op_extend(m: _Machine, _: Any) -> None:
    items = m.pop_to_mark()
    m.extend(m.top(), items)


def _op_mark(m: _Machine, _: Any) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _op_pop(m: _Machine, _: Any) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_to_mark()


def _op_pop_mark(m: _Machine, _: Any) -> None:
    m.pop_to_mark()


def _push(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.stack.append(make())


def _push_marked(make: Callable[[list[Any]], Any]) -> Callable[[_Machine, Any], None]:
    def action(m: _Machine, _: Any) -> None:
        items = m.pop_to_mark()  # first: it replaces m.stack
        m.stack.append(make(items))

    return action


_LITERALS: Final = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
    ]
)

_ACTIONS: Final[dict[str, Callable[[_Machine, Any], None]]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": _op_mark,
    "POP": _op_pop,
    "POP_MARK": _op_pop_mark,
    "DUP": lambda m, _: m.stack.append(m.top()),
    "NONE": _push(lambda: None),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_LIST": _push(list),
    "EMPTY_TUPLE": _push(tuple),
    "EMPTY_DICT": _push(dict),
    "EMPTY_SET": _push(list),
    "LIST": _push_marked(list),
    "FROZENSET": _push_marked(list),
    "TUPLE": _push_marked(tuple),
    "TUPLE1": _op_tuple(1),
    "TUPLE2": _op_tuple(2),
    "TUPLE3": _op_tuple(3),
    "DICT": _op_dict,
    "APPEND": _op_append,
    "APPENDS": _op_extend,
    "ADDITEMS": _op_extend,
    "SETITEM": _op_set_item,
    "SETITEMS": _op_set_items,
    "PUT": _op_put,
    "BINPUT": _op_put,
    "LONG_BINPUT": _op_put,
    "MEMOIZE": _op_memoize,
    "GET": _op_get,
    "BINGET": _op_get,
    "LONG_BINGET": _op_get,
    "GLOBAL": _op_global,
    "STACK_GLOBAL": _op_stack_global,
    "EXT1": lambda m, arg: m.stack.append(Foreign(f"extension {arg}")),
    "EXT2": lambda m, arg: m.stack.append(Foreign(f"extension {arg}")),
    "EXT4": lambda m, arg: m.stack.append(Foreign(f"extension {arg}")),
    "REDUCE": _op_reduce,
    "NEWOBJ": _op_reduce,
    "NEWOBJ_EX": _op_newobj_ex,
    "INST": _op_inst,
    "OBJ": _op_obj,
    "BUILD": _op_build,
    "PERSID": _op_persistent,
    "BINPERSID": lambda m, _: _op_persistent(m, m.pop()),
}
_RECONSTRUCTORS: Final = frozenset(
    f"{module}.{name}"
    for module in ("copyreg", "copy_reg")
    for name in ("_reconstructor", "__newobj__", "__newobj_ex__")
)


def plain(value: Any) -> Any:
    """A readable copy of unpickled data: dictionaries, lists and scalars only, without cycles.

    Objects become what they hold: the `_content` or `_val` of a configuration node, else their state
    dictionary, their items, or their single argument (an enumeration member), else their name in angle
    brackets. Deeper than 64 levels, or past 200 000 nodes, values are cut to "...": shared structures in a
    hostile file can expand without end.

    Args:
        value: what `read_pickle` returned, or a part of it.

    Returns:
        dict, list, str, int, float, bool or None; anything else by its `repr`.
    """
    return _plain(value, 0, [_PLAIN_NODES])


def _plain(value: Any, depth: int, budget: list[int]) -> Any:
    budget[0] -= 1
    if depth > _PLAIN_DEPTH or budget[0] < 0:
        return "..."
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    # nothing is copied before it is counted: a file can hold one large dictionary and name it a million times
    pairs: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1, budget) for item in _within(value, budget)]
    elif isinstance(value, Foreign):
        state = value.state
        # __slots__ objects: two dictionaries, the second counts
        both = isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict)
        parts = [part for part in (state if both else (state,)) if isinstance(part, dict)]
        for inner in ("_content", "_val"):
            for part in reversed(parts):
                if inner in part:
                    return _plain(part[inner], depth + 1, budget)
        if any(parts):
            pairs = itertools.chain.from_iterable(part.items() for part in parts)
        elif value.pairs:
            pairs = value.pairs
        elif value.elements:
            return _plain(value.elements, depth + 1, budget)
        elif value.args is not None and len(value.args) == 1:
            return _plain(value.args[0], depth + 1, budget)
        elif value.name in _RECONSTRUCTORS and value.args and isinstance(value.args[0], Foreign):
            return repr(value.args[0])
        else:
            return repr(value)
    else:
        return _short(value)
    return {
        key if isinstance(key, str) else _short(key): _plain(item, depth + 1, budget)
        for key, item in _within(pairs, budget)
    }


def _short(value: Any) -> str:
    return repr(value[:200] if isinstance(value, (bytes, bytearray)) else value)[:200]


def _within(items: Iterable[_Item], budget: list[int]) -> Iterator[_Item]:
    for item in items:
        if budget[0] <= 0:
            return
        yield item
