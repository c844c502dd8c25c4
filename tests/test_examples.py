"""The examples, as the documentation shows them: short, and they learn."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(name, *arguments):
    path = EXAMPLES / name
    assert sum(bool(line.strip()) for line in path.read_text().splitlines()) <= 60
    command = [sys.executable, str(path), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_two_towers_learn_which_name_is_whose_in_a_loop_of_their_own():
    said = run("two_towers.py")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert losses[-1] < 0.6 * losses[0]
    assert int(re.search(r"(\d+) of 100 new pictures", said)[1]) >= 60  # chance: 1


@pytest.mark.slow
def test_a_third_modality_joins_a_frozen_codebook_and_changes_nothing_old():
    said = run("third_modality.py")
    found = [int(number) for number in re.findall(r": (\d+)", said.partition("sounds:")[2])]
    assert len(found) == 6 and min(found) >= 25  # chance: 1
    assert "old embeddings unchanged: True" in said


@pytest.mark.slow
def test_stories_are_aligned_though_only_their_order_is_known(tmp_path):
    said = run("stories.py", tmp_path / "alignment.png")
    assert int(re.search(r"(\d+)% of the names", said)[1]) >= 85  # chance: 17
    assert Image.open(tmp_path / "alignment.png").size == (540, 630)


def test_the_lines_of_the_page_are_a_loss_with_a_gradient():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.S)
    draw = np.random.default_rng(0)
    towers = draw.normal(size=(2, 8, 64)).astype(np.float32)
    given = {
        "my_parameters": towers,
        "embed_image": lambda parameters, x: x @ parameters[0],
        "embed_text": lambda parameters, x: x @ parameters[1],
    }
    exec(code, given)
    batch = SimpleNamespace(image=draw.normal(size=(4, 8)), text=draw.normal(size=(4, 8)))
    of = jax.value_and_grad(given["loss_of"], has_aux=True)
    (loss, _), gradient = of(given["parameters"], batch)
    assert np.isfinite(loss)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
