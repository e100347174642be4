"""Run mae-dist as a user does, in this process or in one of its own, and read what a run leaves. For all tests."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed.distributed_c10d as collectives
from safetensors.torch import load_file

from mae_dist.__main__ import main
from mae_dist.launcher import COUNTED
from mae_dist.run import layout

SETTINGS = [
    "model.name=vit_demo4", "model.image_size=32", "view.test_crop=1", "train.global_batch=16", "train.precision=fp32",
    "track.every=1", "machine.processes=1", "machine.restarts=0",
]  # fmt: skip
"""A tiny run of any verb on `tiny_data`: one rank, every step logged, no restart."""
MAE = ["mae.decoder_dim=32", "mae.decoder_depth=1", "mae.decoder_heads=4", "optim.base_lr=1e-2", "train.clip_grad=1"]
"""What a tiny pretraining adds to SETTINGS."""

IMPORTED = [
    "mae_dist.stages.pretrain", "mae_dist.stages.finetune", "mae_dist.stages.probe", "mae_dist.launcher",
    "numpy.random", "omegaconf", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "timm.data.auto_augment",
    "torch._dynamo", "torch.distributed.checkpoint",
]  # fmt: skip
"""What a rank imports until its first step: torch._dynamo for DDP and FSDP, the last to read a checkpoint."""


def command(*argv: object) -> list[str]:
    """The command `mae-dist ARGV` for `subprocess`."""
    return [sys.executable, "-m", "mae_dist", *map(str, argv)]


def environment() -> dict[str, str]:
    """The environment of a `command`: this checkout's package, one thread a process."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def bytes_read() -> int:
    """How many bytes this process has read so far, from files or the page cache (rchar of proc(5))."""
    return int(Path("/proc/self/io").read_text().split()[1])


def start(*argv: object, check: int | None = 0, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run `mae-dist ARGV` to its end in a process of its own; it must end with status `check` (None: with any)."""
    done = subprocess.run(
        command(*argv), capture_output=True, text=True, env=environment(), timeout=timeout, check=False
    )
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


def start_ranks(
    number: int, *argv: object, log: Path, before: Callable[[], object] | None = None
) -> list[BaseProcess]:  # fmt: skip
    """Start `mae-dist ARGV` on `number` ranks without a launcher, forked from a process that has imported the package:
    a start costs a tenth of what it costs from nothing. What they print is appended to the file `log`. Each first calls
    `before`, a function at the top of a module, or a `partial` of one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    words, ranks = [*map(str, argv), f"machine.processes={number}"], []
    for rank in range(number):
        place = meeting | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(start_rank(words, place, log, before))
    return ranks


def start_launcher(*argv: object, log: Path, before: Callable[[], object] | None = None) -> BaseProcess:
    """Start `mae-dist ARGV` as a launcher, which forks its ranks, in a process that has imported the package. `argv`
    says how many ranks.
    """
    return start_rank([*map(str, argv)], {COUNTED: "forked from what has imported torch"}, log, before)


def start_rank(
    argv: list[str], environment: dict[str, str], log: Path, before: Callable[[], object] | None = None
) -> BaseProcess:  # fmt: skip
    """Start `mae-dist ARGV` with more environment variables, forked from a process that has imported the package; what
    it prints is appended to the file `log`. It first calls `before`.
    """
    return start_forked(_rank, argv, environment, log, before)


def start_forked(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start `target(*arguments)` in a process that is forked from one that has imported what a rank needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def _rank(argv: list[str], environment: dict[str, str], log: Path, before: Callable[[], object] | None) -> None:
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    gc.freeze()  # a collection need not visit, and so copy, what came with the fork
    os.environ.update(environment)
    if before is not None:
        before()
    sys.argv = ["/mae-dist", *argv]
    sys.exit(main())


def unpickle_nothing() -> None:
    """Let torch be unable to unpickle an object of another rank: for `before`."""
    collectives._tensor_to_object = None  # pyright: ignore[reportAttributeAccessIssue]


def wait_until(reached: Callable[[], bool], ranks: Sequence[BaseProcess], log: Path, timeout: float = 120) -> None:
    """Wait until `reached()`; no rank may end before."""
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline
        assert all(rank.is_alive() for rank in ranks), log.read_text()
        time.sleep(0.01)


def kill_ranks_when(ranks: Sequence[BaseProcess], reached: Callable[[], bool], log: Path, timeout: float = 120) -> None:
    """Send SIGKILL to all ranks as soon as `reached()`; none may end before."""
    wait_until(reached, ranks, log, timeout)
    for rank in ranks:
        rank.kill()
        rank.join()


def finish_ranks(ranks: Sequence[BaseProcess], log: Path, check: int = 0, timeout: float = 120) -> None:
    """Wait for ranks, each of which must end with status `check`; after `timeout` s they are killed."""
    deadline = time.monotonic() + timeout
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        rank.kill()
        rank.join()
    assert [rank.exitcode for rank in ranks] == [check] * len(ranks), log.read_text()


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run `mae-dist ARGV` in this process: it must end with status 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("mae-dist: ")
    return lines[0]


def records(run: Path) -> list[dict]:
    """All records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The loss of every recorded step."""
    return [record["loss"] for record in records(run) if "loss" in record]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint, by name."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {name: tensor for file in newest.glob("*.safetensors") for name, tensor in load_file(file).items()}


def copy_of_begun(finished: Path, out: Path) -> Path:
    """A copy of a finished run, as it was at its first checkpoint but for lines that a resume cuts off."""
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    for later in layout.checkpoints(out)[1:]:
        shutil.rmtree(later)
    return out


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks that a launcher, of this process id, has started, in the order of the ranks."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def is_running(pid: int) -> bool:
    """Whether a process runs, zombies not counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
