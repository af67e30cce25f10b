"""The description inside a PyTorch file, a pickle, read as data: nothing that it says is run.

A pickle is a program, and Python's own unpickler runs what it says. Here `pickletools` only splits it into its
instructions, and the few that describe tensors are followed. No class and no function is ever looked up, so there is
nothing that a hostile file could call, change or fill the memory with.
"""

from __future__ import annotations

import dataclasses
import pickletools
import re
from typing import IO, Any

from mesh_transformer.config.checks import shown

MAX_PICKLE = 64 << 20  # bytes; GPT-J's description has about 60 thousand
_MAX_STEPS = 2_000_000  # instructions of one pickle; a tensor takes about 30


class Refusal(Exception):
    """A reason not to read a file, to which the file's name is still to be added."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """A row of `n` values. Its kind is such as torch.FloatStorage."""

    kind: str
    key: str
    n: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RebuiltTensor:
    """A tensor as the pickle tells it; offset, shape and strides may still be anything."""

    storage: Storage
    offset: Any
    shape: Any
    strides: Any


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str  # nothing but a word: what it names is never imported


_WORDS = {RebuiltTensor: "tensor", Storage: "storage", _Global: "global name"}


def unpickle(file: IO[bytes]) -> tuple[Any, dict[str, Storage]]:
    """What the pickle that begins here describes, and the storages it names by key; `file` is left behind its end.

    The values are None, bools, numbers, strings, tuples, lists, dicts, `Storage` and `RebuiltTensor`.

    Raises:
        Refusal: it asks for anything else, or is too long; the message says so.
        Exception: it is damaged; of any type.
    """
    machine = _Unpickler()
    start = file.tell()
    for n_steps, (opcode, argument, position) in enumerate(pickletools.genops(file)):
        if n_steps >= _MAX_STEPS or (position or 0) - start > MAX_PICKLE:
            raise Refusal("its pickle is too long for a state dict")
        if opcode.name == "STOP":
            break
        machine.step(opcode.name, argument)
    return machine.stack.pop(), machine.storages


def is_count(value: Any) -> bool:
    """Whether it is an int, not a bool, that a size in memory can have."""
    return type(value) is int and 0 <= value < 1 << 63


def word_for(value: Any) -> str:
    """What a message calls a value of this type."""
    return _WORDS.get(type(value), type(value).__name__)


class _Unpickler:
    """Follows a pickle's instructions as Python's documentation (module pickletools) gives them.

    Only strings and small integers become the keys of a dict: to hash a tuple of tuples of ... takes for ever if each
    holds the next one twice.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.storages: dict[str, Storage] = {}
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode]())
            case "MARK":
                self._marked.append(stack)
                self.stack = []
            case "TUPLE":
                values = self._pop_marked()
                self.stack.append(tuple(values))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode[-1])
                stack[-n:] = [tuple(_last(stack, n))]
            case "APPEND" | "APPENDS":
                values = [stack.pop()] if opcode == "APPEND" else self._pop_marked()
                _expect(self.stack[-1], list).extend(values)
            case "SETITEM" | "SETITEMS":
                values = [stack.pop(), stack.pop()][::-1] if opcode == "SETITEM" else self._pop_marked()
                _set_items(_expect(self.stack[-1], dict), values)
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memo[len(self._memo) if opcode == "MEMOIZE" else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL" | "STACK_GLOBAL":
                if opcode == "STACK_GLOBAL":
                    name, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
                else:
                    module, _, name = argument.partition(" ")
                stack.append(_find(f"{module}.{name}"))
            case "REDUCE":
                arguments = _expect(stack.pop(), tuple)
                stack[-1] = _rebuild(_expect(stack[-1], _Global).name, arguments)
            case "BUILD":
                stack.pop()  # the _metadata of a state dict, which says nothing about the tensors
                _expect(stack[-1], dict)
            case "BINPERSID":
                stack.append(self._storage(_expect(stack.pop(), tuple)))
            case _:
                raise Refusal(f"its pickle asks for {opcode}, which no state dict needs; refused, nothing was run")

    def _pop_marked(self) -> list[Any]:
        values, self.stack = self.stack, self._marked.pop()
        return values

    def _storage(self, identity: tuple[Any, ...]) -> Storage:
        # The old form has a sixth part, for views of storages, which torch has not written since 0.4.
        if len(identity) not in (5, 6) or identity[5:] not in ((), (None,)):
            raise Refusal("a persistent identity is no storage; refused, nothing was run")
        word, kind, key, _, n = identity[:5]
        if type(word) is not str or word != "storage" or not isinstance(kind, _Global) or type(key) is not str:
            raise Refusal("a persistent identity is no storage; refused, nothing was run")
        if not kind.name.endswith("Storage") or not is_count(n):
            raise Refusal(f"storage {shown(key)} has a damaged description")
        storage = Storage(kind=kind.name, key=key, n=n)
        if self.storages.setdefault(key, storage) != storage:
            raise Refusal(f"storage {shown(key)} is described in two ways")
        return storage


def _find(name: str) -> _Global:
    known = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
    # Storages of any kind may pass: the tensor that lies in an unknown one is refused by its own name.
    if name in known or re.fullmatch(r"torch\.[A-Za-z0-9]{1,40}Storage", name):
        return _Global(name)
    # Unquoted, as anybody would look for it; what is not printable is written as an escape.
    text = name.encode("unicode_escape").decode()[:80]
    raise Refusal(
        f"holds {text}, which is no tensor of a plain dtype; refused, nothing was run\n"
        "expected a state dict: torch.save(model.state_dict(), path), or the same in safetensors"
    )


def _rebuild(function: str, arguments: tuple[Any, ...]) -> Any:
    match function, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "torch._utils._rebuild_tensor_v2", (Storage() as storage, offset, shape, strides, _, _, *rest):
            if len(rest) <= 1:  # torch 2's metadata
                return RebuiltTensor(storage=storage, offset=offset, shape=shape, strides=strides)
        case "torch._utils._rebuild_parameter", (RebuiltTensor() as tensor, _, _):
            return tensor
    raise Refusal(f"calls {function} with arguments that make no tensor; refused, nothing was run")


def _last(stack: list[Any], n: int) -> list[Any]:
    if len(stack) < n:
        raise IndexError("the stack is empty")
    return stack[-n:]


def _set_items(mapping: dict[Any, Any], values: list[Any]) -> None:
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) is not str and not (type(key) is int and abs(key) < 1 << 31):
            raise Refusal(f"a key is of type {type(key).__name__}; expected a string")
        mapping[key] = value


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        wanted = _WORDS.get(kind, kind.__name__)
        raise Refusal(f"its pickle has a {word_for(value)} where a {wanted} belongs; refused, nothing was run")
    return value
