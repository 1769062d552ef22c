"""A process of its own for test_hosts.py: one rank on a host of its own measures its links.

    python rank_on_host.py RANK RANKS ADDRESS

ADDRESS is that of rank 0. Prints the bytes per second between nodes.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from ep_rebalance.collectives.link_speed import with_measured_links
from ep_rebalance.config import LinksConfig
from ep_rebalance.topology import Topology

PORT = 9100


def main(rank: int, ranks: int, address: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}:{PORT}", rank=rank, world_size=ranks
    )
    found = with_measured_links(
        Topology(node_of_rank=tuple(range(ranks))),
        LinksConfig(),
        group=dist.group.WORLD,
        device=torch.device("cpu"),
    )
    sys.stdout.write(f"{found.bytes_per_second[2]}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
