"""The modes of the command in one table, which --mode, the help and the suggestions use."""

from __future__ import annotations

import shlex
from typing import NamedTuple

PROGRAM = "codebook-jax"


class Mode(NamedTuple):
    """A mode: its heading in the help, what it does, and the flags of an example."""

    group: str
    does: str
    example: str


MODES = {
    "train": Mode(
        "Train",
        "trains, or continues the run in --workdir (the default mode)",
        "--config=configs/base.py:tiny --workdir=runs/first",
    ),
    "import": Mode(
        "Train",
        "makes a run from pre-trained weights, to evaluate, export or train further",
        "--mode=import --config=configs/albef.py --config.init=model:ALBEF.pth "
        "--workdir=runs/albef",
    ),
    "eval": Mode(
        "Evaluate",
        "evaluates retrieval of the best checkpoint on all test data: a table and eval.json",
        "--mode=eval --workdir=runs/first",
    ),
    "report": Mode(
        "Evaluate",
        "writes a page about the run: curves, what the model finds, the codebook, settings",
        "--mode=report --workdir=runs/first",
    ),
    "export": Mode(
        "Use the weights",
        "writes the weights for codebook_jax.load, Hugging Face or ALBEF",
        "--mode=export --workdir=runs/first",
    ),
    "check-data": Mode(
        "Look at data",
        "finds unusable, repeated and leaked pictures before you train",
        "--mode=check-data --config=configs/base.py --config.data.train=json:pairs.json "
        "--workdir=checks/pairs",
    ),
    "prepare": Mode(
        "Look at data",
        "packs pairs into shards that are fast to read",
        "--mode=prepare --config=configs/base.py --config.prepare.source=json:pairs.json "
        "--workdir=packed/pairs",
    ),
    "plan": Mode(
        "Plan",
        "estimates the memory and time of training on chips that you only name",
        "--mode=plan --config=configs/base.py:large --plan.chip=h200 --plan.devices=8",
    ),
}
USES = ("Evaluate", "Use the weights")  # groups of the modes that use a trained run

BEGIN = f"""start with a small model on built-in pictures, or list the other commands:
  {PROGRAM} {MODES["train"].example}
  {PROGRAM} --help"""


def command_line(mode: str, workdir: object) -> str:
    """The command that runs a mode on a trained run."""
    return f"{PROGRAM} --mode={mode} --workdir={shlex.quote(str(workdir))}"


def help_text() -> str:
    """The short help: every mode with an example."""
    lines, group = [], None
    for name, mode in MODES.items():
        if mode.group != group:
            lines += ["", mode.group]
            group = mode.group
        lines += [f"  {name:11} {mode.does}", f"              {PROGRAM} {mode.example}"]
    table = "\n".join(lines)
    return f"""{PROGRAM} --config=FILE[:SIZE] --workdir=DIR [--mode=MODE] [--config.FIELD=VALUE ...]
python -m codebook_jax.main does the same.
{table}

SIZE is tiny, small, base, large or huge. configs/base.py lists every FIELD with its source.
Modes that use a trained run need no --config. Exit codes: 0 done, 1 failed, 2 user error, 130
Ctrl-C; a training answers Ctrl-C by saving, then exits with 0, or with --preempted_exit_code if
that is given. --helpfull lists all flags."""
