#!/usr/bin/env bash
# What the SLURM container does: starts the cluster, runs the words it is given, and in the end gives what they made in
# the checkout to the checkout's owner, since the cluster and its jobs run as root.
set -euo pipefail
trap 'find . -user root -exec chown --no-dereference --reference=. {} +' EXIT
# srun listens at the address of this host's name, and the nodes answer to 127.0.0.1.
hosts=$(cat /etc/hosts)
printf '127.0.0.1 %s\n%s\n' "$HOSTNAME" "$hosts" >/etc/hosts
tests/slurm/cluster up /run/slurm
"$@"
