"""The mirror of a run's metrics.jsonl on Weights & Biases: one run there for each run here, over stops, kills, resumes.

Record n of metrics.jsonl is internal step n of wandb. `wandb/mirrored.json` in the run's folder counts what earlier
starts have mirrored for certain; what a killed one left out is mirrored again at the next start. wandb never asks and
is never waited for long: without a key or a connection a run is mirrored offline, with a word. Imported by `tracker`.
"""

import hashlib
import json
import logging
import netrc
import os
import queue
import shutil
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from mae_dist import config as configuration
from mae_dist import small_files
from mae_dist.errors import MachineFault
from mae_dist.run import events, jsonl, layout
from mae_dist.schema import RunConfig, TrackConfig

log = logging.getLogger(__name__)

WAIT, CONNECT = 60.0, 3.0
"""Seconds to wait for wandb, which sends to a server at the end of a run, and for its server to take a connection."""
Mode = Literal["online", "offline"]
MODES: dict[str, Mode] = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline"}
"""Values of WANDB_MODE that mirror a run."""
KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
SERVER = "https://api.wandb.ai"
SYSTEM = ("images_per_second", "data_wait", "saving", "stall", "bad")
"""Numbers of a step that say how fast it was made."""
COUNTED = "mirrored.json"


def mode_of(track: TrackConfig) -> Literal["off"] | Mode:
    """off, online or offline: as set, else by WANDB_MODE."""
    return track.wandb or MODES.get(os.environ.get("WANDB_MODE", ""), "off")


def run_id(run: Path) -> str:
    """The id of the run's wandb run: a hash of its first start, so that a resumed run is one run in wandb."""
    first = next(iter(events.of(run, "start")), str(run.absolute()))
    return hashlib.sha256(json.dumps(first).encode()).hexdigest()[:8]


def grouped(record: dict[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl in groups: train/, system/, and test/ for those of evaluations; step and epoch bare."""
    kind, found = record.get("kind"), {}
    for name, value in record.items():
        if name in ("step", "epoch"):
            found[name] = value
        elif name != "kind" and not isinstance(value, list):
            group = "system" if name in SYSTEM or kind == jsonl.INTERVAL else "train"
            evaluated = f"test/{name.removeprefix('test_')}"
            found[evaluated if kind == jsonl.EVALUATION else f"{group}/{name}"] = value
    return found


def offline_reason(server: str) -> str | None:
    """Why a run cannot be sent to a server at once: no key, or no connection; None where it can."""
    host = urlsplit(server).hostname or ""
    known = any(os.environ.get(name) for name in KEYS)
    if not known:
        with suppress(OSError, netrc.NetrcParseError):
            known = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    if not known:
        return "there is no key (WANDB_API_KEY, or `wandb login`)"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None
    try:
        socket.create_connection((host, urlsplit(server).port or 443), CONNECT).close()
    except OSError as error:
        return f"{host} cannot be reached ({error})"
    return None


def _counted(file: Path) -> tuple[int, int, list[str]]:
    """Lines that earlier starts have mirrored, the next step there, and their folders; none where the file is damaged,
    or not there yet.
    """
    with suppress(ValueError, MachineFault):
        found = small_files.read_json(file)
        lines, following, folders = (found.get(name) for name in ("lines", "next", "folders"))
        if type(lines) is int and type(following) is int and isinstance(folders, list):
            return max(lines, 0), max(following, 0), folders
    return 0, 0, []


class Mirror:
    """Sends records of a run to wandb; does nothing where track.wandb is off, or after wandb has failed."""

    def __init__(self, path: Path, config: RunConfig, verb: str):
        self.path, self.counted, self.run = path, path / "wandb" / COUNTED, None
        if (mode := mode_of(config.track)) == "off":
            return
        if mode == "online" and (reason := offline_reason(os.environ.get("WANDB_BASE_URL", SERVER))):
            log.warning("wandb: %s; this start is mirrored offline, `wandb sync` sends it", reason)
            mode = "offline"
        self.lines, self.next, self.folders = _counted(self.counted)
        self.calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()
        self._attempt(lambda: self._open(config, verb, mode))
        if self.run is not None:
            records = jsonl.read(path / layout.METRICS) if (path / layout.METRICS).is_file() else []
            sent = max(self.run.step - self.next, 0)  # to a server, by a start that was killed
            fewer = max(self.lines + sent - len(records), 0)  # records that were cut and will be made again
            self.lines, self.next = self.lines + sent - fewer, self.next + sent - min(fewer, sent)
            for record in records[self.lines :]:
                self.log(record)

    def _open(self, config: RunConfig, verb: str, mode: Mode) -> None:
        import wandb

        if mode == "offline":
            self._remove_unfinished()
        track, environ = config.track, os.environ
        given: dict[str, Any] = {
            "project": track.project or environ.get("WANDB_PROJECT", "mae_dist"),
            "name": environ.get("WANDB_NAME", self.path.name), "dir": environ.get("WANDB_DIR", str(self.path)),
            "tags": track.tags or tuple(filter(None, environ.get("WANDB_TAGS", "").split(","))),
            "entity": track.entity or environ.get("WANDB_ENTITY"), "notes": track.notes or environ.get("WANDB_NOTES"),
            "group": track.group or environ.get("WANDB_RUN_GROUP"),
        }  # fmt: skip
        self.run = wandb.init(
            id=run_id(self.path), resume="allow", job_type=verb, mode=mode, config=configuration.to_dict(config),
            settings=wandb.Settings(init_timeout=WAIT / 2), **{name: value for name, value in given.items() if value},
        )  # fmt: skip
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def _remove_unfinished(self) -> None:
        """Remove what starts that were killed have mirrored offline: it may lack anything, and is mirrored again."""
        folder = Path(os.environ.get("WANDB_DIR") or self.path) / "wandb"
        for unfinished in folder.glob(f"offline-run-*-{run_id(self.path)}*"):
            if unfinished.name not in self.folders:
                log.info("%s: of a start that was killed; mirrored again from %s", unfinished, layout.METRICS)
                shutil.rmtree(unfinished)

    def log(self, record: dict[str, Any]) -> None:
        """Mirror a record that has just been appended to metrics.jsonl."""
        if self.run is not None:
            numbers, self.next, self.lines = grouped(record), self.next + 1, self.lines + 1
            self._attempt(lambda: self.run.log(numbers, step=self.next - 1))  # pyright: ignore

    def rewind(self, lines: int) -> None:
        """Go on after metrics.jsonl was cut to `lines`: what is made again gets new internal steps."""
        if self.run is not None:
            self.lines = min(self.lines, lines)

    def picture(self, file: Path) -> None:
        """Mirror a picture in the run's folder, beside the record before it."""

        def send() -> None:
            import wandb

            self.run.log({f"pictures/{file.stem.split('-')[0]}": wandb.Image(str(file))}, step=max(self.next - 1, 0))  # pyright: ignore

        if self.run is not None:
            self._attempt(send)

    def finish(self) -> None:
        """Wait until all is written, and note it for the next start."""
        if self.run is not None:
            self._attempt(self._close)
            self.calls.put(None)

    def _close(self) -> None:
        assert self.run is not None
        folder = Path(self.run.dir).parent.name
        self.run.finish()
        content = {"lines": self.lines, "next": self.next, "folders": [*self.folders, folder]}
        self.counted.parent.mkdir(exist_ok=True)
        jsonl.write_atomic(self.counted, json.dumps(content) + "\n")

    def _attempt(self, action: Callable[[], object]) -> None:
        """Call `action` in the mirror's thread, and wait WAIT s at most. After a failure wandb is not used again."""
        self.calls.put(action)
        try:
            problem = self.answers.get(timeout=WAIT)
        except queue.Empty:
            problem = f"no answer in {WAIT:g} s"
        if problem is not None:
            log.warning("wandb failed (%s): going on without it; metrics.jsonl has everything", problem)
            self.run = None
            self.calls.put(None)

    def _serve(self) -> None:
        """Make the calls, one after the other, until None."""
        for call in iter(self.calls.get, None):
            try:
                call()
                self.answers.put(None)
            except Exception as error:  # wandb errors must not stop training
                self.answers.put(error)
