"""Pack pictures into webdataset tars with indexes and a dataset.json: the same bytes on each machine and each time.

The tars are written into a hidden folder beside the target, which they reach by one rename at the end. A stopped
packing goes on behind the last finished tar; any number of worker processes gives the same bytes.

Where the pictures are from: `sources`. Knows no model and no view. Imports no torch.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from mae_dist import rng
from mae_dist.atomic import holder_of, mount_points, open_lock, replacing, sign, try_lock
from mae_dist.data import grouping, index
from mae_dist.data.decode import decoded
from mae_dist.data.reencode import Encoding, as_png
from mae_dist.data.shard_writer import ShardWriter
from mae_dist.data.tally import Tally
from mae_dist.data.workers import ordered_map
from mae_dist.errors import MachineFault, from_os_error

log = logging.getLogger(__name__)

MAX_BAD = 0.01
"""Largest share of a split's images that may be left out, where --max-bad does not say another."""
MOST_NAMED = 100
"""Images that cannot be packed after which packing ends, if they are too many; with fewer it looks at all images."""

LOST = "a worker process was killed, or memory ran out; with fewer --workers the same command continues"

PACK_EPOCH = 2**32 - 1
"""Epoch of the random draws of `permutation`; no run reaches it."""
EXTENSIONS = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg"}
"""How members are called whose files had another extension: readers of webdatasets look for .jpg, timm for no other."""

ProgressCallback = Callable[[str, int, int], None]
"""Called as (what is being done, number done, total number)."""


def no_progress(what: str, done: int, total: int) -> None:
    """A ProgressCallback that does nothing."""


@dataclass(frozen=True)
class Picture:
    """One image file to be packed.

    ``extension`` is its format (lower case, no dot), ``content`` its bytes, ``label`` its class (-1: none). ``name`` is
    the end of its key, which begins with split and number; ``key`` is the whole key, if it is not empty. ``file`` is
    its path within the source, for `source_files`; ``origin`` names it in messages. Pictures of different ``group`` are
    never in one tar. One with a ``problem`` is left out, and counted under what stands before its colon. With
    ``to_png`` it is stored as PNG where its bytes could stay and PNG can hold it.
    """

    extension: str
    content: bytes
    label: int
    name: str = ""
    key: str = ""
    file: str = ""
    origin: str = ""
    group: int = 0
    problem: str = ""
    to_png: bool = False


@dataclass(frozen=True)
class Source:
    """What to pack: name, class names (None: not known), number of pictures per split, and a function that yields the
    pictures of a split that have these numbers (0 to the number of pictures - 1, a range).

    ``fingerprint`` changes when the pictures do; without one a stopped packing starts from the beginning. ``mean`` and
    ``std`` are those of the training split, if they are known, and ``num_classes`` may be known where names are not.
    ``chunk`` is the number of pictures that are asked for at once.
    """

    name: str
    classes: list[str] | None
    counts: dict[str, int]
    pictures: Callable[[str, range], Iterable[Picture]]
    fingerprint: str = ""
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    chunk: int = 16


@dataclass(frozen=True)
class Packed:
    """What `pack` has written: the content of dataset.json, and the sums over all pictures of all splits."""

    dataset: index.Dataset
    tally: Tally


@dataclass(frozen=True)
class _Prepared:
    """A picture as it will be stored, and its tally."""

    picture: Picture
    tally: Tally


def pack(
    source: Source,
    out: Path,
    shard_size: int | None = 5000,
    encoding: Encoding = Encoding(),  # noqa: B008
    workers: int = 1,
    tick: ProgressCallback = no_progress,
    max_bad: float = MAX_BAD,
) -> Packed:
    """Write `source` as a data set into the new folder `out`: {split}-000000.tar and .idx, ..., and dataset.json.

    Members are named {split}_{number}[-{name}].{extension} and .cls, or by the picture's key; at most `shard_size`
    samples a tar (None: any number), fewer when a tar reaches 3 GB or a new group begins. Each image is decoded once;
    what cannot be packed is logged and left out, up to a share `max_bad` of a split. _info.json is for timm's reader.

    A process that is stopped or killed leaves the hidden folder .NAME.packing beside `out`, and the same call goes on
    from there. Raises ValueError when `out` has files in it or cannot be written, another process is packing into it,
    the hidden folder is of a packing with other options, or too many images are unreadable; MachineFault when the disk
    is full or a worker is killed; and what `source` raises.
    """
    out = new_folder(out)
    if not 0 <= max_bad <= 1:
        raise ValueError(f"--max-bad {max_bad:g}: must be at least 0 and at most 1, for example {MAX_BAD}")
    if shard_size is not None and shard_size < 1:
        raise ValueError(f"--shard-size {shard_size}: must be 1 or more samples")
    if workers < 1:
        raise ValueError(f"--workers {workers}: must be 1 or more processes")
    work = out.with_name(f".{out.name}.packing")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _locked(work, out):
            new_folder(out)  # another process may have made it meanwhile
            _begin(work, source, shard_size, encoding)
            try:
                packed = _write(source, work, shard_size, encoding, workers, tick, max_bad)
            except ValueError:  # the user changes the source, so nothing of this can be kept
                shutil.rmtree(work)
                raise
            os.replace(work / "data", out)
            shutil.rmtree(work)
        return packed
    except OSError as error:
        reason = error.strerror or error
        raised = from_os_error(error, f"--out {out}: cannot be written ({reason})")
        remedy = "the same command continues" if isinstance(raised, MachineFault) else "choose another folder"
        raise type(raised)(f"{raised}; {remedy}") from error


def new_folder(out: Path) -> Path:
    """The path of `out` with links followed. Raises ValueError if no rename can make it a new folder."""
    out = Path(os.path.realpath(out))
    if out in mount_points():
        raise ValueError(f"--out {out}: a file system is mounted there; choose a folder in it, such as {out}/data")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder; choose another or remove it")
    if out.is_dir() and out == Path.cwd():
        raise ValueError(f"--out {out}: is the working folder, which is to be replaced; start from another")
    return out


@contextmanager
def _locked(work: Path, out: Path) -> Iterator[None]:
    """Hold the lock of the hidden folder, which the kernel releases when this process ends."""
    with open_lock(work / "lock") as lock:
        if not try_lock(lock):
            raise ValueError(f"--out {out}: {holder_of(lock)} is packing into it; wait for it")
        sign(lock)
        yield


def _begin(work: Path, source: Source, shard_size: int | None, encoding: Encoding) -> None:
    """Note what is packed, or, where a packing has been begun, check that it is of the same source and options."""
    plan = {
        "source": [source.name, source.fingerprint, source.counts],
        "--shard-size": shard_size,
        "--short-side": encoding.short_side,
        "--format": encoding.format,
        "--quality": encoding.quality,
        "--channels, --white or --exif": [encoding.how.channels, encoding.how.white, encoding.how.upright],
        "Pillow or simplejpeg": [PIL.__version__, version("simplejpeg")],
    }
    file = work / "plan.json"
    if file.is_file() and source.fingerprint:
        before = json.loads(file.read_text())
        if changed := [name for name in plan if plan[name] != before.get(name)]:
            raise ValueError(
                f"{work}: holds a packing that was begun with another {' and another '.join(changed)}; "
                f"finish it with the command that began it, or remove this folder"
            )
        log.info("%s: holds a packing that was stopped, which continues", work)
        (work / "data").mkdir(exist_ok=True)  # a process killed at its very end has renamed it
        return
    for name in ("data", "finished"):
        shutil.rmtree(work / name, ignore_errors=True)
        (work / name).mkdir()
    with replacing(file) as new:
        new.write_text(json.dumps(plan))


def _write(
    source: Source, work: Path, shard_size: int | None, encoding: Encoding, workers: int, tick: ProgressCallback,
    max_bad: float,
) -> Packed:  # fmt: skip
    splits: dict[str, list[index.Shard]] = {}
    tallies: dict[str, Tally] = {}
    counts: dict[str, list[int]] = {}
    for split, total in source.counts.items():
        with ShardWriter(work, split, shard_size) as writer:
            _fill(writer, source, split, encoding, workers, tick, max_bad)
        splits[split] = [finished.shard for finished in writer.finished]
        counts[split] = [sum(column) for column in zip_longest(*(f.label_counts for f in writer.finished), fillvalue=0)]
        tallies[split] = sum((finished.tally for finished in writer.finished), Tally())
        if bad := tallies[split].bad:
            log.warning("split %s: left out %s", split, _counted(bad, total, total))
        if len(kinds := tallies[split].kinds) > 1:
            listed = ", ".join(f"{count} .{kind}" for kind, count in sorted(kinds.items()))
            log.warning("split %s: stores %s; datasets.load_dataset needs one kind: --format png or jpg", split, listed)
    every = sum(tallies.values(), Tally())
    for remark in every.remarks():
        log.warning("%s", remark)
    train = tallies.get("train", Tally())
    known = source.mean is not None and not train.num_encoded
    num_classes = len(source.classes) if source.classes is not None else source.num_classes
    dataset = index.Dataset(
        name=source.name,
        splits=splits,
        num_classes=every.top_label + 1 or None if num_classes is None else num_classes,
        classes=source.classes,
        image_size=every.common_size,
        mean=source.mean if known else train.mean,
        std=_without_zeros(source.std if known else train.std),
        white=encoding.how.white if encoding.keeps_bytes else None,
        channels=encoding.how.channels,
        label_counts=counts,
    )
    dataset.save(work / "data")
    _save_timm_info(dataset, work / "data")
    return Packed(dataset, every)


def _without_zeros(std: tuple[float, ...] | None) -> Any:
    """Standard deviations to divide by: 1 for a channel that is the same everywhere, which is logged."""
    if constant := [str(channel) for channel, value in enumerate(std or ()) if not value]:
        log.warning("constant in all images of train: channel %s; its std is stored as 1", ", ".join(constant))
    return std and tuple(value or 1.0 for value in std)


def _save_timm_info(dataset: index.Dataset, folder: Path) -> None:
    """Write the _info.json in which timm's reader of webdatasets looks for splits, tars and numbers of samples."""
    splits = {
        name: {
            "name": name,
            "filenames": [shard.tar for shard in shards],
            "shard_lengths": [shard.num_samples for shard in shards],
            "num_samples": sum(shard.num_samples for shard in shards),
        }
        for name, shards in dataset.splits.items()
    }
    with replacing(folder / "_info.json") as new:
        new.write_text(json.dumps({"splits": splits}, indent=1) + "\n")


def _fill(
    writer: ShardWriter, source: Source, split: str, encoding: Encoding, workers: int, tick: ProgressCallback,
    max_bad: float,
) -> None:  # fmt: skip
    first, total = writer.end, source.counts[split]
    chunks = [range(start, min(start + source.chunk, total)) for start in range(first, total, source.chunk)]
    prepare, examples, seen = partial(_prepare, source, encoding, split), dict[str, str](), first
    with closing(ordered_map(prepare, chunks, min(workers, len(chunks)), LOST)) as prepared:
        for number, item in enumerate(prepared, first):
            picture, seen = item.picture, number + 1
            if picture.problem:
                writer.leave_out(item.tally)
                origin = picture.origin or f"image {number}"
                like = examples.setdefault(picture.problem, origin)
                log.warning("%s: left out, %s", origin, picture.problem if like == origin else f"like {like}")
                if writer.bad.total() > max(max_bad * total, MOST_NAMED - 1):
                    break  # enough to know what is wrong
            else:
                name = f"-{safe_name(picture.name)}" if picture.name else ""
                members = {picture.extension: picture.content}
                if picture.label >= 0:
                    members[grouping.LABEL] = str(picture.label).encode()
                key = picture.key or f"{split}_{writer.num_samples:06d}{name}"
                writer.write(number, picture.group, key, members, item.tally, picture.file)
            tick(f"pack {split}", seen, total)
    if writer.bad.total() > max_bad * total:
        raise ValueError(
            f"{_counted(writer.bad, seen, total)} of split {split} cannot be used, more than --max-bad {max_bad:g} "
            f"allows: {_examples(examples)}; repair or remove them (those met so far are logged), or raise --max-bad"
        )
    if not writer.num_samples:
        raise ValueError(f"split {split!r}: none of its images can be packed, {_counted(writer.bad, seen, total)}")
    writer.finish(total)


def _prepare(source: Source, encoding: Encoding, split: str, numbers: range) -> Iterator[_Prepared]:
    """Decode pictures, and encode them anew where that is wanted; runs in worker processes."""
    for _, picture in zip(numbers, source.pictures(split, numbers), strict=True):
        try:
            if picture.problem:
                raise ValueError(picture.problem)
            sample = index.Sample(picture.key, picture.extension, picture.content, picture.label)
            found = decoded(sample, how=encoding.how)
            extension, content, pixels = encoding.store(picture.extension, picture.content, found)
        except ValueError as error:
            problem = picture.problem or f"unreadable: {error}"
            yield _Prepared(replace(picture, content=b"", problem=problem), Tally(bad={problem.partition(":")[0]: 1}))
            continue
        if picture.to_png and encoding.keeps_bytes and (png := as_png(content)) is not None:
            extension, content = "png", png
        extension = EXTENSIONS.get(extension, extension)
        tally = Tally.of(
            pixels, picture.label, kinds={extension: 1}, source_bytes=len(picture.content), stored_bytes=len(content),
            num_resized=int(pixels is not found.pixels), num_encoded=int(content is not picture.content),
            changes=found.changes,
        )  # fmt: skip
        yield _Prepared(replace(picture, extension=extension, content=content), tally)


def _counted(bad: Mapping[str, int], seen: int, total: int) -> str:
    """How many of the `seen` first images of a split, of `total`, are left out, and why."""
    looked_at = f"the first {seen} of {total}" if seen < total else total
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(bad.items()))
    return f"{sum(bad.values())} of {looked_at} images ({reasons})"


def _examples(problems: Mapping[str, str]) -> str:
    """The first image of each of up to three kinds of problem, from a map of problems to images."""
    kinds = dict[str, str]()
    for problem, origin in problems.items():
        kinds.setdefault(problem.partition(":")[0], f"{origin}: {problem}")
    return "; ".join([*kinds.values()][:3])


def permutation(count: int) -> np.ndarray:
    """The order in which `count` pictures that are sorted by class are packed: the same each time."""
    words = rng.bits(0, rng.Purpose.SAMPLES, PACK_EPOCH, np.arange(count), 2)
    return np.lexsort((words[:, 1], words[:, 0]))


def safe_name(name: str) -> str:
    """Make `name` usable in a key: ASCII letters, digits, _ and - only, at most 60 characters for the tar header."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:60]
