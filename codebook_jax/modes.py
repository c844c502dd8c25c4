"""What the command can do: its modes, their help, and the commands that other output suggests."""

from __future__ import annotations

import shlex

PROGRAM = "codebook-jax"
MODES = ("train", "import", "eval", "report", "export", "explain", "check-data", "prepare", "plan")
BEGIN = f"""start with a small model on built-in pictures, or list the other commands:
  {PROGRAM} --config=configs/base.py:tiny --workdir=runs/first
  {PROGRAM} --help"""
HELP = f"""{PROGRAM} --config=FILE[:SIZE] --workdir=DIR [--mode=MODE] [--config.FIELD=VALUE ...]
python -m codebook_jax.main does the same.

Train
  train       trains, or continues the run in --workdir (the default mode)
              {PROGRAM} --config=configs/base.py:tiny --workdir=runs/first
  import      makes a run from pre-trained weights, to evaluate, export or train further
              {PROGRAM} --mode=import --config=configs/albef.py --config.init=model:ALBEF.pth \
--workdir=runs/albef

Evaluate
  eval        evaluates retrieval of the best checkpoint on all test data: a table and eval.json
              {PROGRAM} --mode=eval --workdir=runs/first
  report      writes a page about the run: curves, what the model finds, the codebook, settings
              {PROGRAM} --mode=report --workdir=runs/first

Use the weights
  export      writes the weights for codebook_jax.load, Hugging Face or ALBEF
              {PROGRAM} --mode=export --workdir=runs/first
  explain     draws which parts of a picture speak for each word of a text, and prints the places:
              Grad-CAM in the third of six fusion layers (of fewer: the middle one), as in ALBEF;
              later layers look at few patches. Needs an export
              {PROGRAM} --mode=explain --workdir=runs/first --explain.image=a.png \
--explain.text="a red circle"

Look at data
  check-data  finds unusable, repeated and leaked pictures before you train
              {PROGRAM} --mode=check-data --config=configs/base.py \
--config.data.train=json:pairs.json --workdir=checks/pairs
  prepare     packs pairs into shards that are fast to read
              {PROGRAM} --mode=prepare --config=configs/base.py \
--config.prepare.source=json:pairs.json --workdir=packed/pairs

Plan
  plan        estimates the memory and time of training on chips that you only name
              {PROGRAM} --mode=plan --config=configs/base.py:large --plan.chip=h200 --plan.devices=8

SIZE is tiny, small, base, large or huge. configs/base.py lists every FIELD with its source.
Modes that use a trained run need no --config. Exit codes: 0 done, 1 failed, 2 user error, 130
Ctrl-C; a training answers Ctrl-C by saving, then exits with 0, or with --preempted_exit_code if
that is given. --helpfull lists all flags."""


def command_line(mode: str, workdir: object) -> str:
    """The command that runs a mode on a trained run."""
    return f"{PROGRAM} --mode={mode} --workdir={shlex.quote(str(workdir))}"
