"""The command `codebook-jax --config=configs/base.py[:size] --workdir=DIR --mode=MODE`.

The only file that reads flags. A user error prints one sentence on stderr and exits with code 2.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before the slow imports below, so that Ctrl-C is caught from here on
    from codebook_jax import console

    sys.exit(console.command())

import ast
import faulthandler
import importlib.util
import os
import runpy
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from codebook_jax import console, modes
from codebook_jax.config import COMMON, check_fields, flat, with_fields
from codebook_jax.errors import FULL_DISK, UNREACHABLE, UserError, did_you_mean
from codebook_jax.parallel.processes import joining, peers, shared_folder
from codebook_jax.tools.chips import CHIPS, PlanOptions, environment

DATA_MODES = ("prepare", "check-data")  # need no devices
NEEDS_CONFIG = ("train", "import", "plan", *DATA_MODES)
WRITES_A_RUN = ("train", "import")

OPTIONS: dict[str, tuple[type, str]] = {
    "config": (str, "FILE:SIZE, as configs/base.py:tiny; --config.FIELD=VALUE sets a field"),
    "workdir": (str, "the run's folder; an existing run is continued"),
    "mode": (str, f"{', '.join(modes.MODES)} (default: train)"),
    "preempted_exit_code": (int, "the exit code if a signal stops training (default: 0)"),
    "coordinator": (str, "HOST:PORT of process 0, if no launcher provides it"),
    "processes": (int, "the number of processes in the run"),
    "process": (int, "the number of this process, from 0"),
    "join_timeout_s": (int, "how long the processes look for each other (default: 300 seconds)"),
    "plan.chip": (str, f"for --mode=plan: {', '.join(CHIPS)} (default: h200)"),
    "plan.devices": (int, "for --mode=plan: the number of chips (default: 8)"),
    "plan.slices": (int, "for --mode=plan: the number of slices (default: 1)"),
    "plan.compiler": (str, "for --mode=plan: cpu (default), or tpu (libtpu; takes minutes)"),
    "plan.json": (str, "for --mode=plan: a file to write the figures to"),
}
KINDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


class Flags(NamedTuple):
    """What a command line asks for."""

    config: ConfigDict | None = None  # of --config=FILE, with the fields that flags set
    named: tuple[str, ...] = ()  # those fields
    workdir: str = ""
    mode: str = "train"
    preempted_exit_code: int = 0
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    join_timeout_s: int = 300
    plan: PlanOptions = PlanOptions()


def parse(arguments: Sequence[str]) -> Flags:
    """The flags of a command line; raises UserError if they are not valid."""
    texts = _texts(arguments)
    fields = {name: texts.pop(name) for name in list(texts) if name.startswith("config.")}
    for name in texts:
        if name not in OPTIONS:
            raise UserError(f"there is no flag --{name}{did_you_mean(name, OPTIONS)}")
    given = {name: _value(name, text, OPTIONS[name][0]) for name, text in texts.items()}
    file = given.pop("config", "")
    plan = {name: given.pop(name) for name in list(given) if name.startswith("plan.")}
    plan = {name.removeprefix("plan."): value for name, value in plan.items()}
    flags = Flags(**given, plan=PlanOptions(**plan))
    if flags.mode not in modes.MODES:
        hint = did_you_mean(flags.mode, modes.MODES)
        raise UserError(f"--mode={flags.mode} is not one of {', '.join(modes.MODES)}{hint}")
    if not file and (fields or flags.mode in NEEDS_CONFIG):
        raise UserError("--config is missing: give one, e.g. --config=configs/base.py:tiny")
    if not flags.workdir and flags.mode != "plan":
        raise UserError("--workdir is missing: give the run's folder, e.g. --workdir=runs/first")
    if "://" in flags.workdir:
        raise UserError(f"--workdir={flags.workdir} must be a local or mounted folder")
    if not file:
        return flags
    config = config_of(file)
    known, named = flat(config.to_dict()), {}
    for flag, text in fields.items():
        name = flag.removeprefix("config.")
        if name not in known:
            hint = did_you_mean(name, known) or " (configs/base.py lists all)"
            raise UserError(f"--{flag}: the config has no field {name}{hint}")
        named[name] = _value(flag, text, type(known[name]))
    return flags._replace(config=with_fields(config, named), named=tuple(named))


def _texts(arguments: Sequence[str]) -> dict[str, str | None]:
    """{name: text} of --name=text or --name text; None of a --name alone."""
    found, name = {}, ""
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            found[name] = text if equals else None
        elif name and found[name] is None:
            found[name] = argument
        else:
            raise UserError(f"{argument!r} is not a flag: flags begin with --, as --workdir=DIR")
    return found


def _value(flag: str, text: str | None, kind: type) -> Any:
    """The text of a flag as a value of the type of its option, or of its field in the config."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[(text or "true").lower()]
        return kind(text or "" if kind in KINDS else ast.literal_eval(text or ""))
    except (KeyError, SyntaxError, TypeError, ValueError) as error:
        needed = KINDS.get(kind, "values such as (0.5, 1.0)")
        raise UserError(f"--{flag}={text or ''} needs {needed}") from error


def config_of(given: str) -> ConfigDict:
    """The config of FILE:SIZE; raises UserError if there is none."""
    file, _, size = given.partition(":")
    if not Path(file).is_file():
        known = [*Path(file).parent.glob("*.py"), *Path("configs").glob("*.py")]
        hint = did_you_mean(file, map(str, known)) or ": give one such as configs/base.py"
        raise UserError(f"--config={given}: there is no file {file}{hint}")
    make = runpy.run_path(file).get("get_config", dict)
    try:
        config = make(size) if size else make()
    except ValueError as error:  # for a size that it does not know
        raise UserError(f"--config={given}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={given}: its get_config() must return a ConfigDict as in configs/base.py"
        )
    return config


def run(flags: Flags) -> int:
    """Runs the mode and returns the exit code."""
    # Imported here, after the flags were checked, because they import JAX and other slow modules.
    config, workdir = flags.config, Path(flags.workdir).expanduser()
    if flags.mode in DATA_MODES:
        from codebook_jax.tools import check_data, prepare

        check_fields(config, COMMON)
        data_mode = prepare.prepare if flags.mode == "prepare" else check_data.check_data
        return data_mode(config, workdir) or 0
    _join_other_processes(flags, workdir)  # before anything asks JAX for its devices
    from codebook_jax import train
    from codebook_jax.parallel import devices
    from codebook_jax.report.run import write_report
    from codebook_jax.tools import evaluate, export, import_weights

    devices.check_platforms()
    named = None if config is None else flags.named
    others: dict[str, Callable[[], int | None]] = {
        "train": lambda: 0 if train.fit(config, workdir) else flags.preempted_exit_code,
        "import": lambda: import_weights.import_weights(config, workdir),
        "eval": lambda: evaluate.evaluate(config, workdir, named),
        "export": lambda: export.export(config, workdir, named),
        "report": lambda: write_report(config, workdir, named),
    }
    with console.interruptible():
        return others[flags.mode]() or 0


def complain(sentence: str) -> int:
    """Prints the sentence on stderr; returns the exit code of a user error."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return 2


def main(flags: Flags) -> int:
    """Runs what the flags ask for and returns the exit code.

    With several processes, a failing one tells the others why and exits at once.
    """
    try:
        if flags.mode == "plan":
            return _plan(flags)
        code = run(flags)
        peers.connected().leave()
        return code
    except KeyboardInterrupt:
        sentence = f"stopped by SIGINT: --mode={flags.mode} has not finished"
        print(sentence, file=sys.stderr, flush=True)
        if "jax" in sys.modules and peers.connected().count > 1:
            peers.connected().fail(sentence)
            os._exit(128 + signal.SIGINT)  # a normal exit would wait for the others
        return 128 + signal.SIGINT
    except Exception as error:
        known = str(error) if isinstance(error, UserError) else ""
        if getattr(error, "errno", None) in (*FULL_DISK, *UNREACHABLE):
            known = (
                f"{error.filename or flags.workdir} cannot be written or read any more "
                f"({error.strerror}): make room or fix this, and start the same command again; "
                "a training goes on from its newest checkpoint"
            )
        if "jax" in sys.modules:
            peers.connected().end_all(UserError(known) if known else error)
        if not known:
            raise
        return complain(known)


def _plan(flags: Flags) -> int:
    options = flags.plan._replace(json=os.path.expanduser(flags.plan.json))
    os.environ |= environment(options)  # read when JAX is imported
    from codebook_jax.tools.plan import plan

    with console.interruptible():
        plan(flags.config, options)
    return 0


def _join_other_processes(flags: Flags, workdir: Path) -> None:
    """Connects to the run's other processes, if any, and checks that all do the same."""
    found = joining.find(
        os.environ,
        coordinator=flags.coordinator,
        count=flags.processes,
        own=flags.process,
        on_a_tpu=joining.on_a_tpu(),
        has_kubernetes=importlib.util.find_spec("kubernetes") is not None,
    )
    if found is None or not joining.join(found, timeout_s=flags.join_timeout_s):
        return
    import jax

    from codebook_jax.parallel import devices
    from codebook_jax.run import record

    devices.check_platforms()
    others = peers.connect(found.coordinator)
    print(joining.describe(found), flush=True)
    fields = flat(flags.config.to_dict()) if flags.config else {}
    facts = {
        "--mode": flags.mode,
        "code": record.code_digest(),
        **{f"version of {name}": version for name, version in record.package_versions().items()},
        "devices per process": jax.local_device_count(),
        "kind": jax.local_devices()[0].device_kind,
        **{f"config.{name}": value for name, value in fields.items()},
    }
    others.compare("start", facts, "start all with the same command, code and versions")
    if flags.mode in WRITES_A_RUN:
        shared_folder.check(others, workdir)


def command() -> None:
    """Reads the command line, runs it and exits; called by console.command."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # XLA's notices to its own developers
    logging.use_absl_handler()
    logging.set_verbosity(logging.FATAL)  # Orbax logs the trace of what it also raises
    arguments = sys.argv[1:]
    if not arguments:
        sys.exit(complain(f"no arguments: {modes.BEGIN}"))
    if {"--help", "-h", "--helpfull"} & set(arguments):
        flags = (f"  --{name:20} {meaning}" for name, (_, meaning) in OPTIONS.items())
        print(modes.HELP, "Flags", *flags, sep="\n")
        sys.exit(0)
    try:
        flags = parse(arguments)
    except UserError as error:
        sys.exit(complain(str(error)))
    faulthandler.enable()
    sys.exit(main(flags))
