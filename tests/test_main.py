"""A user error on the command line is one sentence on stderr and exit code 2."""

import configparser
import errno
import re
import shlex
import sys

import pytest
from absl import flags
from small_run import ROOT, ran

import codebook_jax
from codebook_jax import main, modes
from codebook_jax.errors import UserError

CONFIG = f"--config={ROOT / 'configs' / 'base.py'}:tiny"
WORKDIR = "--workdir=runs/x"


def parsed(*arguments):
    values = flags.FlagValues()
    argv = ["main", *arguments]
    main.define_flags(values, argv)
    main.parse(argv, values)
    return values


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        parsed(*arguments)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    return str(error.value)


def test_the_size_and_every_kind_of_override_are_read():
    given = ("global_batch=32", "crop_scale=(0.2, 1)", "flip", "train=json:a b.json")
    fields = [f"--config.data.{field}" for field in given]
    rate = "--config.optimizer.learning_rate=1"
    values = parsed(CONFIG, WORKDIR, *fields, rate, "--mode=export")
    config = values.config
    assert config.size == "tiny" and config.data.global_batch == 32 and config.data.flip is True
    assert repr(config.optimizer.learning_rate) == "1.0"
    assert config.data.crop_scale == (0.2, 1) and config.data.train == "json:a b.json"
    assert (values.mode, values.workdir) == ("export", "runs/x")


def test_a_trained_run_needs_no_config():
    assert parsed(WORKDIR, "--mode=eval").config is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.data.global_bach=3"], "config.data.global_bach: .* did you mean global_batch?"),
        (["--config.dta.global_batch=3"], "config.dta.global_batch: .* did you mean data?"),
        (["--noconfig.data.flp"], "noconfig.data.flp: .* did you mean flip?"),
        (["--config.data.xyz=1"], "config.data.xyz: the config has no field xyz"),
        (["--config.train.steps.x", "3"], "config.train.steps is a value and has no field x"),
        (["--config.data.global_batch=3.5"], "--config.data.global_batch=3.5 needs a whole number"),
        (["--config.optimizer.b1=high"], "--config.optimizer.b1=high needs a number"),
        (["--config.data.flip=maybe"], "--config.data.flip=maybe needs true or false"),
        (["--config.data=3"], "--config.data=3 is a section: set its fields"),
        (["--mode=trian"], "--mode=trian is not one of train, import, eval.* did you mean train?"),
        (["--wrokdir=a"], "there is no flag --wrokdir ... did you mean --workdir?"),
        (["--x=a"], "there is no flag --x"),
        (["--processes=two"], "--processes=two needs a whole number"),
        (["--config.seed"], ".*--config.seed"),
        (["seed=3"], "'seed=3' is not a flag"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named_in_one_sentence(arguments, words):
    assert re.match(words.replace("?", r"\?"), refusal(CONFIG, WORKDIR, *arguments))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([CONFIG.replace("tiny", "tinny"), WORKDIR], "no size 'tinny'.* did you mean tiny?"),
        (["--config=configs/bas.py:tiny", WORKDIR], "no file .*did you mean configs/base.py?"),
        (["--config=elsewhere/base.py:tiny", WORKDIR], "no file .*did you mean configs/base.py?"),
        (["--config=configs", WORKDIR], "--config: Is a directory: 'configs'"),
        (["--config=", WORKDIR], "--config: .* empty string: give one"),
        (["--config=README.md", WORKDIR], "--config: the file is not Python"),
        (["--config.seed=1", CONFIG, WORKDIR], "--config=FILE goes before the fields it sets"),
        (["--config.seed=1", WORKDIR], "--config=FILE is missing before --config.seed"),
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
def test_a_config_file_without_a_config_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # ml_collections' name for all
    (tmp_path / "empty.py").write_text(content)
    assert "get_config" in refusal(f"--config={tmp_path / 'empty.py'}", WORKDIR)


def test_every_mode_is_in_the_help_with_an_example_that_is_right(monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = re.findall(rf"\n +{modes.PROGRAM} (.*)", modes.HELP)
    assert tuple(parsed(*shlex.split(example)).mode for example in examples) == modes.MODES
    assert tuple(re.findall(r"\n  (\S+)  +\w", modes.HELP)) == modes.MODES


def test_without_arguments_the_command_says_how_to_begin(capsys):
    with pytest.raises(SystemExit) as end:
        main._parse_or_leave(["codebook-jax"])
    assert end.value.code == 2 and modes.BEGIN in capsys.readouterr().err


def test_the_console_script_and_the_module_do_the_same():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    name, place = settings["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, function = place.split(":")
    script = f"from {module} import {function}; {function}()"
    assert name == modes.PROGRAM
    for way in (["-m", "codebook_jax.main"], ["-c", script]):
        done = ran([sys.executable, *way, "--help"])
        assert (done.returncode, done.stdout, done.stderr) == (0, modes.HELP + "\n", "")


def test_the_command_prints_the_sentence_alone_and_exits_2():
    module = [sys.executable, "-m", "codebook_jax.main"]
    done = ran([*module, CONFIG, WORKDIR, "--config.data.global_bach=3"])
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: config.data.global_bach: ")


@pytest.fixture
def fails_with(monkeypatch, capsys):
    monkeypatch.setattr(main, "FLAGS", parsed(CONFIG, WORKDIR))

    def fail(error):
        def run(*_):
            raise error

        monkeypatch.setattr(main, "run", run)
        return main.main([]), capsys.readouterr().err

    return fail


def test_a_user_error_of_the_run_exits_2_and_a_full_or_lost_disk_is_said(fails_with):
    assert fails_with(UserError("that is wrong: do this")) == (2, "error: that is wrong: do this\n")
    code, said = fails_with(OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics"))
    assert code == 2 and "runs/x/metrics" in said and "No space left on device" in said
    code, said = fails_with(OSError(errno.ESTALE, "Stale file handle"))
    assert code == 2 and "runs/x" in said and "Stale file handle" in said


def test_an_interrupted_mode_is_one_sentence_and_exits_130(fails_with):
    code, said = fails_with(KeyboardInterrupt())
    assert code == 130 and len(said.splitlines()) == 1 and "SIGINT" in said


@pytest.mark.parametrize(
    "arguments", ["--mode=plan --plan.json=~/plan.json", "--mode=check-data --workdir=~/run"]
)
def test_a_tilde_is_the_home_of_the_user(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(main, "environment", lambda options: {})  # of a process that only plans
    (tmp_path / "plan.json").mkdir()
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    monkeypatch.setattr(main, "FLAGS", parsed(CONFIG, *arguments.split()))
    assert main.main([]) == 2 and f" {tmp_path}/" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"^{tmp_path}/none "):
        codebook_jax.load("~/none")


def test_an_error_of_ours_keeps_its_trace(fails_with):
    for error in (OSError(errno.EACCES, "Permission denied"), RuntimeError("a bug")):
        with pytest.raises(type(error)):
            fails_with(error)
