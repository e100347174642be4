"""Which members of a tar are one sample, and which of them are its image and its label. Imports no torch.

A name is cut at its first dot, by the rule of webdataset and DALI: `a/b.seg.png` is seg.png of sample a/b. Where that
would make one sample of many images, whose names merely have dots (clip.0001.png), names are cut at the last.
"""

from collections.abc import Callable, Iterable

from mae_dist.data.folder_files import OF_SYSTEMS
from mae_dist.data.folder_words import parts_of_others
from mae_dist.data.idx import Entry, Members
from mae_dist.data.tar_reader import Member, Notes

IMAGES = (
    "jpg", "jpeg", "png", "webp", "npy", "tif", "tiff", "bmp", "ppm", "pgm", "pnm", "pbm", "gif", "jpe", "jfif",
)  # fmt: skip
"""Extensions that hold an image, in order of preference."""
LABEL_WORDS = ("cls", "label", "labels", "target", "class")
"""Words before .npy of an array that is no image."""
LABEL = "cls"
LABELS = (LABEL, "cls.txt")
"""Extensions that hold a label, also behind more words (output.cls), in order of preference."""
MOST_VIEWS = 4
"""Images of a sample that may be told from each other by a word before their extension."""


def split_name(name: str) -> tuple[str, str]:
    """Split 'a/b.seg.png' into key and extension ('a/b', 'seg.png'), at the first dot."""
    dot = name.find(".", name.rfind("/") + 1)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :])


def split_at_last_dot(name: str) -> tuple[str, str]:
    """Split 'a/b.seg.png' into key and extension ('a/b.seg', 'png'); cls.txt stays whole."""
    key, dot, extension = name.removesuffix(".txt" if name.lower().endswith(".cls.txt") else "").rpartition(".")
    return (name, "") if not dot or "/" in extension else (key, name[len(key) + 1 :])


def image_of(members: Members) -> str | None:
    """The extension of a sample's image: a plain one, else the first of several words."""
    plain = next((extension for extension in IMAGES if extension in members), None)
    return plain or next((extension for extension in members if _is_image(extension)), None)


def _is_image(extension: str) -> bool:
    """Whether a member is an image, by its extension and the words before it."""
    words, _, kind = extension.rpartition(".")
    return kind in IMAGES and not (kind == "npy" and words.rpartition(".")[2] in LABEL_WORDS)


def label_of(members: Members) -> str | None:
    """The extension of a sample's label, if it has one."""
    plain = next((extension for extension in LABELS if extension in members), None)
    return plain or next((extension for extension in members if extension.endswith((".cls", ".cls.txt"))), None)


def group(members: list[Member], notes: Notes) -> dict[str, Members]:
    """The samples of a tar by key, in its order, each with an image; their members need not be neighbours.

    Samples of one key in tars that were joined stay apart. Samples without an image are left out, and noted. Raises
    ValueError when a sample has a member twice.
    """
    members = [member for member in members if not _is_left_out(member.name, notes)]
    samples = _grouped(members, split_name)
    merged = [sample for sample in samples.values() if len(_images(sample)) > 1]
    plain = [any(image in sample for image in IMAGES) for sample in samples.values()]
    dotted = any(map(_has_dotted_names, merged)) or (merged and not any(plain))
    if dotted and not _are_views(list(samples.values())):
        whole = samples
        samples = _grouped(members, split_at_last_dot)
        lent = set[tuple[int, str]]()
        for (archive, key), sample in samples.items():  # clip.cls is the label of clip.0001.png, too
            shared = whole.get((archive, split_name(key)[0]), {})
            if label_of(sample) is None and LABEL in shared:
                sample[LABEL] = shared[LABEL]
                lent.add((archive, split_name(key)[0]))
        samples = {place: sample for place, sample in samples.items() if place not in lent or sample.keys() != {LABEL}}
        notes.add("names with several dots are cut at the last one", next(iter(merged[0].values())).name)
    elif merged:
        listed = ", ".join(_images(merged[0]))
        what = "samples have several images, of which one is taken"
        notes.add(what, f"{image_of(merged[0])} of {listed}", len(merged))
    beside = {extension for sample in samples.values() if any(i in sample for i in IMAGES) for extension in sample}
    kept: dict[str, Members] = {}
    for (archive, key), sample in samples.items():
        if (image := image_of(sample)) is None or (image not in IMAGES and image in beside):  # a mask without its image
            notes.add("samples have no image and are left out", key)
        else:
            kept[key if key not in kept else f"{key}#{archive}"] = sample
    if parts := parts_of_others(kept):
        notes.add("samples may be parts of others, as masks are, and are taken as images", parts[0], len(parts))
    return kept


def _is_left_out(name: str, notes: Notes) -> bool:
    """Whether a member is hidden, or of an operating system, which is noted."""
    folders, _, last = name.rpartition("/")
    left_out = last.startswith(".") or last.lower() in OF_SYSTEMS or "__MACOSX" in folders.split("/")
    if left_out:
        notes.add("hidden members, and those of an operating system, are left out", name)
    return left_out


def _grouped(members: Iterable[Member], split: Callable[[str], tuple[str, str]]) -> dict[tuple[int, str], Members]:
    samples: dict[tuple[int, str], Members] = {}
    for name, offset, size, archive in members:
        key, extension = split(name)
        sample = samples.setdefault((archive, key.removeprefix("./")), {})
        if other := sample.get(extension.lower()):
            raise ValueError(f"contains {name} twice" if other.name == name else f"contains {other.name} and {name}")
        sample[extension.lower()] = Entry(extension, offset, size, name)
    return samples


def _images(sample: Members) -> list[str]:
    return [extension for extension in sample if _is_image(extension)]


def _has_dotted_names(sample: Members) -> bool:
    """Whether images of a sample are numbered, or have labels of their own, so that they are several samples."""
    words = [extension.rpartition(".")[0] for extension in _images(sample)]
    return any(word.rpartition(".")[2].isdigit() or (word and f"{word}.{LABEL}" in sample) for word in words)


def _are_views(samples: list[Members]) -> bool:
    """Whether each sample has the same few images, which are named by words (left.png, right.png)."""
    kinds = {frozenset(_images(sample)) for sample in samples if _images(sample)}
    words = [extension.rpartition(".")[0] for kind in kinds for extension in kind]
    named = not any(word.isdigit() for word in words)
    return named and len(samples) > 1 and len(kinds) == 1 and len(words) <= MOST_VIEWS
