"""Output that cannot be printed does no harm, and Ctrl-C prints one sentence; tested in separate
processes.
"""

import io
import os
import subprocess
import sys
import textwrap

import jax
import pytest
from one_weight import OneWeight, saved_steps
from small_data import tokenizer_of
from small_run import ROOT, config_of

from codebook_jax import build, console, summary
from codebook_jax.data.sources import Source
from codebook_jax.parallel import sharding

FULL = "/dev/full"
NAME = "bïld🐱.jpg"


def started(script, *, redirect="", environment=None, **options):
    """A script behind a shell's redirections; both outputs are pipes unless `options` differ."""
    shell = ["bash", "-c", f'exec "$0" -c "$1" {redirect}']
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    everything = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **(environment or {})}
    command = [*shell, sys.executable, textwrap.dedent(script)]
    return subprocess.Popen(command, env=everything, cwd=ROOT, **pipes | options)


def ended(script, **options):
    process = started(script, **options)
    said, errors = process.communicate(timeout=120)
    return process.returncode, said.decode(), errors.decode()


PRINTS = f"""
    import os, sys, warnings
    from codebook_jax import console
    console.keep_output()
    sys.stdin and sys.stdin.readline()
    for number in range(3):
        print("{NAME}" * 5000, flush=True)
        print("{NAME}", file=sys.stderr)
        console.write_now("{NAME}")
        warnings.warn("{NAME}")
    opened = os.open(sys.argv[0] if os.path.exists(sys.argv[0]) else os.devnull, os.O_RDONLY)
    sys.exit(0 if opened > 2 else 3)
"""


@pytest.mark.parametrize(
    "redirect", [f">{FULL}", f"2>{FULL}", f">{FULL} 2>&1", ">&-", "2>&-", "<&- >&- 2>&-"]
)
def test_an_output_that_cannot_be_written_ends_nothing(redirect):
    code, _, errors = ended(PRINTS, redirect=redirect, stdin=subprocess.DEVNULL)
    assert code == 0 and "Traceback" not in errors and "Exception" not in errors


@pytest.mark.parametrize("made", [os.pipe, os.openpty])
def test_a_pipe_or_terminal_that_is_closed_ends_nothing(made):
    ours, theirs = made()
    process = started(PRINTS, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.close(ours)
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    "before, prints, where, said",
    [
        ("", 'print("lost", flush=True)\nos.dup2(2, 1)\nprint("kept")', f">{FULL}", ("", "kept\n")),
        ("os.set_blocking(1, False)", 'print("x" * 1_000_000)', "", ("x" * 1_000_000 + "\n", "")),
    ],
    ids=["a disk that has space again", "an output that does not block"],
)
def test_an_output_that_can_be_written_later_gets_the_rest(before, prints, where, said):
    keeps = "from codebook_jax import console\nconsole.keep_output()"
    assert ended(f"import os\n{before}\n{keeps}\n{prints}", redirect=where) == (0, *said)


@pytest.mark.parametrize(
    "encoding, name", [("ascii", r"b\xefld\U0001f431.jpg"), ("utf-8", NAME)], ids=["ascii", "utf-8"]
)
def test_a_name_that_an_output_has_no_letters_for_is_escaped(encoding, name):
    script = f"""
        from codebook_jax import console
        console.keep_output()
        print("{NAME}", "\\udce9.jpg")
    """
    code, said, _ = ended(script, environment={"PYTHONIOENCODING": encoding})
    assert (code, said) == (0, rf"{name} \udce9.jpg" + "\n")


TRAINS = """
    import os, signal, sys
    from codebook_jax import console
    console.begin()
    import pytest
    from one_weight import make_world
    from codebook_jax import main
    world = make_world(pytest.MonkeyPatch())
    world.before_batch = lambda step: print("batch", step, flush=True)
    sys.argv[1:] = ["--config=configs/paper.py:tiny", "--workdir=" + os.environ["RUN"]] + [
        f"--config.{field}" for field in ("data.global_batch=4", "train.steps=12",
        "log_every_steps=1", "checkpoint.every_steps=4", "evaluation.every_steps=6")]
    main.command()
"""


def test_a_training_whose_outputs_are_gone_is_saved_to_its_end_and_exits_0(tmp_path):
    workdir = tmp_path / NAME
    environment = {"RUN": str(workdir), "PYTHONIOENCODING": "ascii", "JAX_PLATFORMS": "cpu"}
    process = started(TRAINS, redirect=f"2>{FULL}", environment=environment)
    assert process.stdout.readline()
    process.stdout.close()  # as head does
    assert process.wait(timeout=120) == 0
    assert saved_steps(workdir)[-1] == 12
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 12 + 2
    assert list(workdir.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("given", [console.HUGE_PAGES, {}], ids=["huge pages", "started again"])
def test_ctrl_c_while_the_command_starts_is_one_sentence(given, monkeypatch):
    script = """
        import os, signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        os.kill(os.getpid(), signal.SIGINT)
        from codebook_jax import console
        console.begin()
        print("not reached")
    """
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert ended(script, environment=given) == (130, "", "stopped by SIGINT\n")


def test_ctrl_c_in_a_mode_lets_it_clear_up_and_a_second_one_does_not_wait():
    script = """
        import os, signal, time
        from codebook_jax import console
        console.begin()
        try:
            with console.interruptible():
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(60)
                finally:
                    print("cleared", flush=True)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
    """
    assert ended(script) == (130, "cleared\n", "stopped by SIGINT\n")


@pytest.mark.parametrize(
    "asked, call, words",
    [
        ("gpuu", "devices.check_platforms()", ("gpuu", "did you mean gpu?", "(cpu)")),
        ("cuda", "codebook_jax.load('.')", ("cuda", "codebook_jax[cuda]", "(cpu)")),
    ],
)
def test_a_platform_that_is_not_here_is_refused_with_what_is(asked, call, words):
    if asked == "cuda" and jax.default_backend() != "cpu":
        pytest.skip("this machine has a GPU")
    script = f"""
        import codebook_jax
        from codebook_jax import UserError
        from codebook_jax.parallel import devices
        try:
            {call}
        except UserError as error:
            print(error)
    """
    code, said, errors = ended(script, environment={"JAX_PLATFORMS": asked})
    assert code == 0, errors
    assert len(said.splitlines()) == 1 and f"JAX_PLATFORMS={asked}" in said
    assert all(word in said for word in words)


class Pairs(list, Source):
    listed = 5

    def captions(self, index):
        return (f"pair {index}",)


def test_a_training_set_smaller_than_a_batch_is_warned_of_with_both_numbers(capsys, tmp_path):
    def announced(count):
        mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        config, source = config_of(**{"data.global_batch": 8}), Pairs(range(count))
        words = tokenizer_of(source, tmp_path / str(count), 300)
        summary.announce(build.Parts(config, mesh, source, source, words, OneWeight()))
        return capsys.readouterr().out

    small = announced(5)
    assert "global_batch=8" in small and " 5 training pairs" in small
    assert "warning" not in announced(8)


def test_a_bar_leaves_an_output_that_is_a_file_alone(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with open(tmp_path / "log", "w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        bar = console.Bar(10, 0, "working")
        print("a sentence", flush=True)
        bar.stop()
    assert (tmp_path / "log").read_text() == "a sentence\n"
