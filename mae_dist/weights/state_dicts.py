"""Which tensors of a checkpoint are its model's: the state dict among other things, and its names without a prefix.

Trainers keep a model's tensors under a key of their own (``state_dict``, ``module``, ``teacher``) and put a prefix
before all names (``module.`` of DDP, ``_orig_mod.`` of torch.compile, ``backbone.``, ``encoder.``). A file with several
models is never guessed about.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae_dist.weights.checks import listed

AVERAGED = ("state_dict_ema", "model_ema")
"""Keys of averaged weights, which are taken before the others, as timm does."""
USUAL = (*AVERAGED, "state_dict", "model")
"""Keys under which a model is taken whatever else is in the file."""
CHOOSE = "choose one with `mae-dist import --key NAME`"
DEPTH = 3
"""Keys within keys in which models are looked for."""
STEM = re.compile(
    r"(.*?)(?:patch_embed\.proj\.weight|stem\.proj\.weight|(?:vit\.)?embeddings\.patch_embeddings\.projection\.weight)"
)
"""Name of the first layer of each model that mae_dist reads, after a prefix."""


class StateDict(NamedTuple):
    """A model's tensors by name, what lies beside them in the file (with "key", the key of the tensors), and sentences
    on what was found and left out on the way.
    """

    tensors: dict[str, Tensor]
    extras: dict[str, Any]
    found: list[str]
    left_out: list[str]


def choose(content: Any, key: str | None, origin: str) -> StateDict:
    """The state dict in what torch.save wrote: the one at `key` (with dots: within others), else the bare one, else the
    one of a usual key, else the only one. A `key` that is none of them is left to `without_prefix`. Raises ValueError
    where there is none, or several to choose from.
    """
    everything = dict(state_dicts(content))
    there = {name: tensors for name, tensors in everything.items() if holds_model(tensors)} or everything
    given = key in everything
    usual = next((name for name in ("", *USUAL) if name in there), None)
    if not given:  # or a prefix of names
        if usual is None and len(there) > 1:
            raise ValueError(f"{origin}: has several state dicts, {listed(list(there))}; {CHOOSE}")
        key = usual if usual is not None else next(iter(there), None)
    nameless = [*lists_of_tensors(content)]
    if key is None:
        lists = f"; the tensors of {listed(nameless)} have no names" if nameless else ""
        raise ValueError(f"{origin}: has no state dict: tensors by name, alone or under a key such as model{lists}")
    tensors = {str(name): value for name, value in everything[key].items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            raise ValueError(f"{origin}: {name} is sparse, quantised, complex or empty; use a file of plain floats")
    extras = {name: value for name, value in content.items() if name != key} | ({"key": key} if key else {})
    others = [name for name in everything if name != key and not given]
    left_out = [f"other state dicts of the file: {listed(others)} (--key takes one)"] if others else []
    alone = [name for name, value in content.items() if key and isinstance(value, Tensor) and value.numel() > 1]
    if alone := [*nameless, *alone]:
        left_out.append(f"tensors without the names of a model's: {listed(alone)}, perhaps averaged weights")
    return StateDict(tensors, extras, [f"its weights under the key {key}"] if key else [], left_out)


def state_dicts(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, dict]]:
    """The dictionaries in `content` that hold tensors, by key; "" for itself. Those of an optimizer are none, nor is
    one with other dictionaries of tensors and no model's own, as where a tensor counts the steps.
    """
    if not isinstance(content, dict):
        return
    inner = [pair for name, value in _entries(content, key, depth) for pair in state_dicts(value, name, depth + 1)]
    if any(isinstance(value, Tensor) for value in content.values()) and (not inner or holds_model(content)):
        yield key, content
    yield from inner


def holds_model(content: dict) -> bool:
    """Whether one of the tensors has the name of a model's first layer."""
    return any(isinstance(value, Tensor) and STEM.fullmatch(str(name)) for name, value in content.items())


def lists_of_tensors(content: Any, key: str = "", depth: int = 0) -> Iterator[str]:
    """The keys in `content` of lists with floating-point tensors, which have no names."""
    for name, value in _entries(content, key, depth):
        if isinstance(value, list | tuple) and any(isinstance(x, Tensor) and x.is_floating_point() for x in value):
            yield name
        yield from lists_of_tensors(value, name, depth + 1)


def _entries(content: Any, key: str, depth: int) -> Iterator[tuple[str, Any]]:
    """What lies in a dictionary, each with its whole key, but for optimizers and what is too deep."""
    for name, value in content.items() if isinstance(content, dict) and depth < DEPTH else ():
        if isinstance(name, str) and not name.startswith("optim"):
            yield f"{key}.{name}" if key else name, value


def without_prefix(found: StateDict, key: str | None, origin: str) -> StateDict:
    """The tensors of one model without the prefix that its names share. Tensors beside it, a projection head or another
    network, are left out and named. Raises ValueError where several models lie beside each other.
    """
    stems = {match[1] for name in found.tensors if (match := STEM.fullmatch(name))}
    if key is not None and found.extras.get("key") != key:
        others, stems = stems, {stem for stem in stems if stem.rstrip(".") == key}
        if not stems:
            names = [stem.rstrip(".") for stem in sorted(others) if stem]
            there = f"; it has the prefixes {listed(names)}" if names else ""
            raise ValueError(f"--key {key}: {origin} has no model under this key or prefix{there}")
    if len(stems) > 1:
        names = [stem.rstrip(".") or "(no prefix)" for stem in sorted(stems)]
        raise ValueError(f"{origin}: has several models, with the prefixes {listed(names)}; {CHOOSE}")
    prefix = next(iter(stems), "")
    if not prefix:
        return found
    kept = {name.removeprefix(prefix): value for name, value in found.tensors.items() if name.startswith(prefix)}
    others = [name for name in found.tensors if not name.startswith(prefix)]
    left_out = [f"tensors beside {prefix}*: {listed(others)}"] if others else []
    sentence = (
        f"all names without their prefix {prefix}" if not others else f"the tensors {prefix}*, without this prefix"
    )
    return found._replace(tensors=kept, found=[*found.found, sentence], left_out=[*found.left_out, *left_out])
