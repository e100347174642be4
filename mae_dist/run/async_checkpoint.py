"""Checkpoints in the background: copied at a step boundary, written by a thread beside training, one at a time. On a
CPU the thread copies what only an update changes, while the next gradients are computed.

A save that fails (a full disk, say) is logged, and training continues with the earlier checkpoints; only the last save
must succeed. Ranks write together, over a group of their own. Knows no model and no loop.
"""

from __future__ import annotations

import logging
import threading
import time

import torch
from torch import Tensor

from mae_dist import dist
from mae_dist.errors import MachineFault
from mae_dist.run import checkpoint
from mae_dist.run.directory import RunDir
from mae_dist.schema import CheckpointConfig
from mae_dist.watchdog import waiting_for

log = logging.getLogger(__name__)

LAST_WAIT = 5.0
"""Seconds that a run which ends with an error waits for a save to end."""


class AsyncSaver:
    """Saves checkpoints of `run`; a context manager."""

    def __init__(self, run: RunDir, settings: CheckpointConfig, pinned: bool):
        self.run, self.settings, self.stall, self.began = run, settings, 0.0, time.perf_counter()
        self.group = dist.background_group()
        self.pinned, self.copies = pinned, dict[str, Tensor]()
        self.copied = threading.Event()
        self.copied.set()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread:
            self.thread.join(LAST_WAIT)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self.thread is not None and self.thread.is_alive()

    @property
    def overdue(self) -> bool:
        """Whether more work would be lost now than `checkpoint.minutes` allows, as this rank's clock has it."""
        minutes = self.settings.minutes
        return minutes is not None and time.perf_counter() - self.began > 60 * minutes

    def take_stall(self) -> dict[str, float]:
        """{"stall": seconds for which the last `save` kept the loop waiting}, once after each save; else {}."""
        stall, self.stall = self.stall, 0.0
        return {"stall": stall} if stall else {}

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """Copy `state` and start to write it as the checkpoint of `step`. It may change as soon as this returns, its
        moments and averages after `wait_for_copies`.
        """
        self.began = began = time.perf_counter()
        self.wait(last=False)
        late = () if self.pinned else (checkpoint.OPTIMIZER, checkpoint.EMA)
        parts = checkpoint.share(state)
        for name, part in parts.items():
            if not name.startswith(late):
                parts[name] = self._copy(name, part)
        self.copied.clear()
        self.thread = threading.Thread(target=self._write, args=(step, parts, late), daemon=True)
        self.thread.start()
        self.stall = time.perf_counter() - began

    def wait_for_copies(self) -> None:
        """Wait until all of the state is copied, so that an update may change it."""
        began = time.perf_counter()
        if not self.copied.is_set():
            with waiting_for(lambda: f"the copy of the state for a checkpoint of {self.run.path}"):
                self.copied.wait()
            self.stall += time.perf_counter() - began

    def _copy(self, name: str, part: checkpoint.Part) -> checkpoint.Part:
        """A copy on the CPU, in the memory of the copy of the save before, since pinned memory takes long to get."""
        values = part.values
        if name not in self.copies:
            self.copies[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=self.pinned)
        return part._replace(values=self.copies[name].copy_(values))

    def wait(self, last: bool = True) -> None:
        """Wait for the save in flight. Raises its error if it is the `last` of the run, else warns."""
        if self.thread:
            with waiting_for(lambda: f"the checkpoint that is being written to {self.run.path}"):
                self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if isinstance(error, MachineFault | ValueError | OSError) and not last:
            if dist.is_main():
                log.warning("%s Training continues.", error)
        elif error is not None:
            raise error

    def _write(self, step: int, parts: dict[str, checkpoint.Part], late: tuple[str, ...]) -> None:
        try:
            try:
                parts |= {name: self._copy(name, part) for name, part in parts.items() if name.startswith(late)}
            finally:
                self.copied.set()
            keep = self.settings
            self.run.save(step, parts, keep.keep, keep.keep_every, self.group, keep.keep_best)
        except BaseException as error:  # raised by `wait`, in the thread of the loop
            self.error = error
