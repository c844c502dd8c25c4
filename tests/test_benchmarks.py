"""The benchmarks, most of which take too long to run here, use what the package has."""

import ast
import importlib
import sys

import jax
import pytest
from small_run import ROOT, SMALL

FEWER = SMALL | {"losses.matching": 0, "losses.masked_lm": 0, "data.global_batch": 16}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_every_name_that_a_benchmark_uses_of_the_package_is_there(path):
    owners, missing = {}, []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("codebook_jax"):
            for name in node.names:
                owners[name.asname or name.name] = imported(node.module, name.name)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = owners.get(node.value.id)
            if owner is not None and not hasattr(owner, node.attr):
                missing.append(f"{node.value.id}.{node.attr}")
    assert not missing


def imported(module, name):
    try:
        return importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


@pytest.fixture
def train_step(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("train_step")


def test_a_row_of_the_step_has_its_share_of_the_ceiling_and_its_bytes(train_step):
    found = train_step.measure("tiny", FEWER, 3)
    rate = found["operations"] / found["step_s"] / 1e9
    assert found["of_ceiling"] == pytest.approx(rate / found["matmul_gflops"])
    assert 0 < found["of_ceiling"] < 1
    # all parameters, moments and the teacher's are read and written
    assert found["bytes"] > 2 * 1e6 * found["state_mb"]
    assert found["fastest_s"] <= found["step_s"]


def test_the_step_beside_pytorchs_is_that_of_the_paper(train_step):
    _, figures = train_step.prepared("tiny", FEWER)
    task, _ = train_step.random_task("tiny", FEWER, "paper")
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(task.abstract_state()))
    assert figures["state_mb"] == state / 1e6


def test_two_processes_take_their_steps_in_turn(train_step, tmp_path):
    taken = tmp_path / "taken"
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import train_step\n"
        f"train_step.in_turn(lambda: open({str(taken)!r}, 'a').write(sys.argv[1]))\n"
    )
    command = [sys.executable, str(script)]
    with train_step.turns([*command, "a"]) as ours, train_step.turns([*command, "b"]) as theirs:
        both = [(ours(), theirs()) for _ in range(3)]
    assert taken.read_text() == "ababab"
    assert all(found["s"] >= 0 and found["cpu_s"] >= 0 for pair in both for found in pair)


@pytest.mark.slow
def test_the_table_of_plans_plans(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    planned = importlib.import_module("plan_table").planned
    chip = ("--plan.chip=v5p", "--plan.devices=1")
    assert planned("--config=configs/paper.py:tiny", *chip)["compile_s"] > 0
