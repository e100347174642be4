#!/usr/bin/env bash
# A run on one or more machines without SLURM: type the same line on each of them, at about the same time.
#
#   launch/torchrun.sh pretrain CONFIG.yaml data.path=DIR out=RUN                     one machine, one rank a GPU
#   NODES=4 HEAD=node1 launch/torchrun.sh pretrain CONFIG.yaml out=RUN                four machines, meeting at node1
#
# Variables: NODES (1), HEAD (host[:port] of one of them; the port, 15000 to 29999, follows from RUN), RANKS (of each
# machine; one a GPU, or 1), RESTARTS (3), PYTHON (python). SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C make the ranks save and
# exit; the same line resumes. A lost rank is started again. RUN must be a folder that all machines see; several runs on
# the same machines at once do not meet each other.
set -euo pipefail

case "${1:-}" in
"" | -h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
  exit
  ;;
esac
nodes=${NODES:-1}
if ((nodes > 1)) && [[ -z ${HEAD:-} ]]; then
  echo "torchrun.sh: NODES=$nodes needs HEAD=HOST, the machine at which they meet" >&2
  exit 2
fi
gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || gpus=0
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + ranks - 1) / ranks))}
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}

if ((nodes == 1)); then # mae-dist's own launcher starts torchrun's agent
  exec "${PYTHON:-python}" -m mae_dist "$@" "machine.processes=$ranks" "machine.restarts=${RESTARTS:-3}"
fi
run="$*" # what all machines of a run know, and those of no other one: its folder
for word in "$@"; do [[ $word != out=* ]] || run=${word#out=}; done
[[ $run == /* ]] || run=$PWD/$run
run=$(cksum <<<"$run") && run=${run%% *}
[[ $HEAD == *:* ]] || HEAD=$HEAD:$((15000 + run % 15000))

# At SIGTERM torchrun signals its ranks and gives them 30 s to save; SIGUSR1 and SIGUSR2 would just end it.
trap '' USR1 USR2
"${PYTHON:-python}" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" --rdzv-backend c10d \
  --rdzv-endpoint "$HEAD" --rdzv-id "$run" --max-restarts "${RESTARTS:-3}" -m mae_dist "$@" &
agent=$!
trap 'kill -TERM "$agent" 2>/dev/null || true' TERM USR1 USR2
trap : INT # the terminal sends it to all processes
while :; do # a signal ends `wait`, not the agent
  status=0
  wait "$agent" || status=$?
  kill -0 "$agent" 2>/dev/null || break
done
exit "$status"
