"""`mae-dist preflight [VERB] CONFIG [DATA] [--cluster FILE] [key=value ...]`: what a run will take, and what limits it.

Memory, speed, time, queue and disk, what limits the run, and the setting to change. Steps and loading are timed here
where that says something of where the run will be computed. Nothing is queued; with out= the run's folder keeps what
was expected, and `mae-dist report` shows it beside what came. `mae-dist submit` prints the same without trying.
"""

import dataclasses
import json
import logging
import math
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch import cluster as cluster_file
from launch import preflight
from launch.cluster import Cluster
from mae_dist import config as configuration
from mae_dist import errors, forecast, gpus, recipes, small_files, starts
from mae_dist.cli import Parser, duration
from mae_dist.forecast import Forecast, Place
from mae_dist.model_sizes import sides
from mae_dist.printed import counted, rate
from mae_dist.run import events, identity, jsonl, layout, warned
from mae_dist.schema import RANDOM, SCHEMAS, HeadsConfig, ProbeConfig, TrainingConfig

TRAINING = [verb for verb in SCHEMAS if verb != "knn"]
NO_FOLDER = "runs/preflight"
"""Folder of a run whose folder is not given; nothing is written there."""
MEASURED = "measured on this machine"
WIDTH = 118
"""Characters of a line."""
WAIT = 0.1
"""Share of the time from which on loading, and of a job from which on starting and stopping, is worth a change."""


def main(argv: list[str]) -> int:
    """Run `mae-dist preflight ARGV`. Exit status DONE, or FAILED where the run does not fit into memory or disk."""
    parser = Parser(prog="mae-dist preflight", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("words", nargs="*", metavar="VERB | CONFIG | DATA | section.key=value", help="as for mae-dist")
    cluster_file.add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_intermixed_args(argv)
    verb, file, settings = read_words(options.words)
    given = any(word.startswith("out=") for word in settings)
    given = given or (file is not None and "out" in (small_files.read_yaml(Path(file)) or {}))
    config: Any = configuration.load(verb, file, settings if given else [*settings, f"out={NO_FOLDER}"])
    heads = config.heads if isinstance(config, ProbeConfig) else HeadsConfig()
    if heads.active and not (heads.lars or heads.sgd or heads.adamw):
        raise ValueError("preflight probe: heads.ridge and heads.knn train in no steps; add heads.lars or others")
    where = cluster_file.overrides_of(options)
    if where and options.cluster is None:
        name = where[0].partition("=")[0].replace("_", "-")
        raise ValueError(f"--{name}: overrides a field of a cluster file; give --cluster FILE, too")
    cluster = cluster_file.load(options.cluster, where) if options.cluster else None
    if cluster is not None:
        preflight.check_ranks(config, cluster)
    if given:
        preflight.check_folder(verb, config)
    found = with_trial(verb, config, cluster)
    if given:
        keep(found)
    print(json.dumps(facts(found), indent=1) if options.json else "\n".join(lines(found)))
    return errors.FAILED if problem(found) else errors.DONE


def read_words(words: list[str]) -> tuple[str, str | None, list[str]]:
    """(Verb, CONFIG.yaml, settings) of the words. The verb that is not given is that of the file's folder, else
    pretrain. Raises ValueError.
    """
    named, words = (words[0], words[1:]) if words and words[0] in SCHEMAS else (None, words)
    file, settings = configuration.split_words("preflight", recipes.with_data("preflight", words))
    verb = named or (Path(file).parent.name if file and Path(file).parent.name in SCHEMAS else "pretrain")
    if verb not in TRAINING:
        raise ValueError(f"preflight {verb}: trains nothing; give one of {', '.join(TRAINING)}")
    return verb, str(recipes.find(verb, file)) if file else None, settings


def with_trial(verb: str, config: TrainingConfig, cluster: Cluster | None) -> Forecast:
    """The forecast of a run, with steps timed here, where the device is that of the run, and loading."""
    logging.getLogger("mae_dist.stages.setup").setLevel(logging.ERROR)  # this screen has what it would warn of
    from mae_dist.stages import trial  # imports torch

    here = trial.place_here(config.machine.processes)
    place = here if cluster is None else place_of(cluster)
    if place.is_gpu == here.is_gpu and gpus.are_alike(place.device or here.device, here.device):
        place = dataclasses.replace(place, device=here.device, memory=place.memory or here.memory)
    found = without_trial(verb, config, place)
    fits_here = found.fits_with(found.micro, config.machine.activation_checkpointing)
    found = trial.tried(found, here.ranks, place.device == here.device and fits_here)
    if found.step is not None and cluster is not None and not place.is_gpu:
        found = dataclasses.replace(found, step=found.step._replace(extrapolated=True))  # its CPUs are others
    if found.loading is not None and found.loading.serial and place.is_gpu and not here.is_gpu and found.kept_images:
        found = dataclasses.replace(found, loading=None)  # a GPU crops faster than this machine
    return found if place.is_gpu else dataclasses.replace(found, kept_images=0.0)  # on a CPU they are a file's


def without_trial(verb: str, config: TrainingConfig, place: Place) -> Forecast:
    """The forecast of a run by closed forms, the table of measured steps and data sheets. Imports no torch."""
    config = with_precision(config, place)
    train, *tested = preflight.splits_used(verb, config)
    test = tested[0] if tested else preflight.test_split(config)
    made = [layout.step_of(path) for path in layout.checkpoints(Path(config.out))]
    found = Forecast(
        verb, config, place, len(train), num_test=0 if test is None else len(test),
        done=max(made, default=0), free=shutil.disk_usage(preflight.nearest_existing(Path(config.out))).free,
    )  # fmt: skip
    if not place.is_gpu:
        return found
    step = forecast.expected_rate(config, place.device, found.micro, jsonl.read(forecast.TABLE))
    return dataclasses.replace(found, step=step)


def with_precision(config: TrainingConfig, place: Place) -> TrainingConfig:
    """The config with train.precision=auto replaced as the run will do it."""
    own, start = Path(config.out), starts.run_and_step(config.origin or RANDOM)[0]
    before, origin = (layout.settings(run)[2] if (run / layout.CONFIG).is_file() else None for run in (own, start))
    return identity.with_precision(config, identity.precision_for(before, origin, place.fast_precisions))


def place_of(cluster: Cluster) -> Place:
    """Where a cluster file runs ranks, on the least of its nodes."""
    named = (text for text in (cluster.gres, cluster.constraint) if text and gpus.find(text))
    device = (cluster.gpu or next(named, "")) if cluster.gpus_per_node else ""
    gpu = gpus.find(device)
    memory = cluster.memory * 1e9 / cluster.ranks_per_node if cluster.memory else None
    limit = cluster_file.seconds_of(cluster.time)
    return Place(
        nodes=cluster.nodes_range[0], ranks_per_node=cluster.ranks_per_node, is_gpu=cluster.gpus_per_node > 0,
        cores=cluster.ranks_per_node * (cluster.cpus_per_task or 1), device=device,
        memory=gpu.memory * 1e9 if gpu else None if cluster.gpus_per_node else memory,
        limit=limit, unused=cluster.start_up + cluster.stop_before_end, lose_at_most=cluster.lose_at_most,
    )  # fmt: skip


def keep(found: Forecast) -> None:
    """Write what is expected into the run's folder, which is made."""
    folder = Path(found.config.out)
    preflight.check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    jsonl.write_atomic(folder / layout.PREFLIGHT, json.dumps({"time": events.now()} | facts(found), indent=1) + "\n")


def facts(found: Forecast) -> dict[str, Any]:
    """The forecast as plain numbers: bytes, seconds, images a second; None for what is not known."""
    config, place = found.config, found.place
    every, best = config.machine.activation_checkpointing, found.best
    return {
        "verb": found.verb, "model": config.model.name, "image_size": [*sides(config.model.image_size)],
        "place": dataclasses.asdict(place) | {"ranks": place.ranks},
        "fits": found.fits if place.memory else None, "micro_batch": found.micro,
        "memory": found.memory(found.micro, every), "memory_measured": found.measured,
        "best": best and {"micro_batch": best[0], "activation_checkpointing": best[1]},
        "images": found.num_samples, "steps": found.steps, "steps_done": found.done,
        "step_ceiling": found.step_ceiling, "step_known": found.step and found.step.how,
        "extrapolated": extrapolated(found), "loader_ceiling": found.loader_ceiling,
        "images_per_second": found.speed, "seconds": found.seconds, "requeues": found.requeues,
        "checkpoint_bytes": forecast.checkpoint_bytes(config), "disk_bytes": found.disk,
        "disk_free": found.free, "seconds_between_checkpoints": found.between_saves,
        "limit": limit(found), "warnings": [*warnings(found)],
    }  # fmt: skip


def extrapolated(found: Forecast) -> bool:
    """Whether the speed rests on more than measurements of this step on such a device with as many ranks."""
    return found.step is None or found.step.extrapolated or found.place.ranks > 1


def lines(found: Forecast) -> list[str]:
    """The screen."""
    config, place = found.config, found.place
    size = " x ".join(map(str, dict.fromkeys(sides(config.model.image_size))))
    where = f"{counted(place.nodes, 'node')} x {counted(place.ranks_per_node, 'rank')}"
    shape = f"{counted(config.train.global_batch, 'image')} a step on {where}"
    head = f"{found.verb} of {config.model.name} at {size} px, {config.train.precision}, {shape}"
    rows = [("memory", memory_line(found)), ("data", data_line(found)), *speed_lines(found), ("time", time_line(found)),
            ("queue", queue_line(found)), ("disk", disk_line(found))]  # fmt: skip
    rows = [*((name, row) for name, row in rows if row), *(("warning", row) for row in warnings(found))]
    text = [head + (f" ({place.device})" if place.device else ", device not known")]
    for name, row in rows:
        text += textwrap.wrap(f"  {name:9s} {row}", WIDTH, subsequent_indent=" " * 12, break_on_hyphens=False)
    return [*text, *textwrap.wrap(limit(found), WIDTH, break_on_hyphens=False)]


def gigabytes(value: float) -> str:
    """Bytes as text."""
    unit, name = next((row for row in ((1e12, "TB"), (1e9, "GB")) if value >= row[0] / 10), (1e6, "MB"))
    return f"{value / unit:.3g} {name}"


def memory_line(found: Forecast) -> str:
    """Whether the run fits, from what parts, and what would be best."""
    machine, place = found.config.machine, found.place
    parts = found.memory(found.micro, machine.activation_checkpointing)
    of = f" of {gigabytes(place.memory)}" if place.memory else ""
    fits = "does not fit" if not found.fits else "fits" if place.memory else "takes"
    text = f"{fits}: {gigabytes(sum(parts.values()))}{of}"
    text += f" with {counted(found.micro, 'image')} at once ("
    text += ", ".join(f"{name} {gigabytes(value)}" for name, value in parts.items() if value) + ")"
    if found.measured:
        text += f"; a trial step took {gigabytes(found.measured)}" + (", Python included" if not place.is_gpu else "")
    if not place.memory:
        text += "; the device's memory is not known"
    elif place.is_gpu and found.best:
        text += f"; best: machine.micro_batch={found.best[0]} machine.activation_checkpointing={found.best[1]}"
    return text


def data_line(found: Forecast) -> str:
    """Steps, epochs and warm-up."""
    train, warmup = found.config.train, found.config.optim.warmup_epochs
    epoch = found.num_samples / train.global_batch
    text = f"{counted(found.num_samples, 'image')}, an epoch is {epoch:,.4g} steps; {counted(found.steps, 'step')}"
    text += f" are {found.steps / epoch:,.6g} epochs" + (
        f", the first {warmup * epoch:,.0f} steps warm-up" if warmup else ""
    )
    return text + (f"; {found.done:,} are done" if found.done else "")


def speed_lines(found: Forecast) -> Iterator[tuple[str, str]]:
    """The two ceilings, and what follows."""
    step, loading, place = found.step, found.loading, found.place
    if found.step_ceiling is None or step is None:
        device = place.device or "the device"
        yield "step", f"not known: {device} is neither here nor in a table; gpu: in the cluster file names one (H100)"
    else:
        ranks = f"; {place.ranks} ranks are assumed to reach {forecast.SCALING:.0%}" if place.ranks > 1 else ""
        yield "step", f"{rate(found.step_ceiling)} images/s ({step.how}{ranks})"
    if found.reading:
        yield "features", f"{rate(found.reading * place.ranks)} images/s ({MEASURED}), once, before the steps"
    elif found.loader_ceiling is not None and loading is not None:
        what = "in memory, before each step" if loading.serial else f"machine.workers={found.config.machine.workers}"
        yield "loader", f"{rate(found.loader_ceiling)} images/s ({MEASURED}: {what})"
    else:
        yield "loader", "not measured"
    if found.speed is not None:
        yield "predicted", f"{rate(found.speed)} images/s" + (", extrapolated" if extrapolated(found) else "")


def time_line(found: Forecast) -> str:
    """Hours, and what they cost."""
    if found.seconds is None:
        return "not known, as the speed is not"
    hours, place = found.seconds / 3600, found.place
    cost = (
        f"{hours * place.ranks:,.3g} GPU-hours"
        if place.is_gpu
        else f"{hours * place.nodes * place.cores:,.3g} core-hours"
    )
    return f"{duration(found.seconds)} from now on, {cost}"


def queue_line(found: Forecast) -> str:
    """Jobs, and what a stop costs."""
    text = ""
    if found.requeues is not None and found.place.limit:
        jobs, each = found.requeues + 1, duration(found.place.unused)
        text = f"{counted(jobs, 'job')} of {duration(found.place.limit)}, each {each} for start and stop; "
    if found.between_saves is None:
        return text
    return f"{text}a stop without warning loses {duration(found.between_saves)} at most"


def disk_line(found: Forecast) -> str:
    """Checkpoints against the disk."""
    free = f" of {gigabytes(found.free)} free" if found.free is not None else ""
    stored = forecast.stored_features(found.config, found.num_samples)
    features = f" and {gigabytes(stored)} of features" if stored else ""
    most = forecast.num_checkpoints(found.config, found.steps)
    text = f"{gigabytes(forecast.checkpoint_bytes(found.config))} a checkpoint, {most} at most{features}"
    return f"{text}: {gigabytes(found.disk)}{free}"


def problem(found: Forecast) -> str:
    """Why the run would fail, with what to change; empty where it fits."""
    machine, place, best = found.config.machine, found.place, found.best
    if not found.fits:
        change = "machine.strategy=fsdp" if machine.strategy == "ddp" and place.ranks > 1 else "a smaller model.name"
        if best is not None:
            change = f"machine.micro_batch={best[0]} machine.activation_checkpointing={best[1]}"
        return f"It does not fit into the memory of a rank: set {change}."
    if found.free is not None and found.disk + preflight.DISK_MARGIN > found.free:
        what, lower = "Its checkpoints do", "lower checkpoint.keep"
        if found.config.checkpoint.keep_every:
            lower = "raise checkpoint.keep_every"
        elif forecast.stored_features(found.config, found.num_samples) > found.disk / 2:
            what, lower = "Its features do", "leave out heads.attentive or some of heads.blocks"
        return f"{what} not fit on the disk: {lower}, or choose another out=."
    return ""


def limit(found: Forecast) -> str:
    """What limits the run, in a sentence, with the setting to change."""
    if sentence := problem(found):
        return sentence
    step, loader, machine = found.step_ceiling, found.loader_ceiling, found.config.machine
    fits = "It fits" if found.place.memory else "Whether it fits is not known, as the device's memory is not"
    if step is None or found.speed is None:
        return f"{fits}; what limits its speed is not known here."
    waits, by_host = 1 - found.speed / step, found.step is not None and found.step.by_host
    if loader is None or found.loading is None or waits < WAIT:
        most = found.best[0] if found.place.is_gpu and found.best else 0
        fastest = identity.precision_for(None, None, found.place.fast_precisions)
        slow = found.config.train.precision not in (fastest, *found.place.fast_precisions)
        ways = [f"train.precision={fastest}"] * slow
        ways += [f"machine.micro_batch={most}"] if most > found.micro else []
        ways += ["machine.cuda_graphs=true"] if by_host and found.place.ranks == 1 and not machine.cuda_graphs else []
        ways += [] if machine.compile else ["machine.compile=true"]
        ways += ["machine.activation_checkpointing=0"] if machine.activation_checkpointing and found.most(0) else []
        what = "the host, which launches the kernels, limits it" if by_host else "computing limits it"
        return f"{fits}, and {what}: {' or '.join([*ways, 'more ranks'])} may make it faster."
    lost = f"{fits}, but loading takes {waits:.0%} of its speed"
    busy, cores = machine.workers * found.place.ranks_per_node, found.place.cores
    needed = math.ceil(machine.workers * 1.1 * step / loader)
    if not machine.workers:
        return f"{lost}: set machine.workers={min(cores, 4)}."
    if found.loading.serial:
        return f"{lost}: images in memory are cropped where steps are computed; view.crop=pad is faster."
    if found.place.is_gpu and busy < cores and needed * found.place.ranks_per_node <= cores:
        return f"{lost}: set machine.workers={needed}."
    side = round(min(sides(found.config.model.image_size)) * 8 / 7)
    return f"{lost}: pack the images once with `mae-dist data pack tars --short-side {side}`, or take more cores."


def warnings(found: Forecast) -> Iterator[str]:
    """Settings that are possible, but seldom meant."""
    config, place = found.config, found.place
    of_settings = warned.of_settings(found.verb, config, found.num_samples, on_cpu=place.on_cpu)
    yield from (sentence for _, sentence in of_settings)
    if config.train.resolutions:
        yield "train.resolutions: memory and speed are those of the last resolution; the time is that of all"
    if place.limit is None:
        return
    useful = place.limit - place.unused
    if place.unused > WAIT * place.limit and found.requeues:
        yield f"time: {place.unused / place.limit:.0%} of each job is start and stop; ask for more time"
    if found.between_saves is not None and found.between_saves > useful and found.requeues:
        yield "checkpoint.minutes: no checkpoint falls into a job but the one at its end; set less than its time limit"
    if found.step_seconds is not None and found.step_seconds > useful:
        yield f"time: a step takes {duration(found.step_seconds)}, longer than a job; ask for more time"
