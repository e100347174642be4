"""Which of the folders of a data set are splits, and which are classes. Imports no torch.

What is certain is read: folders called train, val or test are splits, and the folders in them, or in a folder without
splits, are classes, each read to its bottom as torchvision's ImageFolder does. What could be either is asked about.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mae_dist.data import label_list, split_list
from mae_dist.data.folder_checks import Named, check_classes, check_links, classes_of, join, warn
from mae_dist.data.folder_files import UNPACK, File, Found
from mae_dist.data.folder_words import SPLITS, doubt, is_images, listed, split_like, split_pairs
from mae_dist.data.label_list import TINY_IMAGENET, Image, LabelList, Row
from mae_dist.data.labels import NAME, class_in, class_in_name, level_of

log = logging.getLogger(__name__)

YEAR = re.compile(r"(19|20)\d\d")


@dataclass(frozen=True)
class Labelled:
    """The images of each split with their labels (-1: none), the names of the classes, and their number; None where
    there are no labels, or where these are numbers.
    """

    splits: dict[str, list[tuple[File, int]]]
    classes: list[str] | None
    num_classes: int | None


def read(source: Path, found: Found, answer: str | None = None, labels: str | Path | None = None) -> Labelled:
    """The splits and labels of what lies below `source`.

    `answer` is the option --splits: 'none', a file of rows IMAGE,SPLIT, or 'train=FOLDER,test=FOLDER', where FOLDER
    may also be a file that lists images, with labels or without. `labels` is the option --labels: a file that
    `label_list` reads, which decides in splits whose images it names, 'folder:N' (see `labels.level_of`), or 'name'
    (see `labels.class_in_name`). Raises ValueError where something is not clear.
    """
    if not found.files:
        others = ", ".join(f"{count} {kind}" for kind, count in found.others.most_common(4))
        more = "tars are for `mae-dist data index`" if ".tar" in found.others else UNPACK
        raise ValueError(f"--source {source}: no images below it" + (f", only {others}; {more}" if others else ""))
    rule = re.fullmatch(rf"({NAME})|folder(:.*)?", str(labels))
    level = None if rule is None else NAME if rule[1] else level_of(rule[0])
    option = None if labels is None or rule else label_list.read(Path(labels))
    folders = _certain_splits(source, found) if answer is None else _answered_splits(source, answer)
    splits, lists = _files_of_splits(source, found.files, folders)
    if level is None and answer != "none":
        folders = _below_common(folders, splits)
    lists = {} if labels is not None else {split: some for split, some in lists.items() if any(some.labels)}
    named, by_list = _named(source, splits, folders, option, level, lists)
    check_classes(source, named, by_list)
    _unlabel_lone_folders(named, by_list)
    if answer is None and level in (None, NAME):
        by_folder = {split: files for split, files in named.items() if split not in by_list}
        _ask_about_parts(source, folders, by_folder, allow_one=level == NAME)
    check_links(source, named, meant=answer is not None)
    warn(source, found, folders, named, by_list)
    by_number = by_list >= {split for split in named if classes_of(named[split])}
    return _numbered(named, label_list.first_number([option] if option else [*lists.values()]) if by_number else None)


def _named(
    source: Path, splits: dict[str, list[File]], folders: dict[str, str], option: LabelList | None,
    level: int | str | None, lists: dict[str, LabelList],
) -> tuple[Named, set[str]]:  # fmt: skip
    """The images of each split with the names of their classes, and the splits that have these from a list."""
    named: Named = {}
    by_list: dict[str, list[tuple[Image, Row | None]]] = {}
    for split, files in splits.items():
        folder = folders[split]
        images = [Image(f.path, f.path[len(folder) + bool(folder) :]) for f in files]
        table, rows = _rows(source / folder, images, option or lists.get(split))
        if table is None:
            named[split] = _by_folder(split, folder, files, level)
            continue
        labelled = sum(row is not None and row.label != "" for row in rows)
        log.info("split %s: labels of %d images are from %s", split, labelled, table.source)
        by_list[split] = [*zip(images, rows, strict=True)]
        named[split] = [(f, (row.label or None) if row else None) for f, row in zip(files, rows, strict=True)]
        if option is None and split not in lists:
            table.check(images, rows, f"split {split}")
    if option is not None:
        if not by_list:
            what = f"labels are not as many as the images of a split of {source}"
            if option.files is not None:
                what = f"rows name no image of {source} ({(*option.files, 'none')[0]!r} first); write IMAGE,LABEL"
            raise ValueError(f"--labels {option.source}: its {len(option.labels)} {what}")
        if option.files is None and len(by_list) > 1:
            raise ValueError(f"--labels {option.source}: fits the splits {listed(by_list)}; write rows IMAGE,LABEL")
        pairs = [pair for some in by_list.values() for pair in some]
        option.check([image for image, _ in pairs], [row for _, row in pairs], f"the splits {listed(by_list)}")
    return named, set(by_list)


# --- splits


def _certain_splits(source: Path, found: Found) -> dict[str, str]:
    """The folder of each split, relative to `source` ('': `source` itself), where there is no doubt."""
    base, tree = "", _tree(found.files, "")
    while len(tree) == 1 and (only := next(iter(tree))) and only.lower() not in SPLITS and tree[only] != {""}:
        base = join(base, only)
        tree = _tree(found.files, base)
    tops = sorted(tree.keys() - {""})
    named = sorted(f for f in found.folders if os.path.dirname(f) == base and os.path.basename(f).lower() in SPLITS)
    if not named:
        if lists := split_list.offered(source, found.lists, [file.path for file in found.files]):
            raise ValueError(
                f"--source {source}: has lists of the images of each split; add --splits {shlex.quote(lists)}, or "
                f"--splits none for one split of all images"
            )
        if base:
            raise ValueError(
                f"--source {source}: all images are in {base}, with folders {listed(tops)}; give --source "
                f"{source / base}, or --splits none to make {base.split('/')[0]} the only class"
            )
        if inner := _splits_in(tree):
            raise ValueError(
                f"--source {source}: the splits ({listed(inner)}) are in the folders {listed(tops)}; put them above, "
                f"as {inner[-1]}/{tops[0]}, or add --splits none to take all images as one split"
            )
        if why := _doubt(tree):
            raise _question(source, why, base, tops)
        return {"train": ""}
    if others := [top for top in tops if top.lower() not in SPLITS]:
        why = f"{listed(map(os.path.basename, named))} named like a split, but {listed(others)} beside it not"
        raise _question(source, why, base, tops)
    splits = {name: [f for f in named if SPLITS[os.path.basename(f).lower()] == name] for name in SPLITS.values()}
    if twins := next((f for f in splits.values() if len(f) > 1), None):
        raise ValueError(
            f"--source {source}: {listed(twins)} are both {SPLITS[os.path.basename(twins[0]).lower()]!r}; "
            f"choose with --splits train=FOLDER,val=FOLDER,test=FOLDER"
        )
    if base:
        log.info("%s: reads %s, as all images are there", source, base)
    return {name: folders[0] for name, folders in splits.items() if folders}


def _tree(files: list[File], base: str) -> dict[str, set[str]]:
    """The folders with images in `base`, which has all of them: the folders with images in each. '' among them stands
    for images that lie there themselves.
    """
    tree: dict[str, set[str]] = defaultdict(set)
    for file in files:
        parts = file.path[len(base) + bool(base) :].split("/", 2)
        tree[parts[0] if len(parts) > 1 else ""].add(parts[1] if len(parts) > 2 else "")
    return tree


def _splits_in(tree: dict[str, set[str]]) -> list[str]:
    """The splits, sorted, of which several folders of this tree have several in them; [] if there are none."""
    found = [{name for name in names if name.lower() in SPLITS} for names in tree.values()]
    return sorted(set().union(*found)) if sum(len(names) > 1 for names in found) > 1 else []


def _doubt(tree: dict[str, set[str]]) -> str:
    """Why the folders of this tree may be splits, and not classes; '' if there is no reason to think so."""
    tops = sorted(tree.keys() - {""})
    like = [top for top in tops if split_like(top) is not None]
    if split_pairs(tops) or (like and 2 * len(like) >= len(tops)):
        return doubt(tops)
    if len(tops) < 2 or any("" in inner for inner in tree.values()):
        return ""
    counts = Counter(name for top in tops for name in tree[top])
    shared = {name for name, count in counts.items() if count > 1 and not name.isdigit()}
    if sum(len(tree[top] & shared) > 1 for top in tops) * 2 >= len(tops):
        return f"{listed(tops)} have folders of the same names ({listed(sorted(shared))}), so they may be splits"
    if all(YEAR.fullmatch(top) for top in tops) and not all(name.isdigit() for name in counts):
        return f"{listed(tops)} may be splits or classes"
    return ""


def _question(source: Path, doubt: str, base: str, tops: list[str]) -> ValueError:
    """What to ask, with an example in which each folder has the split that its name speaks of."""
    pairs = split_pairs(tops)
    guesses = {split: join(base, top) for top in reversed(tops) if (split := split_like(top) or pairs.get(top))}
    like = Counter(filter(None, (split_like(top) or pairs.get(top) for top in tops)))
    once = " (first bring the folders of a split together; links will do)" if max(like.values(), default=1) > 1 else ""
    guesses = guesses or {split: join(base, top) for split, top in zip(("train", "test"), tops, strict=False)}
    splits = {"train": base or "."} | guesses
    return ValueError(
        f"--source {source}: {doubt}; add --splits none if its folders are classes, or --splits SPLIT=FOLDER,... if "
        f"they are splits{once}, for example {_option(splits)}"
    )


def _option(splits: dict[str, str]) -> str:
    """The option --splits that names these folders."""
    return f"--splits {shlex.quote(','.join(f'{split}={folder}' for split, folder in splits.items()))}"


def _ask_about_parts(source: Path, folders: dict[str, str], named: Named, allow_one: bool) -> None:
    """Raise ValueError where the folders of labelled images are called like parts of samples, as images and masks. A
    single one is no part of anything if its name is not that of a class (`allow_one`).
    """
    above = [_above(file, folders[split]) for split, files in named.items() for file, name in files if name]
    names = {inner[0] for inner in above if inner}
    if (why := doubt(names)) and not (allow_one and len(names) == 1):
        images = sorted(filter(is_images, names)) or sorted(names)
        chosen = {split: join(folder, images[0]) for split, folder in folders.items()}
        raise ValueError(
            f"--source {source}: {why}; add --labels folder:1 if they are classes, or name the folder of images, for "
            f"example {_option(chosen)}"
        )


def _answered_splits(source: Path, answer: str) -> dict[str, str]:
    """The folder of each split as the option --splits says, or the file that lists its images; "" for all splits."""
    if answer == "none":
        return {"train": ""}
    if os.path.isfile(answer):
        return {"": os.path.abspath(answer)}
    folders: dict[str, str] = {}
    for part in answer.split(","):
        split, equals, folder = part.partition("=")
        folder = os.path.normpath(folder)
        if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+", split) or split in folders:
            raise ValueError(
                f"--splits {answer}: write none, or each split once as train=FOLDER,test=FOLDER, or a file "
                f"of rows IMAGE,SPLIT"
            )
        if os.path.isfile(folder) and not (source / folder).is_dir():
            folders[split] = os.path.abspath(folder)
            continue
        if os.path.isabs(folder) or folder.startswith("..") or not (source / folder).is_dir():
            raise ValueError(f"--splits {answer}: {source} has no folder {folder}")
        folders[split] = "" if folder == "." else folder
    if len(set(folders.values())) < len(folders):
        raise ValueError(f"--splits {answer}: two splits have the same folder")
    return folders


def _files_of_splits(
    source: Path, files: list[File], folders: dict[str, str]
) -> tuple[dict[str, list[File]], dict[str, LabelList]]:
    """The images of each split, and the lists that some are from. The folder of splits that are listed in
    files, which is put into `folders`, is that which they have in common, or that of each where these are apart.
    """
    lists = {split: split_list.of_split(Path(file)) for split, file in folders.items() if split and os.path.isabs(file)}
    names = {split: some.files or [] for split, some in lists.items()}
    if (file := folders.pop("", None)) is not None:
        names = split_list.by_split(Path(file))
        folders |= dict.fromkeys(names, file)
    splits = {split: split_list.files_of(Path(folders[split]), some, files) for split, some in names.items()}
    first: dict[str, str] = {}
    for split, some in splits.items():
        if twice := next((f.path for f in some if first.setdefault(f.path, split) != split), None):
            raise ValueError(f"--splits: {twice} is in the lists of {first[twice]} and {split}")
    folders |= split_list.folders_of({split: [os.path.dirname(f.path) for f in some] for split, some in splits.items()})
    for split in folders.keys() - splits.keys():
        splits[split] = _files_of(files, folders[split], folders.values())
        if not splits[split]:
            raise ValueError(f"--source {source}: no images of split {split!r} in its folder {folders[split] or '.'}")
    return {split: splits[split] for split in folders}, lists


def _below_common(folders: dict[str, str], splits: dict[str, list[File]]) -> dict[str, str]:
    """The folders of the splits, one deeper where that is the same for all images, and has class folders, as Images in
    train/Images/cat.
    """
    above = {split: [_above(file, folders[split]) for file in files] for split, files in splits.items()}
    within = {split: some for split, some in above.items() if any(some)}
    tops, classes = ({tuple(names[n : n + 1]) for some in within.values() for names in some} for n in (0, 1))
    mixed = any({len(names) > 1 for names in some} == {True, False} for some in within.values())
    if mixed or len(tops) != 1 or len(classes - {()}) < 2:
        return folders
    common = tops.pop()[0]
    log.info("folder %s has all images of %s, and is no class; --labels folder:1 makes it one", common, listed(within))
    return {split: join(folder, common) if split in within else folder for split, folder in folders.items()}


def _files_of(files: list[File], folder: str, claimed: Iterable[str]) -> list[File]:
    """The files below a folder, without those of the folders in it that other splits claim."""
    start = f"{folder}/" if folder else ""
    inner = tuple(f"{other}/" for other in claimed if other != folder and other.startswith(start))
    return [f for f in files if f.path.startswith(start) and not f.path.startswith(inner)]


# --- classes


def _rows(path: Path, images: list[Image], option: LabelList | None) -> tuple[LabelList | None, list[Row | None]]:
    """The list that is about the images of this split, and the row of each; None and no rows if there is none."""
    table = option
    if table is None and (path / TINY_IMAGENET).is_file():
        table = label_list.read(path / TINY_IMAGENET)
    if table is None or (table.files is None and any("/" in image.inner for image in images)):
        return None, []  # a list without files is for a folder without folders
    rows = table.rows_of(images)
    return (table, rows) if any(rows) else (None, [])


def _above(file: File, folder: str) -> list[str]:
    """The folders below `folder` that a file in it lies in."""
    return file.path[len(folder) + bool(folder) :].split("/")[:-1]


def _by_folder(split: str, folder: str, files: list[File], level: int | str | None) -> list[tuple[File, str | None]]:
    """The files, each with the folder below `folder` as its class that is at `level` (see `labels.level_of`), or the
    first, or by NAME with the class in its name; files beside class folders have a problem.
    """
    above = [_above(f, folder) for f in files]
    if isinstance(level, str):
        return [(f, class_in_name(f.path)) for f in files]
    if not any(above):
        return [(f, None) for f in files]
    by_letter = level is None and len({names[0] for names in above if names}) > 1 and all(
        len(names) > 1 and len(names[0]) == 1 and names[1][0].lower() == names[0].lower() for names in above
    )  # fmt: skip
    if by_letter:
        log.info(
            "split %s: its folders are first letters, as in Places365, so the folders in them are the classes", split
        )
    elif level is None and (deep := sum(len(names) > 1 for names in above)):
        log.info(
            "split %s: %d images in deeper folders belong to the class of the first; --labels folder:-1 takes the last",
            split,
            deep,
        )
    classes = ["/".join(names) if by_letter else class_in(names, level or 1) for names in above]
    return [
        (f, name) if name is not None else (f._replace(problem=f.problem or "in no class folder"), None)
        for f, name in zip(files, classes, strict=True)
    ]


def _unlabel_lone_folders(named: Named, by_list: set[str]) -> None:
    """Take the label from a split whose only folder is no class of train, as test/images in tiny-imagenet."""
    known = classes_of(named.get("train", []))
    for split, files in named.items():
        classes = classes_of(files)
        if split not in by_list and known and len(classes) == 1 and not classes & known:
            log.warning("split %s: its only folder, %s, is no class of train: no labels", split, *classes)
            named[split] = [(f, None) for f, _ in files]


def _numbered(named: Named, first: int | None) -> Labelled:
    """Names of classes as labels: numbers stay what they are where all are from lists, in which the first is `first`
    (None: they are not).
    """
    names = set().union(*map(classes_of, named.values()))
    if not names:
        return Labelled({split: [(f, -1) for f, _ in files] for split, files in named.items()}, None, None)
    others = [name for name in names if not re.fullmatch(r"-1|0|[1-9]\d*", name)]
    if first is not None and others and len(others) < len(names):
        what = f"{len(names) - len(others)} of {len(names)} labels are numbers, but not {listed(sorted(others))}"
        log.warning("--labels: %s; all count as names", what)
    if first is not None and not others:
        labels, classes = {name: max(int(name) - first, -1) for name in names}, None
        num_classes = max(labels.values()) + 1 or None
        if num_classes is not None and (empty := num_classes - len(names - {"-1"})):
            log.warning("of the %d classes 0 to %d, %d have no image", num_classes, num_classes - 1, empty)
    else:
        classes = sorted(names)
        if all(re.fullmatch("[0-9]+", name) for name in names) and classes != (right := sorted(names, key=int)):
            first = next(label for label, name in enumerate(classes) if name != right[label])
            log.warning("classes are sorted as text, so class %s has the number %d", classes[first], first)
        labels, num_classes = {name: label for label, name in enumerate(classes)}, len(classes)
    return Labelled(
        {split: [(f, -1 if n is None else labels[n]) for f, n in files] for split, files in named.items()},
        classes, num_classes,
    )  # fmt: skip
