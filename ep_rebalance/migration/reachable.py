"""Every tensor that an object can reach: through attributes, slots, containers and closures.

It reads and never calls: no property, no `__getattr__`. What lies behind an object written in C or C++
cannot be seen and is named as such. Neither can what a function keeps among its module's globals.
"""

from __future__ import annotations

import datetime
import enum
import functools
import logging
import numbers
import pathlib
import re
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ep_rebalance.migration.slabs import NamedTensor

MOST_OBJECTS = 20_000
"""A MoE layer has some hundreds: a walk that meets more has left it."""

Leaves = Callable[[str, object], bool]
"""Name and object: whether not to enter it."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """name: of an object whose inside cannot be seen. type: its class."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Reached:
    """In the order of how far away they are: the first name of a tensor is its shortest.

    tensors: all of them, views of the same memory included. hidden: what may hold more.
    """

    tensors: tuple[NamedTensor, ...]
    hidden: tuple[Hidden, ...]


def reach(root: object, leaves: Leaves) -> Reached:
    """Walk from `root`, whose attributes are named without it.

    The order follows from the objects alone, so that ranks which made them alike find the same.
    """
    tensors: list[NamedTensor] = []
    hidden: list[Hidden] = []
    queue: deque[tuple[str, object]] = deque([("", root)])
    entered: dict[int, object] = {}  # keeps what it names alive, so that no id is given twice
    while queue:
        name, found = queue.popleft()
        if len(entered) > MOST_OBJECTS:
            hidden.append(Hidden(name, f"object behind {MOST_OBJECTS} others"))
            break
        if _is_plain(found) or id(found) in entered or leaves(name, found):
            continue
        entered[id(found)] = found
        if isinstance(found, torch.Tensor):
            if _has_bytes(found):
                tensors.append(NamedTensor(name, found.data))
            elif not is_traceable_wrapper_subclass(found):  # whose parts are attributes
                hidden.append(Hidden(name, f"tensor of layout {found.layout} on {found.device}"))
        elif isinstance(found, np.ndarray) and _torch_can_write(found):
            tensors.append(NamedTensor(name, torch.from_numpy(found)))
        elif not _is_open(found):
            hidden.append(Hidden(name, _type_name(found)))
        queue.extend(_inside(name, found))
    return Reached(tuple(tensors), tuple(hidden))


def _has_bytes(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and not is_traceable_wrapper_subclass(tensor)
    )


def _torch_can_write(array: np.ndarray[Any, Any]) -> bool:
    whole = all(step >= 0 and step % array.itemsize == 0 for step in array.strides)
    return whole and array.flags.writeable and array.dtype.kind in "biuf"


_PLAIN: tuple[type, ...] = (
    type(None),
    type(Ellipsis),
    type(NotImplemented),
    str,
    bytes,
    numbers.Number,
    np.generic,
    range,
    slice,
    enum.Enum,
    type,
    types.ModuleType,
    types.GenericAlias,
    types.CodeType,
    datetime.date,
    datetime.timedelta,
    pathlib.PurePath,
    re.Pattern,
    logging.Logger,
    weakref.ref,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Generator,
    torch.Stream,
    torch.Event,
)
"""What holds no tensor, and what belongs to others."""

_PLAIN_PACKAGES = frozenset({"typing", "threading", "_thread", "triton", "abc", "_abc"})
"""Types of theirs: annotations, locks, compiled kernels."""
_PLAIN_MODULES = ("torch._ops", "torch.distributed", "torch._C._distributed")

_OPEN_BASES: frozenset[type] = frozenset(
    {
        object,
        dict,
        OrderedDict,
        defaultdict,
        list,
        tuple,
        set,
        frozenset,
        deque,
        types.MappingProxyType,
        types.SimpleNamespace,
        types.FunctionType,
        types.MethodType,
        types.BuiltinFunctionType,
        types.MethodWrapperType,
        functools.partial,
        functools.partialmethod,
        *torch.Tensor.__mro__,
        torch.Size,
    }
)
"""Written in C, with an inside that `_inside` knows."""

_CACHED = type(functools.cache(len))

_HEAP_TYPE = 1 << 9
"""Flag of a class that was not compiled (Include/object.h, Py_TPFLAGS_HEAPTYPE)."""
_SOURCES = (".py", ".pyc")
_BINDINGS = ("pybind11_", "nb_")
"""How the metaclasses of pybind11 and nanobind begin: their classes look like Python's."""


def _is_plain(found: object) -> bool:
    if isinstance(found, _PLAIN):
        return True
    module = type(found).__module__ or ""
    return module.partition(".")[0] in _PLAIN_PACKAGES or module.startswith(_PLAIN_MODULES)


def _is_open(found: object) -> bool:
    """Whether all that it holds can be seen."""
    if isinstance(found, (set, frozenset)):
        return all(_is_plain(member) for member in found)  # others come in no order
    if isinstance(found, _CACHED):
        return not found.cache_info().currsize
    return all(base in _OPEN_BASES or _is_of_python(base) for base in type(found).__mro__)


def _is_of_python(klass: type) -> bool:
    """Whether it was written in Python."""
    if not klass.__flags__ & _HEAP_TYPE or type(klass).__name__.startswith(_BINDINGS):
        return False
    module = sys.modules.get(klass.__module__)
    return module is None or (getattr(module, "__file__", None) or ".so").endswith(_SOURCES)


def _inside(name: str, found: object) -> Iterator[tuple[str, object]]:
    if isinstance(found, (dict, types.MappingProxyType)):
        yield from ((f"{name}[{_key(key)}]", value) for key, value in found.items())
    elif isinstance(found, (list, tuple, deque)):
        yield from ((f"{name}[{number}]", value) for number, value in enumerate(found))
    elif isinstance(found, functools.partial):
        yield from _partial(name, found)
    elif isinstance(found, types.MethodType):
        yield f"{name}.__self__", found.__self__
        yield f"{name}.__func__", found.__func__
    elif isinstance(found, (types.BuiltinFunctionType, types.MethodWrapperType)):
        yield f"{name}.__self__", found.__self__
    elif isinstance(found, types.FunctionType):
        yield from _function(name, found)
    yield from ((_join(name, key), value) for key, value in _attributes(found).items())
    yield from _of_class(name, type(found))


def _partial(name: str, found: functools.partial[Any]) -> Iterator[tuple[str, object]]:
    yield f"{name}.func", found.func
    yield f"{name}.args", found.args
    yield f"{name}.keywords", found.keywords


def _function(name: str, found: types.FunctionType) -> Iterator[tuple[str, object]]:
    for variable, cell in zip(found.__code__.co_freevars, found.__closure__ or (), strict=True):
        try:
            yield f"{name}.<{variable}>", cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield f"{name}.__defaults__", found.__defaults__
    yield f"{name}.__kwdefaults__", found.__kwdefaults__


def _attributes(found: object) -> dict[str, object]:
    """By name. A module's parameters, buffers and children are attributes of it, and come first."""
    own: dict[str, Any] = dict(getattr(found, "__dict__", {}))
    attributes: dict[str, object] = {}
    if isinstance(found, torch.nn.Module):
        for table in ("_parameters", "_buffers", "_modules"):
            attributes |= own.pop(table, {})
    attributes |= own
    for klass in filter(_has_own_attributes, type(found).__mro__):
        for slot, descriptor in vars(klass).items():
            if isinstance(descriptor, types.MemberDescriptorType) and slot not in attributes:
                try:
                    attributes[slot] = descriptor.__get__(found, type(found))
                except AttributeError:  # not set
                    continue
    return attributes


def _of_class(name: str, klass: type) -> Iterator[tuple[str, object]]:
    """What a class keeps for all of its objects, if it is something that keeps."""
    for base in filter(_has_own_attributes, klass.__mro__):
        for key, value in vars(base).items():
            if isinstance(value, (torch.Tensor, dict, list, tuple)) and not key.startswith("__"):
                yield _join(name, f"{base.__name__}.{key}"), value


def _has_own_attributes(klass: type) -> bool:
    """Not those of Python itself, which lead from a function to all of its module, nor of torch."""
    return bool(klass.__flags__ & _HEAP_TYPE) and klass.__module__.partition(".")[0] != "torch"


def _join(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute


def _key(key: object) -> str:
    return repr(key) if isinstance(key, (str, int, tuple)) else str(key)


def _type_name(found: object) -> str:
    return f"{type(found).__module__}.{type(found).__qualname__}"
