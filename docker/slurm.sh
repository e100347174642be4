#!/usr/bin/env bash
# Entry point of the SLURM container: starts the cluster and runs the given command. At the end it changes the owner of
# new files in the checkout to the owner of the checkout, since the cluster and its jobs run as root.
set -euo pipefail
trap 'find . -user root -exec chown --no-dereference --reference=. {} +' EXIT
# srun listens at the address of this host's name, and the nodes answer to 127.0.0.1.
hosts=$(cat /etc/hosts)
printf '127.0.0.1 %s\n%s\n' "$HOSTNAME" "$hosts" >/etc/hosts
tests/slurm/cluster up /run/slurm
"$@"
