"""Lists of splits and labels beside folders of images, in the forms in which data sets are published."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_folder_layout import Splits, files, read

from mae_dist.data import folder_files, folder_layout, label_list

FLAT, ROOMS = "images/{1,2,3}.jpg", "office/hall/{1,2}.jpg home/hall/1.jpg home/bath/1.jpg"
Case = tuple[str, dict[str, str], Splits]
"""Paths of images, lists, and what the splits of these lists are."""
CASES: dict[str, Case] = {
    "food": (
        "images/pie/{1,2}.jpg images/egg/{1,2}.jpg",
        {"meta/train.txt": "pie/1\negg/2\n", "meta/test.txt": "pie/2\negg/1\n"},
        {"train": {"pie": 1, "egg": 1}, "test": {"pie": 1, "egg": 1}},
    ),
    "dtd": (
        "images/pie/{1,2}.jpg images/egg/{1,2}.jpg",
        {"train1.txt": "pie/1.jpg\negg/1.jpg\n", "val1.txt": "pie/2.jpg\n", "test1.txt": "egg/2.jpg\n",
         "train2.txt": "pie/1.jpg\n", "joint_anno.txt": "pie/1.jpg pie\n"},
        {"train": {"pie": 1, "egg": 1}, "val": {"pie": 1}, "test": {"egg": 1}},
    ),
    "sun": (
        "SUN/a/abbey/{1,2}.jpg SUN/b/bay/open/{3,4}.jpg",
        {"Training_01.txt": "/a/abbey/1.jpg\r\n/b/bay/open/3.jpg",
         "Testing_01.txt": "/a/abbey/2.jpg\r\n/b/bay/open/4.jpg"},
        {"train": {"a/abbey": 1, "b/bay/open": 1}, "test": {"a/abbey": 1, "b/bay/open": 1}},
    ),
    "places": (
        "data/a/air/{1}.jpg data/b/bay/open/{1}.jpg val_256/v_{1,2}.jpg",
        {"places365_train_standard.txt": "/a/air/1.jpg 0\n/b/bay/open/1.jpg 1\n",
         "places365_val.txt": "v_2.jpg 1\nv_1.jpg 0\n"},
        {"train": {"0": 1, "1": 1}, "val": {"0": 1, "1": 1}},
    ),
    "no labels": (
        FLAT, {"images_train.txt": "1\n2\n", "images_test.txt": "3\n"}, {"train": {None: 2}, "test": {None: 1}}
    ),
    "aircraft": (
        FLAT, {"x_train.txt": "1 707-320\n2 A 300 B4\n", "x_test.txt": "3 707-320\n"},
        {"train": {"707-320": 1, "A 300 B4": 1}, "test": {"707-320": 1}},
    ),
    "domains with labels": (
        ROOMS, {"train_office.txt": "office/hall/1.jpg 1\noffice/hall/2.jpg 1\n",
                "home_test.txt": "home/hall/1.jpg 1\nhome/bath/1.jpg 0\n"},
        {"train": {"1": 2}, "test": {"1": 1, "0": 1}},
    ),
    "domains": (
        "office/hall/1.jpg office/bath/2.jpg home/hall/1.jpg home/bath/1.jpg",
        {"train_office.txt": "office/hall/1.jpg\noffice/bath/2.jpg\n", "home_test.txt": "home/hall/1.jpg\n"},
        {"train": {"hall": 1, "bath": 1}, "test": {"hall": 1}},
    ),
    "two columns": (
        "train_images/a{0,1}.png test_images/b{0}.png",
        {"train.csv": "id_code,grade\na0,0\na1,1\n", "test.csv": "id_code\nb0\n"},
        {"train": {"0": 1, "1": 1}, "test": {None: 1}},
    ),
    "celeba": (
        "img_align/00000{1,2,3}.jpg",
        {"list_eval_partition.csv": "image_id,partition\n000001.jpg,0\n000002.jpg,1\n000003.jpg,2\n"},
        {"train": {None: 1}, "val": {None: 1}, "test": {None: 1}},
    ),
    "pets": (
        "pets/a_{1,2}.jpg pets/B_{1,2}.jpg",
        {"annotations/trainval.txt": "a_1 1 1 2\nB_1 2 1 1\n", "annotations/test.txt": "a_2 1 1 2\n"},
        {"train": {None: 2}, "test": {None: 1}},
    ),
}  # fmt: skip


def made(folder: Path, paths: str, lists: dict[str, str]) -> Path:
    """A folder with these images, whose names may have braces, and lists."""
    for path in paths.split():
        head, _, rest = path.partition("{")
        names, _, tail = rest.partition("}")
        files(folder, *(f"{head}{name}{tail}" for name in names.split(",")))
    for name, rows in lists.items():
        files(folder, name, content=rows)
    return folder


@pytest.mark.parametrize(("paths", "lists", "expected"), CASES.values(), ids=CASES)
def test_folder_beside_lists_of_splits_is_asked_about_and_the_answer_reads_them(
    tmp_path: Path, paths: str, lists: dict[str, str], expected: Splits
) -> None:
    with pytest.raises(ValueError, match="has lists of the images of each split; add --splits ") as error:
        read(made(tmp_path, paths, lists))
    assert (answer := re.search("--splits (.*), or --splits none", str(error.value)))
    assert read(tmp_path, shlex.split(answer[1])[0]) == expected
    assert sum(read(tmp_path, "none")["train"].values()) == sum(len(path.split(",")) for path in paths.split())


@pytest.mark.parametrize(
    ("paths", "lists"),
    [
        ("a/{1,2}.jpg b/{1}.jpg", {"train.txt": "a/1.jpg\n"}),
        ("a/{1,2}.jpg b/{1}.jpg", {"train.txt": "epoch 1\n", "test.txt": "epoch 2\n"}),
        ("train/a/{1,2}.jpg test/a/{3}.jpg", {"train.txt": "a/1.jpg\n", "test.txt": "a/3.jpg\n"}),
    ],
)
def test_folder_beside_files_that_are_no_lists_of_splits_is_read(
    tmp_path: Path, paths: str, lists: dict[str, str]
) -> None:
    assert sum(sum(split.values()) for split in read(made(tmp_path, paths, lists)).values()) == 3


def test_folder_that_all_images_are_in_is_no_class_where_it_has_class_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    signs = made(
        tmp_path / "signs",
        "Final_Training/Images/0/{1,2}.ppm Final_Training/Images/1/{1}.ppm Final_Test/Images/{1}.ppm",
        {},
    )
    assert read(signs, "train=Final_Training,test=Final_Test") == {"train": {"0": 2, "1": 1}, "test": {None: 1}}
    assert "folder Images has all images of train, test, and is no class; --labels folder:1 makes it one" in caplog.text
    assert read(signs, "train=Final_Training", "folder:1") == {"train": {"Images": 3}}
    mixed = made(tmp_path / "mixed", "train/a/{1}.jpg train/a/x/{1}.jpg train/a/y/{1}.jpg", {})
    assert read(mixed) == {"train": {"a": 3}}
    assert read(made(tmp_path / "one", "train/a/x/{1}.jpg", {})) == {"train": {"a": 1}}


@pytest.mark.parametrize(
    ("labels", "first"),
    [
        ([["1", "2", ""], ["3", "1"]], 1), ([["grade", "1", "2"]], 1), ([["1", "3"]], 0), ([["0", "1"]], 0),
        ([["1", "1"]], 0), ([["1", "b", "2"]], 0), ([["01", "2"]], 0), ([["1", "2"], ["0"]], 0), ([["2", "3"]], 0),
        ([[]], 0), ([], 0),
    ],
)  # fmt: skip
def test_labels_of_lists_begin_at_one_where_they_are_all_numbers_from_it(
    labels: list[list[str]], first: int, caplog: pytest.LogCaptureFixture
) -> None:
    lists = [label_list.LabelList(Path("l"), None, some) for some in labels]
    assert label_list.first_number(lists) == first
    assert ("labels 1 to" in caplog.text) == (first == 1)


@pytest.mark.parametrize(
    ("labels", "others", "first"),
    [
        ("12345", "01234", 1), ("25", "01234", 1), ("0134", "01234", 0), ("123456", "01", 1),
        ("1234", "01234", None), ("24", "01234", None), ("01234", "123", None), ("12345", "124", None),
        ("123", "12345", 0), ("135", "1234", 0), ("ab", "01", 0), ("", "01", 0),
    ],
)  # fmt: skip
def test_labels_of_a_split_begin_where_those_of_other_splits_do(labels: str, others: str, first: int | None) -> None:
    """None: refused. Test without the last class, the reverse order, and lists that begin with 0 and with 1."""
    lists, known = [label_list.LabelList(Path("l"), None, [*labels])], {*map(int, others)}
    if first is not None:
        assert label_list.first_number(lists, known) == first
        return
    with pytest.raises(ValueError, match="^--labels l: its labels are . to ., and those of other splits . to .: those"):
        label_list.first_number(lists, known)


def test_labels_from_one_move_to_zero_unless_they_are_names_of_class_folders(tmp_path: Path) -> None:
    rows = {"l.csv": "file,label\na.png,1\nb.png,2\n", "head.csv": "file,label\n"}
    flat = made(tmp_path / "flat", "{a,b}.png", rows)
    assert read(flat, labels="l.csv") == {"train": {"0": 1, "1": 1}}
    mixed = made(tmp_path / "mixed", "train/1/{x}.png train/2/{y}.png val/{a,b}.png", rows)
    assert read(mixed, labels="l.csv") == {"train": {"1": 1, "2": 1}, "val": {"1": 1, "2": 1}}
    assert folder_layout.read(mixed, folder_files.find(mixed), labels=mixed / "l.csv").classes == ["1", "2"]
    with pytest.raises(ValueError, match="head.csv: its 0 rows name no image of .*write IMAGE,LABEL"):
        read(flat, labels="head.csv")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("1 golden retriever\n2 pug\n", [["1", "golden retriever"], ["2", "pug"]]),
        ("my 1.jpg pug\nold 2.jpg cat\n", [["my 1.jpg", "pug"], ["old 2.jpg", "cat"]]),
        ("cat (1) 0\ndog (1) 1\n", [["cat (1)", "0"], ["dog (1)", "1"]]),
        ("a b cat\na c dog\n", [["a b", "cat"], ["a c", "dog"]]),
        ("#Image CLASS\n# more\n1 cat\n", [["1", "cat"]]),
        ("#1.jpg cat\n", [["#1.jpg", "cat"]]),
        ("cat\ndog\n", [["cat"], ["dog"]]),
    ],
)
def test_list_separated_by_blanks_has_them_in_names_or_in_labels(text: str, rows: list[list[str]]) -> None:
    assert label_list.table(text) == rows


def test_list_that_is_no_text_is_refused_and_headers_are_read_in_any_spelling(tmp_path: Path) -> None:
    made(tmp_path, "{1,2}.jpg", {"l.mat": "MATLAB\0\0", "l.csv": "Width;Image Name;ClassId\n7;1.jpg;3\n7;2.jpg;4\n"})
    with pytest.raises(ValueError, match="--labels .*l.mat: is no text; write rows IMAGE,LABEL"):
        read(tmp_path, labels="l.mat")
    assert read(tmp_path, labels="l.csv") == {"train": {"3": 1, "4": 1}}
