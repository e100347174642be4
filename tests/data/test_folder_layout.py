"""Layouts of folders: read where they are certain, asked about where they are not, nothing lost without a word."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from pathlib import Path

import pytest

from mae_dist.data import folder_files, folder_layout

Splits = dict[str, dict[str | None, int]]
"""How many images of each class (None: no label) a split has."""

HEIC = ".heic is not read: convert it to jpg or png"


def files(folder: Path, *paths: str, content: str = "x") -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    return folder


def read(folder: Path, answer: str | None = None, labels: str | None = None) -> Splits:
    found = folder_files.find(folder)
    option = labels if labels is None or labels.startswith(("folder", "name")) else folder / labels
    layout = folder_layout.read(folder, found, answer, option)
    names = layout.classes or [*map(str, range(layout.num_classes or 0))]
    splits: Splits = {}
    for split, rows in layout.splits.items():
        for file, label in rows:
            name = file.problem or (None if label < 0 else names[label])
            splits.setdefault(split, {}).setdefault(name, 0)
            splits[split][name] += 1
    return splits


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ("cat/2020/1.jpg cat/2020/2.jpg dog/2020/1.jpg", {"train": {"cat": 2, "dog": 1}}),
        ("cat/1.jpg dog/more/still/1.jpg", {"train": {"cat": 1, "dog": 1}}),
        ("cat/2020/1.jpg cat/2021/1.jpg dog/2020/1.jpg dog/2021/1.jpg", {"train": {"cat": 2, "dog": 2}}),
        ("cat/siamese/1.jpg dog/poodle/1.jpg dog/pug/1.jpg", {"train": {"cat": 1, "dog": 2}}),
        ("a/airfield/1.jpg f/field/wild/1.jpg f/field/tame/1.jpg",
         {"train": {"a/airfield": 1, "f/field/wild": 1, "f/field/tame": 1}}),
        ("1.jpg b/.x.jpg", {"train": {None: 1}}),
        ("train/1.jpg test/1.jpg", {"train": {None: 1}, "test": {None: 1}}),
        ("Train/a/1.jpg VALID/a/1.jpg", {"train": {"a": 1}, "val": {"a": 1}}),
        ("train/a/1.jpg validation/a/1.jpg test/1.jpg", {"train": {"a": 1}, "val": {"a": 1}, "test": {None: 1}}),
        ("train/a/images/1.jpg train/a/a_boxes.txt test/images/1.jpg", {"train": {"a": 1}, "test": {None: 1}}),
        ("set/data/train/a/1.jpg set/data/val/a/1.jpg set/x.txt", {"train": {"a": 1}, "val": {"a": 1}}),
        ("train/a/1.jpg val/a/1.jpg __MACOSX/train/a/._1.jpg .DS_Store a/Thumbs.db annotations/1.xml",
         {"train": {"a": 1}, "val": {"a": 1}}),
        ("a/1.jpg 2.jpg b.heic", {"train": {"a": 1, "in no class folder": 1, HEIC: 1}}),
        ("label_0/1.jpg label_1/1.jpg", {"train": {"label_0": 1, "label_1": 1}}),
        ("mask/1.jpg no_mask/1.jpg", {"train": {"mask": 1, "no_mask": 1}}),
        ("train_inn/1.jpg field/1.jpg valley/1.jpg", {"train": {"train_inn": 1, "field": 1, "valley": 1}}),
    ],
)  # fmt: skip
def test_folder_layouts_that_are_certain_are_read(tmp_path: Path, paths: str, expected: Splits) -> None:
    assert read(files(tmp_path, *paths.split())) == expected


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("training/a/1.jpg training/b/1.jpg testing/a/1.jpg", "testing, training may.*train=training,test=testing"),
        ("traindata/1.jpg testdata/1.jpg", "testdata, traindata may be.*--splits train=traindata,test=testdata"),
        ("trainA/1.jpg testA/1.jpg testB/1.jpg trainB/1.jpg", "testA, testB, trainA, trainB may.*=trainA,test=testA"),
        ("my-test2/1.jpg my-train2/1.jpg a/1.jpg b/1.jpg c/1.jpg", "train=my-train2,test=my-test2"),
        ("truck/1.jpg oval/1.jpg contest/1.jpg test/1.jpg", "beside it not.*for example --splits train=.,test=test$"),
        ("d/train/a/1.jpg d/held_test/a/1.jpg", "train=d/train,test=d/held_test"),
        ("images/1.jpg masks/1.png", "images, masks may be parts.*--labels folder:1.* or name.*--splits train=images"),
        ("train/images/1.jpg val/images/1.jpg train/labels/1.txt", "--splits train=train/images,val=val/images"),
        ("JPEGImages/1.jpg SegmentationClass/1.png SegmentationObject/1.png Annotations/1.xml", "train=JPEGImages"),
        ("images+1/1.jpg masks+1/1.png", "--splits 'train=images 1'"),
        ("train.X1/a/1.jpg train.X2/b/1.jpg val.X/a/1.jpg", "are splits .first bring the folders of a split together"),
        ("training/1.jpg testing/1.jpg", "testing, training may be splits or classes"),
        ("cat/train/x/1.jpg cat/test/1.jpg cat/gt/1.jpg dog/train/1.jpg dog/test/1.jpg",
         r"splits .test, train. are in the folders cat, dog; put them above, as train/cat, or add --splits none"),
        ("imagesTr/a/1.jpg imagesTr/b/1.jpg imagesTs/a/1.jpg", "imagesTr, imagesTs may be splits or classes"),
        ("imagesTr/1.jpg labelsTr/1.nii", "imagesTr may be splits or classes"),
        ("2020/a/1.jpg 2020/b/1.jpg 2021/b/1.jpg", "2020, 2021 may be splits or classes"),
        ("x/a/1.jpg x/b/1.jpg y/a/1.jpg y/b/1.jpg", "x, y have folders of the same names"),
        ("photos/a/1.jpg photos/b/1.jpg", "all images are in photos, with folders a, b; give --source .*/photos"),
        ("train/a/1.jpg extra/a/1.jpg", "train named like a split, but extra beside it not"),
        ("cat/1.jpg dog/1.jpg test/1.jpg", "test named like a split, but cat, dog beside it not.*--splits none"),
        ("train/a/1.jpg val/a/1.jpg valid/a/1.jpg", "val, valid are both 'val'"),
        ("train/a/1.jpg val/x.txt", "no images of split 'val' in its folder val"),
        ("a/1.txt a/2.txt b/3", "no images below it, only 2 .txt, 1 without extension"),
        ("train/Cat/1.jpg val/cat/1.jpg", "one class has two names, 'Cat' in train and 'cat' in val"),
        ("train/e\u0301/1.jpg val/\xe9/1.jpg", "one class has two names"),
        ("train/\udce9/1.jpg", "has a name that is no text in UTF-8"),
    ],
)  # fmt: skip
def test_folder_layouts_that_are_not_certain_are_asked_about(tmp_path: Path, paths: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(files(tmp_path, *(path.replace("+", " ") for path in paths.split(" "))))
    if example := re.search(r"for example --splits (.*)", str(error.value)):
        read(tmp_path, shlex.split(example[1])[0])


def test_folder_labels_option_says_which_folder_is_the_class(tmp_path: Path) -> None:
    folder = files(tmp_path, "a/x/1.jpg", "a/y/z/2.jpg", "b/x/3.jpg", "b/4.jpg", "masks/x/1.jpg", "images/x/1.jpg")
    assert read(folder, labels="folder:1") == {"train": {"a": 2, "b": 2, "masks": 1, "images": 1}}
    assert read(folder, labels="folder:2") == {"train": {"x": 4, "y": 1, "in no class folder": 1}}
    assert read(folder, labels="folder:-1") == {"train": {"x": 4, "z": 1, "b": 1}}
    with pytest.raises(ValueError, match="--labels folder:0: write folder:1 for the first"):
        read(folder, labels="folder:0")


def test_folder_splits_option_answers(tmp_path: Path) -> None:
    folder = files(tmp_path, "training/a/1.jpg", "training/b/1.jpg", "held/out/a/1.jpg", "more/c/1.jpg")
    assert read(folder, "none") == {"train": {"training": 2, "held": 1, "more": 1}}
    assert read(folder, "train=training,test=held/out") == {"train": {"a": 1, "b": 1}, "test": {"a": 1}}
    assert read(folder, "train=.,val=held/out") == {"train": {"training": 2, "more": 1}, "val": {None: 1}}
    for answer, message in {
        "training": "write none, or each split once", "train=x": "has no folder x", "train=../in": "has no folder",
        "train=more,test=more/": "two splits have the same folder", "a/b=more": "write none",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"--splits {answer}: .*{message}"):
            read(folder, answer)


def test_folder_splits_option_takes_lists_of_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files(tmp_path, *(f"images/{kind}/{number}.jpg" for kind in ("pie", "sushi") for number in range(3)))
    lists = {"train": "pie/0\nsushi/0\nsushi/1\ngone/7\n", "test": "images/pie/1.jpg 1 7\nimages/sushi/2.jpg 2 7\n"}
    for split, rows in lists.items():
        files(tmp_path, f"meta/{split}.txt", content=rows)
    answer = ",".join(f"{split}={tmp_path}/meta/{split}.txt" for split in lists)
    assert read(tmp_path, answer) == {"train": {"pie": 1, "sushi": 2}, "test": {"pie": 1, "sushi": 1}}
    assert "train.txt: 1 of its 4 rows name no image ('gone/7' first)" in caplog.text
    assert "1 images, of no split, are left out: images/pie/2.jpg" in caplog.text
    files(tmp_path, "meta/more.txt", content="pie/1\n")
    files(tmp_path, "meta/none.txt", content="9 1\n")
    files(tmp_path, "meta/short.txt", content="0\n")
    for last, message in {
        "more": r"--splits: images/pie/1.jpg is in the lists of test and val", "none": "1 of its 1 rows name no image",
        "short": "--splits .*short.txt: 0 may be images/pie/0.jpg or images/sushi/0.jpg; write paths",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read(tmp_path, f"{answer},val={tmp_path}/meta/{last}.txt")


def test_folder_splits_option_takes_a_list_of_all_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files(tmp_path, *(f"all/{kind}/{number}.jpg" for kind in ("pie", "sushi") for number in range(3)))
    rows = (
        "kind,split,file\npie,train,pie/0.jpg\npie,Validation,pie/1.jpg\nsushi,training,sushi/0.jpg\npie,,pie/2.jpg\n"
    )
    files(tmp_path, "s.csv", content=rows)
    answer = str(tmp_path / "s.csv")
    assert read(tmp_path, answer) == {"train": {"pie": 1, "sushi": 1}, "val": {"pie": 1}}
    assert "3 images, of no split, are left out: all/pie/2.jpg, all/sushi/1.jpg" in caplog.text
    for rows, message in {
        "pie/0.jpg 1\n": "'1' is no split; write IMAGE,SPLIT", "pie/0.jpg\n": "names no split",
        "pie/0.jpg train\n0.jpg test\n": "0.jpg may be all/pie/0.jpg or all/sushi/0.jpg",
        "0.jpg,a,train\n": "expected two columns, file and split",
    }.items():  # fmt: skip
        files(tmp_path, "s.csv", content=rows)
        with pytest.raises(ValueError, match=f"--splits .*s.csv: .*{message}"):
            read(tmp_path, answer)


def test_folder_lists_name_images_by_the_ids_of_cub(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [f"{kind}/a {number}.jpg" for kind in ("001.Auk", "002.Owl") for number in range(3)]
    lists = {"images": images, "image_class_labels": [1, 1, 1, 2, 2, 2], "train_test_split": [1, 0, 1, 1, 1, 0]}
    files(tmp_path, *(f"images/{image}" for image in images))
    for name, column in lists.items():
        files(tmp_path, f"{name}.txt", content="".join(f"{row} {value}\n" for row, value in enumerate(column, 1)))
    answer = str(tmp_path / "train_test_split.txt")
    expected = {"train": {"001.Auk": 2, "002.Owl": 2}, "test": {"001.Auk": 1, "002.Owl": 1}}
    caplog.set_level("INFO")
    assert read(tmp_path, answer) == read(tmp_path / "images", answer) == expected
    assert caplog.text.count("images by their ids in") == 2
    numbers = {split: {f"{int(name[2]) - 1}": n for name, n in of.items()} for split, of in expected.items()}
    assert read(tmp_path, answer, labels="image_class_labels.txt") == numbers
    assert read(tmp_path, "none", labels="image_class_labels.txt") == {"train": {"0": 3, "1": 3}}
    assert "image_class_labels.txt: labels 1 to 2 become classes 0 to 1" in caplog.text
    files(tmp_path, "classes.txt", content="1 001.Auk\n2 002.Owl\n7 003.None\n")
    assert read(tmp_path, answer, labels="image_class_labels.txt") == expected
    assert read(tmp_path, f"train={tmp_path}/image_class_labels.txt") == {"train": {"001.Auk": 3, "002.Owl": 3}}
    files(tmp_path, "classes.txt", content="1 Auk\n2 Auk\n")
    assert read(tmp_path, answer, labels="image_class_labels.txt") == numbers
    for folder in (tmp_path, tmp_path / "images"):
        with pytest.raises(ValueError, match=f"has lists of the images of each split; add --splits {answer}, or"):
            read(folder)
    files(tmp_path, "train_test_split.txt", content="1 1\n9 0\n")
    with pytest.raises(ValueError, match="train_test_split.txt: .*images.txt has no image with the id '9'"):
        read(tmp_path, answer)


def test_folder_list_takes_words_for_no_label_as_none_and_reports_names_among_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["nan", "None", "NULL", "NA", "n/a", "#N/A", "<NA>", "", "-1", "cat"]
    files(tmp_path, *(f"{number}.jpg" for number in range(len(words))))
    files(tmp_path, "l.csv", content="".join(f"{number}.jpg,{word}\n" for number, word in enumerate(words)))
    assert read(tmp_path, labels="l.csv") == {"train": {None: 9, "cat": 1}}
    files(tmp_path, "l.csv", content="0.jpg,0\n1.jpg,1\n2.jpg,1=\n")
    assert read(tmp_path, labels="l.csv") == {"train": {None: 7, "0": 1, "1": 1, "1=": 1}}
    assert "--labels: 2 of 3 labels are numbers, but not 1=; all count as names" in caplog.text


def test_folder_labels_of_coco_are_joined_by_id(tmp_path: Path) -> None:
    files(tmp_path, "a/1.jpg", "b/2.jpg")
    plain = {"images": [{"id": 7, "file_name": "a/1.jpg"}, {"id": 8, "file_name": "b/2.jpg"}],
             "annotations": [{"image_id": 8, "category_id": 3}, {"image_id": 7, "category_id": 4}],
             "categories": [{"id": 3, "name": "elk"}, {"id": 4, "name": "fox"}]}  # fmt: skip
    (tmp_path / "l.json").write_text(json.dumps(plain))
    assert read(tmp_path, labels="l.json") == {"train": {"fox": 1, "elk": 1}}
    (tmp_path / "l.json").write_text(json.dumps(plain | {"annotations": plain["annotations"][:1]}))
    assert read(tmp_path, labels="l.json") == {"train": {None: 1, "elk": 1}}
    assert read(tmp_path, f"train={tmp_path}/l.json") == {"train": {None: 1, "elk": 1}}
    assert read(tmp_path, f"train={tmp_path}/l.json", "folder:1") == {"train": {"a": 1, "b": 1}}
    plain["annotations"] += [{"image_id": 8, "category_id": 4}]
    (tmp_path / "l.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"b/2.jpg has two labels, elk and fox"):
        read(tmp_path, labels="l.json")
    (tmp_path / "l.json").write_text(json.dumps(plain | {"images": []}))
    with pytest.raises(ValueError, match=r"its images and annotations do not go together \(KeyError 8\)"):
        read(tmp_path, labels="l.json")
    (tmp_path / "l.json").write_text(json.dumps(plain | {"images": 2 * plain["images"]}))
    with pytest.raises(ValueError, match="two of its images have one id"):
        read(tmp_path, labels="l.json")
    (tmp_path / "l.json").write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(ValueError, match=r"--splits .*l.json: names no image"):
        read(tmp_path, f"train={tmp_path}/l.json")


def test_folder_reports_what_is_left_out_and_what_may_be_a_mistake(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/2.jpg", "cover.jpg", "train/c/notes.txt")
    assert read(tmp_path)["val"] == {"a": 1, "in no class folder": 1}
    for said in (
        "1 images, of no split, are left out: cover.jpg",
        "val has no image of 1 classes, b first",
        "no classes: train/c",
    ):
        assert said in caplog.text


def test_folder_warns_of_masks_beside_images_and_of_numbers_sorted_as_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files(tmp_path, *(f"{number}/a.jpg" for number in range(11)), "0/mask.jpg", "0/a (1).jpg")
    assert len(read(tmp_path)["train"]) == 11
    assert "parts of others" not in caplog.text
    assert "classes are sorted as text, so class 10 has the number 2" in caplog.text
    files(tmp_path, "0/a_Mask.png", "0/a (1)-gt_2.png")
    read(tmp_path)
    assert "2 images may be parts of others, as masks are, and are taken as images: 0/a (1)-gt_2, " in caplog.text


def test_folder_links_that_double_images_are_counted_and_refused_between_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Links by path and hard links, of files and of folders, are the same."""
    files(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg")
    os.link(tmp_path / "train/a/1.jpg", tmp_path / "train/b/1.jpg")
    (tmp_path / "train/b/again.jpg").symlink_to(tmp_path / "train/b/2.jpg")
    assert read(tmp_path) == {"train": {"a": 1, "b": 3}, "val": {"a": 1}}
    assert "1 images are links to the file of one in another class: train/a/1.jpg and train/b/1.jpg" in caplog.text
    assert "1 images are links to the file of one: train/b/2.jpg and train/b/again.jpg" in caplog.text
    (tmp_path / "val/b").symlink_to(tmp_path / "train/b")
    with pytest.raises(ValueError, match="3 files are images of two splits by links, train/.* as --splits train=train"):
        read(tmp_path)
    assert read(tmp_path, "train=train,val=val") == {"train": {"a": 1, "b": 3}, "val": {"a": 1, "b": 3}}
    assert "3 images are links to the file of one in another split" in caplog.text


def test_folder_follows_links_but_no_loops(tmp_path: Path) -> None:
    folder = files(tmp_path / "in", "a/1.jpg")
    files(tmp_path / "elsewhere", "2.jpg")
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    found = folder_files.find(folder)
    assert [(f.path, f.problem) for f in found.files] == [("a/1.jpg", ""), ("b/2.jpg", ""), ("gone.jpg", "broken link")]
    assert found.loops == ["a/loop"]
    (folder / "dogs").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="in/dogs: a broken link, perhaps to a folder"):
        folder_files.find(folder)


def test_folder_of_the_whole_machine_is_refused_and_a_long_search_says_how_far_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="/: is the whole machine; name the folder of the images"):
        folder_files.find(Path("/"))
    monkeypatch.setattr(folder_files, "OFTEN", 2)
    caplog.set_level(logging.INFO)
    read(files(tmp_path, "a/1.jpg", "b/1.jpg"))
    assert "2 folders so far, with 1 images" in caplog.text


def test_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, "a/1.jpg", "b/1.jpg")

    scan = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "b":  # the tests' user may be root, who may read all
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"b: cannot be read \(Permission denied\)"):
        read(tmp_path)
