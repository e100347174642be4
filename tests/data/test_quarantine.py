"""Quarantine: samples that a file names are no part of the data set; the fingerprint knows them."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from shared_types import Tars
from test_index import png, write_tar

from mae_dist.__main__ import main
from mae_dist.data import quarantine
from mae_dist.data.index import ShardIndex, open_split
from mae_dist.data.order import Order
from mae_dist.data.quarantine import Line
from mae_dist.stages.splits import refuse_unlabelled


def reopened(data: ShardIndex, *lines: tuple[str, str]) -> ShardIndex:
    """The same tars with these (index, image) in quarantine."""
    folder = data.tars[0].parent
    quarantine.add(folder, [Line(*line, "damaged\tfile\n") for line in lines])
    return open_split(str(folder), "train")


def test_quarantine_leaves_samples_out_and_changes_the_fingerprint(
    tars: Tars, caplog: pytest.LogCaptureFixture
) -> None:
    data = tars([4, 3, 2])
    with caplog.at_level(logging.INFO):
        less = reopened(data, ("x-0.idx", "s0001.png"), ("x-2.idx", "s0008.png"), ("x-2.idx", "s0007.png"))
    assert "3 samples are left out (quarantine.txt)" in caplog.text
    for index in (less, pickle.loads(pickle.dumps(less))):
        assert [index.read(sample).key for sample in range(len(index))] == [f"s000{i}" for i in (0, 2, 3, 4, 5, 6)]
        assert index.counts.tolist() == [3, 3, 0]
        assert index.num_labelled == 6
        assert [*index.neighbours(1)] == [2, 0, 3], "no sample of an empty shard"
    assert less.fingerprint != data.fingerprint
    order = Order(0, less.counts, window=1)
    assert sorted(order.at(0, 6)[1].tolist()) == [*range(6)]
    before = less.fingerprint
    assert reopened(data, ("x-0.idx", "s0001.png")).fingerprint == before, "a line twice is one"
    assert reopened(data, ("x-0.idx", "s0000.png")).fingerprint != before
    np.testing.assert_array_equal(open_split(str(data.tars[1]), "").counts, [3])


def test_quarantine_of_all_samples_or_of_unknown_ones_is_refused(tars: Tars) -> None:
    data = tars([2])
    with pytest.raises(ValueError, match=r"hold no samples: quarantine.txt leaves out all; remove its"):
        reopened(data, ("x-0.idx", "s0000.png"), ("x-0.idx", "s0001.png"))
    with pytest.raises(ValueError, match=r"quarantine\.txt: x-0\.idx has no image 's9\.png'; remove that line"):
        reopened(data, ("x-0.idx", "s9.png"))
    (data.tars[0].parent / quarantine.FILE).write_text("# notes\n\nx-0.idx s0000.png\n")
    with pytest.raises(ValueError, match=r"quarantine\.txt: line 3 is not an index, an image and a reason"):
        open_split(str(data.tars[0]), "train")


def test_quarantine_holds_names_with_tabs_line_ends_quotes_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    names = ["a\tb.png", "a\nb.png", 'a"b\\.png', "gr\u00f6\u00dfe.png", "\udcff.png"]
    quarantine.add(tmp_path, [Line("x.idx", name, "damaged") for name in names])
    assert [line.image for line in quarantine.read(tmp_path)] == names


def test_quarantine_of_a_sample_whose_label_cannot_be_read(tars: Tars) -> None:
    data = tars([3])
    content = data.tars[0].read_bytes()
    where = content.index(b"s0001.cls") + 512
    data.tars[0].write_bytes(content[:where] + b"-" + content[where + 1 :])
    less = reopened(data, ("x-0.idx", "s0001.png"))
    assert (len(less), less.num_labelled, [less.label(i) for i in range(2)]) == (2, 2, [0, 2])


def test_samples_without_label_are_refused_by_split_until_check_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [(f"{number}.png", png(60 * number)) for number in range(3)]
    write_tar(tmp_path / "x.tar", [*images, ("0.cls", b"0"), ("2.cls", b"1")])
    write_tar(tmp_path / "t.tar", [("7.png", png(200))])
    for name, split in (("x", "train"), ("t", "test")):
        assert main(["data", "index", str(tmp_path / f"{name}.tar"), "--split", split]) == 0
    check = f"data check {tmp_path} --unlabelled --quarantine"
    with pytest.raises(ValueError, match=f"1 of 3 samples have no label in split train.*`mae-dist {check}`"):
        refuse_unlabelled(open_split(str(tmp_path), "train"), "train", "probe")
    assert main(check.split()) == 1, "the test split has no labels at all"
    assert "test: note: none of its images has a label" in capsys.readouterr().out
    refuse_unlabelled(open_split(str(tmp_path), "train"), "train", "probe")
    with pytest.raises(ValueError, match="1 of 1 samples have no label in split test.*--split test --labels SOURCE"):
        refuse_unlabelled(open_split(str(tmp_path), "test"), "test", "probe")
