"""`--mode=explain` draws a panel for each word and refuses in a sentence what it cannot draw."""

import shutil

import numpy as np
import pytest
from PIL import Image

from codebook_jax.errors import UserError
from codebook_jax.tools import explain, export
from codebook_jax.weights.explained import Explanation

WORDS = ("a", "red", "ring")


@pytest.fixture
def found():
    maps = np.zeros((3, 2, 2), np.float32)
    maps[1, 1, 0], maps[2, 0, 1] = 1, 2
    return Explanation(WORDS, maps, maps.sum(0), 2, 0.25, np.full((30, 60, 3), 250, np.uint8))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (60, 30), "white").save(path)
    return str(path)


def test_a_sheet_has_the_picture_and_a_named_panel_for_each_word(found):
    sheet = np.asarray(explain.drawn(found), int)
    down, across = 128 + explain.LABEL_PX + explain.GAP_PX, 256 + explain.GAP_PX
    assert sheet.shape == (down + explain.GAP_PX, 4 * across + explain.GAP_PX, 3)
    heat = sheet[:, :, 0] - sheet[:, :, 2]  # warm is positive
    of_panel = [heat[8:136, 8 + n * across :][:, :256] for n in range(4)]
    assert [panel.max() > 50 for panel in of_panel] == [False, False, True, True]
    assert of_panel[2][64:, :128].max() == heat.max() > of_panel[2][:32, 160:].max()
    ink = sheet[136 : 136 + explain.LABEL_PX].min(axis=(0, 2)) < 100
    assert [ink[8 + n * across :][:256].any() for n in range(4)] == [False, True, True, True]


def test_many_words_are_drawn_in_rows(found):
    many = found._replace(words=WORDS * 4, maps=np.tile(found.maps, (4, 1, 1)))
    columns, rows = explain.COLUMNS, 3  # of 13 panels
    width, height = explain.drawn(many).size
    assert width == columns * 264 + 8 and height == rows * (128 + 28 + 8) + 8


def test_the_mode_writes_the_sheet_and_prints_the_places(
    found, picture, tmp_path, capsys, monkeypatch
):
    class Model(explain.Codis):
        step = 7

        def __init__(self):
            pass

        def explain(self, image, text):
            assert (image, text) == (picture, "a red ring")
            return found

    monkeypatch.setattr(explain, "load", lambda path: Model())
    explain.explain(tmp_path, picture, "a red ring")
    said = capsys.readouterr().out
    a, red, ring = (row for row in said.splitlines() if row.startswith("  "))
    assert [row.split()[0] for row in (a, red, ring)] == list(WORDS)
    x, y = map(float, red.split()[2::2])
    assert x < 30 and y > 15 and "no patch" in a and "no patch" not in ring
    assert "25.0%" in said and "layer 3" in said and "step 7" in said
    assert Image.open(tmp_path / "explain.png").size == explain.drawn(found).size


def test_a_missing_flag_or_export_is_named(picture, straight):
    for given, flag in (((None, "a ring"), "--explain.image"), ((picture, ""), "--explain.text")):
        with pytest.raises(UserError, match=flag):
            explain.explain(straight.workdir, *given)
    with pytest.raises(UserError, match=f"--workdir={straight.workdir} --mode=export"):
        explain.explain(straight.workdir, picture, "a ring")


def test_a_run_whose_model_explains_no_word_is_refused(straight, tmp_path, picture, one_device):
    workdir = shutil.copytree(straight.workdir, tmp_path / "run")
    export.export(None, workdir)
    with pytest.raises(UserError, match="single fusion layer"):
        explain.explain(workdir, picture, "a ring")
    assert not (workdir / "explain.png").exists()
