"""What the names of folders say: that they are splits, or parts of samples (images, masks) and no classes.

Imports no torch.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Names of folders (in any case) that are splits, and the names of these splits."""
LIKE = {
    "train": "train", "tr": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test",
    "ts": "test", "evaluation": "test", "eval": "test", "holdout": "test", "labelled": "", "labeled": "",
    "unlabelled": "", "unlabeled": "", "fold": "", "split": "",
}  # fmt: skip
"""Words in the names of folders that may be splits, and the splits that they may be, if that can be known."""
PICTURES = r"(?:images?|imgs?|photos?|pictures?|pics?|data)"
LIKE_SPLIT = re.compile(rf"(?:{PICTURES}|labels)?({'|'.join(LIKE)})(?:ing|set|files|{PICTURES})?")
SPLIT = re.compile("train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?")
IMAGES = re.compile(r"(?:jpe?g|png|rgb|train|val|test)?(?:images?|imgs?)(?:files)?")
OTHER_PARTS = re.compile(
    r"(?:train|val|test|images?|seg)?(?:masks?|labels?|annotations?|annots?|segmentation[a-z]*|gt|groundtruth|depths?|"
    r"trimaps?|thumbs|thumbnails?|previews?)(?:images?|maps?|files)?"
)


def split_like(name: str) -> str | None:
    """The split that a folder may be; '' where it may be one without a known name, None where it is like none."""
    words = (LIKE_SPLIT.fullmatch(word) for word in re.split("[^a-z]+", name.lower()))
    return next((LIKE[word[1]] for word in words if word and word[0] not in ("tr", "ts")), None)


def split_pairs(names: Iterable[str]) -> dict[str, str]:
    """The folders whose names are equal but for the split in them, as trainA and testA, and the split of each."""
    alike: dict[str, dict[str, str]] = defaultdict(dict)
    for name in sorted(names):
        for word in SPLIT.finditer(name.lower()):
            split = next(split for split in ("train", "val", "test") if word[0].startswith(split))
            alike[f"{name[: word.start()]}/{name[word.end() :]}".lower()][name] = split
    pairs = [found for found in alike.values() if {"train"} < {*found.values()}]
    return {name: split for found in pairs for name, split in found.items()}


def is_images(name: str) -> bool:
    """Whether a folder is called images, or the like."""
    return IMAGES.fullmatch(re.sub("[^a-z]", "", name.lower())) is not None


def _is_part(name: str) -> bool:
    if re.fullmatch(r"label\W*_?\d+", name.lower()):
        return False
    return is_images(name) or OTHER_PARTS.fullmatch(re.sub("[^a-z]", "", name.lower())) is not None


def doubt(names: Collection[str]) -> str:
    """Why folders of these names may be no classes, in a phrase; '' if there is no reason to think so."""
    splits = sorted(name for name in names if split_like(name) is not None)
    pairs = sorted(split_pairs(names))
    if pairs or (splits and 2 * len(splits) >= len(names)):
        splits = pairs or splits
        return f"{listed(splits)} may be splits or classes"
    parts = sorted(filter(_is_part, names))
    if parts and (len(parts) == len(names) or (len(parts) > 1 and 2 * len(parts) >= len(names))):
        return f"{listed(parts)} may be parts of samples, as images and their masks, or classes"
    return ""


def parts_of_others(stems: Collection[str]) -> list[str]:
    """The paths without extension, sorted, that are called like a part of another: a_mask or a-gt2 beside a."""
    known = set(stems)
    found = ((stem, re.fullmatch(r"(.+?)[ _-]+([a-z]+)[ _-]*\d*", stem, re.IGNORECASE)) for stem in sorted(known))
    return [stem for stem, words in found if words and words[1] in known and OTHER_PARTS.fullmatch(words[2].lower())]


def listed(names: Iterable[str]) -> str:
    """Names for a message, at most five of them."""
    names = [*names]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
