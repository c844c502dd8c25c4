"""The command `codebook-jax --config=configs/base.py[:size] --workdir=DIR --mode=MODE`.

The only file that reads flags. A user error prints one sentence on stderr and exits with code 2.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before the slow imports below, so that Ctrl-C is caught from here on
    from codebook_jax import console

    sys.exit(console.command())

import importlib.util
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from codebook_jax import console, modes, programs
from codebook_jax.config import COMMON, check_fields, flat
from codebook_jax.errors import FULL_DISK, UNREACHABLE, UserError, did_you_mean
from codebook_jax.parallel.processes import joining, peers
from codebook_jax.tools.chips import PlanOptions, environment

DATA_MODES = ("prepare", "check-data")  # need no devices
NEEDS_CONFIG = ("train", "import", "plan", *DATA_MODES)
WRITES_A_RUN = ("train", "import")
HELP = {"--help", "-help", "-h", "--helpshort", "-helpshort"}

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
    (TEXT, "report.reference", None, "for --mode=report: a file of reference curves of your own"),
    (TEXT, "explain.image", None, "for --mode=explain: a picture file"),
    (TEXT, "explain.text", None, "for --mode=explain: a text about it"),
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
    (r"^flag (.+?): Failed to parse .* as a ConfigDict", r"\1 is a section: set its fields"),
    ("in argv before a value for", "--config=FILE goes before the fields it sets"),
    (r"flag '((no)?config\..+?)'", r"--config=FILE is missing before --\1"),
    (r"flag '(.+?)'(?:\. Did you mean: (.+?) \?)?", r"there is no flag --\1"),
    (r"No such file or directory: '(.+?)'", r"--config: there is no file \1"),
    (r"failure to load: (?:\[.+?\] )?(.+?)\.?$", r"--config: \1: give one as configs/base.py"),
    ("no attribute '(get_config|to_dict)'", "--config: its get_config() returns no ConfigDict"),
    (r"Attempting to lookup: (\S+)\.(\w+)", r"config.\1 is a value and has no field \2"),
)

FLAGS = flags.FLAGS


def define_flags(values: flags.FlagValues = FLAGS, argv: list[str] | None = None) -> None:
    """Declares the flags; the config's overrides are read from `argv` (None: the command line)."""
    meaning = "FILE:SIZE, as configs/base.py:tiny; --config.data.global_batch=64 sets a field"
    config_flags.DEFINE_config_file("config", None, meaning, flag_values=values, sys_argv=argv)
    for define, name, default, meaning in OPTIONS:
        define(name, default, meaning, flag_values=values)


def parse(argv: Sequence[str], values: flags.FlagValues = FLAGS) -> list[str]:
    """Reads the command line into `values`; raises UserError if it is not valid."""
    try:
        rest = values(list(argv))
        if values.config is not None:
            values.config.to_dict()  # an unreadable file raises only here
    except SyntaxError as error:
        raise UserError(f"--config: the file is not Python: {error}") from error
    except (flags.Error, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        if sentence := _sentence(error, argv):
            raise UserError(sentence) from error
        raise  # an error of the config file, whose trace names the line
    mode, workdir = values.mode, values.workdir
    if rest[1:]:
        raise UserError(f"{rest[1]!r} is not a flag: flags begin with --, as --workdir=DIR")
    if mode not in modes.MODES:
        hint = did_you_mean(mode, modes.MODES)
        raise UserError(f"--mode={mode} is not one of {', '.join(modes.MODES)}{hint}")
    if values.config is None and mode in NEEDS_CONFIG:
        raise UserError("--config is missing: give one, e.g. --config=configs/base.py:tiny")
    if not workdir and mode != "plan":
        raise UserError("--workdir is missing: give the run's folder, e.g. --workdir=runs/first")
    if "://" in (workdir or ""):
        raise UserError(f"--workdir={workdir} must be a local or mounted folder")
    return rest


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
            hint = ""
            if "no file" in sentence:
                missing = Path(match[1])
                known = [*missing.parent.glob("*.py"), *Path("configs").glob("*.py")]
                hint = did_you_mean(f"configs/{missing.name}", map(str, known))
            elif "no flag" in sentence and match[2]:
                hint = f" ... did you mean --{match[2]}?"
            return match.expand(sentence) + hint
    return text.partition("\n")[0].removeprefix("flag ") if isinstance(error, flags.Error) else ""


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
    from codebook_jax.tools import evaluate, explain, export, import_weights

    devices.check_platforms()
    named = None if config is None else FLAGS["config"].override_values
    others: dict[str, Callable[[], int | None]] = {
        "train": lambda: 0 if train.fit(config, workdir) else FLAGS.preempted_exit_code,
        "import": lambda: import_weights.import_weights(config, workdir),
        "eval": lambda: evaluate.evaluate(config, workdir, named),
        "export": lambda: export.export(config, workdir, named),
        "report": lambda: write_report(config, workdir, named, FLAGS["report.reference"].value),
        "explain": lambda: explain.explain(
            workdir, FLAGS["explain.image"].value, FLAGS["explain.text"].value
        ),
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
        known = str(error) if isinstance(error, UserError) else ""
        if getattr(error, "errno", None) in (*FULL_DISK, *UNREACHABLE):
            known = (
                f"{error.filename or FLAGS.workdir} cannot be written or read any more "
                f"({error.strerror}): make room or fix this, and start the same command again; "
                "a training goes on from its newest checkpoint"
            )
        if "jax" in sys.modules:
            peers.connected().end_all(UserError(known) if known else error)
        if not known:
            raise
        return complain(known)


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
    os.environ |= programs.environment(alone=found is None)  # read when JAX is imported
    if found is None or not joining.join(found, timeout_s=FLAGS.join_timeout_s):
        return
    import jax

    from codebook_jax.parallel import devices
    from codebook_jax.run import record

    devices.check_platforms()
    others = peers.connect(found.coordinator)
    print(joining.describe(found), flush=True)
    fields = flat(config.to_dict()) if config else {}
    facts = {
        "--mode": mode,
        "code": record.code_digest(),
        **{f"version of {name}": version for name, version in record.package_versions().items()},
        "devices per process": jax.local_device_count(),
        "kind": jax.local_devices()[0].device_kind,
        **{f"config.{name}": value for name, value in fields.items()},
    }
    others.compare("start", facts, "start all with the same command, code and versions")
    if mode in WRITES_A_RUN:
        others.check_folder(workdir)


def _parse_or_leave(argv: Sequence[str]) -> list[str]:
    if len(argv) == 1:
        sys.exit(complain(f"no arguments: {modes.BEGIN}"))
    if HELP & set(argv[1:]):
        print(modes.HELP)
        sys.exit(0)
    try:
        return parse(argv)
    except UserError as error:
        sys.exit(complain(str(error)))


def command() -> None:
    """Reads the command line, runs it and exits; called by console.command."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # XLA's notices to its own developers
    logging.set_verbosity(logging.FATAL)  # Orbax logs the trace of what it also raises
    define_flags()
    app.run(main, flags_parser=_parse_or_leave)
