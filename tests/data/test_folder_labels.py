"""Labels of folders of images: lists beside them, names of files, COCO; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_folder_layout import files, read

from mae_dist.data.labels import class_in_name


def test_folder_tiny_imagenet_has_the_labels_of_its_annotations(tmp_path: Path) -> None:
    files(tmp_path, "train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG", "train/n01/n01_boxes.txt")
    files(tmp_path, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG", "wnids.txt")
    files(tmp_path, "val/val_annotations.txt", content="val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    assert read(tmp_path) == {"train": {"n01": 1, "n02": 1}, "val": {"n02": 1, "n01": 1}, "test": {None: 1}}


@pytest.mark.parametrize(
    "rows",
    [
        "file,label\n1.jpg,cat\n2.jpg,dog\n3.jpg,cat\n",
        "1,cat\n2,dog\n3,cat\n",
        "\ufeffimg\tlabel\r\ntrain/1.jpg\tcat\r\n./train/2.jpg\tdog\r\ntrain/3.jpg\tcat\r\n",
        "1.jpg cat\n2.jpg dog\n3.jpg cat\n",
        "1;cat\n2;dog\n3;cat\n",
        "width,image_id,class\n7,1.jpg,cat\n7,2.jpg,dog\n7,3.jpg,cat\n",
        "cat\ndog\ncat\n",
    ],
)  # fmt: skip
def test_folder_labels_option_reads_lists_of_many_forms(tmp_path: Path, rows: str) -> None:
    files(tmp_path, "train/1.jpg", "train/2.jpg", "train/3.jpg", "test/9.jpg", "test/8.jpg")
    files(tmp_path, "labels", content=rows)
    assert read(tmp_path, labels="labels") == {"train": {"cat": 2, "dog": 1}, "test": {None: 2}}


def test_folder_labels_that_are_numbers_stay_what_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files(tmp_path, "10.jpg", "2.jpg", "x.jpg", "y.jpg")
    files(tmp_path, "labels.csv", content="10.jpg,10\n2.jpg,2\nx.jpg,-1\n")
    assert read(tmp_path, labels="labels.csv") == {"train": {"10": 1, "2": 1, None: 2}}
    assert "of the 11 classes 0 to 10, 9 have no image" in caplog.text
    files(tmp_path, "labels.csv", content="10.jpg,20261126\n")
    with pytest.raises(ValueError, match="holds b'20261126', more than the number of any class"):
        read(tmp_path, labels="labels.csv")


def test_folder_labels_of_imagenets_flat_validation_images_belong_to_class_folders(tmp_path: Path) -> None:
    files(tmp_path, "Data/CLS-LOC/train/n00000001/1.JPEG", "Data/CLS-LOC/train/n00000002/1.JPEG", "Annotations/1.xml")
    files(
        tmp_path,
        "Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG",
        "Data/CLS-LOC/test/1.JPEG",
        "Data/CLS-LOC/test/2.JPEG",
    )
    rows = "ImageId,PredictionString\nILSVRC2012_val_00000001,n00000002 85 1 499 272 n00000002 5 1 9 2 \n"
    files(tmp_path, "LOC_val_solution.csv", content=rows)
    train = {"n00000001": 1, "n00000002": 1}
    expected = {"train": train, "val": {"n00000002": 1}, "test": {None: 2}}
    assert read(tmp_path, labels="LOC_val_solution.csv") == expected
    assert read(files(tmp_path, "synsets.txt", content="n00000002\n"), labels="synsets.txt") == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "is empty"), ("7.jpg,cat\n", "its 1 rows name no image"), ("cat\n", "its 1 labels are not as many"),
        ("1.jpg,a\n1.jpg,b\n", "1.jpg has two labels, a and b"), ("1.jpg,a\n2.jpg\n", "a line without a label"),
        ("1.jpg,a,b\n", "expected two columns, .* found 3 columns"), ("same,a\n", "same may be .* write paths"),
        ("1 val/1.jpg\n2 val/2.jpg\n", "has files where labels should be .val/2.jpg."),
        ("val/1.jpg,3\n", "labels of split val .3. are no class folders of the others .n01."),
    ],
)  # fmt: skip
def test_folder_labels_that_do_not_fit_are_refused(tmp_path: Path, rows: str, message: str) -> None:
    files(tmp_path, "train/n01/a.jpg", "val/1.jpg", "val/2.jpg", "val/x/same.jpg", "val/y/same.jpg")
    files(tmp_path, "labels.csv", content=rows)
    with pytest.raises(ValueError, match=f"--labels.*{message}"):
        read(tmp_path, labels="labels.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1.jpg,0.5\n2.jpg,0\n", "--labels: a row of split train holds b'0.5', expected a class number"),
        ("1.jpg,-2\n2.jpg,0\n", "a row of split train holds b'-2'"),
        ("1.jpg,a\n2.jpg,b,c\n", "labels.csv: a line of 3 columns, not 2: '2.jpg b c'; quote what has commas"),
    ],
)
def test_folder_labels_that_are_no_classes_are_refused(tmp_path: Path, rows: str, message: str) -> None:
    files(tmp_path, "1.jpg", "2.jpg")
    files(tmp_path, "labels.csv", content=rows)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, labels="labels.csv")


def test_folder_without_labels_says_where_they_may_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(files(tmp_path, "1.jpg", "metadata.csv")) == {"train": {None: 1}}
    assert "no labels; perhaps metadata.csv has them: --labels FILE\n" in caplog.text
    files(tmp_path / "hf", "train/1.png", "train/metadata.csv", "test/1.png", "test/metadata.csv")
    read(tmp_path / "hf")
    assert "perhaps test/metadata.csv or train/metadata.csv has them: --labels FILE, or --splits" in caplog.text
    with pytest.raises(ValueError, match=r"no images below it, only 1 .tar; tars are for `mae-dist data index`"):
        read(files(tmp_path / "more", "1.tar"))
    with pytest.raises(ValueError, match=r"only 1 .h5; unpack archives; write the images in arrays, .* to files, as"):
        read(files(tmp_path / "array", "train_x.h5"))


def test_folder_labels_option_name_takes_the_class_from_file_names_and_is_hinted_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files(tmp_path, *(f"train/{kind}.{n}.jpg" for kind in ("cat", "dog") for n in range(3)), "test1/1.jpg")
    splits = "train=train,test=test1"
    assert read(tmp_path, splits) == {"train": {None: 6}, "test": {None: 1}}
    assert "no labels; if names of images begin with classes (cat, dog): --labels name" in caplog.text
    assert read(tmp_path, splits, "name") == {"train": {"cat": 3, "dog": 3}, "test": {None: 1}}
    pets = files(tmp_path / "pets", "images/Abyssinian_1.jpg", "images/pit_bull_2.jpg", "images/pit_bull_10.jpg")
    assert read(pets, labels="name") == {"train": {"Abyssinian": 1, "pit_bull": 2}}
    files(pets, "trimaps/Abyssinian_1.png")
    with pytest.raises(ValueError, match="images, trimaps may be parts of samples.*--splits train=images"):
        read(pets, labels="name")
    files(pets, "list.txt", content="#Image CLASS-ID SPECIES\nAbyssinian_1 1 1\npit_bull_2 2 2\n")
    with pytest.raises(ValueError, match=r"rows name no image of .*\('Abyssinian_1 1' first\); write IMAGE,LABEL"):
        read(pets, "train=images", "list.txt")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("n01440764_10026.JPEG", "n01440764"), ("a/cat (1).jpg", "cat"), ("cat12.jpg", "cat"), ("cat_1_2.jpg", "cat_1"),
     ("12.jpg", None), ("cat.jpg", "cat"), ("train/-7-.png", None)],
)  # fmt: skip
def test_folder_class_in_a_name_is_what_is_before_its_last_number(name: str, expected: str | None) -> None:
    assert class_in_name(name) == expected
