#!/usr/bin/env bash
# What the SLURM container does: starts the cluster, runs the words it is given, and in the end gives what they made in
# the checkout to the checkout's owner, since the cluster and its jobs run as root.
set -euo pipefail
trap 'find . -user root -exec chown --no-dereference --reference=. {} +' EXIT
tests/slurm/cluster up /run/slurm
"$@"
