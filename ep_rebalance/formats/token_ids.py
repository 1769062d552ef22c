"""Expert ids token by token, which are cut into snapshots and counted.

The ids of a token in a layer differ, as a router chooses them. What breaks that is no token: routing buffers
are padded by zeros, by -1 or by E (`topk_ids` of vLLM and SGLang), and vLLM's capture has zeros for layers
without experts (vllm/model_executor/layers/fused_moe/routed_experts_capturer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.formats.contents import FormatError
from ep_rebalance.formats.format import Reading
from ep_rebalance.formats.layer_counts import layers_with_experts
from ep_rebalance.formats.load import ForeignLoad
from ep_rebalance.load.window import PHASES

_MAX_EXPERTS = 1 << 16
_MAX_COUNTS = 1 << 26
"""Of one snapshot: a hundred layers of all these experts are a tenth of it."""
_PART_IDS = 1 << 22
"""How many ids are looked at together."""
_MAX_SKIPPED = 0.5
"""Of all tokens. With more, it is the array that is not understood."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """Some tokens.

    name: where they lie in the file.
    ids_TLK: whole numbers [T, L, K].
    prompt: how many of them, the first ones, are prompt tokens; None if that is not known.
    """

    name: str
    ids_TLK: NDArray[Any]
    prompt: int | None = None


Source = Callable[[], Iterator[Tokens]]
"""Reads all tokens, as often as it is called."""


@dataclass(slots=True)
class _Seen:
    """What a first look at all tokens finds.

    ids_N, rows_N: how often id n - 1 occurs, and how many rows of a token and layer hold it alone.
    used_L: whether a layer has rows that a router may have chosen.
    """

    layers: int = 0
    top_k: int = 0
    tokens: int = 0
    phases: bool = False
    unsigned_max: int = -1
    used_L: Any = False
    ids_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_MAX_EXPERTS + 1, np.int64))
    rows_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_MAX_EXPERTS + 1, np.int64))


def load_of_tokens(path: Path, source: Source, reading: Reading, origin: str) -> ForeignLoad:
    """The tokens of a source, in order, cut into snapshots. Only one of its parts is in memory at a time.

    Left out and counted, each in a note, are padding, and tokens with an expert twice in one layer.

    Raises FormatError for ids that cannot be, and where more than half of all tokens are left out.
    """
    seen = _seen(path, source)
    kept, notes = layers_with_experts(path, "", np.asarray(seen.used_L))
    experts, padding, told = _experts(path, source, seen, reading.experts)
    if len(kept) * experts > _MAX_COUNTS:
        raise FormatError(
            path,
            "",
            f"has {len(kept)} layers of {experts} experts, too many to count; check --axes",
        )
    cut = _Cut(source, np.array(kept), experts, np.array(padding), seen.phases)
    tally = cut.tally()
    told += tally.told(path, seen.tokens)
    size = reading.tokens_per_snapshot
    if tally.tokens < size:
        told += (
            f"{tally.tokens} tokens, fewer than --tokens-per-snapshot {size}: one snapshot of all",
        )
    elif rest := tally.tokens % size:
        told += (f"the last {rest} tokens fill no snapshot of {size} and are left out",)
    gaps = kept if len(kept) < seen.layers else ()
    return ForeignLoad(
        counts=_Snapshots(cut, min(size, tally.tokens)),
        layers=len(kept),
        experts=experts,
        moe_layers=reading.numbers_of(path, len(kept), gaps),
        origin=origin,
        top_k=seen.top_k,
        notes=notes + told,
    )


def _seen(path: Path, source: Source) -> _Seen:
    seen = _Seen()
    for part in source():
        _check(path, part, seen)
        seen.layers, seen.top_k = part.ids_TLK.shape[1:]
        seen.tokens += len(part.ids_TLK)
        seen.phases |= part.prompt is not None
        if part.ids_TLK.dtype.kind == "u":
            seen.unsigned_max = int(np.iinfo(part.ids_TLK.dtype).max)
        for ids_TLK in _parts(part.ids_TLK):
            seen.ids_N += np.bincount(ids_TLK.ravel() + 1, minlength=_MAX_EXPERTS + 1)
            alone = ids_TLK.min(axis=2) == ids_TLK.max(axis=2)
            # A row of one id, over and over, is no choice of a router.
            chosen = ids_TLK[..., 0] > 0 if seen.top_k == 1 else ~alone
            seen.used_L = seen.used_L | chosen.any(axis=0)
            firsts = ids_TLK[..., 0][alone]
            seen.rows_N += np.bincount(firsts + 1, minlength=_MAX_EXPERTS + 1)
    if not seen.tokens:
        raise FormatError(path, "", "holds no tokens; record while the server has traffic")
    return seen


def _check(path: Path, part: Tokens, seen: _Seen) -> None:
    ids_TLK = part.ids_TLK
    if ids_TLK.ndim != 3 or 0 in ids_TLK.shape or ids_TLK.dtype.kind not in "iu":
        reason = f"is {ids_TLK.dtype} {ids_TLK.shape}, not whole numbers [tokens, layers, top-k]"
        raise FormatError(path, part.name, f"{reason}; choose arrays with --key, or name --axes")
    if seen.layers and (seen.layers, seen.top_k) != ids_TLK.shape[1:]:
        reason = f"has shape {ids_TLK.shape}, unlike [T, {seen.layers}, {seen.top_k}] before it"
        raise FormatError(path, part.name, f"{reason}; choose arrays with --key")
    if ids_TLK.min() < -1 or ids_TLK.max() >= _MAX_EXPERTS:
        place, found = _first(part, (ids_TLK < -1) | (ids_TLK >= _MAX_EXPERTS))
        reason = f"is {found}, and ids are from -1 to {_MAX_EXPERTS - 1}"
        raise FormatError(path, place, f"{reason}; choose arrays of ids with --key")


def _first(part: Tokens, wrong_TLK: NDArray[np.bool_]) -> tuple[str, int]:
    """(place, id) of the first of these."""
    token, layer, column = (int(index) for index in np.argwhere(wrong_TLK)[0])
    found = int(part.ids_TLK[token, layer, column])
    return f"{part.name}, token {token}, layer {layer}, place {column},", found


def _parts(ids_TLK: NDArray[Any]) -> Iterator[NDArray[np.int64]]:
    step = max(1, _PART_IDS // ids_TLK[0].size)
    for begin in range(0, len(ids_TLK), step):
        yield ids_TLK[begin : begin + step].astype(np.int64)


def _experts(
    path: Path, source: Source, seen: _Seen, given: int | None
) -> tuple[int, tuple[int, ...], tuple[str, ...]]:
    """(experts of a layer, ids that are padding, notes)."""
    found = np.flatnonzero(seen.ids_N) - 1
    largest = int(found[-1])
    if given is not None:
        padding = (-1, given, *([seen.unsigned_max] if seen.unsigned_max >= given else []))
        beyond = np.setdiff1d(found[found >= given], padding)
        if beyond.size:
            parts = ((part, np.isin(part.ids_TLK, beyond)) for part in source())
            place, number = next(_first(*one) for one in parts if one[1].any())
            reason = (
                f"is expert {number}, beyond the {given} experts given; give the model's number"
            )
            raise FormatError(path, place, reason)
        return given, padding, ()
    if (
        largest > 0
        and seen.top_k > 1
        and seen.ids_N[largest + 1] == seen.top_k * seen.rows_N[largest + 1]
    ):
        # No token chooses an expert twice: these rows are padding, whatever their number means.
        experts = int(found[-2]) + 1 if len(found) > 1 else 0
        return (
            experts,
            (-1, largest),
            (
                f"id {largest} fills whole rows, so it is taken for padding and the model for one of "
                f"{experts} experts; if that is wrong, give --experts",
            ),
        )
    experts = largest + 1
    far = largest == seen.unsigned_max and len(found) > 1 and found[-2] < largest - 1
    if experts > 1 and (experts % 2 or far or (seen.top_k > 1 and seen.rows_N[largest + 1])):
        note = f"the largest id, {largest}, looks like padding, and the model is taken for one of {experts}"
        return experts, (-1,), (f"{note} experts; give --experts, which settles it",)
    note = f"the model is taken for one of {experts} experts, by the largest id"
    return experts, (-1,), (f"{note}; if it has more, give --experts",)


@dataclass(slots=True)
class _Tally:
    """tokens: those that count. padded, repeated: tokens left out. places: ids left out of the others."""

    tokens: int = 0
    padded: int = 0
    repeated: int = 0
    places: int = 0

    def told(self, path: Path, total: int) -> tuple[str, ...]:
        """Notes. Raises FormatError where too few tokens are left."""
        if self.repeated > _MAX_SKIPPED * total or not self.tokens:
            raise FormatError(
                path,
                "",
                f"has {self.repeated} of {total} tokens with an expert twice in one layer, and {self.padded} "
                "of padding; if its axes are not tokens, layers, top-k, give --axes",
            )
        notes = []
        if self.repeated:
            notes.append(
                f"{self.repeated} of {total} tokens have an expert twice in one layer, as padding by zeros "
                "does, and are left out"
            )
        if self.padded:
            notes.append(f"{self.padded} of {total} tokens are padding and are left out")
        if self.places:
            notes.append(f"{self.places} places of other tokens hold padding and are not counted")
        return tuple(notes)


class _Cut:
    """Tokens without padding, layers without experts, and repeats.

    experts: the id by which padding is replaced.
    """

    def __init__(
        self,
        source: Source,
        kept_L: NDArray[np.int64],
        experts: int,
        padding: NDArray[np.int64],
        phases: bool,
    ) -> None:
        self.experts, self.phases, self.layers = experts, phases, len(kept_L)
        self._source, self._kept_L, self._padding = source, kept_L, padding

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """(ids [T, L, K], whether a token is generated [T])."""
        for ids_TLK, generated_T, fine_T, _ in self._looked_at():
            yield ids_TLK[fine_T], generated_T[fine_T]

    def tally(self) -> _Tally:
        """What counts and what does not."""
        tally = _Tally()
        for ids_TLK, _, fine_T, padded_T in self._looked_at():
            tally.tokens += int(fine_T.sum())
            tally.padded += int(padded_T.sum())
            tally.repeated += len(fine_T) - int((fine_T | padded_T).sum())
            tally.places += int((ids_TLK[fine_T] == self.experts).sum())
        return tally

    def _looked_at(
        self,
    ) -> Iterator[
        tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]
    ]:
        """(ids, generated, whether a token counts, whether it is all padding)."""
        for part in self._source():
            begin = 0
            for ids_TLK in _parts(part.ids_TLK[:, self._kept_L]):
                ids_TLK[np.isin(ids_TLK, self._padding)] = self.experts
                sorted_TLK = np.sort(ids_TLK, axis=2)
                twice = sorted_TLK[..., 1:] == sorted_TLK[..., :-1]
                twice &= sorted_TLK[..., 1:] != self.experts
                padded_T = (ids_TLK == self.experts).all(axis=(1, 2))
                places_T = np.arange(begin, begin + len(ids_TLK))
                prompt = len(part.ids_TLK) if part.prompt is None else part.prompt
                fine_T = ~(twice.any(axis=(1, 2)) | padded_T)
                yield ids_TLK, places_T >= prompt, fine_T, padded_T
                begin += len(ids_TLK)


class _Snapshots:
    """Counts of each snapshot, [L, E], or [A, L, E] if phases are known. Each iteration reads all tokens.

    Tokens at the end that do not fill a snapshot are left out.
    """

    def __init__(self, cut: _Cut, tokens: int) -> None:
        self._cut, self._tokens = cut, tokens

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        rest: tuple[NDArray[np.int64], NDArray[np.bool_]] | None = None
        for ids_TLK, generated_T in self._cut:
            if rest is not None:
                ids_TLK = np.concatenate([rest[0], ids_TLK])
                generated_T = np.concatenate([rest[1], generated_T])
            whole = len(ids_TLK) // self._tokens * self._tokens
            for begin in range(0, whole, self._tokens):
                one = slice(begin, begin + self._tokens)
                yield self._count(ids_TLK[one], generated_T[one])
            rest = ids_TLK[whole:], generated_T[whole:]

    def _count(
        self, ids_TLK: NDArray[np.int64], generated_T: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        if not self._cut.phases:
            return self._count_phase(ids_TLK)
        assert PHASES == ("prefill", "decode")
        return np.stack([self._count_phase(ids_TLK[generated_T == late]) for late in (False, True)])

    def _count_phase(self, ids_TLK: NDArray[np.int64]) -> NDArray[np.int64]:
        layers, columns = self._cut.layers, self._cut.experts + 1  # the last one is of padding
        cells = ids_TLK + columns * np.arange(layers)[:, None]
        counts = np.bincount(cells.ravel(), minlength=layers * columns)
        return counts.reshape(layers, columns)[:, :-1].astype(np.int64)
