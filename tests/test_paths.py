"""Paths: lists, `::`, braces, patterns, folders, URLs, variables, and names that merely look like these."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mae_dist import paths


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """x-000 to x-003.tar in A, B/1/y.tar, B/z.tar, what lies beside tars, and a file with an odd name."""
    monkeypatch.chdir(tmp_path)
    for name in (*(f"A/x-00{i}.tar" for i in range(4)), "B/1/y.tar", "B/z.tar", "A/x-000.idx", "A/dataset.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a {0..1} [b]::c, d.tar").touch()
    return tmp_path


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("A/x-001.tar", ["A/x-001.tar"]),
        ("A/x-{000..002}.tar", ["A/x-000.tar", "A/x-001.tar", "A/x-002.tar"]),
        ("A/x-{003,001}.tar", ["A/x-003.tar", "A/x-001.tar"]),
        ("A/x-{000..001}.tar::B/z.tar", ["A/x-000.tar", "A/x-001.tar", "B/z.tar"]),
        ("A/x-00[12].tar", ["A/x-001.tar", "A/x-002.tar"]),
        ("{A/x-*[01],B/?}.tar", ["A/x-000.tar", "A/x-001.tar", "B/z.tar"]),
        ("A/*", ["A/x-000.tar", "A/x-001.tar", "A/x-002.tar", "A/x-003.tar"]),
        ("B/**/*.tar", ["B/1/y.tar", "B/z.tar"]),
        ("B/**", ["B/1/y.tar", "B/z.tar"]),
        ("**/y.tar", ["B/1/y.tar"]),
        ("[B]/**/**/?.tar", ["B/1/y.tar", "B/z.tar"]),
        ("**/1/**/*.tar", ["B/1/y.tar"]),
        ("B", ["B"]),
        ("a {0..1} [b]::c, d.tar", ["a {0..1} [b]::c, d.tar"]),
        ("s3://b/x-{0..1}.tar::hf://d/y.tar", ["s3://b/x-0.tar", "s3://b/x-1.tar", "hf://d/y.tar"]),
    ],
)
def test_path_names_files_folders_and_urls(part: str, expected: list[str]) -> None:
    assert paths.names(part) == expected


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("A/x-{000..007}.tar", ["A/x-004.tar: no such", "4 of 8"]),
        ("C/*.tar", ["C/*.tar: no file matches"]),
        ("{A,C}/*.tar", ["C/*.tar: no file matches"]),
        ("A/x-{000.tar", ["A/x-{000.tar: no such"]),
        ("[A, B", ["its brackets do not match"]),
        ("x-{0..99999999}.tar", ["braces", "1,000,000"]),
        ("pipe:cat A/x-000.tar", ["commands are not run"]),
        ("", ["no such"]),
    ],
)
def test_path_that_is_not_there_is_refused(part: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        paths.names(part)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", ["A"]),
        ("[A, B]", ["A", "B"]),
        ("[A::B,x-{0,1}.tar,]", ["A::B", "x-{0,1}.tar"]),
        ("['a, b', \"c\"]", ["a, b", "c"]),
        ("X[AB]", ["X[AB]"]),
        ("a {0..1} [b]::c, d.tar", ["a {0..1} [b]::c, d.tar"]),
    ],
)
def test_path_list_has_parts_that_its_text_gives_back(text: str, expected: list[str]) -> None:
    assert paths.parts(text) == expected
    assert paths.parts(paths.listed(expected)) == expected


def test_path_absolute_keeps_lists_patterns_and_urls(tree: Path) -> None:
    assert paths.absolute("B/**") == f"{tree}/B/**"
    assert paths.absolute("[A::s3://b/x.tar, B]") == f"[{tree}/A::s3://b/x.tar, {tree}/B]"


def test_path_variables_are_those_of_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/d")
    assert paths.with_variables("~/x") == "/home/me/x"
    assert paths.with_variables("[~/a, $DATA/b]::~") == "[/home/me/a, /d/b]::/home/me"
    assert paths.with_variables("train=~/a,test=$DATA/b") == "train=/home/me/a,test=/d/b"
    assert paths.with_variables("$DATA/x-{0..1}~/$/a~b") == "/d/x-{0..1}~/$/a~b"
    with pytest.raises(ValueError, match="no variable NOT_THERE"):
        paths.with_variables("$NOT_THERE/x")


def test_path_that_exists_with_a_dollar_or_a_tilde_stays(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/d")
    for name in ("d$DATA", "~", "e$NOT_THERE", "f, $DATA"):
        (tree / name).mkdir()
        assert paths.with_variables(name) == name
    assert paths.with_variables("[d$DATA, e$NOT_THERE::$DATA/y]") == "[d$DATA, e$NOT_THERE::/d/y]"


def test_path_folder_is_all_tars_at_any_depth_of_one_split(tree: Path) -> None:
    assert paths.tars_in("B") == ["B/1/y.tar", "B/z.tar"]
    (tree / "B/imagenet1k-train-00.tar").touch()
    (tree / "B/val").mkdir()
    (tree / "B/val/0.tar").touch()
    with pytest.raises(ValueError, match=r"several splits \(train, val\).*'B/\*\*/\*train\*\.tar'"):
        paths.tars_in("B")
    with pytest.raises(ValueError, match="no tars there"):
        paths.tars_in("B/val/none")
    (tree / "B/1/x.tar.gz").touch()
    with pytest.raises(ValueError, match=r"^B/1/x.tar.gz: is compressed; uncompress it, or name the tars to read"):
        paths.tars_in("B/1")


def test_path_folder_that_is_a_whole_disk_is_refused_and_links_are_read_once(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "B/loop").symlink_to(tree / "B")
    (tree / "B/again").symlink_to(tree / "B/1")
    assert sorted(map(os.path.basename, paths.tars_in("B"))) == ["y.tar", "z.tar"]
    monkeypatch.setattr(paths, "MOST_FOLDERS", 2)
    with pytest.raises(ValueError, match=f"^{tree}: has more than 2 folders; name tars, like"):
        paths.tars_in(str(tree))
    with pytest.raises(ValueError, match="^/: has more than 2 folders; name tars, like"):
        paths.names("/**")


def test_paths_colons_of_an_address_are_no_list() -> None:
    assert paths.names("http://[::1]:80/x.tar::s3://b/y.tar") == ["http://[::1]:80/x.tar", "s3://b/y.tar"]
