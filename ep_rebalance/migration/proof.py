"""Whether an engine computes the same after its experts moved: tried on one rank, on one layer.

That slabs were found says nothing of what was not found. So the experts go once round the ring: each
takes the next one's slots in all slabs, and each token follows its experts. Then the engine has to
compute the same bits. Tokens that do not follow have to see a difference, or the trial proves nothing.

Some kernels divide the sums of an expert among blocks of a GPU by the place where it lies: Marlin in stripes
over all experts. An expert that moved then rounds a few outputs otherwise, always the same ones.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ep_rebalance.migration.slabs import SlabTensor

logger = logging.getLogger(__name__)

Compute = Callable[[torch.Tensor], torch.Tensor]
"""int32 [T, K] of local experts: outputs [T, hidden] of always the same tokens, a tensor of its own."""

REPETITIONS = 3
"""How often the same is computed to see whether it comes out the same."""
CLEARANCE = 16
"""A mistake must show this many times more than what differs from run to run by itself."""
MOST_ROUNDED = 0.5
"""Share of a token's outputs that sums in another order may round to another value."""
LONGEST_TEXT = 300
"""Characters of an error that other ranks are told."""


class Verdict(enum.Enum):
    """value: what it means, as a clause for a log or an error."""

    EXACT = "the same bits wherever an expert is"
    WITHIN_NOISE = "no more difference than the kernel makes between two runs of the same"
    ROUNDED = "a few outputs that are rounded otherwise, as by sums in another order"
    ALONE = "one local expert, which nothing can be exchanged with"
    REPLICA = "the same bits from replicas of an expert, of which none was another's before"
    MISPLACED = "different outputs after the experts moved, so that a part of them stayed behind"
    BLIND = "no difference when tokens went to the wrong experts, so that a mistake would not show"
    UNSTEADY = "outputs that differ from run to run as much as a mistake would"
    NOT_RESTORED = "something else after the experts were moved back"
    UNDELIVERED = "experts that did not arrive whole from another rank"
    FAILED = "an error, so that nothing is known"
    UNTRIED = "nothing, since another rank could not go on"

    @property
    def allows_moves(self) -> bool:
        """Whether nothing speaks against moves. What one rank cannot try remains to be seen."""
        return self in (
            Verdict.EXACT,
            Verdict.WITHIN_NOISE,
            Verdict.ROUNDED,
            Verdict.ALONE,
            Verdict.REPLICA,
        )

    @property
    def is_open(self) -> bool:
        """Whether it speaks neither for moves nor against them."""
        return self in (Verdict.BLIND, Verdict.UNSTEADY, Verdict.FAILED, Verdict.UNTRIED)


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of a trial.

    noise: largest difference between runs of the same. moved: after the experts moved, tokens with them.
    missed: smallest, over tokens, when tokens went to the wrong experts. restored: after all was back.
    tokens: numbers of those with a difference above the noise after the experts moved.
    unread: slabs that make no difference if they stay behind: not read by the kernel, or equal for all.
    failure: the error, in a line, if the verdict is FAILED.
    """

    verdict: Verdict
    noise: float
    moved: float
    missed: float
    restored: float
    tokens: tuple[int, ...] = ()
    unread: tuple[str, ...] = ()
    failure: str = ""

    @classmethod
    def without_numbers(cls, verdict: Verdict, failure: str = "") -> Proof:
        """Of a trial that did not come to its end."""
        return cls(verdict, noise=0.0, moved=0.0, missed=0.0, restored=0.0, failure=failure)


def ring_ids(experts: int, top_k: int) -> torch.Tensor:
    """int32 [experts, K]: one token for each expert and its K - 1 followers, so that all get as many.

    Tiles of kernels then do not change when experts do.
    """
    first_T1 = torch.arange(experts, dtype=torch.int32)[:, None]
    return (first_T1 + torch.arange(min(top_k, experts), dtype=torch.int32)) % experts


def prove_moves(compute: Compute, slabs: Sequence[SlabTensor], ids_TK: torch.Tensor) -> Proof:
    """Try it. Every slab holds the same bytes afterwards, and no exception leaves: the verdict is FAILED
    then, to be told to the others (`verdicts.py`).

    `compute` is called as often on each rank that has as many slabs, whatever comes out, unless it
    raises: it may be collective. A rank where it raised calls it no more, since nobody knows what it took
    part in. The others then wait in a collective of `compute` until the timeout of its group, and fail,
    too; where `compute` is no collective they never notice.
    ids_TK: of `ring_ids`, on the device.
    """
    try:
        return _tried(compute, slabs, ids_TK)
    except Exception as error:
        return failed(error)


def failed(error: Exception) -> Proof:
    """The log of this rank has all of it."""
    logger.error("ep_rebalance: a trial of moves failed", exc_info=error)
    return Proof.without_numbers(Verdict.FAILED, in_a_line(error))


def in_a_line(error: BaseException) -> str:
    """Short enough to be sent around, whatever the error makes of itself as a text."""
    try:
        said = str(error)
    except Exception:
        said = "an error without a text"
    text = " ".join(f"{type(error).__name__}: {said}".split())
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 3]}..."


def _tried(compute: Compute, slabs: Sequence[SlabTensor], ids_TK: torch.Tensor) -> Proof:
    experts = len(slabs[0].bytes_EB)
    if experts == 1:
        return Proof.without_numbers(Verdict.ALONE)
    following_TK = (ids_TK + 1) % experts
    base, noise = repeated(compute, ids_TK)
    with _moved_on(slabs):
        moved_TH, missed_TH = compute(following_TK), compute(ids_TK)
    moved_T, missed_T = differences_T(base, moved_TH), differences_T(base, missed_TH)
    left_behind = [_leaving_behind(slab, slabs, moved_TH, compute, following_TK) for slab in slabs]
    restored = largest_difference(base, compute(ids_TK))
    allowed = allowed_difference(noise)
    moved, missed = float(moved_T.max()), float(missed_T.min())
    return Proof(
        verdict=verdict_of(
            noise, moved, missed, restored, rounded=_only_rounded(base, moved_TH, missed_TH)
        ),
        noise=noise,
        moved=moved,
        missed=missed,
        restored=restored,
        tokens=tuple((moved_T > allowed).nonzero().flatten().tolist()),
        unread=tuple(
            slab.name for slab, far in zip(slabs, left_behind, strict=True) if far <= allowed
        ),
    )


def repeated(compute: Compute, ids_TK: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Outputs, and how far apart those of runs of the same are."""
    base = compute(ids_TK)
    return base, max(largest_difference(base, compute(ids_TK)) for _ in range(REPETITIONS))


def allowed_difference(noise: float) -> float:
    """Between outputs of the same; as far above the noise as below a mistake that can be told."""
    return math.sqrt(CLEARANCE) * noise


def verdict_of(
    noise: float, moved: float, missed: float, restored: float, *, rounded: bool = False
) -> Verdict:
    """Each as of `Proof`. rounded: whether nothing but rounding differs after the experts moved."""
    allowed = allowed_difference(noise)
    if noise and missed <= CLEARANCE * noise:
        return Verdict.UNSTEADY
    if moved > allowed and not rounded:
        return Verdict.MISPLACED
    if missed == 0.0:
        return Verdict.BLIND
    if restored > allowed:
        return Verdict.NOT_RESTORED
    if moved > allowed:
        return Verdict.ROUNDED
    return Verdict.WITHIN_NOISE if noise else Verdict.EXACT


def _only_rounded(base_TH: torch.Tensor, moved_TH: torch.Tensor, missed_TH: torch.Tensor) -> bool:
    """Whether few outputs of a token changed, by less than their type rounds them, and wrong experts change
    far more.
    """
    rounding = torch.finfo(base_TH.dtype).eps / 2
    share_T = base_TH.ne(moved_TH).float().mean(1)
    return bool(
        (share_T <= MOST_ROUNDED).all()
        and (_parts_T(base_TH, moved_TH) <= rounding).all()
        and (_parts_T(base_TH, missed_TH) > CLEARANCE * rounding).all()
    )


def _parts_T(base_TH: torch.Tensor, other_TH: torch.Tensor) -> torch.Tensor:
    """[T]: how large all differences are together, in parts of the outputs; of nothing, infinite or NaN."""
    base_TH = base_TH.float()
    return (base_TH - other_TH.float()).norm(dim=1) / base_TH.norm(dim=1)


def _leaving_behind(
    slab: SlabTensor,
    slabs: Sequence[SlabTensor],
    moved_TH: torch.Tensor,
    compute: Compute,
    following_TK: torch.Tensor,
) -> float:
    """How far outputs are from those of all slabs moved if this one stays where it is."""
    with _moved_on([other for other in slabs if other is not slab]):
        return largest_difference(moved_TH, compute(following_TK))


@contextmanager
def _moved_on(slabs: Sequence[SlabTensor]) -> Iterator[None]:
    """Each expert is where the next one was, in these slabs."""
    steps = range(len(slabs[0].bytes_EB) - 1) if slabs else range(0)
    try:
        for expert in steps:
            _exchange(slabs, 0, expert + 1)
        yield
    finally:
        for expert in reversed(steps):
            _exchange(slabs, 0, expert + 1)


def _exchange(slabs: Sequence[SlabTensor], one: int, other: int) -> None:
    for slab in slabs:
        kept = slab.bytes_EB[one].clone()
        slab.bytes_EB[one].copy_(slab.bytes_EB[other])
        slab.bytes_EB[other].copy_(kept)


def differences_T(base_TH: torch.Tensor, other_TH: torch.Tensor) -> torch.Tensor:
    """[T]: the largest difference, infinite where there is one that cannot be measured."""
    differs_TH = base_TH.ne(other_TH) & ~(base_TH.isnan() & other_TH.isnan())
    far_TH = (base_TH.float() - other_TH.float()).abs().nan_to_num(nan=torch.inf)
    return torch.where(differs_TH, far_TH, 0.0).amax(1)


def largest_difference(base_TH: torch.Tensor, other_TH: torch.Tensor) -> float:
    """Over all tokens."""
    return float(differences_T(base_TH, other_TH).max())
