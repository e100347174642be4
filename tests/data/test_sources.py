"""Sources of pictures: class folders and tars; inconsistent ones are refused."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_files import image_file, noise
from PIL import Image
from shared_types import Tars

from mae_dist.commands.data import main
from mae_dist.data import index
from mae_dist.data.decode import decode
from mae_dist.data.pack import pack
from mae_dist.data.reencode import Encoding
from mae_dist.data.sources import from_folder, from_synthetic, from_tars


def test_pack_folder_keeps_bytes_and_class_order_and_calls_every_jpeg_jpg(tmp_path: Path) -> None:
    source = tmp_path / "imagenet"
    files = {}
    for number in range(12):
        split, name = ("train", f"im {number}.v2.é") if number < 9 else ("val", f"v{number}")
        kind, extension = [("PNG", "png"), ("JPEG", "JPEG"), ("WEBP", "webp")][number % 3]
        path = image_file(source / split / ("b_dog", "a cat")[number % 2] / f"{name}.{extension}", number, kind=kind)
        files[path.read_bytes()] = ("jpg" if kind == "JPEG" else extension, 1 - number % 2, split)
    (source / "train" / "a cat" / "Thumbs.db").write_bytes(b"x")
    (source / ".hidden").mkdir()
    os.symlink(source / "train" / "b_dog", tmp_path / "elsewhere")
    pack(from_folder(source), tmp_path / "out")
    dataset = index.Dataset.load(tmp_path / "out")
    assert dataset.classes == ["a cat", "b_dog"]
    found = {}
    for split in ("train", "val"):
        data = index.open_split(str(tmp_path / "out"), split)
        samples = [data.read(i) for i in range(len(data))]
        assert all(name.isascii() and " " not in name and "." not in name for name in (s.key for s in samples))
        found |= {s.image: (s.extension, s.label, split) for s in samples}
    assert found == files


def test_pack_folder_shards_are_not_sorted_by_class(tmp_path: Path) -> None:
    for number in range(40):
        image_file(tmp_path / "in" / str(number // 20) / f"{number}.png", number)
    pack(from_folder(tmp_path / "in"), tmp_path / "out")
    data = index.open_split(str(tmp_path / "out"), "train")
    labels = [data.label(i) for i in range(40)]
    assert sum(labels) == 20
    assert 5 < sum(labels[:20]) < 15


def test_pack_folder_test_share_is_exact_and_complete(tmp_path: Path) -> None:
    written = {image_file(tmp_path / "in" / str(n % 3) / f"{n}.png", n).read_bytes() for n in range(30)}
    pack(from_folder(tmp_path / "in", test_share=0.2), tmp_path / "out")
    parts = {}
    for split in ("train", "test"):
        data = index.open_split(str(tmp_path / "out"), split)
        parts[split] = {data.read(i).image for i in range(len(data))}
    assert (len(parts["train"]), len(parts["test"])) == (24, 6)
    assert parts["train"] | parts["test"] == written


def test_pack_folder_follows_links_to_class_folders(tmp_path: Path) -> None:
    image_file(tmp_path / "elsewhere" / "a.png", 1)
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "linked")
    source = from_folder(tmp_path / "in")
    assert (source.classes, source.counts) == (["linked"], {"train": 1})


def test_pack_folder_leaves_out_unreadable_images_up_to_a_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(150):
        image_file(tmp_path / "in" / "c" / f"{number}.jpg", number, size=(64, 64), kind="JPEG")
    broken = tmp_path / "in" / "c" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:-30])
    dataset = pack(from_folder(tmp_path / "in"), tmp_path / "out").dataset
    assert sum(shard.num_samples for shard in dataset.splits["train"]) == 149
    assert "7.jpg" in caplog.text
    (tmp_path / "in" / "c" / "8.jpg").write_bytes(b"")
    (tmp_path / "in" / "c" / "x.heic").write_bytes(b"x")
    (tmp_path / "in" / "c" / "link.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "in" / "c" / "pipe.png")
    reasons = "1 .heic is not read, 1 broken link, 1 empty file, 1 not a regular file, 1 unreadable"
    with pytest.raises(
        ValueError, match=f"5 of 153 images .{reasons}. of split train cannot be used, more than --max-bad 0.01"
    ):
        pack(from_folder(tmp_path / "in"), tmp_path / "out2")
    assert not (tmp_path / "out2").exists()
    pack(from_folder(tmp_path / "in"), tmp_path / "out3", max_bad=0.04)
    assert f"split train: left out 5 of 153 images ({reasons})" in caplog.text


def rgb(content: bytes) -> bytes:
    """Pixels of an image file in 8 bits a channel, or those of one channel of 16."""
    with Image.open(io.BytesIO(content)) as image:
        return image.tobytes() if image.mode == "I;16" else image.convert("RGB").tobytes()


def test_pack_folder_stores_bmp_gif_ppm_and_tiff_as_png_with_the_same_pixels(tmp_path: Path) -> None:
    expected = {}
    for kind, array in {
        "BMP": noise(1)[0], "GIF": noise(1)[0, ..., 0], "PPM": noise(2)[1],
        "TIFF": noise(1)[0, ..., 1].astype(np.uint16) * 257,
    }.items():  # fmt: skip
        path = tmp_path / "in" / "c" / f"{kind}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
        expected[kind] = rgb(path.read_bytes())
    Image.fromarray(noise(1)[0, ..., 0].astype(np.float32) / 255).save(tmp_path / "in" / "c" / "float.tif")
    pack(from_folder(tmp_path / "in"), tmp_path / "out")
    stored = {s.key.rpartition("-")[2]: s for s in samples(tmp_path / "out")}
    assert stored.pop("float").extension == "tif"  # PNG cannot hold it
    assert {s.extension for s in stored.values()} == {"png"}
    assert {kind: rgb(sample.image) for kind, sample in stored.items()} == expected


def test_pack_folder_test_share_holds_out_the_same_share_of_each_class(tmp_path: Path) -> None:
    for number, name in enumerate("a" * 20 + "b" * 10 + "c" * 10 + "d"):
        image_file(tmp_path / "in" / name / f"{number}.png", number)
    image_file(tmp_path / "kaggle" / "test" / "0.png", 1)
    os.symlink(tmp_path / "in", tmp_path / "kaggle" / "train")
    source, kaggle = from_folder(tmp_path / "in", 0.2), from_folder(tmp_path / "kaggle", 0.2)
    held_out = [[p.label for p in s.pictures(split, range(8))] for s, split in ((source, "test"), (kaggle, "val"))]
    assert [sorted(labels) for labels in held_out] == [[0, 0, 0, 0, 1, 1, 2, 2]] * 2
    assert (source.counts, kaggle.counts) == ({"train": 33, "test": 8}, {"train": 33, "val": 8, "test": 1})
    (tmp_path / "kaggle" / "val").mkdir()
    image_file(tmp_path / "kaggle" / "val" / "a" / "0.png", 1)
    with pytest.raises(ValueError, match="--test-share 0.2: SOURCE has the splits train, val, test; leave it out"):
        from_folder(tmp_path / "kaggle", 0.2)


# --- tars


def samples(folder: Path, split: str = "train") -> list[index.Sample]:
    data = index.open_split(str(folder), split)
    return [data.read(i) for i in range(len(data))]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_pack_tars_keeps_samples_splits_shards_and_facts(tmp_path: Path) -> None:
    made = pack(from_synthetic(11, 5), tmp_path / "in", shard_size=4).dataset
    again = pack(from_tars(str(tmp_path / "in")), tmp_path / "out", None, workers=2).dataset
    assert again == made
    for split in ("train", "test"):
        assert samples(tmp_path / "out", split) == samples(tmp_path / "in", split)


def test_pack_tars_resized_keeps_ids_keys_labels_and_measures_anew(tmp_path: Path) -> None:
    made = pack(from_synthetic(11, 5), tmp_path / "in", shard_size=4).dataset
    small = pack(from_tars(str(tmp_path / "in")), tmp_path / "out", None, Encoding(short_side=8, format="npy")).dataset
    before, after = (samples(tmp_path / name) for name in ("in", "out"))
    assert [(s.key, s.label) for s in after] == [(s.key, s.label) for s in before]
    assert [s.num_samples for s in small.splits["train"]] == [s.num_samples for s in made.splits["train"]]
    assert (small.classes, small.image_size, {s.extension for s in after}) == (made.classes, (8, 8), {"npy"})
    pixels = np.stack([np.asarray(decode(sample)) for sample in after]) / 255
    assert small.mean != made.mean
    np.testing.assert_allclose(np.array(small.mean), pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(np.array(small.std), pixels.std((0, 1, 2)), rtol=1e-12)


def test_pack_tars_of_a_glob_without_dataset_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = image_file(tmp_path / "a.png", 1).read_bytes()
    for shard in range(2):  # keys are repeated in each shard, as in many sets
        write_tar(tmp_path / "in" / f"{shard}.tar", {
            "0.png": image, "0.cls": b"7", "0.json": b"{}", "dir/1.seg.png": image, "1.txt": b"x", "1.png": image,
        })  # fmt: skip
    main(["index", str(tmp_path / "in" / "*.tar")])
    (tmp_path / "in" / "dataset.json").unlink()
    dataset = pack(from_tars(str(tmp_path / "in" / "*.tar"), "val"), tmp_path / "out", None).dataset
    assert [(s.key, s.extension, s.label) for s in samples(tmp_path / "out", "val")] == 2 * [
        ("0", "png", 7), ("dir/1", "png", -1), ("1", "png", -1),
    ]  # fmt: skip
    assert (dataset.num_classes, dataset.classes, list(dataset.splits)) == (8, None, ["val"])
    assert "left out: .json (2), .txt (2)" in caplog.text


def test_pack_tars_of_a_glob_has_the_split_of_dataset_json(tmp_path: Path) -> None:
    pack(from_synthetic(4, 4), tmp_path / "in", shard_size=2)
    assert list(from_tars(str(tmp_path / "in" / "test-*.tar")).counts) == ["test"]
    assert from_tars(str(tmp_path / "in" / "*.tar"), "all").counts == {"all": 8}
    with pytest.raises(
        ValueError, match="--source .*tars in it are of several splits .*test, train.*name those of one"
    ):
        from_tars(str(tmp_path / "in" / "*.tar"))


def test_pack_tars_refuses_what_is_not_indexed_or_has_splits(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "x.tar", {"0.png": b""})
    for path, split, message in (
        (tmp_path / "in", None, "not indexed yet; run `mae-dist data index '.*/in'`"),
        (tmp_path / "in" / "x.tar", None, "not indexed yet"),
        (tmp_path / "set", "val", "--split val: .* names the splits"),
    ):
        if path.name == "set":
            pack(from_synthetic(2, 2), path)
        with pytest.raises(ValueError, match=message):
            from_tars(str(path), split)


def test_pack_tars_test_share_keeps_keys_and_holds_out_of_every_class(tmp_path: Path) -> None:
    image = image_file(tmp_path / "a.png", 1).read_bytes()
    for shard in range(2):
        write_tar(tmp_path / "in" / f"{shard}.tar", {
            f"{n}.{kind}": content for n in range(10) for kind, content in (("png", image), ("cls", b"%d" % (n % 2)))
        })  # fmt: skip
    main(["index", str(tmp_path / "in" / "*.tar")])
    main(["pack", "tars", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--test-share", "0.2"])
    assert sorted(s.label for s in samples(tmp_path / "out", "test")) == [0, 0, 1, 1]
    both = [s.key for split in ("train", "test") for s in samples(tmp_path / "out", split)]
    assert sorted(both) == sorted(2 * [str(n) for n in range(10)])


def test_pack_test_share_keeps_links_to_one_image_together(tmp_path: Path) -> None:
    for number in range(20):
        image = image_file(tmp_path / f"in/a/{number}.png", number)
        os.link(image, image.with_name(f"{number}-hard.png"))
        image.with_name(f"{number}-soft.png").symlink_to(image)
    folder = from_folder(tmp_path / "in", test_share=0.3)
    with tarfile.open(tmp_path / "x-0.tar", "w") as tar:
        tar.add(tmp_path / "in/a", ".")
    main(["index", str(tmp_path / "x-0.tar")])
    for source in (folder, from_tars(str(tmp_path / "x-0.tar"), test_share=0.3)):
        train, test = (
            {picture.content for picture in source.pictures(split, range(source.counts[split]))}
            for split in ("train", "test")
        )
        assert len(train) + len(test) == 20
        assert not train & test
        assert test


def test_pack_tars_fingerprint_changes_with_a_tar_of_the_same_size_that_nothing_lists(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"0.png": image_file(tmp_path / "a.png", 1).read_bytes()})
    main(["index", str(tmp_path / "x.tar")])
    (tmp_path / "dataset.json").unlink()
    before = from_tars(str(tmp_path / "x.tar")).fingerprint
    assert from_tars(str(tmp_path / "x.tar")).fingerprint == before
    os.utime(tmp_path / "x.tar", ns=(1, 1))
    assert from_tars(str(tmp_path / "x.tar")).fingerprint != before


@pytest.mark.parametrize("split", ["../../evil", "a/b"])
def test_tars_split_that_is_no_file_name_is_refused(split: str, tars: Tars) -> None:
    folder = tars([2]).tars[0].parent
    with pytest.raises(ValueError, match=r"split .*: names files; use letters, digits, _ and - only"):
        from_tars(f"{folder}/*.tar", split)
