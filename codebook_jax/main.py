"""The command: `python -m codebook_jax.main --config=configs/base.py[:size] --workdir=DIR --mode=MODE`; MODES lists them.

The only file that sees flags. A user's mistake ends it with one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from codebook_jax.errors import FULL_DISK, UserError

DATA_MODES = ("prepare", "check-data")  # need no devices
MODES = ("train", "import", "eval", "export", "show", *DATA_MODES)
NEEDS_CONFIG = ("train", "import", *DATA_MODES)
WRONG_TYPES = (
    ("invalid literal for int()", "needs a whole number"),
    ("could not convert string to float", "needs a number"),
    ("('Non-boolean argument", "needs true or false"),
    ("Failed to parse", "is a section: set its fields, as --config.SECTION.FIELD=value"),
)
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # read by glibc when a program starts

Mode = Callable[[ConfigDict | None, Path], int | None]  # the exit code; None is 0

FLAGS = flags.FLAGS


def define_flags(values: flags.FlagValues = FLAGS, argv: list[str] | None = None) -> None:
    """Declares the flags; `argv` is where the config's overrides are read from (None: the command line)."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "the config file, after a colon the size: configs/base.py:tiny; --config.data.global_batch=64 sets a field",
        flag_values=values,
        sys_argv=argv,
    )
    flags.DEFINE_string(
        "workdir", None, "the run's folder; an existing run goes on", flag_values=values
    )
    flags.DEFINE_enum(
        "mode",
        "train",
        MODES,
        "train, use what the workdir has learned, or see to the data",
        flag_values=values,
    )


def parse(argv: Sequence[str], values: flags.FlagValues = FLAGS) -> list[str]:
    """Reads the command line into `values`; raises UserError, in one sentence, for what it cannot mean."""
    try:
        rest = values(list(argv))
        config = values.config
        if config is not None:
            config.to_dict()  # a file that could not be read shows only now
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith(("config.", "noconfig.")):
            raise UserError(f"--config=FILE is missing before --{error.flagname}") from error
        close = difflib.get_close_matches(error.flagname, list(values), n=1)
        hint = f" ... did you mean --{close[0]}?" if close else ""
        raise UserError(f"there is no flag --{error.flagname}{hint}") from error
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_field(argv)) from error
    except (flags.Error, OSError, ValueError, TypeError) as error:
        raise UserError(_one_sentence(error)) from error
    for field, value in values["config"].override_values.items() if config is not None else ():
        if isinstance(value, ConfigDict):
            raise UserError(
                f"--config.{field} is a section: set its fields, as --config.{field}.NAME=value"
            )
    if rest[1:]:
        raise UserError(f"{rest[1]!r} is not a flag: flags begin with --, as --workdir=DIR")
    if config is None and values.mode in NEEDS_CONFIG:
        raise UserError("--config is missing: give one, as --config=configs/base.py:tiny")
    if not values.workdir:
        raise UserError("--workdir is missing: give the folder of the run, as --workdir=runs/first")
    if "://" in values.workdir:
        raise UserError(
            f"--workdir={values.workdir} is not a folder on this machine: give a local or mounted one"
        )
    return rest


def run(mode: str, config: ConfigDict | None, workdir: Path) -> int:
    """Does what `mode` says; the exit code."""
    # Imported now: they import JAX or much else, after the flags are known to be right.
    if mode in DATA_MODES:
        from codebook_jax import check_data, prepare

        modes: dict[str, Mode] = {"prepare": prepare.prepare, "check-data": check_data.check_data}
        return modes[mode](config, workdir) or 0
    _join_other_processes()  # before anything asks JAX for its devices
    from codebook_jax import evaluate, export, figures, train

    modes = {
        "train": train.fit,
        "import": train.import_weights,
        "eval": evaluate.evaluate,
        "export": export.export,
        "show": figures.show,
    }
    return modes[mode](config, workdir) or 0


def complain(sentence: str) -> int:
    """Prints the sentence on stderr; the exit code of a user's mistake."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return 2


def main(argv: Sequence[str]) -> int:
    """The exit code of the run the flags ask for; a user's mistake is one sentence and 2."""
    del argv
    try:
        return run(FLAGS.mode, FLAGS.config, Path(FLAGS.workdir))
    except UserError as error:
        return complain(str(error))
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        goes_on = "" if FLAGS.mode in DATA_MODES else ", it goes on from the newest checkpoint"
        return complain(
            f"no space left while writing {error.filename or FLAGS.workdir}: free some and start the same "
            f"command again{goes_on}"
        )


def _join_other_processes() -> None:
    """Connects to the processes of one run, where the environment names their coordinator."""
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return
    import jax

    try:
        count, own = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
    except (KeyError, ValueError) as error:
        raise UserError(
            "JAX_COORDINATOR_ADDRESS is set, but JAX_NUM_PROCESSES and JAX_PROCESS_ID are not both numbers: "
            "set all three, or none"
        ) from error
    jax.distributed.initialize(num_processes=count, process_id=own)


def _parse_or_leave(argv: Sequence[str]) -> list[str]:
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
                close = difflib.get_close_matches(name, section.keys(), n=1)
                hint = (
                    f" ... did you mean {close[0]}?"
                    if close
                    else f" (it has {', '.join(section.keys())})"
                )
                return f"{given}: the config has no field {name}{hint}"
            section = section[name]
    return f"the command line does not fit the config: {' '.join(overrides)}"


def _one_sentence(error: Exception) -> str:
    """What a flag error says, without the trace that ml_collections wraps around it."""
    text = str(error).strip()
    _, colon, detail = text.partition(": Error whilst parsing config file:")
    if colon:
        return re.sub(r"^\w+(\.\w+)*: ", "", detail.strip().splitlines()[-1])  # the error's type
    if isinstance(error, OSError):
        path = re.search(r"No such file or directory: '([^']+)'", text)
        return (
            f"--config: there is no file {path.group(1)}"
            if path
            else f"--config: {text.splitlines()[-1]}"
        )
    if "in argv before a value for" in text:
        return "--config=FILE goes before the fields it sets, such as --config.data.global_batch=64"
    for problem, meaning in WRONG_TYPES:
        flag, found, _ = text.partition(f": {problem}")
        if found:
            return f"{flag.removeprefix('flag ')} {meaning}"
    return re.sub(r"^flag ", "", text.splitlines()[0])


def _with_huge_pages() -> None:
    """Starts this program again, as the same process, with malloc asking Linux for huge pages.

    A CPU otherwise spends a quarter of a step on page faults.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ.update(HUGE_PAGES)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    _with_huge_pages()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # XLA's notices to its own developers
    logging.set_verbosity(logging.FATAL)  # Orbax logs the trace of what it also raises
    define_flags()
    app.run(main, flags_parser=_parse_or_leave)
