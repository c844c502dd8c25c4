"""A user error on the command line is one sentence on stderr and exit code 2."""

import configparser
import errno
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from codebook_jax import main, modes
from codebook_jax.config import flat
from codebook_jax.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIG = f"--config={ROOT / 'configs' / 'base.py'}:tiny"
WORKDIR = "--workdir=runs/x"


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        main.parse(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_size_and_every_kind_of_override_are_read():
    overrides = {
        "--config.data.global_batch=32": 32,
        "--config.optimizer.learning_rate=1": 1.0,
        "--config.data.crop_scale=(0.2, 1)": (0.2, 1),
        "--config.data.crop_ratio=[0.5, 2]": (0.5, 2),
        "--config.data.flip": True,
        "--config.train.memory_check=False": False,
        "--config.data.train=json:a b.json": "json:a b.json",
    }
    flags = main.parse(
        [*overrides, WORKDIR, "--mode", "export", "--config.seed", "3", CONFIG, "--process=1"]
    )
    fields = flat(flags.config.to_dict())
    assert fields["size"] == "tiny"
    assert [fields[name] for name in flags.named] == [*overrides.values(), 3]
    assert isinstance(fields["optimizer.learning_rate"], float)
    assert (flags.mode, flags.workdir, flags.process) == ("export", "runs/x", 1)


def test_a_trained_run_needs_no_config():
    assert main.parse([WORKDIR, "--mode=eval"]).config is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.data.global_bach=3"], "global_bach ... did you mean data.global_batch?"),
        (["--config.dta.global_batch=3"], "dta.global_batch ... did you mean data.global_batch?"),
        (["--config.data.xyz=1"], "--config.data.xyz: the config has no field data.xyz"),
        (["--config.train.steps.x", "3"], "the config has no field train.steps.x"),
        (["--config.data=3"], "the config has no field data "),
        (["--config.data.global_batch=3.5"], "--config.data.global_batch=3.5 needs a whole number"),
        (["--config.optimizer.b1=high"], "--config.optimizer.b1=high needs a number"),
        (["--config.data.flip=maybe"], "--config.data.flip=maybe needs true or false"),
        (
            ["--config.data.crop_scale=a"],
            "--config.data.crop_scale=a needs values such as (0.5, 1.0)",
        ),
        (["--config.seed"], "--config.seed"),
        (["--mode=trian"], "--mode=trian is not one of train, import, eval"),
        (["--mode=trian"], "did you mean train?"),
        (["--wrokdir=a"], "there is no flag --wrokdir ... did you mean workdir?"),
        (["--processes=two"], "--processes=two needs a whole number"),
        (["--processes"], "--processes"),
        (["seed=3"], "'seed=3' is not a flag"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named_in_one_sentence(arguments, words):
    assert words in refusal(CONFIG, WORKDIR, *arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([CONFIG.replace("tiny", "tinny"), WORKDIR], "no size 'tinny'.* did you mean tiny?"),
        (["--config=configs/bas.py:tiny", WORKDIR], "no file .*did you mean configs/base.py?"),
        (["--config=configs", WORKDIR], "--config=configs: there is no file"),
        (["--config=", WORKDIR], "--config is missing"),
        (["--config.seed=1", WORKDIR], "--config is missing"),
        ([WORKDIR], "--config is missing"),
        ([CONFIG], "--workdir is missing"),
        ([CONFIG, "--workdir=gs://bucket/run"], "--workdir=gs://bucket/run must be a local"),
    ],
    ids=str,
)
def test_a_wrong_config_file_or_workdir_is_named_in_one_sentence(arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert re.search(words.replace("?", r"\?"), refusal(*arguments))


@pytest.mark.parametrize("content", ["", "def get_config(): return 3"])
def test_a_config_file_without_a_config_is_refused(content, tmp_path):
    (tmp_path / "empty.py").write_text(content)
    assert "get_config" in refusal(f"--config={tmp_path / 'empty.py'}", WORKDIR)


def test_every_mode_is_in_the_help_with_an_example_that_is_right(monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = re.findall(rf"\n +{modes.PROGRAM} (.*)", modes.HELP)
    assert tuple(main.parse(shlex.split(example)).mode for example in examples) == modes.MODES
    assert tuple(re.findall(r"\n  (\S+)  +\w", modes.HELP)) == modes.MODES


def test_without_arguments_the_command_says_how_to_begin(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["codebook-jax"])
    with pytest.raises(SystemExit) as end:
        main.command()
    assert end.value.code == 2 and modes.BEGIN in capsys.readouterr().err


def test_the_console_script_and_the_module_do_the_same():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    name, place = settings["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, function = place.split(":")
    script = f"from {module} import {function}; {function}()"
    one, other = (
        subprocess.run([sys.executable, *way, "--help"], capture_output=True, text=True, cwd=ROOT)
        for way in (["-m", "codebook_jax.main"], ["-c", script])
    )
    assert name == modes.PROGRAM
    assert one.stdout == other.stdout and (one.returncode, one.stderr) == (0, "")
    assert one.stdout.startswith(modes.HELP)
    assert all(f"--{option} " in one.stdout for option in main.OPTIONS)


def test_the_command_prints_the_sentence_alone_and_exits_2():
    wrong = "--config.data.global_bach=3"
    command = [sys.executable, "-m", "codebook_jax.main", CONFIG, WORKDIR, wrong]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .*global_bach.*global_batch\?\n", done.stderr)


@pytest.fixture
def fails_with(monkeypatch, capsys):
    def fail(error):
        def run(_):
            raise error

        monkeypatch.setattr(main, "run", run)
        return main.main(main.parse([CONFIG, WORKDIR])), capsys.readouterr().err

    return fail


def test_a_user_error_of_the_run_exits_2_and_a_full_disk_is_said(fails_with):
    assert fails_with(UserError("that is wrong: do this")) == (2, "error: that is wrong: do this\n")
    code, said = fails_with(OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics"))
    assert code == 2 and "runs/x/metrics" in said and "No space left on device" in said
    code, said = fails_with(OSError(errno.ESTALE, "Stale file handle"))
    assert code == 2 and "runs/x" in said and "Stale file handle" in said


def test_an_interrupted_mode_is_one_sentence_and_exits_130(fails_with):
    code, said = fails_with(KeyboardInterrupt())
    assert code == 130 and len(said.splitlines()) == 1 and "SIGINT" in said


def test_an_error_of_ours_keeps_its_trace(fails_with):
    for error in (OSError(errno.EACCES, "Permission denied"), RuntimeError("a bug")):
        with pytest.raises(type(error)):
            fails_with(error)
