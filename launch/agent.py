"""`python -m launch.agent NODES NODE RANKS HOST:PORT ARGV`: torchrun's agent of one node, for `mae-dist ARGV`.

Unlike torchrun's own command, it exits with the status of the first rank that failed, on which a requeue depends.
"""

from __future__ import annotations

import sys

from torch.distributed.launcher.api import LaunchConfig

from mae_dist import launcher


def main(arguments: list[str]) -> int:
    """Run the ranks of this node; give the exit status."""
    nodes, node, ranks, address, *argv = arguments
    config = LaunchConfig(
        min_nodes=int(nodes), max_nodes=int(nodes), nproc_per_node=int(ranks), rdzv_backend="static",
        rdzv_endpoint=address, rdzv_configs={"rank": int(node), "timeout": 900}, run_id="none", max_restarts=0,
        monitor_interval=0.2,
    )  # fmt: skip
    return launcher.run(argv, config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
