"""Starts several ranks on this machine through torchrun's agent, and starts them again when one was lost.

They meet in files of a private folder and talk over the loopback interface, whatever the machine's name resolves to.

It decides by exit statuses alone and prints nothing where a rank has printed why it ended.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import uuid
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mae_dist import environment, interfaces
from mae_dist.errors import DONE, INTERRUPTED, SIGNAL_BASE, STOPPED, USER_ERROR

log = logging.getLogger(__name__)

OUT_OF_MEMORY = ", most likely because memory ran out (lower machine.micro_batch, machine.workers or machine.processes)"
FINAL = (DONE, USER_ERROR, STOPPED, INTERRUPTED)
"""Exit statuses after which the ranks are not started again."""


def processes_here(wanted: int | None) -> int:
    """How many ranks to start on this machine: `wanted`, else one for each GPU, else one."""
    return wanted or max(1, torch.cuda.device_count())


def limit_threads(ranks: int) -> None:
    """Give this process, one of `ranks` of this machine, its share of the cores, unless OMP_NUM_THREADS is set. Where
    it is alone and has no quota, torch counts the cores right.
    """
    if "OMP_NUM_THREADS" not in os.environ and (ranks > 1 or environment.quota() is not None):
        torch.set_num_threads(environment.threads(os.environ, ranks))


def spawn(argv: list[str], processes: int, restarts: int) -> int:
    """Run `python -m mae_dist ARGV` on several ranks of this machine, and return the exit status.

    When a rank crashes, hangs or is killed, the others stop and all are started again, `restarts` times at most. The
    status is that of the first rank that failed, 128 + n for one that signal n ended.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(environment.threads({}, processes)))
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # the agent needs no server for ranks that meet in a file
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # the agent passes on SIGTERM, but these would end it alone
        signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    while True:
        with tempfile.TemporaryDirectory(prefix="mae_dist-", ignore_cleanup_errors=True) as folder:
            os.environ[environment.MEETING_FILE] = str(Path(folder) / "ranks")
            config = LaunchConfig(
                min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", monitor_interval=0.2,
                local_addr=interfaces.LOCALHOST, rdzv_endpoint=str(Path(folder) / "agent"), max_restarts=0,
                rdzv_configs={"store_type": "file"}, run_id=uuid.uuid4().hex,
            )  # fmt: skip
            status = run(argv, config)
        if status in FINAL or not restarts:
            return status
        restarts -= 1
        log.error("starting the ranks again (%d restarts left)", restarts)


def run(argv: list[str], config: LaunchConfig) -> int:
    """Run `python -m mae_dist ARGV` once on the ranks that torchrun's agent starts, and return their exit status."""
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.CRITICAL)
    try:
        program, *words = environment.python()
        elastic_launch(config, program)(*words, *argv)
    except ChildFailedError as error:
        first_rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            what = signal.Signals(-failure.exitcode).name
            what += OUT_OF_MEMORY if -failure.exitcode == signal.SIGKILL else ""
            log.error("rank %d was ended by %s; the same command resumes from the last checkpoint", first_rank, what)
            return SIGNAL_BASE - failure.exitcode
        return failure.exitcode
    except SignalException as error:  # the agent has passed the signal on and waited for the ranks
        log.error("stopped by %s; the same command resumes", signal.Signals(error.sigval).name)
        return STOPPED
    return DONE
