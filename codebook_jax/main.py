"""The command: `codebook-jax --config=configs/base.py[:size] --workdir=DIR --mode=MODE`; modes.py
lists the modes.

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
from codebook_jax.errors import FULL_DISK, UNREACHABLE, UserError, did_you_mean
from codebook_jax.parallel.processes import joining, peers, shared_folder
from codebook_jax.tools.plan.options import PlanOptions, environment

DATA_MODES = ("prepare", "check-data")  # need no devices
NEEDS_CONFIG = ("train", "import", "plan", *DATA_MODES)
WRITES_A_RUN = ("train", "import")
WRONG_TYPES = (
    ("invalid literal for int()", "needs a whole number"),
    ("could not convert string to float", "needs a number"),
    ("('Non-boolean argument", "needs true or false"),
    ("Failed to parse", "is a section: set its fields, e.g. --config.SECTION.FIELD=value"),
)
NO_CONFIG = "--config: the file has no get_config() that returns a ConfigDict: write one as in configs/base.py"
HELP = ("--help", "-help", "-h", "--helpshort", "-helpshort")

Mode = Callable[[ConfigDict | None, Path], int | None]  # the exit code; None is 0

FLAGS = flags.FLAGS


def define_flags(values: flags.FlagValues = FLAGS, argv: list[str] | None = None) -> None:
    """Declares the flags; the config's overrides are read from `argv` (None: the command line)."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "the config file, after a colon the size: configs/base.py:tiny; "
        "--config.data.global_batch=64 sets a field",
        flag_values=values,
        sys_argv=argv,
    )
    flags.DEFINE_string(
        "workdir", None, "the run's folder; an existing run is continued", flag_values=values
    )
    flags.DEFINE_string("mode", "train", ", ".join(modes.MODES), flag_values=values)
    flags.DEFINE_integer(
        "preempted_exit_code",
        0,
        "the exit code if a signal stops a training run before its last step, after saving",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, if no launcher provides it",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "processes", None, "the number of processes in the run", flag_values=values
    )
    flags.DEFINE_integer("process", None, "the number of this process, from 0", flag_values=values)
    flags.DEFINE_integer(
        "join_timeout_s",
        300,
        "how long the processes look for each other, in seconds",
        flag_values=values,
    )
    default = PlanOptions()
    flags.DEFINE_string(
        "plan.chip", default.chip, "for --mode=plan: the accelerator", flag_values=values
    )
    flags.DEFINE_integer(
        "plan.devices", default.devices, "for --mode=plan: the number of chips", flag_values=values
    )
    flags.DEFINE_integer(
        "plan.slices", default.slices, "for --mode=plan: the number of slices", flag_values=values
    )
    flags.DEFINE_string(
        "plan.compiler",
        default.compiler,
        "for --mode=plan: what compiles the step: cpu, or tpu (libtpu, for the chip itself; takes "
        "minutes)",
        flag_values=values,
    )
    flags.DEFINE_string(
        "plan.json",
        default.json,
        "for --mode=plan: a file to write the figures to",
        flag_values=values,
    )


def parse(argv: Sequence[str], values: flags.FlagValues = FLAGS) -> list[str]:
    """Reads the command line into `values`; raises UserError if it is not valid."""
    try:
        rest = values(list(argv))
        config = values.config
        if config is not None:
            config.to_dict()  # an unreadable file raises only here
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith(("config.", "noconfig.")):
            raise UserError(f"--config=FILE is missing before --{error.flagname}") from error
        hint = did_you_mean(f"--{error.flagname}", [f"--{name}" for name in values])
        raise UserError(f"there is no flag --{error.flagname}{hint}") from error
    except (AttributeError, KeyError) as error:
        missing = str(error).endswith(("no attribute 'get_config'", "no attribute 'to_dict'"))
        raise UserError(NO_CONFIG if missing else _unknown_field(argv)) from error
    except SyntaxError as error:
        raise UserError(f"--config: the file is not Python: {error}") from error
    except (flags.Error, OSError, ValueError, TypeError) as error:
        raise UserError(_one_sentence(error)) from error
    for field, value in values["config"].override_values.items() if config is not None else ():
        if isinstance(value, ConfigDict):
            raise UserError(
                f"--config.{field} is a section: set its fields, e.g. --config.{field}.NAME=value"
            )
    if rest[1:]:
        raise UserError(f"{rest[1]!r} is not a flag: flags begin with --, e.g. --workdir=DIR")
    if values.mode not in modes.MODES:
        raise UserError(modes.unknown(values.mode))
    if config is None and values.mode in NEEDS_CONFIG:
        raise UserError("--config is missing: give one, e.g. --config=configs/base.py:tiny")
    if not values.workdir and values.mode != "plan":
        raise UserError(
            "--workdir is missing: give the folder of the run, e.g. --workdir=runs/first"
        )
    if "://" in (values.workdir or ""):
        raise UserError(
            f"--workdir={values.workdir} is not a folder on this machine: give a local or mounted "
            "one"
        )
    return rest


def run(mode: str, config: ConfigDict | None, workdir: Path) -> int:
    """Runs `mode` and returns the exit code."""
    # Imported here, after the flags were checked, because they import JAX and other slow modules.
    if mode in DATA_MODES:
        from codebook_jax.tools import check_data, prepare

        data_modes: dict[str, Mode] = {
            "prepare": prepare.prepare,
            "check-data": check_data.check_data,
        }
        return data_modes[mode](config, workdir) or 0
    _join_other_processes(mode, config, workdir)  # before anything asks JAX for its devices
    from codebook_jax import build, report, train
    from codebook_jax.parallel import devices
    from codebook_jax.tools import evaluate, export

    devices.check_platforms()

    others: dict[str, Mode] = {
        "train": lambda config, workdir: (
            0 if train.fit(config, workdir) else FLAGS.preempted_exit_code
        ),
        "import": train.import_weights,
        "eval": evaluate.evaluate,
        "export": export.export,
        "report": report.report,
    }
    if config is not None and mode not in NEEDS_CONFIG:
        config = build.with_own_data(config, workdir, FLAGS["config"].override_values)
    with console.interruptible():
        return others[mode](config, workdir) or 0


def complain(sentence: str) -> int:
    """Prints the sentence on stderr; returns the exit code of a user error."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return 2


def main(argv: Sequence[str]) -> int:
    """Runs what the flags ask for and returns the exit code; a user error prints one sentence and
    returns 2.

    With several processes, a failing one tells the others why and exits at once: a normal Python
    exit would wait for them.
    """
    del argv
    try:
        if FLAGS.mode == "plan":
            return _plan()
        code = run(FLAGS.mode, FLAGS.config, Path(os.path.expanduser(FLAGS.workdir)))
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
    """Connects to the run's other processes, if any, and checks that all do the same in the same
    workdir.
    """
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
        shared_folder.check(others, workdir)


def _facts(mode: str, config: ConfigDict | None) -> dict[str, Any]:
    """What must be the same on every host."""
    import jax

    from codebook_jax.run import record as records

    facts = {"--mode": mode, "code": records.code_digest()}
    facts |= {f"version of {name}": version for name, version in records.package_versions().items()}
    facts |= {
        "devices per process": jax.local_device_count(),
        "kind": jax.local_devices()[0].device_kind,
    }
    if config is not None:
        facts |= {f"config.{name}": value for name, value in records.flat(config.to_dict()).items()}
    return facts


def _about_files(error: Exception) -> UserError | None:
    """The user error for a disk that is full or cannot be reached; None for other errors."""
    if not isinstance(error, OSError):
        return None
    if error.errno in FULL_DISK:
        goes_on = "" if FLAGS.mode in DATA_MODES else ", it goes on from the newest checkpoint"
        return UserError(
            f"no space left while writing {error.filename or FLAGS.workdir}: free some and start "
            f"the same command again{goes_on}"
        )
    if error.errno in UNREACHABLE:
        return UserError(
            f"{error.filename or FLAGS.workdir} can no longer be reached ({error.strerror}): fix "
            "this and start the same command again"
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


def _unknown_field(argv: Sequence[str]) -> str:
    """Names the override that the config has no field for, and the field it may have meant."""
    overrides = [a for a in argv if re.match(r"--?(no)?config\.", a)]
    bare = [a for a in argv if a not in overrides]
    values = flags.FlagValues()
    define_flags(values, bare)
    values(bare, known_only=True)
    for override in overrides:
        given = override.split("=")[0].lstrip("-")
        section = values.config
        for name in given.split(".")[1:]:
            if not isinstance(section, ConfigDict):
                return f"{given}: {given.partition(f'.{name}')[0]} is a value and has no fields"
            if name not in section:
                hint = did_you_mean(name, section) or f" (it has {', '.join(section)})"
                return f"{given}: the config has no field {name}{hint}"
            section = section[name]
    return f"the command line does not fit the config: {' '.join(overrides)}"


def _one_sentence(error: Exception) -> str:
    """The message of a flag error, without the trace that ml_collections wraps around it."""
    text = str(error).strip()
    _, colon, detail = text.partition(": Error whilst parsing config file:")
    if colon:
        return re.sub(r"^\w+(\.\w+)*: ", "", detail.strip().splitlines()[-1])  # the error's type
    if isinstance(error, OSError):
        path = re.search(r"No such file or directory: '([^']+)'", text)
        if not path:
            reason = text.splitlines()[-1].rpartition("failure to load: ")[2].rstrip(".")
            return f"--config: {re.sub(r'^.Errno .*?] ', '', reason)}: give a file, e.g. configs/base.py:tiny"
        return f"--config: there is no file {path.group(1)}{_near_config(Path(path.group(1)))}"
    if "in argv before a value for" in text:
        return "--config=FILE goes before the fields it sets, such as --config.data.global_batch=64"
    for problem, meaning in WRONG_TYPES:
        flag, found, _ = text.partition(f": {problem}")
        if found:
            return f"{flag.removeprefix('flag ')} {meaning}"
    return re.sub(r"^flag ", "", text.splitlines()[0])


def _near_config(missing: Path) -> str:
    """Suggests a config file that may have been meant, in the same folder or in configs/."""
    files = [*missing.parent.glob("*.py"), *Path("configs").glob("*.py")]
    near = difflib.get_close_matches(missing.stem, [file.stem for file in files], n=1, cutoff=0.5)
    found = [str(file) for file in files if file.stem in near]
    if found:
        return f" ... did you mean {found[0]}?"
    return f" (there are {', '.join(map(str, files))})" if files else ""


def command() -> None:
    """Reads the command line, runs it and exits; called by console.command."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # XLA's notices to its own developers
    logging.set_verbosity(logging.FATAL)  # Orbax logs the trace of what it also raises
    define_flags()
    app.run(main, flags_parser=_parse_or_leave)
