"""Which tensors hold one expert after another, told by where their bytes lie. Knows no engine.

A *slab* is what one expert has of one tensor. A tensor can be cut into slabs if one of its dimensions
counts the local experts and that one has the largest stride, so that each expert's bytes lie in a run of
their own. Shapes do not tell: scales may be column-major, views permuted or padded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
        first, rest = self.bytes_EB[:1], self.bytes_EB[1:]
        if not len(rest) or not torch.equal(first, rest[:1]):
            return False
        return bool((rest == first).all())


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
    slabs: list[SlabTensor] = []
    covered: list[_View] = []
    for device in dict.fromkeys(view.named.tensor.device for view in views):
        cut = [view for view in views if view.on(device) and view.step]
        for views_of_rows in _sharing_rows(cut):
            slabs += _slabs_of(views_of_rows, experts)
            covered += views_of_rows
    whole = {(view.start, view.stop): view for view in reversed(views) if not view.step}
    common = [view.named for view in whole.values() if view.outside(covered)]
    return Split(
        slabs=tuple(sorted(slabs, key=attrgetter("name"))),
        common=tuple(sorted(common, key=attrgetter("name"))),
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

    def on(self, device: torch.device) -> bool:
        return bool(self.named.tensor.device == device)

    def outside(self, others: Sequence[_View]) -> bool:
        """Whether no byte is one of the others'. Raises ValueError if some are and some are not."""
        device = self.named.tensor.device
        reached = self.start
        met: _View | None = None
        for other in sorted((o for o in others if o.on(device)), key=attrgetter("start")):
            if other.start < self.stop and other.stop > self.start:
                met = other
                if other.start <= reached:
                    reached = max(reached, other.stop)
        if met is None:
            return True
        if reached < self.stop:
            raise ValueError(
                f"{self.named.name} lies over a part of {met.named.name} and goes on where no expert does"
            )
        return False


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


def _slabs_of(group: Sequence[_View], experts: int) -> list[SlabTensor]:
    """One slab if the storage is nothing but these rows, padding and all; else one for each run of
    bytes in a row, since what lies between them may be another's.

    group: by their start.
    """
    storage = group[0].named.tensor.untyped_storage()
    first, step = storage.data_ptr(), group[0].step
    if experts > 1 and storage.nbytes() == step * experts and _end_of_row(group) - first <= step:
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
    storage = named.tensor.untyped_storage()
    with torch.inference_mode(False):  # else nothing but inference could write it later
        whole = torch.empty(0, dtype=torch.uint8, device=named.tensor.device).set_(storage)
    bytes_EB = whole.as_strided(
        (experts, stop - start), (views[0].step, 1), start - storage.data_ptr()
    )
    return SlabTensor(name=named.name, bytes_EB=bytes_EB)
