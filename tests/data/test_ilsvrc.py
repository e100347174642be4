"""`pack imagenet`: archives in ILSVRC's exact form, in miniature; labels that cannot be known are refused."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mae_dist.commands.data import main
from mae_dist.data import ilsvrc_labels, index

SYNSETS = {  # WNID: ILSVRC's id, words; sorted by id this is no order of WNIDs
    "n02012849": (3, "crane"), "n03126707": (1, "crane"), "n01440764": (4, "tench, Tinca tinca"),
    "n02119789": (2, "kit fox, Vulpes macrotis"),
}  # fmt: skip
BY_ID = [wnid for _, wnid in sorted((number, wnid) for wnid, (number, _) in SYNSETS.items())]
TRUTH = [4, 1, 1, 2, 3, 4]
"""ILSVRC's ids of the validation images 1 to 6."""
WNIDS = [BY_ID[number - 1] for number in TRUTH]


def jpeg(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (value, 255 - value, 7 * value % 256)).save(stream, "JPEG")
    return stream.getvalue()


def tar(path: Path | None, members: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar of files, also written to `path`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    if path is not None:
        path.write_bytes(stream.getvalue())
    return stream.getvalue()


def name_of(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def meta() -> bytes:
    """meta.mat as in ILSVRC2012_devkit_t12: the synsets of the images, and one above them."""
    fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    synsets = np.empty((len(BY_ID) + 1, 1), dtype=[(name, object) for name in fields])
    for row, wnid in enumerate(BY_ID):
        synsets[row, 0] = (float(row + 1), wnid, SYNSETS[wnid][1], "a gloss", 0.0, [], 0.0, 3.0)
    synsets[-1, 0] = (float(len(BY_ID) + 1), "n00001740", "entity", "that which is", 2.0, [1.0, 2.0], 1.0, 0.0)
    stream = io.BytesIO()
    savemat(stream, {"synsets": synsets}, do_compression=True)
    return stream.getvalue()


GROUND_TRUTH = "".join(f"{number}\n" for number in TRUTH).encode()
DEVKIT = "ILSVRC2012_devkit_t12/data/"


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """Training tars in the order of ids, with 3 images each; validation images in no order, as in the official tar."""
    inner = {
        f"{wnid}.tar": tar(None, {f"{wnid}_{n}.JPEG": jpeg(40 * row + n) for n in range(3)})
        for row, wnid in enumerate(BY_ID)
    }
    tar(tmp_path / "train.tar", inner)
    tar(tmp_path / "val.tar", {name_of(n): jpeg(200 + n) for n in (3, 1, 6, 2, 5, 4)})
    members = {f"{DEVKIT}ILSVRC2012_validation_ground_truth.txt": GROUND_TRUTH, f"{DEVKIT}meta.mat": meta()}
    tar(tmp_path / "devkit.tar.gz", {"ILSVRC2012_devkit_t12/readme.txt": b"x", **members}, "w:gz")
    return tmp_path


def pack(folder: Path, *options: str) -> index.Dataset:
    main(["pack", "imagenet", "--train", str(folder / "train.tar"), "--out", str(folder / "out"), *options])
    return index.Dataset.load(folder / "out")


def packed(folder: Path, split: str) -> dict[bytes, str]:
    """The WNID of each packed image."""
    data = index.open_split(str(folder / "out"), split)
    samples = [data.read(i) for i in range(len(data))]
    assert {sample.extension for sample in samples} == {"jpg"}
    return {sample.image: sorted(SYNSETS)[sample.label] for sample in samples}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_imagenet_archives_and_devkit_give_the_right_label_to_each_image(archives: Path, workers: str) -> None:
    val = ["--val", str(archives / "val.tar"), "--val-labels", str(archives / "devkit.tar.gz")]
    dataset = pack(archives, *val, "--workers", workers)
    assert dataset.classes == [
        "n01440764 tench, Tinca tinca", "n02012849 crane", "n02119789 kit fox, Vulpes macrotis", "n03126707 crane",
    ]  # fmt: skip
    assert packed(archives, "train") == {jpeg(40 * row + n): wnid for row, wnid in enumerate(BY_ID) for n in range(3)}
    assert packed(archives, "val") == {jpeg(200 + n): wnid for n, wnid in enumerate(WNIDS, 1)}
    assert {file.name for file in (archives / "out").iterdir()} == {
        "_info.json", "dataset.json", "train-000000.idx", "train-000000.tar", "val-000000.idx", "val-000000.tar",
    }  # fmt: skip


@pytest.mark.parametrize(
    "lists",
    [
        {"truth": GROUND_TRUTH, "meta.mat": meta()},
        {"truth": GROUND_TRUTH, "map_clsloc.txt": "".join(f"{w} {i} x_y\n" for i, w in enumerate(BY_ID, 1)).encode()},
        {"synsets in the order of ids": "\n".join(BY_ID).encode(), "truth": GROUND_TRUTH},
        {"imagenet_2012_validation_synset_labels.txt": "\n".join(WNIDS).encode()},
        {"names": b"n01440764 tench\nn02012849 crane\n", "labels": "\n".join(WNIDS).encode()},
        {"LOC_val_solution.csv": "\n".join(
            ["ImageId,PredictionString", *(f"{name_of(n)[:-5]},{WNIDS[n - 1]} 1 2 3 4 " for n in (2, 1, 6, 3, 4, 5))]
        ).encode()},
    ],
    ids=lambda lists: " ".join(lists),
)  # fmt: skip
def test_imagenet_validation_labels_are_read_from_any_list(tmp_path: Path, lists: dict[str, bytes]) -> None:
    for name, content in lists.items():
        (tmp_path / name).write_bytes(content)
    truth = ilsvrc_labels.read([tmp_path / name for name in lists])
    assert truth.of([name_of(n) for n in (3, 1, 6, 2, 5, 4)]) == [WNIDS[n - 1] for n in (3, 1, 6, 2, 5, 4)]


def test_imagenet_labels_that_cannot_be_known_are_refused(archives: Path) -> None:
    sorted_list = "\n".join(f"{wnid} {words}" for wnid, (_, words) in sorted(SYNSETS.items())).encode()
    for contents, message in (
        ([GROUND_TRUTH], "are no ranks of a list sorted by WNID; expected ILSVRC2012_devkit_t12.tar.gz"),
        ([GROUND_TRUTH, sorted_list], "are no ranks of a list sorted by WNID"),
        ([b"9\n", meta()], "has the id 9, which is the id of no synset"),
        ([b"hello\n"], "no list of synsets and no ground truth"),
        ([b"\x89PNG\xff"], "is no text"),
        ([b"n01440764\n" * 5], "--val: 1 of 6 images have no label, ILSVRC2012_val_00000006.JPEG first"),
        ([b"n01440764\n" * 7], "--val: has 6 images, but there are 7 labels"),
        ([b"n00000007\n" * 6], "n00000007 and 0 other synsets are not in"),
    ):
        files = [
            archives / f"{number}{'.mat' if content[:6] == b'MATLAB' else ''}"
            for number, content in enumerate(contents)
        ]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            pack(archives, "--val", str(archives / "val.tar"), "--val-labels", *map(str, files))
    with pytest.raises(ValueError, match="--val and --val-labels: give both or none"):
        pack(archives, "--val", str(archives / "val.tar"))


def test_imagenet_devkit_without_scipy_says_what_to_do(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)  # as where it is not installed
    with pytest.raises(ValueError, match="meta.mat: is read by scipy, which is not installed; `pip install scipy`, or"):
        ilsvrc_labels.read([archives / "devkit.tar.gz"])


def test_imagenet_archives_of_another_form_are_refused(archives: Path) -> None:
    train = archives / "train.tar"
    whole = train.read_bytes()
    for content, message in (
        (whole[:-15000], "is cut short in|is no complete tar"), (b"", "is no complete tar"),
        ((archives / "val.tar").read_bytes(), "contains no n01440764.tar, ...; expected ILSVRC2012_img_train.tar"),
        ((archives / "devkit.tar.gz").read_bytes(), "is no complete tar"),
        (tar(None, {"n01440764.tar": b"no tar"}), "n01440764.tar in it is no complete tar"),
    ):  # fmt: skip
        train.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            pack(archives)
    train.unlink()
    with pytest.raises(ValueError, match="train.tar: cannot be read"):
        pack(archives)


def test_imagenet_folder_of_class_tars_and_inner_tars_without_end_blocks(archives: Path) -> None:
    inner = tar(None, {"n01440764_1.JPEG": jpeg(1)})
    end = 512 + -(-len(jpeg(1)) // 512) * 512
    tar(archives / "train.tar", {"n01440764.tar": inner[:end], "n02012849.tar": inner})
    assert pack(archives).splits["train"][0].num_samples == 2
    folder = archives / "again" / "train.tar"
    folder.mkdir(parents=True)
    (folder / "n01440764.tar").write_bytes(inner)
    assert pack(archives / "again").classes == ["n01440764"]
