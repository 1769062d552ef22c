"""Which tensors hold one expert after another, told by where their bytes lie. Knows no engine.

A *slab* is what one expert has of one tensor. A tensor can be cut into slabs if one of its dimensions
counts the local experts and that one has the largest stride, so that each expert's bytes lie in a run of
their own. Shapes do not tell: scales may be column-major, views permuted or padded, and a dimension may be
as long as there are experts by chance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """name: where it was found."""

    name: str
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SlabTensor:
    """A tensor cut into slabs, one for each local expert.

    name: of the tensor.
    bytes_EB: uint8 [local experts, bytes of one], a view of the engine's own memory. Rows are contiguous;
        there may be gaps between them, which belong to others.
    """

    name: str
    bytes_EB: torch.Tensor

    @property
    def size(self) -> int:
        """Bytes of a slab."""
        return int(self.bytes_EB.shape[1])

    @property
    def gapless(self) -> bool:
        return bool(self.bytes_EB.is_contiguous())

    @property
    def uniform(self) -> bool:
        """Whether several experts all hold the same, as where a value of the rank is spread over them."""
        first, *rest = self.bytes_EB
        return bool(rest) and all(torch.equal(first, other) for other in rest)


TensorsOfLayer = Mapping[str, torch.Tensor] | Sequence[torch.Tensor]
"""What holds the experts of one layer, by name or without."""
ExpertsOfLayer = Sequence[SlabTensor] | TensorsOfLayer
"""Cut already, or not yet."""


@dataclass(frozen=True, slots=True)
class Split:
    """The tensors of a layer.

    slabs: what moves with an expert. common: what cannot be cut by expert, and so stays. Both by name.
    """

    slabs: tuple[SlabTensor, ...]
    common: tuple[NamedTensor, ...]


def split_by_expert(found: Sequence[NamedTensor], experts: int) -> Split:
    """Cut what can be cut. Memory that several tensors share is taken once, under the first one's name.

    found: in the order in which names are preferred. experts: local ones.
    Raises ValueError if tensors that share memory do not agree where an expert begins.
    """
    views = [
        _View.of(order, named, experts) for order, named in enumerate(found) if named.tensor.numel()
    ]
    uncut = [view for view in views if not view.step]
    slabs: list[SlabTensor] = []
    for memory in dict.fromkeys(view.memory for view in views):
        cut = [view for view in views if view.memory == memory and view.step]
        for views_of_rows in _sharing_rows(cut):
            slabs += _slabs_of(views_of_rows, uncut, experts)
    whole = {(view.memory, view.start, view.stop): view for view in reversed(uncut)}
    common = [view.named for view in whole.values() if view.outside(slabs)]
    return Split(
        slabs=tuple(sorted(slabs, key=attrgetter("name"))),
        common=tuple(sorted(common, key=attrgetter("name"))),
    )


def slabs_of_layers(
    layers: Sequence[ExpertsOfLayer], *, slots: int | None = None
) -> list[tuple[SlabTensor, ...]]:
    """The slabs of each layer. What is cut stays as it is; tensors, which all hold experts, are cut and
    keep their order. Memory that several share is taken once, in the place of the first.

    slots: local ones; left out, the first dimension of the first tensor.

    Raises ValueError for a tensor of which an expert is no run of bytes.
    """
    experts = _counted_by_first(layers) if slots is None else slots
    return [_slabs_of_layer(layer, number, experts) for number, layer in enumerate(layers)]


def _counted_by_first(layers: Sequence[ExpertsOfLayer]) -> int:
    layer = layers[0] if layers else ()
    first = next(iter(layer.values() if isinstance(layer, Mapping) else layer), None)
    if isinstance(first, SlabTensor):
        first = first.bytes_EB
    if first is None or not first.ndim:
        raise ValueError(
            "experts cannot be moved: the first tensor does not count them; pass slots"
        )
    return int(first.shape[0])


def _slabs_of_layer(layer: ExpertsOfLayer, number: int, experts: int) -> tuple[SlabTensor, ...]:
    if isinstance(layer, Mapping):
        found = [NamedTensor(name, tensor) for name, tensor in layer.items()]
    else:
        slabs = [slab for slab in layer if isinstance(slab, SlabTensor)]
        if len(slabs) == len(layer):
            return tuple(slabs)
        found = [NamedTensor(f"tensor {n}", tensor) for n, tensor in enumerate(layer)]
    for named in found:
        if named.tensor.layout is not torch.strided:
            raise _refusal(named, number, f"its layout is {named.tensor.layout}, not strided")
    try:
        split = split_by_expert(found, experts)
    except ValueError as error:
        raise ValueError(
            f"experts of layer {number} cannot be moved: {error}; give each memory of its own"
        ) from None
    for named in split.common:
        raise _refusal(named, number, _why_uncut(named.tensor, experts))
    place = {named.name: order for order, named in enumerate(found)}
    return tuple(sorted(split.slabs, key=lambda slab: place[slab.name]))


def _why_uncut(tensor: torch.Tensor, experts: int) -> str:
    """A clause."""
    counting = [axis for axis, size in enumerate(tensor.shape) if size == experts]
    if not counting:
        return f"it does not divide into {experts} local experts: no dimension has their number"
    axis = max(counting, key=tensor.stride)
    item, stride = tensor.element_size(), tensor.stride(axis)
    others = [n for n in range(tensor.ndim) if n != axis and tensor.shape[n] > 1]
    if any(tensor.stride(other) > stride for other in others):
        return (
            f"the stride of its {experts} local experts, in dimension {axis}, is not the largest, so that an "
            "expert is no run of bytes; lay them out one after another"
        )
    row = item * (1 + sum((tensor.shape[n] - 1) * tensor.stride(n) for n in others))
    return (
        f"its experts overlap: one is {row} bytes long and the next begins {item * stride} bytes on; "
        "give each memory of its own"
    )


def _refusal(named: NamedTensor, layer: int, reason: str) -> ValueError:
    tensor = named.tensor
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return ValueError(
        f"experts cannot be moved: {named.name} of layer {layer}, of shape {tuple(tensor.shape)} and "
        f"strides {strides}: {reason}"
    )


def fingerprint(tensor: torch.Tensor) -> str:
    """Equal on two ranks if shape, type and bytes are."""
    values = tensor.detach().to("cpu").contiguous()
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype} ".encode(), digest_size=8)
    digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor as a range of addresses.

    order: of all that were found.
    start, stop: in bytes, of the first element and behind the last.
    step: bytes from an expert's first element to the next one's; 0 if the tensor cannot be cut.
    row: bytes from an expert's first element to behind its last.
    """

    order: int
    named: NamedTensor
    start: int
    stop: int
    step: int
    row: int

    @classmethod
    def of(cls, order: int, named: NamedTensor, experts: int) -> _View:
        tensor = named.tensor
        start, item = tensor.data_ptr(), tensor.element_size()
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        # Along a stride of 0 one element is repeated: it is common to all, whatever the size.
        axes = sorted((stride * item, size) for size, stride in sizes if size > 1 and stride)
        extent = item + sum((size - 1) * stride for stride, size in axes)
        step, row = _step_and_row(axes, item, experts)
        if experts == 1 and 1 in tensor.shape:  # any dimension of size 1 may be the one
            step, row = tensor.untyped_storage().nbytes(), extent
        return cls(order, named, start=start, stop=start + extent, step=step, row=row)

    @property
    def memory(self) -> tuple[torch.device, int]:
        return _memory(self.named.tensor)

    def outside(self, slabs: Sequence[SlabTensor]) -> bool:
        """Whether no byte is an expert's. Raises ValueError if some are and some are not."""
        reached = self.start
        met: SlabTensor | None = None
        near = [slab for slab in slabs if _memory(slab.bytes_EB) == self.memory]
        for slab in sorted(near, key=lambda slab: slab.bytes_EB.data_ptr()):
            start = slab.bytes_EB.data_ptr()
            stop = start + (len(slab.bytes_EB) - 1) * slab.bytes_EB.stride(0) + slab.size
            if start < self.stop and stop > self.start:
                met = slab
                if start <= reached:
                    reached = max(reached, stop)
        if met is None:
            return True
        if reached < self.stop:
            raise ValueError(
                f"{self.named.name} lies over a part of {met.name} and goes on where no expert does"
            )
        return False


def _memory(tensor: torch.Tensor) -> tuple[torch.device, int]:
    """What addresses are of: a device; without data, as on device meta, one storage."""
    storage = tensor.untyped_storage()
    return tensor.device, 0 if storage.data_ptr() else storage._cdata


def _step_and_row(axes: Sequence[tuple[int, int]], item: int, experts: int) -> tuple[int, int]:
    """Both in bytes; (0, 0) if the tensor cannot be cut.

    axes: (stride, size) of the dimensions with several elements, smallest stride first, in bytes.
    """
    if not axes or axes[-1][1] != experts:
        return 0, 0
    step = axes[-1][0]
    row = item + sum((size - 1) * stride for stride, size in axes[:-1])
    return (step, row) if row <= step else (0, 0)


def _sharing_rows(views: Sequence[_View]) -> list[list[_View]]:
    """Groups of views whose ranges meet. Raises ValueError if their experts do not begin together."""
    groups: list[list[_View]] = []
    for view in sorted(views, key=attrgetter("start")):
        if groups and view.start < max(other.stop for other in groups[-1]):
            groups[-1].append(view)
        else:
            groups.append([view])
    for group in groups:
        first = group[0]
        for view in group:
            if view.step != first.step or view.start - first.start + view.row > first.step:
                raise ValueError(
                    f"{first.named.name} and {view.named.name} share memory and do not agree where an "
                    "expert begins"
                )
    return groups


def _slabs_of(group: Sequence[_View], uncut: Sequence[_View], experts: int) -> list[SlabTensor]:
    """One slab if the storage is nothing but these rows, padding and all; else one for each run of
    bytes in a row, since what lies between them may be another's.

    group: by their start. uncut: all tensors that stay.
    """
    storage = group[0].named.tensor.untyped_storage()
    first, step = storage.data_ptr(), group[0].step
    last = first + storage.nbytes()
    lodgers = [
        view
        for view in uncut
        if view.memory == group[0].memory and first < view.stop and view.start < last
    ]
    if (
        experts > 1
        and storage.nbytes() == step * experts
        and _end_of_row(group) - first <= step
        and all((view.start, view.stop) == (first, last) for view in lodgers)
    ):
        return [_slab(group, first, first + step, experts)]
    runs = [[group[0]]]
    for view in group[1:]:
        if view.start > _end_of_row(runs[-1]):
            runs.append([])
        runs[-1].append(view)
    return [_slab(run, run[0].start, _end_of_row(run), experts) for run in runs]


def _end_of_row(views: Sequence[_View]) -> int:
    return max(view.start + view.row for view in views)


def _slab(views: Sequence[_View], start: int, stop: int, experts: int) -> SlabTensor:
    """start, stop: addresses of the first expert's bytes."""
    named = min(views, key=attrgetter("order")).named
    size = stop - start
    step = views[0].step if experts > 1 else size
    end = start + (experts - 1) * step + size
    storage = _storage_of([named, *(view.named for view in views)], start, end)
    with torch.inference_mode(False):  # else nothing but inference could write it later
        whole = torch.empty(0, dtype=torch.uint8, device=named.tensor.device).set_(storage)
    bytes_EB = whole.as_strided((experts, size), (step, 1), start - storage.data_ptr())
    return SlabTensor(name=named.name, bytes_EB=bytes_EB)


def _storage_of(named: Sequence[NamedTensor], start: int, stop: int) -> torch.UntypedStorage:
    """The first that has all of it. Raises ValueError if several share memory of which none has all."""
    for each in named:
        storage = each.tensor.untyped_storage()
        if storage.data_ptr() <= start and stop <= storage.data_ptr() + storage.nbytes():
            return storage
    raise ValueError(f"{named[0].name} shares memory with tensors that reach beyond its storage")
