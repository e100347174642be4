"""`mae-dist data index URL ... --out DIR`: a dataset.json and indexes here of tars that stay where they are.

What lies beside the tars is taken: a dataset.json, and an .idx for each. A tar without .idx is read once, through the
cache. Imports no torch.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from mae_dist import paths
from mae_dist.atomic import replacing
from mae_dist.data import index, indexing, labels, remote
from mae_dist.data.cache import Cache
from mae_dist.data.dataset import FILE, Dataset, Shard
from mae_dist.data.decode import stored_size
from mae_dist.data.remote import Remote, beside, fetch_bytes, name_of, shown

log = logging.getLogger(__name__)


class Tar(NamedTuple):
    """A remote tar as the folder of its `url` lists it: what is known of it, and of its data set."""

    url: str
    shard: Shard | None
    dataset: Dataset | None


class Found(NamedTuple):
    """An indexed tar: the number of its classes (0: none, None: not known), and (height, width) of all its images."""

    shard: Shard
    num_classes: int | None
    size: tuple[int, int] | None


def urls_in(texts: Sequence[str]) -> list[str]:
    """The URLs that the arguments name; none where they name files. Raises ValueError where they name both."""
    names = [name for text in texts for name in paths.names(paths.with_variables(text))]
    found = [name for name in names if paths.is_url(name)]
    if found and len(found) < len(names):
        raise ValueError(f"{shown(found[0])}: index URLs and files one after the other, not together")
    return [url for name in found for url in _matches(name)]


def _matches(url: str) -> list[str]:
    """The URLs that a pattern matches; a URL without pattern is its own."""
    if "*" not in urlsplit(url).path:
        return [url]
    matches = remote.attempt(url, lambda system, path: [system.unstrip_protocol(name) for name in system.glob(path)])
    if not matches:
        raise ValueError(f"{shown(url)}: no file matches")
    return sorted(matches)


def tars_of(urls: Sequence[str], split: str) -> dict[str, list[Tar]]:
    """The tars of each split: those at these URLs are the split `split`; a folder has those that its dataset.json says.

    Raises ValueError for a folder without dataset.json, and for a tar that is named twice.
    """
    if twice := [url for number, url in enumerate(urls) if url in urls[:number]]:
        raise ValueError(f"{shown(twice[0])}: is named twice")
    if any(url != shown(url) for url in urls):
        log.warning("%s keeps the URLs with what stands before @ and after ?, which may be secrets", FILE)
    folders = [url for url in urls if not urlsplit(url).path.lower().endswith(".tar")]
    listed = functools.cache(_listed)
    if not folders:
        return {split: [_tar(url, listed(beside(url, FILE))) for url in urls]}
    if len(urls) > 1:
        raise ValueError(f"{shown(folders[0])}: is no tar; name tars, or one folder with a {FILE}")
    dataset = listed(f"{folders[0].rstrip('/')}/{FILE}")
    if dataset is None:
        raise ValueError(
            f"{shown(folders[0])}: is no .tar, nor a folder with a {FILE}; name tars, like x-{{000..146}}.tar"
        )
    return {
        name: [Tar(s.tar if s.remote else f"{folders[0].rstrip('/')}/{quote(s.tar)}", s, dataset) for s in shards]
        for name, shards in dataset.splits.items()
    }


def _listed(url: str) -> Dataset | None:
    """The dataset.json at a URL, if there is one."""
    text = fetch_bytes(url)
    return None if text is None else Dataset.parse(text, shown(url))


def _tar(url: str, dataset: Dataset | None) -> Tar:
    shards = [shard for split in dataset.splits.values() for shard in split] if dataset is not None else []
    shard = next((shard for shard in shards if shard.file_name == name_of(url)), None)
    return Tar(url, shard, dataset if shard is not None else None)


def index_tar(tar: Tar, idx: Path, cache: Cache, whole: bool) -> Found:
    """Write the index of a tar: a copy of the .idx beside it, or, if there is none or `whole`, made from the tar.

    Raises ValueError where the .idx is not of this tar, and what `Cache.open` and `indexing.build` raise.
    """
    shard = tar.shard or Shard(tar.url, 0, 0, remote.size_of(tar.url), "")
    text = None if whole else fetch_bytes(beside(tar.url, quote(shard.index_name)))
    shard = replace(shard, tar=tar.url, index="" if idx.stem == Path(name_of(tar.url)).stem else idx.name)
    return _copied(tar, shard, idx, text) if text is not None else _read(shard, idx, cache)


def _copied(tar: Tar, shard: Shard, idx: Path, text: bytes) -> Found:
    with replacing(idx) as work:
        work.write_bytes(text)
        num_samples, num_labelled, end = index.summary(work)
    if shard.labels:
        _copy_labels(tar, shard, idx)
        num_labelled = shard.num_labelled
    if end > shard.num_bytes:
        raise ValueError(f"{shown(tar.url)}: the .idx beside it ends at byte {end}, the tar at {shard.num_bytes}")
    known = tar.dataset
    number, size = (None, None) if known is None else (known.num_classes or 0, known.image_size)
    return Found(replace(shard, num_samples=num_samples, num_labelled=num_labelled), number, size)


def _copy_labels(tar: Tar, shard: Shard, idx: Path) -> None:
    """Copy the file of labels beside a remote index."""
    url = beside(tar.url, quote(labels.file_of(Path(tar.shard.index_name if tar.shard else "")).name))
    content = fetch_bytes(url)
    if content is None:
        raise ValueError(f"{shown(url)}: no such file, but {FILE} speaks of it")
    with replacing(labels.file_of(idx)) as work:
        work.write_bytes(content)
    labels.read(idx, shard.labels, shard.num_samples)


def _read(shard: Shard, idx: Path, cache: Cache) -> Found:
    wanted = Remote(shard.tar, shard.num_bytes, shard.sha256)
    descriptor = cache.open(wanted)
    path = Path(f"/proc/self/fd/{descriptor}")  # stays readable if another process makes room
    try:
        built = indexing.build(path, idx)
        found, numbers = built.shard, [label for label in built.labels if isinstance(label, int)]
        if len(numbers) < found.num_samples:
            log.warning("%s: its labels are names, which count as none; index a copy of it", shown(shard.tar))
            found = replace(found, num_labelled=0)
        data = index.ShardIndex([path], [idx], [found], Dataset(""))
        sizes = {stored_size(data.read(sample)) for sample in range(len(data))}
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), shown(shard.tar))) from None
    finally:
        os.close(descriptor)
    cache.rename(wanted, Remote(shard.tar, found.num_bytes, found.sha256))
    size = sizes.pop() if len(sizes) == 1 else None
    return Found(replace(found, tar=shard.tar, index=shard.index, labels=""), max(numbers, default=-1) + 1, size)
