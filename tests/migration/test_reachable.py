"""Every tensor that an engine's objects can reach, by name, and what cannot be looked into."""

import enum
import functools
import itertools
import logging
import re
import threading
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ep_rebalance.migration import reachable
from ep_rebalance.migration.reachable import reach


def never(name, found):
    return False


def names(root, leaves=never):
    reached = reach(root, leaves)
    assert reached.hidden == ()
    return [named.name for named in reached.tensors]


def tensor():
    return torch.zeros(2)


@dataclass(slots=True)
class Slotted:
    scale: torch.Tensor
    later: torch.Tensor

    def __init__(self):
        self.scale = tensor()


class Keeping:
    """Keeps for all of its objects."""

    cache = {"first": tensor()}  # noqa: RUF012

    @property
    def trap(self):
        raise AssertionError("read, where nothing should be called")

    def __getattr__(self, name):
        raise AssertionError(f"{name} asked for")


def test_attributes_slots_containers_and_classes_are_entered():
    root = SimpleNamespace(
        weight=tensor(),
        table={"scale": tensor(), 3: [tensor()]},
        slotted=Slotted(),
        queue=deque([(tensor(),)]),
        ordered=OrderedDict(a=tensor()),
        default=defaultdict(list, b=[tensor()]),
        array=np.zeros(2, dtype=np.float32),
        keeping=Keeping(),
    )
    assert set(names(root)) == {
        "weight",
        "table['scale']",
        "table[3][0]",
        "slotted.scale",
        "queue[0][0]",
        "ordered['a']",
        "default['b'][0]",
        "array",
        "keeping.Keeping.cache['first']",
    }


def test_closures_partials_methods_and_defaults_are_entered():
    bound, default, partial, attribute = tensor(), tensor(), tensor(), tensor()

    def compute(x, scale=default, *, other=None):
        return x * bound

    compute.attribute = attribute
    holder = SimpleNamespace(inside=tensor())

    class Kernel:
        def __init__(self):
            self.held = tensor()

        def run(self):
            return holder

    root = SimpleNamespace(
        compute=compute,
        partial=functools.partial(Kernel.run, partial),
        method=Kernel().run,
        builtin=[tensor()].append,
    )
    assert set(names(root)) == {
        "compute.<bound>",
        "compute.__defaults__[0]",
        "compute.attribute",
        "partial.args[0]",
        "partial.func.<holder>.inside",
        "method.__self__.held",
        "builtin.__self__[0]",
    }


def test_a_module_shows_its_parameters_buffers_and_children_as_attributes():
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(tensor())
    module.register_buffer("scale", tensor())
    module.child = torch.nn.Linear(1, 1)
    module.plain = tensor()
    assert set(names(module)) == {"weight", "scale", "child.weight", "child.bias", "plain"}


def test_what_is_kept_on_a_tensor_is_found():
    weight = torch.nn.Parameter(tensor())
    weight.scale = tensor()
    assert names(SimpleNamespace(weight=weight)) == ["weight", "weight.scale"]


def test_the_shortest_name_comes_first_and_a_circle_ends():
    root = SimpleNamespace(deep=SimpleNamespace(scale=tensor()))
    root.scale = root.deep.scale
    root.deep.back = root
    assert names(root) == ["scale"]


def test_leaves_are_not_entered():
    root = SimpleNamespace(experts=tensor(), router=SimpleNamespace(bias=tensor()))
    assert names(root, lambda name, found: name == "router") == ["experts"]


def test_what_holds_no_tensor_is_passed_over():
    class Colour(enum.Enum):
        RED = 1

    root = SimpleNamespace(
        colour=Colour.RED,
        path=Path("x"),
        pattern=re.compile("x"),
        log=logging.getLogger("x"),
        lock=threading.RLock(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        generator=torch.Generator(),
        numbers={1, 2.0, "three"},
        shape=torch.Size([1]),
        op=torch.ops.aten.add,
        type=Slotted,
        scalar=np.float32(1),
        cached=functools.cache(len),
    )
    assert names(root) == []


def test_what_is_compiled_is_named_with_its_type():
    cached = functools.cache(len)
    cached("abc")
    read_only = np.zeros(2)
    read_only.flags.writeable = False
    root = SimpleNamespace(
        opaque=itertools.count(),
        cached=cached,
        meta=torch.empty(2, device="meta"),
        sparse=torch.zeros(2).to_sparse(),
        members={SimpleNamespace} | {frozenset()},
        objects={(tensor(),)},
        backwards=np.zeros(2)[::-1],
        constant=read_only,
    )
    hidden = {found.name: found.type for found in reach(root, never).hidden}
    assert hidden == {
        "opaque": "itertools.count",
        "cached": "functools._lru_cache_wrapper",
        "meta": "tensor of layout torch.strided on meta",
        "sparse": "tensor of layout torch.sparse_coo on cpu",
        "members": "builtins.set",
        "objects": "builtins.set",
        "backwards": "numpy.ndarray",
        "constant": "numpy.ndarray",
    }


def test_a_class_of_a_binding_is_not_taken_for_one_of_python():
    binding = type("pybind11_type", (type,), {})
    bound = binding("Buffer", (), {})()
    (hidden,) = reach(SimpleNamespace(buffer=bound), never).hidden
    assert hidden.name == "buffer"


def test_a_walk_that_leaves_the_layer_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reachable, "MOST_OBJECTS", 10)
    hidden = reach(SimpleNamespace(many=[[number] for number in range(100)]), never).hidden
    assert [found.type for found in hidden] == ["object behind 10 others"]
