"""The modes of the command in one table: the values of --mode, the help and the suggestions come from it."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from codebook_jax.errors import did_you_mean

PROGRAM = "codebook-jax"


class Mode(NamedTuple):
    """What a mode is for: its heading in the help, a sentence, and the flags of an example."""

    group: str
    does: str
    example: str


MODES = {
    "train": Mode(
        "Train",
        "trains, or goes on with the run in --workdir (the default mode)",
        "--config=configs/base.py:tiny --workdir=runs/first",
    ),
    "import": Mode(
        "Train",
        "makes a run of pre-trained weights, to evaluate, export or train on",
        "--mode=import --config=configs/albef.py --config.init=model:ALBEF.pth --workdir=runs/albef",
    ),
    "eval": Mode(
        "Evaluate",
        "retrieval of the best checkpoint on all test data: a table and eval.json",
        "--mode=eval --workdir=runs/first",
    ),
    "report": Mode(
        "Evaluate",
        "a page of the run: curves, what the model finds, the codebook, settings",
        "--mode=report --workdir=runs/first",
    ),
    "export": Mode(
        "Use the weights",
        "writes them for codebook_jax.load, Hugging Face or ALBEF",
        "--mode=export --workdir=runs/first",
    ),
    "check-data": Mode(
        "Look at data",
        "what is unusable, repeated or leaked, before anything is trained",
        "--mode=check-data --config=configs/base.py --config.data.train=json:pairs.json --workdir=checks/pairs",
    ),
    "prepare": Mode(
        "Look at data",
        "packs pairs into shards that are read fast",
        "--mode=prepare --config=configs/base.py --config.prepare.source=json:pairs.json --workdir=packed/pairs",
    ),
    "plan": Mode(
        "Plan",
        "what a training will need of memory and time on given chips, without them",
        "--mode=plan --config=configs/base.py:large --plan.chip=h200 --plan.devices=8",
    ),
}
USES = ("Evaluate", "Use the weights")  # groups of what a trained run is used for
RENAMED = {"show": "report"}  # former names that are no mode any more

BEGIN = f"""begin with a small model on built-in pictures, and look at the other commands:
  {PROGRAM} {MODES["train"].example}
  {PROGRAM} --help"""


def command_line(mode: str, workdir: object) -> str:
    """The command that runs a mode on a trained run."""
    return f"{PROGRAM} --mode={mode} --workdir={shlex.quote(str(workdir))}"


def unknown(given: str) -> str:
    """The sentence for a --mode that there is not."""
    if (now := RENAMED.get(given)) in MODES:
        hint = f" ... it is now --mode={now}"
    else:
        hint = did_you_mean(given, MODES)
    return f"--mode={given} is none of {', '.join(MODES)}{hint}"


def help_text() -> str:
    """The short help: what can be done, with an example of each."""
    lines = [
        f"{PROGRAM} --config=FILE[:SIZE] --workdir=DIR [--mode=MODE] [--config.FIELD=VALUE ...]",
        "python -m codebook_jax.main does the same.",
    ]
    group = None
    for name, mode in MODES.items():
        if mode.group != group:
            lines += ["", mode.group]
            group = mode.group
        lines += [f"  {name:11} {mode.does}", f"              {PROGRAM} {mode.example}"]
    return "\n".join(
        [
            *lines,
            "",
            "SIZE is tiny, small, base, large or huge. Every FIELD, with its source, is in configs/base.py. A mode that uses",
            "a trained run needs no --config. Exit codes: 0 done, 1 failed, 2 a mistake in what was given, 130 Ctrl-C.",
            "--helpfull lists all flags.",
        ]
    )
