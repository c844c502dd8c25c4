"""The command `codebook-jax --config=configs/base.py[:size] --workdir=DIR --mode=MODE`.

The only file that reads flags. A user error prints one sentence on stderr and exits with code 2.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before the slow imports below, so that Ctrl-C is caught from here on
    from codebook_jax import console

    sys.exit(console.command())

import difflib
import importlib.util
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from codebook_jax import console, modes
from codebook_jax.config import COMMON, check_fields, flat
from codebook_jax.errors import FULL_DISK, UNREACHABLE, UserError, did_you_mean
from codebook_jax.parallel.processes import joining, peers
from codebook_jax.tools.chips import PlanOptions, environment

DATA_MODES = ("prepare", "check-data")  # need no devices
NEEDS_CONFIG = ("train", "import", "plan", *DATA_MODES)
WRITES_A_RUN = ("train", "import")
HELP = ("--help", "-help", "-h", "--helpshort", "-helpshort")

PLAN = PlanOptions()
TEXT, NUMBER = flags.DEFINE_string, flags.DEFINE_integer
OPTIONS = (
    (TEXT, "workdir", None, "the run's folder; an existing run is continued"),
    (TEXT, "mode", "train", ", ".join(modes.MODES)),
    (NUMBER, "preempted_exit_code", 0, "the exit code if a signal stops training before its end"),
    (TEXT, "coordinator", None, "HOST:PORT of process 0, if no launcher provides it"),
    (NUMBER, "processes", None, "the number of processes in the run"),
    (NUMBER, "process", None, "the number of this process, from 0"),
    (NUMBER, "join_timeout_s", 300, "how long the processes look for each other, in seconds"),
    (TEXT, "plan.chip", PLAN.chip, "for --mode=plan: the accelerator"),
    (NUMBER, "plan.devices", PLAN.devices, "for --mode=plan: the number of chips"),
    (NUMBER, "plan.slices", PLAN.slices, "for --mode=plan: the number of slices"),
    (TEXT, "plan.compiler", PLAN.compiler, "for --mode=plan: cpu, or tpu (libtpu; takes minutes)"),
    (TEXT, "plan.json", PLAN.json, "for --mode=plan: a file to write the figures to"),
)
# What absl and ml_collections say about a mistake, and what we say; first match wins.
MISTAKES = (
    (r"(?s)Error whilst parsing config file:.*\n[\w.]+: (.+)$", r"\1"),  # raised by get_config
    (r"^flag (.+?): invalid literal for int\(\)", r"\1 needs a whole number"),
    (r"^flag (.+?): could not convert string to float", r"\1 needs a number"),
    (r"^flag (.+?): \('Non-boolean argument", r"\1 needs true or false"),
    (
        r"^flag ((.+?)=.*?): Failed to parse .* as a ConfigDict",
        r"\1 is a section: set its fields, e.g. \2.FIELD=value",
    ),
    (
        "in argv before a value for",
        "--config=FILE goes before the fields it sets, such as --config.data.global_batch=64",
    ),
    (r"flag '((no)?config\..+?)'", r"--config=FILE is missing before --\1"),
    (r"flag '(.+?)'\. Did you mean: (.+?) \?", r"there is no flag --\1 ... did you mean --\2?"),
    (r"flag '(.+?)'", r"there is no flag --\1"),
    (r"No such file or directory: '(.+?)'", r"--config: there is no file \1"),
    (
        r"failure to load: (\[.+?\] )?(.+?)\.?$",
        r"--config: \2: give a file such as configs/base.py",
    ),
    (
        "no attribute '(get_config|to_dict)'",
        "--config: the file has no get_config() that returns a ConfigDict as in configs/base.py",
    ),
    (
        r"Attempting to lookup: (\S+)\.(\w+)",
        r"config.\1.\2: config.\1 is a value and has no fields",
    ),
)

FLAGS = flags.FLAGS


def define_flags(values: flags.FlagValues = FLAGS, argv: list[str] | None = None) -> None:
    """Declares the flags; the config's overrides are read from `argv` (None: the command line)."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "FILE:SIZE, such as configs/base.py:tiny; --config.data.global_batch=64 sets a field",
        flag_values=values,
        sys_argv=argv,
    )
    for define, name, default, meaning in OPTIONS:
        define(name, default, meaning, flag_values=values)


def parse(argv: Sequence[str], values: flags.FlagValues = FLAGS) -> list[str]:
    """Reads the command line into `values`; raises UserError if it is not valid."""
    try:
        rest = values(list(argv))
        config = values.config
        if config is not None:
            config.to_dict()  # an unreadable file raises only here
    except SyntaxError as error:
        raise UserError(f"--config: the file is not Python: {error}") from error
    except (flags.Error, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        if sentence := _sentence(error, argv):
            raise UserError(sentence) from error
        raise  # an error of the config file, whose trace names the line
    _check_flags(values, rest)
    return rest


def _check_flags(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Raises UserError for flags that do not fit together."""
    config, mode, workdir = values.config, values.mode, values.workdir
    if rest[1:]:
        raise UserError(f"{rest[1]!r} is not a flag: flags begin with --, e.g. --workdir=DIR")
    if mode not in modes.MODES:
        hint = did_you_mean(mode, modes.MODES)
        raise UserError(f"--mode={mode} is not one of {', '.join(modes.MODES)}{hint}")
    if config is None and mode in NEEDS_CONFIG:
        raise UserError("--config is missing: give one, e.g. --config=configs/base.py:tiny")
    if not workdir and mode != "plan":
        raise UserError("--workdir is missing: give the run's folder, e.g. --workdir=runs/first")
    if "://" in (workdir or ""):
        raise UserError(
            f"--workdir={workdir} is not a folder on this machine: give a local or mounted one"
        )


def run(mode: str, config: ConfigDict | None, workdir: Path) -> int:
    """Runs `mode` and returns the exit code."""
    # Imported here, after the flags were checked, because they import JAX and other slow modules.
    if mode in DATA_MODES:
        from codebook_jax.tools import check_data, prepare

        check_fields(config, COMMON)
        data_mode = prepare.prepare if mode == "prepare" else check_data.check_data
        return data_mode(config, workdir) or 0
    _join_other_processes(mode, config, workdir)  # before anything asks JAX for its devices
    from codebook_jax import train
    from codebook_jax.parallel import devices
    from codebook_jax.report.run import write_report
    from codebook_jax.tools import evaluate, export, import_weights

    devices.check_platforms()
    named = None if config is None else FLAGS["config"].override_values
    others: dict[str, Callable[[], int | None]] = {
        "train": lambda: 0 if train.fit(config, workdir) else FLAGS.preempted_exit_code,
        "import": lambda: import_weights.import_weights(config, workdir),
        "eval": lambda: evaluate.evaluate(config, workdir, named),
        "export": lambda: export.export(config, workdir, named),
        "report": lambda: write_report(config, workdir, named),
    }
    with console.interruptible():
        return others[mode]() or 0


def complain(sentence: str) -> int:
    """Prints the sentence on stderr; returns the exit code of a user error."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return 2


def main(argv: Sequence[str]) -> int:
    """Runs what the flags ask for and returns the exit code.

    With several processes, a failing one tells the others why and exits at once.
    """
    del argv
    try:
        if FLAGS.mode == "plan":
            return _plan()
        code = run(FLAGS.mode, FLAGS.config, Path(FLAGS.workdir).expanduser())
        peers.connected().leave()
        return code
    except KeyboardInterrupt:
        sentence = f"stopped by SIGINT: --mode={FLAGS.mode} has not finished"
        print(sentence, file=sys.stderr, flush=True)
        if "jax" in sys.modules and peers.connected().count > 1:
            peers.connected().fail(sentence)
            os._exit(128 + signal.SIGINT)  # a normal exit would wait for the others
        return 128 + signal.SIGINT
    except Exception as error:
        known = error if isinstance(error, UserError) else _about_files(error)
        if "jax" in sys.modules:
            peers.connected().end_all(known or error)
        if known is None:
            raise
        return complain(str(known))


def _plan() -> int:
    options = PlanOptions(**{name: FLAGS[f"plan.{name}"].value for name in PlanOptions._fields})
    options = options._replace(json=os.path.expanduser(options.json))
    os.environ |= environment(options)  # read when JAX is imported
    from codebook_jax.tools.plan import plan

    with console.interruptible():
        plan(FLAGS.config, options)
    return 0


def _join_other_processes(mode: str, config: ConfigDict | None, workdir: Path) -> None:
    """Connects to the run's other processes, if any, and checks that all do the same."""
    found = joining.find(
        os.environ,
        coordinator=FLAGS.coordinator,
        count=FLAGS.processes,
        own=FLAGS.process,
        on_a_tpu=joining.on_a_tpu(),
        has_kubernetes=importlib.util.find_spec("kubernetes") is not None,
    )
    if found is None or not joining.join(found, timeout_s=FLAGS.join_timeout_s):
        return
    from codebook_jax.parallel import devices

    devices.check_platforms()
    others = peers.connect(found.coordinator)
    print(joining.describe(found), flush=True)
    others.compare(
        "start", _facts(mode, config), "start all with the same command, code and versions"
    )
    if mode in WRITES_A_RUN:
        others.check_folder(workdir)


def _facts(mode: str, config: ConfigDict | None) -> dict[str, Any]:
    """What must be the same on every host."""
    import jax

    from codebook_jax.run import record

    versions, fields = record.package_versions(), flat(config.to_dict()) if config else {}
    return {
        "--mode": mode,
        "code": record.code_digest(),
        **{f"version of {name}": version for name, version in versions.items()},
        "devices per process": jax.local_device_count(),
        "kind": jax.local_devices()[0].device_kind,
        **{f"config.{name}": value for name, value in fields.items()},
    }


def _about_files(error: Exception) -> UserError | None:
    """The user error for a disk that is full or cannot be reached; None for other errors."""
    number, place = getattr(error, "errno", None), getattr(error, "filename", "") or FLAGS.workdir
    if number in FULL_DISK:
        goes_on = "" if FLAGS.mode in DATA_MODES else ", it goes on from the newest checkpoint"
        return UserError(
            f"no space left while writing {place}: free some and start the same command "
            f"again{goes_on}"
        )
    if number in UNREACHABLE:
        return UserError(
            f"{place} can no longer be reached ({error.strerror}): fix this and start the same "
            "command again"
        )
    return None


def _parse_or_leave(argv: Sequence[str]) -> list[str]:
    if len(argv) == 1:
        sys.exit(complain(f"no arguments: {modes.BEGIN}"))
    if any(argument in HELP for argument in argv[1:]):
        print(modes.help_text())
        sys.exit(0)
    try:
        return parse(argv)
    except UserError as error:
        sys.exit(complain(str(error)))


def _sentence(error: Exception, argv: Sequence[str]) -> str:
    """The sentence for an error of absl or ml_collections; empty for one of the config file."""
    text = str(error).strip()
    if isinstance(error, AttributeError | KeyError):
        name, near = re.search(r"\w+", text)[0], re.search(r'Did you mean "(\w+)"', text)
        for flag in (argument.partition("=")[0].lstrip("-") for argument in argv):
            if name in flag.split("."):
                hint = f"... did you mean {near[1]}?" if near else "(configs/base.py lists all)"
                return f"{flag}: the config has no field {name} {hint}"
    for pattern, sentence in MISTAKES:
        if match := re.search(pattern, text):
            missing = Path(match[1]) if "no file" in sentence else None
            return match.expand(sentence) + (_near_config(missing) if missing else "")
    return text.partition("\n")[0].removeprefix("flag ") if isinstance(error, flags.Error) else ""


def _near_config(missing: Path) -> str:
    """Suggests a config file that may have been meant, in the same folder or in configs/."""
    files = {
        file.stem: file for file in (*missing.parent.glob("*.py"), *Path("configs").glob("*.py"))
    }
    near = difflib.get_close_matches(missing.stem, files, n=1, cutoff=0.5)
    if near:
        return f" ... did you mean {files[near[0]]}?"
    return f" (there are {', '.join(map(str, files.values()))})" if files else ""


def command() -> None:
    """Reads the command line, runs it and exits; called by console.command."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # XLA's notices to its own developers
    logging.set_verbosity(logging.FATAL)  # Orbax logs the trace of what it also raises
    define_flags()
    app.run(main, flags_parser=_parse_or_leave)
