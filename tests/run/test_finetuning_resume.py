"""Fine-tunings killed in the middle of a step and started again are those that never stopped."""

import signal
import sys

import pytest
from small_finetune import TASKS, main_flags, rows_of, saved
from small_run import ROOT, ran
from weight_file import assert_same

STEPS = 8


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_killed_fine_tuning_goes_on_bit_for_bit(
    task, pretrained, one_device_environment, tmp_path
):
    changes = {"init": f"model:{pretrained}", "train.steps": STEPS, "data.flip": True}
    changes |= {"evaluation.every_steps": 4, "data.workers": 1, "data.scenes_examples": 400}
    flags = main_flags(task, **changes)

    def run(workdir, fault="none:0:0"):
        program = [sys.executable, str(ROOT / "tests" / "faulty_run.py")]
        environment = one_device_environment | {"FAULT": fault}
        return ran([*program, *flags, f"--workdir={workdir}"], environment)

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = run(straight)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(killed, "kill:*:6").returncode == -signal.SIGKILL
    done = run(killed)
    assert done.returncode == 0 and "resuming at step 4 " in done.stdout, done.stdout[-3000:]
    written = (straight / "checkpoints" / str(STEPS)).iterdir()
    items = {path.name for path in written if path.is_dir()} - {"meta"}
    assert {"student", "moments", "rest"} <= items
    for item in items:
        assert_same(saved(killed, STEPS, item), saved(straight, STEPS, item))
    series = [
        [
            {name: value for name, value in row.items() if not name.startswith("time/")}
            for row in rows_of(workdir)
        ]
        for workdir in (straight, killed)
    ]
    assert series[0] == series[1] and len(series[0]) > STEPS
