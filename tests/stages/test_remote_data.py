"""Tars that are URLs: indexed without reading them where an .idx lies beside, and trained on as local ones are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import MAE, SETTINGS, losses, refused
from shared_types import Tars
from web import Fault, Request, Web, serving

from mae_dist.__main__ import main
from mae_dist.data import index, remote
from mae_dist.data.dataset import Dataset


@pytest.fixture
def data(tars: Tars) -> index.ShardIndex:
    """Images of several sizes in six tars."""
    return tars([6, 5, 6, 5, 6, 4], size=None)


@pytest.fixture
def web(data: index.ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with serving(data.tars[0].parent) as web:
        yield web


def words(data: Path, out: Path, *more: str) -> list[str]:
    return ["pretrain", f"data.path={data}", f"out={out}", *SETTINGS, *MAE, "train.steps=6", "track.ids=true",
            "data.shuffle_window=2", "machine.workers=1", "data.test_split=none", *more]  # fmt: skip


def ids(run: Path) -> list[tuple[int, list[int], list[int]]]:
    lines = (json.loads(line) for line in (run / "ids.jsonl").read_text().splitlines())
    return sorted((line["step"], line["ids"], line["epochs"]) for line in lines)


def test_run_over_a_faulty_server_with_a_small_cache_is_that_over_local_tars(
    data: index.ShardIndex, web: Web, tmp_path: Path
) -> None:
    assert main(["data", "index", web.url, "--out", str(tmp_path / "urls")]) == 0
    assert not web.got(".tar"), "no tar is read for the index"
    kinds = [Fault(503), Fault(), Fault(cut=5000), Fault(lie=100), Fault(delay=0.01), Fault()]

    def fault(request: Request) -> Fault:
        return kinds[request.before % len(kinds)] if request.name.endswith(".tar") else Fault()

    web.fault, cache = fault, tmp_path / "small"
    size = sum(sorted(shard.num_bytes for shard in data.shards)[-3:])
    assert size < sum(shard.num_bytes for shard in data.shards)
    local, one = tmp_path / "local", tmp_path / "one"
    assert main(words(data.tars[0].parent, local)) == 0
    assert main(words(tmp_path / "urls", one, f"data.cache={cache}", f"data.cache_size={size}")) == 0
    assert len(web.got(".tar")) > 6, "some were evicted, and fetched again"
    assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= size
    assert ids(one) == ids(local)
    assert losses(one) == losses(local)


def test_index_of_urls_without_idx_reads_each_tar_once(
    data: index.ShardIndex, web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, samples = data.tars[0].parent, [data.read(i) for i in range(32)]
    (folder / "dataset.json").rename(tmp_path / "listed.json")
    for path in folder.glob("*.idx"):
        path.unlink()
    words = ["data", "index", web.url + "/x-{0..5}.tar?key=SECRET", "--out", str(tmp_path / "urls")]
    assert main(words) == 0
    assert sorted(web.got(".tar")) == [f"x-{number}.tar" for number in range(6)]
    printed = capsys.readouterr()
    assert "SECRET" not in printed.out + printed.err
    known, found = Dataset.load(folder.parent / "urls"), index.open_split(str(tmp_path / "urls"), "train")
    assert known.num_classes == 3
    assert [s[1:] for s in map(tuple_of, known.splits["train"])] == [s[1:] for s in map(tuple_of, data.shards)]
    assert found.fingerprint == data.fingerprint
    assert [found.read(i) for i in range(32)] == samples
    assert len(web.got(".tar")) == 6, "what was read for the index stays in the cache"


def tuple_of(shard: index.Shard) -> tuple:
    return shard.tar, shard.num_samples, shard.num_labelled, shard.num_bytes, shard.sha256


def test_index_of_urls_with_idx_knows_no_classes_and_says_so(
    data: index.ShardIndex, web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data.tars[0].parent / "dataset.json").unlink()
    assert main(["data", "index", f"{web.url}/x-0.tar", f"{web.url}/x-1.tar", "--out", str(tmp_path / "urls")]) == 0
    assert "classes and checksums may be unknown (--whole)" in capsys.readouterr().out
    assert not web.got(".tar")
    found = index.open_split(str(tmp_path / "urls"), "train")
    assert [found.read(i) for i in range(11)] == [data.read(i) for i in range(11)]


def test_index_of_urls_is_refused_in_one_sentence(
    data: index.ShardIndex, web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = data.tars[0].parent, f"--out={tmp_path / 'urls'}"
    (folder / "x-1.idx").write_text("v1.2 1\njpg 99999999 10 a.jpg\n")
    (folder / "sub").mkdir()
    for words, sentence in (
        ([f"{web.url}/none.tar", out], r"none.tar: there is no such file"),
        ([f"{web.url}/x-0.tar"], "pass --out DIR"),
        ([f"{web.url}/x-0.tar", str(folder), out], "not together"),
        ([f"{web.url}/x-0.tar", f"{web.url}/x-0.tar", out], "named twice"),
        ([f"{web.url}/sub", out], "is no .tar, nor a folder with a dataset.json; name tars"),
        ([f"{web.url}/x-1.tar", out], r"x-1.tar: the .idx beside it ends at byte 100000009, the tar at \d+"),
    ):
        assert re.search(sentence, refused(capsys, "data", "index", *words)), sentence
    wanted = "a URL is indexed first: `mae-dist data index URL --out DIR`"
    assert wanted in refused(capsys, *words_of(f"{web.url}/x-0.tar?key=SECRET", tmp_path))
    assert "is no size" in refused(capsys, *words_of(str(folder), tmp_path), "data.cache_size=lots")


def words_of(data: str, folder: Path) -> list[str]:
    return words(Path("none"), folder / "run", f"data.path={data}")
