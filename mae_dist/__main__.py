"""`mae-dist VERB ...` or `python -m mae_dist VERB ...`: runs a verb, prints its error in one line, exits with a status.

A verb that makes a run starts one process for each GPU of this machine (machine.processes overrides this) unless
torchrun has started it. Help and config errors need no import of torch. Exit statuses: see `errors`.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys

from mae_dist import (
    __version__,
    cli,
    config,
    environment,
    errors,
    hints,
    launcher,
    printed,
    recipes,
    schema,
    starts,
    watchdog,
)  # fmt: skip
from mae_dist.cli import VERBS
from mae_dist.signals import Stopped

USAGE = """usage: mae-dist VERB [CONFIG.yaml] [section.key=value ...]     one run, see `mae-dist VERB --help`
       mae-dist submit {VERB [CONFIG.yaml],pipeline FILE.yaml} --cluster FILE.yaml [section.key=value ...]
       mae-dist preflight [VERB] CONFIG.yaml [DATA] [--cluster FILE.yaml] [--json] [section.key=value ...]
       mae-dist report RUN [RUN ...] [--json|--md] [--out FILE]
       mae-dist runs [DIR ...] [--watch] [--results FILE.md]
       mae-dist logs RUN [--lines N] [--all]
       mae-dist ckpt {list,inspect,verify} RUN
       mae-dist replay RUN --step N [--rank R]
       mae-dist data {pack,index,show,check} ...
       mae-dist recipe DATA ...
       mae-dist models [NAME ...] [--image-size N] [mae.key=value ...]
       mae-dist import FILE --out RUN
       mae-dist export RUN [--step N] --to {timm,hf,fb,npz,safetensors} --out PATH
       mae-dist embed RUN DATA --out FOLDER [--split NAME] [--features cls|mean|patches|...] [--block N]
       mae-dist predict RUN DATA --out FOLDER [--split NAME] [--ignore-labels]
       mae-dist demo
       mae-dist chaos [CONFIG.yaml] [--faults N] [--kinds A,B] ...
       mae-dist certify [CONFIG.yaml] [--ranks 1,2,3,4] [section.key=value ...]
       mae-dist bench NAME [CONFIG.yaml] [DATA] [section.key=value ...]

verbs:
"""
OUT_OF_GPU_MEMORY = (
    "rank {} ran out of memory of its GPU; try machine.micro_batch=auto, machine.activation_checkpointing=1 or "
    "machine.strategy=fsdp; the same command resumes"
)
OUT_OF_MEMORY = (
    "rank {} ran out of memory of this machine; lower machine.micro_batch, machine.workers or machine.processes, or "
    "try machine.activation_checkpointing=1; the same command resumes"
)


COLLECTIVES_FIRST = 15.0
"""Seconds that several ranks have more than machine.timeout: a collective that fails names the rank that is lost."""


def main(argv: list[str] | None = None) -> int:
    """Run the verb and arguments in `argv` and return the exit status; those of this process are its last work."""
    status = errors.FAILED
    try:
        status = run(list(sys.argv[1:] if argv is None else argv))
    finally:
        if argv is None:
            watchdog.leave(status)
    return status


def run(argv: list[str]) -> int:
    """Run a verb and its arguments, and return the exit status."""
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug" or argv[0] == "submit"]
    rank = environment.rank(os.environ)
    level = logging.INFO if rank == 0 else logging.ERROR
    printed.log_to_stderr(level)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + "\n".join(f"  {name:10s} {verb.summary}" for name, verb in VERBS.items()))
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    try:
        return dispatch(argv[0], argv[1:])
    except BrokenPipeError:  # the reader of this output, `| head` for example, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.DONE
    except Stopped as stopped:
        if rank == 0:
            print(f"mae-dist: {stopped}", file=sys.stderr)
        return errors.STOPPED
    except KeyboardInterrupt:
        if rank == 0 and os.environ.keys().isdisjoint(("TORCHELASTIC_RUN_ID", environment.MEETING_FILE)):
            print("mae-dist: interrupted; the same command goes on from what is finished or saved", file=sys.stderr)
        return errors.INTERRUPTED
    except Exception as error:
        reason = errors.reason(error)
        if debug or reason == "crash":
            raise
        if errors.is_reported_by(rank, error):
            memory = OUT_OF_GPU_MEMORY if errors.is_out_of_gpu_memory(error) else OUT_OF_MEMORY
            text = memory.format(rank) if reason == "out_of_memory" else printed.message(error)
            print(f"mae-dist: {text}", file=sys.stderr)
        return errors.exit_status(error)


def dispatch(verb: str, argv: list[str]) -> int:
    """Run a verb with its arguments, and return the exit status. Raises what the verb raises."""
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise ValueError(
            f"{verb}: no such verb; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(VERBS)}")
        )
    if verb not in schema.SCHEMAS:
        try:
            command = cli.import_module(VERBS[verb].module)
        except ModuleNotFoundError as error:
            if error.name != "launch":
                raise
            raise ValueError(f"{verb}: this installation has no package launch; install mae_dist again") from error
        return command.main(argv)
    if "-h" in argv or "--help" in argv:
        usage = f"usage: mae-dist {verb} [CONFIG.yaml or RECIPE] [key=value ...]"
        listed = f"recipes: {', '.join(recipes.of_verb(verb))}\n(in {recipes.FOLDER.resolve()})"
        print(f"{usage}\n\n{VERBS[verb].summary}\n{listed}\n\n{settings_help(verb)}")
        return 0
    if dashed := [argument for argument in argv if argument.startswith("-")]:
        raise ValueError(f"{dashed[0]}: settings have no dashes; write section.key=value")
    settings = config.load(verb, *config.split_words(verb, argv))
    os.environ.update(environment.of_user() | environment.of_ranks(os.environ))
    if "RANK" not in os.environ and (sentence := environment.nodes_left_out(os.environ)):
        logging.warning("%s", sentence)
    if "RANK" in os.environ and environment.MEETING_FILE in os.environ:
        watchdog.end_with_parent(signal.SIGTERM)  # our launcher, after which nobody would start lost ranks again
    with watchdog.watching(settings.machine.timeout + (COLLECTIVES_FIRST if "RANK" in os.environ else 0)):
        launched, given = "RANK" in os.environ, settings.machine.processes
        processes = 1 if launched else launcher.processes_here(given)
        if processes == 1:
            stage = cli.import_module(VERBS[verb].module)
            from mae_dist import dist

            if launched and given not in (None, dist.local_world()):
                here = f"another launcher started {dist.local_world()} processes here"
                raise ValueError(f"machine.processes={given}: {here}; leave it out")
            launcher.limit_threads(dist.local_world())
            if settings.model.name == starts.UNKNOWN:
                importlib.import_module("mae_dist.stages.imports").import_for(settings)
                settings = config.load(verb, *config.split_words(verb, argv))
            stage.run(settings)
            if dist.is_main():
                print_result(verb, settings, argv)
            return 0
    config.check_world(settings, processes)
    return launcher.spawn([verb, *argv], processes, settings.machine.restarts)


def settings_help(verb: str) -> str:
    """One line for each setting that the verb reads, `section.key  default  one of VALUES: meaning (range)`."""
    lines = []
    for name, item in config.settings_of(verb).items():
        text = item.help
        if choices := hints.choices_of(item.kind):
            text = f"{'any' if isinstance(item.value, tuple) else 'one'} of {', '.join(choices)}: {text}"
        bounds = f" ({item.range.symbols})" if item.range.bounds else ""
        lines.append(f"  {name:33s} {hints.shown(item.value):16s} {text}{bounds}")
    return "\n".join(lines)


def print_result(verb: str, settings: schema.RunConfig, argv: list[str]) -> None:
    """Print the final numbers of a run, where its folder is, and what may come next."""
    from mae_dist.monitor import following
    from mae_dist.run.directory import RunDir

    out = settings.out
    result = RunDir(out).result() or {}
    numbers = "  ".join(f"{name} {_format(value)}" for name, value in result.items() if name != "verb")
    print(f"{verb} is finished: {numbers}\n{out} holds it; `mae-dist report {out}` draws it")
    if verb == "pretrain":
        for why, command in following.after_pretraining(settings, out, argv):
            print(f"next, for {why}: {command}")


def _format(value: object) -> str:
    if isinstance(value, list):
        return " to ".join(map(_format, value))
    return f"{value:.4g}" if isinstance(value, float | int) else str(value)


if __name__ == "__main__":
    sys.exit(main())
