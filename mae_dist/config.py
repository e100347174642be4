"""Settings: how they are read, checked, compared and written. The settings themselves are in `schema`.

A key that does not exist, a value of the wrong type or out of range, and values that contradict each other are refused
here, in one sentence, before anything else happens. Imports no torch, so that an error is reported in a fraction of a
second and a login node can check a run. No other file imports OmegaConf.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_type_hints, overload

from mae_dist import heads_settings, hints, image_settings, recipes, resolutions, setting_texts, small_files, starts
from mae_dist import track_settings as tracking
from mae_dist.schema import (
    FREE_DATA,
    IMPORTED,
    RANDOM,
    RESULT_SECTIONS,
    SCHEMAS,
    FinetuneConfig,
    KnnRunConfig,
    MaeConfig,
    PretrainConfig,
    ProbeConfig,
    RunConfig,
    TrainConfig,
)
from mae_dist.setting import Range

T = TypeVar("T")
Overrides = Sequence[str]


class Setting(NamedTuple):
    """A setting: its value (in a schema: its default) and its type, meaning and range.

    It is read by `verbs` only, unless that is empty, and not by the verbs in `unless`.
    """

    value: Any
    kind: Any
    help: str
    range: Range
    verbs: tuple[str, ...]
    unless: tuple[str, ...]

    def is_read_by(self, verb: str) -> bool:
        """Whether a verb reads this setting of its schema."""
        return (not self.verbs or verb in self.verbs) and verb not in self.unless


type_hints = cache(get_type_hints)
"""The types of a dataclass's fields by name, which are always the same."""


def settings(config: Any, prefix: str = "") -> dict[str, Setting]:
    """The fields of a dataclass of settings, those of its sections as `section.key`; first those without a section."""
    flat, nested, kinds = {}, {}, type_hints(type(config))
    for item in dataclasses.fields(config):
        name, value, known = prefix + item.name, getattr(config, item.name), item.metadata
        if dataclasses.is_dataclass(value):
            nested |= settings(value, f"{name}.")
        else:
            readers = known.get("verbs", ()), known.get("unless", ())
            flat[name] = Setting(value, kinds[item.name], known["help"], known.get("range", Range()), *readers)
    return flat | nested


def settings_of(verb: str) -> dict[str, Setting]:
    """The settings that a verb reads, with their defaults, by `section.key`."""
    return {name: item for name, item in settings(SCHEMAS[verb]()).items() if item.is_read_by(verb)}


def readers() -> dict[str, list[str]]:
    """The settings of all verbs -> the verbs that read them."""
    found: dict[str, list[str]] = {}
    for verb in SCHEMAS:
        for name in settings_of(verb):
            found.setdefault(name, []).append(verb)
    return found


def split_words(verb: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """(CONFIG.yaml or None, the section.key=value) of a command line; ValueError for a second file."""
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ValueError(f"{verb}: one CONFIG.yaml, not {len(files)} ({', '.join(files)}); settings are key=value")
    return (files[0] if files else None), [word for word in words if "=" in word]


@overload
def load(verb: Literal["pretrain"], file: str | Path | None, overrides: Overrides = ()) -> PretrainConfig: ...
@overload
def load(verb: Literal["probe"], file: str | Path | None, overrides: Overrides = ()) -> ProbeConfig: ...
@overload
def load(verb: Literal["finetune"], file: str | Path | None, overrides: Overrides = ()) -> FinetuneConfig: ...
@overload
def load(verb: Literal["knn"], file: str | Path | None, overrides: Overrides = ()) -> KnnRunConfig: ...
@overload
def load(verb: str, file: str | Path | None, overrides: Overrides = ()) -> RunConfig: ...
def load(verb: str, file: str | Path | None, overrides: Overrides = ()) -> RunConfig:
    """Read `file`, a path or a recipe's name, and `section.key=value` overrides into the verb's dataclass; check it.

    Raises ValueError with one sentence: the field, the value, what is allowed.
    """
    file = None if file is None else recipes.find(verb, str(file))
    result = read(SCHEMAS[verb], f"{verb} needs", f"see mae-dist {verb} --help", file, overrides)
    check(result)
    return result


def read(schema: type[T], needs: str, hint: str, file: str | Path | None, overrides: Overrides) -> T:
    """Read `file` and `key=value` overrides into a frozen dataclass of settings.

    An override may have `none`, as --help shows it, where YAML has null. Raises ValueError with one sentence, which
    begins with ``needs`` and ends with ``hint`` when a field is missing.
    """
    from omegaconf import OmegaConf

    known, layers = settings(schema()), []
    kinds = {name: item.kind for name, item in known.items()}
    for origin, layer, written in _layers(kinds, file, overrides):
        plain = OmegaConf.to_container(layer, resolve=False) if OmegaConf.is_config(layer) else layer
        if not isinstance(plain, dict):
            raise ValueError(f"{origin}expected sections with keys, found a list")
        layers.append((origin, setting_texts.as_written(plain, written, kinds, origin)))
    config = copy.deepcopy(_defaults(schema))
    for group in (layers[:1], layers[1:]) if file is not None else (layers,):
        config = _with_layers(config, group, schema)

    def missing() -> list[str]:
        required = sorted(name for name, item in known.items() if item.value == "???")
        return [name for name in required if OmegaConf.select(config, name) is None]

    if "init_from" in kinds and not {"init_from", "out"} & {*missing()}:
        config = _with_start(config, schema, [plain for _, plain in layers])
    if names := missing():
        raise ValueError(f"{needs} {', '.join(f'{name}=...' for name in names)}; {hint}")
    result = OmegaConf.to_object(config)
    assert isinstance(result, schema)
    return result


@cache
def _defaults(schema: type[Any]) -> Any:
    """The defaults of a schema for OmegaConf, to copy: making them takes seven times as long."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(schema)


def _with_layers(config: Any, layers: Sequence[tuple[str, dict]], schema: type[Any]) -> Any:
    """A config, changed in place, under layers of settings: (what an error message begins with, nested settings).
    Where no two give the same setting they are merged as one, which takes as long as one of them.
    """
    from omegaconf import OmegaConf, errors

    if (joined := setting_texts.joined(plain for _, plain in layers)) is not None:
        with suppress(errors.OmegaConfBaseException, *small_files.errors()):
            return OmegaConf.unsafe_merge(config, joined)
    for origin, plain in layers:
        try:
            config = OmegaConf.unsafe_merge(config, plain)
        except (errors.OmegaConfBaseException, *small_files.errors()) as error:
            raise ValueError(_explain(error, plain, schema, origin)) from error
    return config


def _with_start(config: Any, schema: type[Any], layers: Sequence[Any]) -> Any:
    """The layers of settings above those of the run that `init_from` names, and these above the schema's defaults."""
    from omegaconf import OmegaConf, errors

    start = config.init_from
    known = starts.settings(start, config.out, masked="mae" in config)
    setting_texts.refuse_odd(known, f"init_from={start}: ")
    try:
        config = OmegaConf.merge(_defaults(schema), known, *layers) if known else config
    except (errors.OmegaConfBaseException, *small_files.errors()) as error:
        raise ValueError(f"init_from={start}: its config.yaml is damaged ({_one_line(error)})") from error
    if start != RANDOM and OmegaConf.is_missing(config.model, "name"):
        if not starts.is_of_others(Path(start)):
            raise ValueError(
                f"init_from={start}: no run lies there, which would say model.name; give that, or another run"
            )
        config = OmegaConf.unsafe_merge(config, {"model": {"name": starts.UNKNOWN}})
    return config


def _layers(kinds: Mapping[str, Any], file: str | Path | None, overrides: Overrides) -> Iterator[tuple[str, Any, Any]]:
    """(what an error message begins with, settings, the same without types) of the file, then of each override."""
    import yaml
    from omegaconf import OmegaConf, errors

    if file is not None:
        text = small_files.read_text(Path(file), small_files.MOST_YAML)
        small_files.check_yaml(f"config {file}", text)
        try:
            yield f"{file}: ", OmegaConf.load(io.StringIO(text)), yaml.load(text, yaml.BaseLoader)
        except (*small_files.errors(), OSError) as error:  # OSError: OmegaConf's for a single value
            raise ValueError(f"config {file}: not YAML: {_one_line(error)}") from error
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"argument {override!r}: expected section.key=value, for example train.epochs=10")
        name, _, value = override.partition("=")
        optional = NoneType in get_args(kinds.get(name))
        if not value.strip():  # as of $NAME in a shell that knows no NAME
            raise ValueError(f"argument '{name}=': needs a value{', or none' * optional}")
        none = optional and value.strip().lower() in ("none", "null")
        try:
            if setting_texts.is_text(kinds.get(name)) and not none:
                layer = setting_texts.from_override(name, value)
            else:
                layer = OmegaConf.from_dotlist([f"{name}=null" if none else override])
        except (errors.OmegaConfBaseException, *small_files.errors()) as error:
            what = "brackets, braces or quotes do not match" if isinstance(error, yaml.YAMLError) else _one_line(error)
            raise ValueError(f"argument {override!r}: {what.rpartition(f'argument {override!r}: ')[2]}") from error
        yield f"{override}: ", layer, {} if none else setting_texts.from_override(name, value)


def from_dict(verb: str, plain: dict[str, Any], origin: str, fingerprint: str) -> RunConfig:
    """The config that `dump` wrote for a run of data with this fingerprint, parsed (ValueError naming `origin`)."""
    from omegaconf import OmegaConf, errors

    if not isinstance(verb, str) or verb not in SCHEMAS:
        raise ValueError(f"{origin}: verb {str(verb)[:40]!r} is none of {', '.join(SCHEMAS)}")
    setting_texts.refuse_odd(plain, f"{origin}: ")
    try:
        result = OmegaConf.to_object(OmegaConf.merge(_defaults(SCHEMAS[verb]), plain))
    except (errors.OmegaConfBaseException, *small_files.errors()) as error:
        raise ValueError(_explain(error, plain, SCHEMAS[verb], f"{origin}: ")) from error
    assert isinstance(result, RunConfig)
    if fingerprint == IMPORTED and result.train.steps == 0:  # `mae-dist import` has written that
        return dataclasses.replace(result, train=dataclasses.replace(result.train, steps=None))
    return result


def check(config: RunConfig) -> None:
    """Refuse values that are impossible or contradict each other (ValueError)."""
    if isinstance(config.machine.micro_batch, str) and config.machine.micro_batch != "auto":
        raise ValueError(f"machine.micro_batch={config.machine.micro_batch}: must be a number of images, or auto")
    check_ranges(config)
    values = {name: item.value for name, item in settings(config).items() if item.value is not None}
    read_here = settings_of(next(verb for verb, schema in SCHEMAS.items() if schema is type(config)))
    for name, value in changed(config).items():
        if name not in read_here:
            raise ValueError(f"{hints.given(name, value)}: is for {', '.join(readers()[name])}; leave it out")
    if isinstance(config, PretrainConfig) and config.model.pool == "avg" and config.model.name.startswith("vit_"):
        raise ValueError("model.pool=avg: takes away a ViT's last norm, which pretraining needs; choose it in probe, "
                         "knn or finetune")  # fmt: skip
    image_settings.check(config)
    resolutions.check(config)
    tracking.check(config)
    if isinstance(config, ProbeConfig) and config.optim.name == "muon":
        raise ValueError("optim.name=muon: is for the matrices of blocks, which a probe does not train; leave it out")
    if isinstance(config, PretrainConfig):
        check_mae(config.mae)
    if isinstance(config, ProbeConfig):
        heads_settings.check(config, changed(config))
    check_steps(config, values)
    if config.machine.processes is not None:
        check_world(config, config.machine.processes)


def check_steps(config: RunConfig, values: Mapping[str, Any]) -> None:
    """Refuse a warmup that is longer than the run, and batches that do not divide into pairs (ValueError)."""
    epochs, warmup = config.train.epochs, values.get("optim.warmup_epochs", 0)
    if config.train.steps is None and warmup and warmup >= epochs:
        raise ValueError(
            f"optim.warmup_epochs={warmup:g}: longer than the run (train.epochs={epochs:g}); "
            f"try optim.warmup_epochs={epochs * 0.05:g}"
        )
    if group(config) == 2:
        for name in ("train.global_batch", "machine.micro_batch"):
            value = values[name]
            if value != "auto" and (value < 2 or (value % 2 and name == "train.global_batch")):
                raise ValueError(f"{name}={value}: mixup and CutMix take pairs of images, so it must be even")


def check_ranges(config: Any, prefix: str = "", origin: str = "") -> None:
    """Refuse numbers outside the ranges of a dataclass of settings (ValueError, which begins with ``origin``)."""
    for name, item in settings(config, prefix).items():
        numbers = [part for part in hints.parts(item.value) if isinstance(part, int | float)]
        if any(number not in item.range for number in numbers):
            allowed = item.range if all(number in Range() for number in numbers) else Range()
            raise ValueError(f"{origin}{hints.given(name, item.value)}: must be {allowed}")


def check_mae(mae: MaeConfig) -> None:
    """Refuse numbers out of range, and a decoder whose width its heads and positions do not divide (ValueError)."""
    check_ranges(mae, "mae.")
    if mae.decoder_dim % math.lcm(mae.decoder_heads, 4):
        raise ValueError(
            f"mae.decoder_dim={mae.decoder_dim}: must be divisible by mae.decoder_heads={mae.decoder_heads} and by 4"
        )


def group(config: RunConfig) -> int:
    """How many neighbours in the order stay together: 2 where images are mixed in pairs, else 1."""
    return 2 if isinstance(config, FinetuneConfig) and config.mix.enabled else 1


def check_world(config: RunConfig, world: int) -> None:
    """Refuse more ranks than there are images, or pairs of them, in a step, or than a setting allows (ValueError)."""
    batch, most = config.train.global_batch, config.train.global_batch // group(config)
    if world > most:
        raise ValueError(
            f"train.global_batch={batch}: {world} processes are more than the {'images' if most == batch else 'pairs'} "
            f"of one step; start at most {most} processes or raise train.global_batch"
        )
    if config.machine.cuda_graphs and world > 1:
        raise ValueError(
            f"machine.cuda_graphs=true: one rank with a GPU can do so, but these are {world}; leave it out"
        )
    shards = config.machine.shards
    if shards is not None and config.machine.strategy != "hsdp":
        raise ValueError(f"machine.shards={shards}: is for machine.strategy=hsdp, not {config.machine.strategy}")
    if config.machine.strategy == "hsdp" and shards is not None and world % shards:
        raise ValueError(f"machine.shards={shards}: {world} processes do not divide into groups of {shards}")


def total_steps(train: TrainConfig, num_samples: int) -> int:
    """Optimizer steps of a run over `num_samples` images an epoch."""
    if train.steps is not None:
        return train.steps
    return max(1, math.ceil(train.epochs * num_samples / train.global_batch))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as a plain nested dict in the order of the schema."""
    return dataclasses.asdict(config)


def dump(config: RunConfig) -> str:
    """The config as YAML text that `load` reads back."""
    import yaml

    listed = {k: {a: list(b) if isinstance(b, tuple) else b for a, b in v.items()} if isinstance(v, dict) else v
              for k, v in to_dict(config).items()}  # fmt: skip
    return yaml.safe_dump(listed, sort_keys=False)


def result_settings(config: RunConfig) -> dict[str, Any]:
    """The flat `section.key -> value` of all settings that decide the result of a run."""
    flat = {}
    for name, values in to_dict(config).items():
        if name in RESULT_SECTIONS:
            flat |= {f"{name}.{k}": v for k, v in values.items() if not (name == "data" and k in FREE_DATA)}
        elif name == "init_from":
            flat["init_from"] = values
    return flat


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """The result-changing fields in which two configs differ, each as 'field: old -> new'."""
    before, after = result_settings(old), result_settings(new)
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in after if before.get(k) != after.get(k)]


def changed(config: RunConfig) -> dict[str, Any]:
    """The flat `section.key -> value` that differs from the verb's default."""
    defaults = settings(type(config)())
    return {name: item.value for name, item in settings(config).items() if item.value != defaults[name].value}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(error: Exception, layer: Any, schema: type[Any], origin: str) -> str:
    """One sentence on why OmegaConf refused a layer of settings: where, the field, what is wrong, what to write."""
    from omegaconf import OmegaConf

    known = settings(schema())
    verb = next((verb for verb, other in SCHEMAS.items() if other is schema), None)
    meanings = {name: item.help for name, item in (settings_of(verb) if verb else known).items()}
    verbs = readers() if verb else {}
    for name, value in hints.leaves(OmegaConf.to_container(layer) if OmegaConf.is_config(layer) else layer):
        text = ""
        if name in known:
            text = hints.wrong_value(name, value, hints.choices_of(known[name].kind)) or image_settings.wrong_size(
                name, value
            )
        elif value != {} and not any(name.startswith(f"{setting}.") for setting in known):  # no key below a setting
            text = hints.wrong_name(name, value, meanings, verbs)
        if text:
            return ("" if origin.startswith(f"{name}=") else origin) + text
    lines = [line.strip() for line in str(error).splitlines()]
    name = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key:")), "")
    text = re.sub(r" '\$VALUE'| of type '\$VALUE_TYPE'", "", lines[0])  # of an element, which OmegaConf cannot name
    return ("" if name and origin.startswith(f"{name}=") else origin) + (f"{name}: {text}" if name else text)
