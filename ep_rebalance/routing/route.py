"""From logical experts to slots, in one step: on a GPU by a kernel, on the host by compiled code."""

from __future__ import annotations

import torch

from ep_rebalance.kernels.language import runs_triton
from ep_rebalance.kernels.route_and_count import LayerTables, route_and_count
from ep_rebalance.kernels.route_by_own_counts import PourTables, route_by_own_counts
from ep_rebalance.kernels.shared_arithmetic import Ranks
from ep_rebalance.routing.pours import route_on_host


def route(
    topk_ids_TK: torch.Tensor,
    phase_T: torch.Tensor,
    tables: LayerTables,
    pours: PourTables,
    offset: torch.Tensor,
    ranks: Ranks,
) -> torch.Tensor:
    """[T, K], of the dtype of `topk_ids_TK`: the slot for each expert of each token, which is counted.

    By own counts where experts are poured (`route_by_own_counts`), else by quotas (`route_and_count`).

    pours: without rows if all layers go by quotas.
    """
    if torch.compiler.is_compiling():
        slots_TK: torch.Tensor = _operation(
            topk_ids_TK,
            phase_T,
            tables.counts_AE,
            tables.replica_slots_EC,
            tables.thresholds_EC,
            pours.poured_X,
            pours.colour_X,
            pours.row_E,
            pours.ground_R,
            offset,
            ranks.total,
            ranks.slots,
            ranks.source,
        )
        return slots_TK
    if topk_ids_TK.device.type == "cpu" and not runs_triton(topk_ids_TK):
        return _on_host(topk_ids_TK.contiguous(), phase_T, tables, pours, offset, ranks)
    if pours.poured_X.numel():
        return route_by_own_counts(topk_ids_TK, phase_T, tables, pours, offset, ranks)
    return route_and_count(topk_ids_TK, phase_T, tables, offset)


def _on_host(
    topk_ids_TK: torch.Tensor,
    phase_T: torch.Tensor,
    tables: LayerTables,
    pours: PourTables,
    offset: torch.Tensor,
    ranks: Ranks,
) -> torch.Tensor:
    slots_TK = torch.empty_like(topk_ids_TK)
    route_on_host(
        topk_ids_TK.numpy(),
        phase_T.numpy(),
        tables.counts_AE.numpy(),
        tables.replica_slots_EC.numpy(),
        tables.thresholds_EC.numpy(),
        pours.poured_X.numpy(),
        pours.row_E.numpy(),
        pours.ground_R.numpy(),
        int(offset),
        ranks.total,
        ranks.slots,
        ranks.source,
        slots_TK.numpy(),
    )
    return slots_TK


@torch.library.custom_op("ep_rebalance::route", mutates_args=("counts_AE",))  # type: ignore[untyped-decorator]
def _operation(
    topk_ids_TK: torch.Tensor,
    phase_T: torch.Tensor,
    counts_AE: torch.Tensor,
    replica_slots_EC: torch.Tensor,
    thresholds_EC: torch.Tensor,
    poured_X: torch.Tensor,
    colour_X: torch.Tensor,
    row_E: torch.Tensor,
    ground_R: torch.Tensor,
    offset: torch.Tensor,
    num_ranks: int,
    slots_per_rank: int,
    source: int,
) -> torch.Tensor:
    """`route` for torch.compile, with the tables one by one."""
    return route(
        topk_ids_TK,
        phase_T,
        LayerTables(
            counts_AE=counts_AE, replica_slots_EC=replica_slots_EC, thresholds_EC=thresholds_EC
        ),
        PourTables(poured_X=poured_X, colour_X=colour_X, row_E=row_E, ground_R=ground_R),
        offset,
        Ranks(total=num_ranks, slots=slots_per_rank, source=source),
    )


@_operation.register_fake  # type: ignore[untyped-decorator]
def _(topk_ids_TK: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(topk_ids_TK, memory_format=torch.contiguous_format)
