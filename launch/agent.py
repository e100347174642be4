"""`python -m launch.agent NODES NODE RANKS ARGV`: the ranks of one node that run `mae-dist ARGV`.

They meet as the variables MASTER_ADDR and MASTER_PORT say. It exits with the status of the first rank that failed, on
which a requeue depends.
"""

import sys

from mae_dist import launcher


def main(arguments: list[str]) -> int:
    """Run the ranks of this node; give the exit status."""
    nodes, node, ranks = map(int, arguments[:3])
    return launcher.run(arguments[3:], range(node * ranks, (node + 1) * ranks), nodes * ranks, {}, [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
