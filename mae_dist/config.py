"""Settings: how they are read, checked, compared and written. The settings themselves are in `schema`.

Promises: a key that does not exist, a value of the wrong type and values that contradict each other are refused here,
in one sentence, before anything else happens. Imports no torch, so that a mistake is answered in a fraction of a second
and a login node can check a run. Nothing outside this file knows OmegaConf.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mae_dist import model_sizes
from mae_dist.schema import (
    RESULT_SECTIONS,
    SCHEMAS,
    WHERE_DATA_LIES,
    FinetuneConfig,
    KnnRunConfig,
    MaeConfig,
    PretrainConfig,
    ProbeConfig,
    RunConfig,
    TrainConfig,
)

T = TypeVar("T")


def split_words(verb: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """(CONFIG.yaml or None, the section.key=value) of a command line; ValueError for a second file."""
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ValueError(f"{verb}: one CONFIG.yaml, not {len(files)} ({', '.join(files)}); settings are key=value")
    return (files[0] if files else None), [word for word in words if "=" in word]


def load(verb: str, file: str | Path | None, overrides: Sequence[str] = ()) -> Any:
    """Read `file` and `section.key=value` overrides into the verb's frozen dataclass and check it.

    Raises ValueError with one sentence: the field, the value, what is allowed.
    """
    result = read(SCHEMAS[verb], f"{verb} needs", f"see mae-dist {verb} --help", file, overrides)
    check(result)
    return result


def read(schema: type[T], needs: str, hint: str, file: str | Path | None, overrides: Sequence[str]) -> T:
    """Read `file` and `key=value` overrides into a frozen dataclass of settings; ValueError in one sentence, which
    begins with ``needs`` and ends with ``hint`` when a field is missing. An override may say `none`, as --help does,
    for null.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    config, kinds = OmegaConf.structured(schema), _kinds(schema)
    layers = []
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"config {file}: no such file; the ones that come with mae_dist are in configs/")
        try:
            layers.append((f"{file}: ", OmegaConf.load(file)))
        except YAMLError as error:
            raise ValueError(f"config {file}: not YAML: {_one_line(error)}") from error
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"argument {override!r}: expected section.key=value, for example train.epochs=10")
        name, _, value = override.partition("=")
        absent = value.strip().lower() == "none" and NoneType in get_args(kinds.get(name))
        try:
            layers.append((f"{override}: ", OmegaConf.from_dotlist([f"{name}=null" if absent else override])))
        except (OmegaConfBaseException, YAMLError) as error:
            raise ValueError(f"argument {override!r}: {_one_line(error)}") from error
    for origin, layer in layers:
        if not OmegaConf.is_dict(layer):
            raise ValueError(f"{origin}expected sections with keys, found a list")
        try:
            if OmegaConf.select(layer, "track.wandb") is False:  # YAML reads a bare off as false
                OmegaConf.update(layer, "track.wandb", "off")
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise ValueError(_explain(error, schema, origin)) from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{needs} {', '.join(f'{name}=...' for name in missing)}; {hint}")
    result = OmegaConf.to_object(config)
    assert isinstance(result, schema)
    return result


def from_dict(verb: str, plain: dict[str, Any], origin: str) -> Any:
    """The config that `dump` wrote, parsed (ValueError naming `origin`)."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if verb not in SCHEMAS:
        raise ValueError(f"{origin}: verb {verb!r} is none of {', '.join(SCHEMAS)}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SCHEMAS[verb]), plain))
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error, SCHEMAS[verb], f"{origin}: ")) from error


POSITIVE = {
    "train.epochs", "train.steps", "train.global_batch", "train.clip_grad", "machine.processes", "machine.micro_batch",
    "machine.shards", "machine.timeout", "model.image_size", "checkpoint.every", "checkpoint.keep",
    "checkpoint.minutes",
    "checkpoint.keep_every", "checkpoint.rewind_after", "track.every", "track.evaluate_every", "view.test_crop",
    "data.shuffle_window", "data.std", "optim.base_lr", "knn.k", "knn.temperature", "mae.mask_ratio", "mae.decoder_dim",
    "mae.decoder_heads", "mae.predict", "heads.lars", "heads.sgd", "heads.adamw", "heads.blocks", "heads.held_out",
    "train.ema", "optim.layer_decay",
}  # fmt: skip
NOT_NEGATIVE = {
    "machine.workers", "machine.activation_checkpointing", "machine.restarts", "checkpoint.max_skipped", "view.pad",
    "optim.min_lr",
    "optim.warmup_epochs", "optim.weight_decay", "train.seed", "mae.decoder_depth",
    "heads.weight_decay",
}  # fmt: skip
AT_MOST_ONE = {
    "data.max_bad", "view.flip", "view.test_crop", "train.label_smoothing", "mae.predict", "view.random_erasing",
    "mix.mixup",
    "mix.cutmix", "mix.prob", "mix.switch", "optim.layer_decay", "data.mean", "data.std",
}  # fmt: skip
LESS_THAN_ONE = {"model.drop_path", "mae.mask_ratio", "optim.betas", "optim.momentum", "heads.held_out", "train.ema"}

OF_FINETUNE = {"model.drop_path", "model.train_blocks", "train.label_smoothing", "train.loss"}
OF_TRAINING = {
    "train.reduce_dtype", "train.clip_grad", "train.ema", "view.crop", "view.scale", "view.ratio", "view.pad",
    "view.flip", "view.randaugment", "view.random_erasing",
}  # fmt: skip
UNUSED_BY: dict[type[RunConfig], set[str]] = {
    PretrainConfig: OF_FINETUNE,
    ProbeConfig: OF_FINETUNE | {"optim.layer_decay"},
    FinetuneConfig: set(),
    KnnRunConfig: OF_FINETUNE | OF_TRAINING,
}
"""What a verb does not read of the sections model, view, train and optim, which it shares with others. The length of a
run and its batch may be said to knn too, which misleads nobody: it trains nothing.
"""


def check(config: RunConfig) -> None:
    """Refuse values that are impossible or contradict each other (ValueError)."""
    values: dict[str, Any] = {name: value for name, value, _ in _fields(config) if value is not None}
    if isinstance(config.machine.micro_batch, str) and values.pop("machine.micro_batch") != "auto":
        raise ValueError(f"machine.micro_batch={config.machine.micro_batch}: must be a number of images, or auto")
    check_ranges(values)
    if isinstance(config, PretrainConfig) and config.model.pool == "avg" and config.model.name.startswith("vit_"):
        raise ValueError(
            "model.pool=avg: a ViT is pretrained with its last norm on all tokens, which avg takes away; leave it out, "
            "and choose avg in probe, knn or finetune"
        )
    for name, value in changed(config).items():
        if name in UNUSED_BY[type(config)]:
            verbs = [verb for verb, schema in SCHEMAS.items() if name in _used_fields(schema)]
            raise ValueError(f"{_given(name, value)}: is for {', '.join(verbs)}; leave it out")
    train = config.train
    if train.seed >= 2**32:
        raise ValueError(f"train.seed={train.seed}: must be at most 4294967295")
    for name in ("view.scale", "view.ratio"):
        low, high = values.get(name, (1.0, 1.0))
        if not 0 < low <= high or (name == "view.scale" and high > 1):
            raise ValueError(f"{name}=[{low}, {high}]: must be two positive numbers, small then large, scale up to 1")
    if isinstance(config, PretrainConfig):
        check_mae(config.mae)
    warmup = values.get("optim.warmup_epochs", 0)
    if train.steps is None and warmup and warmup >= train.epochs:
        raise ValueError(
            f"optim.warmup_epochs={warmup:g}: longer than the run (train.epochs={train.epochs:g}); "
            f"try optim.warmup_epochs={train.epochs * 0.05:g}"
        )
    if group(config) == 2:
        for name in ("train.global_batch", "machine.micro_batch"):
            value = values.get(name)
            if value is not None and (value < 2 or (value % 2 and name == "train.global_batch")):
                raise ValueError(f"{name}={value}: mixup and CutMix take pairs of images, so it must be even")
    if "heads.lars" in values:
        check_heads(config)
    if config.machine.processes is not None:
        check_world(config, config.machine.processes)


def check_ranges(values: dict[str, Any]) -> None:
    """Refuse numbers outside the range of their field (ValueError); `values` by `section.key`, others among them."""
    for name, value in values.items():
        numbers = [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, int | float)]
        if not numbers:
            continue
        least, most = min(numbers), max(numbers)
        given = _given(name, value)
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{given}: must be finite")
        if name in POSITIVE and not least > 0:
            raise ValueError(f"{given}: must be greater than 0")
        if name in NOT_NEGATIVE | AT_MOST_ONE | LESS_THAN_ONE and not least >= 0:
            raise ValueError(f"{given}: must be 0 or more")
        if name in AT_MOST_ONE and not most <= 1:
            raise ValueError(f"{given}: must lie between 0 and 1")
        if name in LESS_THAN_ONE and not most < 1:
            raise ValueError(f"{given}: must be less than 1")


def check_mae(mae: MaeConfig) -> None:
    """Refuse numbers out of range, and a decoder whose width its heads and positions do not divide (ValueError)."""
    check_ranges({f"mae.{name}": value for name, value, _ in _fields(mae)})
    if mae.decoder_dim % math.lcm(mae.decoder_heads, 4):
        raise ValueError(
            f"mae.decoder_dim={mae.decoder_dim}: must be divisible by mae.decoder_heads={mae.decoder_heads} and by 4"
        )


def group(config: RunConfig) -> int:
    """Neighbours in the order that must not be parted: 2 where images are mixed in pairs."""
    mix = getattr(config, "mix", None)
    return 2 if mix is not None and mix.enabled else 1


def check_heads(config: Any) -> None:
    """Refuse heads that would be missing or affect each other, and settings for heads where there are none."""
    heads = config.heads
    for name, value in changed(config).items():
        if not heads.active and name.startswith("heads."):
            raise ValueError(f"{_given(name, value)}: there is no head to try it on; give heads.lars=[lr, ...], say")
        if heads.active and name in ("optim.name", "optim.weight_decay"):
            own = "heads.weight_decay" if name == "optim.weight_decay" else "heads.lars, heads.sgd, heads.adamw"
            raise ValueError(f"{_given(name, value)}: several heads have their own ({own}); leave it out")
    for name in ("features", "weight_decay"):
        if heads.active and not getattr(heads, name):
            raise ValueError(f"heads.{name}=[]: nothing to try; give at least one, or leave it out")
    if heads.attentive and not heads.adamw:
        raise ValueError("heads.attentive=true: these heads are trained by AdamW; give heads.adamw=[lr, ...]")
    if heads.active and config.train.clip_grad is not None:
        raise ValueError(
            f"train.clip_grad={config.train.clip_grad:g}: several heads would clip each other; leave it out"
        )


def check_world(config: RunConfig, world: int) -> None:
    """Refuse more ranks than there are images, or pairs of them, in a step (ValueError)."""
    batch, most = config.train.global_batch, config.train.global_batch // group(config)
    if world > most:
        raise ValueError(
            f"train.global_batch={batch}: {world} processes are more than the {'images' if most == batch else 'pairs'} "
            f"of one step; start at most {most} processes or raise train.global_batch"
        )
    shards = config.machine.shards
    if shards is not None and config.machine.strategy != "hsdp":
        raise ValueError(f"machine.shards={shards}: is for machine.strategy=hsdp, not {config.machine.strategy}")
    if config.machine.strategy == "hsdp" and shards is not None and world % shards:
        raise ValueError(f"machine.shards={shards}: {world} processes do not divide into groups of {shards}")


def check_same_model(config: Any, origin: Any) -> None:
    """Whether the run of `init_from`, with the settings ``origin``, has the model of ``config``; a Mixer also needs the
    same image size, as its weights are bound to a grid. Raises ValueError.
    """
    model, other = config.model, origin.model
    if model.name != other.name:
        raise ValueError(
            f"model.name={model.name}: the run init_from={config.init_from} has {other.name}; "
            f"set model.name={other.name}"
        )
    if model.image_size != other.image_size and "num_heads" not in model_sizes.size_of(model.name):
        raise ValueError(
            f"model.image_size={model.image_size}: the run init_from={config.init_from} has {other.image_size}, and "
            f"{model.name} is bound to its grid; set model.image_size={other.image_size}"
        )


def total_steps(train: TrainConfig, num_samples: int) -> int:
    """Optimizer steps of a run over `num_samples` images an epoch."""
    if train.steps is not None:
        return train.steps
    return max(1, math.ceil(train.epochs * num_samples / train.global_batch))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dict in the order of the schema."""
    return dataclasses.asdict(config)


def dump(config: RunConfig) -> str:
    """YAML text that `load` reads back."""
    import yaml

    listed = {k: {a: list(b) if isinstance(b, tuple) else b for a, b in v.items()} if isinstance(v, dict) else v
              for k, v in to_dict(config).items()}  # fmt: skip
    return yaml.safe_dump(listed, sort_keys=False)


def result_settings(config: RunConfig) -> dict[str, Any]:
    """The flat `section.key -> value` that decides the result of a run."""
    flat = {}
    for name, values in to_dict(config).items():
        if name in RESULT_SECTIONS:
            flat |= {f"{name}.{k}": v for k, v in values.items() if not (name == "data" and k in WHERE_DATA_LIES)}
        elif name == "init_from":
            flat["init_from"] = values
    return flat


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """The result-changing fields in which two configs differ, each as 'field: old -> new'."""
    before, after = result_settings(old), result_settings(new)
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in after if before.get(k) != after.get(k)]


def changed(config: RunConfig) -> dict[str, Any]:
    """The flat `section.key -> value` that differs from the verb's default."""
    pairs = zip(_fields(config), _fields(type(config)()), strict=True)
    return {name: value for (name, value, _), (_, default, _) in pairs if value != default}


def settings_help(verb: str) -> str:
    """One line a field that the verb reads, `section.key  default  one of VALUES: meaning`, for --help."""
    lines, kinds = [], _kinds(SCHEMAS[verb])
    for name, (default, text) in _used_fields(SCHEMAS[verb]).items():
        shown = "(required)" if default == "???" else "none" if default is None else str(default)
        if choices := _choices(kinds[name]):
            text = f"{'any' if isinstance(default, tuple) else 'one'} of {', '.join(choices)}: {text}"
        lines.append(f"  {name:24s} {shown:22s} {text}")
    return "\n".join(lines)


def _fields(config: Any, prefix: str = "") -> list[tuple[str, Any, str]]:
    rows = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            rows += _fields(value, f"{item.name}.")
        else:
            rows.append((prefix + item.name, value, item.metadata["help"]))
    return sorted(rows, key=lambda row: "." in row[0])


def _kinds(schema: Any, prefix: str = "") -> dict[str, Any]:
    """The types of all fields by `section.key`."""
    kinds = {}
    for name, kind in get_type_hints(schema).items():
        kinds |= _kinds(kind, f"{name}.") if dataclasses.is_dataclass(kind) else {prefix + name: kind}
    return kinds


def _choices(kind: Any) -> tuple[str, ...]:
    """The words that a type allows, within a tuple too; () where it allows any."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(choice for part in get_args(kind) for choice in _choices(part))


def _used_fields(schema: type[RunConfig]) -> dict[str, tuple[Any, str]]:
    """The fields that the schema's verb reads: `section.key -> (default, meaning)`."""
    return {name: (default, text) for name, default, text in _fields(schema()) if name not in UNUSED_BY.get(schema, ())}


def _given(name: str, value: Any) -> str:
    """A setting as a command line has it."""
    return f"{name}={list(value) if isinstance(value, tuple) else value}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(error: Exception, schema: type[Any], origin: str) -> str:
    """OmegaConf's message in one sentence: where, the field, what is wrong; what to write for an unknown one."""
    from omegaconf.errors import ConfigKeyError

    lines = [line.strip() for line in str(error).splitlines()]
    name = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key:")), "")
    if name and origin.startswith(f"{name}="):
        origin = ""
    if not isinstance(error, ConfigKeyError):
        text = re.sub(r" '\$VALUE'| of type '\$VALUE_TYPE'", "", lines[0])  # of an element, which OmegaConf cannot name
        return origin + (f"{name}: {text}" if name else text)
    here = list(_used_fields(schema))
    near = [field for field in here if field.endswith(f".{name}")]  # its section is missing
    verbs = [verb for verb, other in SCHEMAS.items() if any(name in f.split(".") for f in _used_fields(other))]
    if verbs and not near:
        return f"{origin}{name} is for {', '.join(verbs)}; leave it out"
    known = here if "." in name else sorted({field.partition(".")[0] for field in here})
    near = near or difflib.get_close_matches(name, known, n=1)
    return f"{origin}{name}: there is no such setting" + (f"; did you mean {' or '.join(near)}?" if near else "")
