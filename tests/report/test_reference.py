"""Reference curves: what their bands are, which runs are compared, and where those leave them."""

import json
import re
import runpy
import shutil
import sys

import browser
import numpy as np
import pytest
import test_report
from small_run import ROOT, config_of

from codebook_jax.build import task_class
from codebook_jax.errors import UserError
from codebook_jax.files import write_json
from codebook_jax.report import reference, run
from codebook_jax.report.curves import curves
from codebook_jax.report.page import Pictures, write_page
from configs import base

MAKER = runpy.run_path(str(ROOT / "benchmarks" / "reference_curves.py"))
STEPS = [1, *range(10, 541, 10)]


def record_of(seed=0, changes=(), fingerprint="0", **fields):
    """The record of a run of the recipe of these tests, or of another with these fields."""
    config = config_of(**({"seed": seed, "train.steps": 540} | fields)).to_dict()
    data = {"train": "made up", "examples": 64, "fingerprint": fingerprint}
    changes = [{"step": 3, "fields": {name: [1, 2] for name in changes}}] * bool(changes)
    return {"config": config, "data": data, "versions": {"jax": "1"}, "changes": changes}


def seeded(record, seed):
    return record | {"config": record["config"] | {"seed": seed}}


def rows_of(seed, *, last=540, offset=0.0):
    """A run with smooth differences between seeds, and with noise between steps; `offset` is added
    to its matching loss from step 300 on.
    """
    rng, rows = np.random.default_rng(seed), []
    level, slope = rng.normal(size=2)
    for step in STEPS:
        noise = rng.normal(size=3)
        matching = 0.5 + 0.01 * (level + slope * step / 540) + 0.02 * noise[0]
        rate = 0.5 * (1 + np.cos(np.pi * step / last))
        row = {"step": step, "learning_rate": rate, "loss": 9 / step**0.5 + 0.1 * noise[1]}
        row |= {"loss/matching": matching + offset * (step >= 300), "time/step_s": 0.1}
        rows.append(row | {"codebook/perplexity": 200 + 5 * level + step / 5 + 0.2 * noise[2]})
    for step in (180, 360, 540):
        recalls = {
            f"eval/{side}_r{k}": 50 + k + rng.normal() for side in ("txt", "img") for k in (1, 5)
        }
        rows.append({"step": step, "eval/images": 1000, "eval/texts": 1000} | recalls)
    return rows


def folder_of(path, rows, record):
    path.mkdir()
    write_json(path / "config.json", record)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """What the command makes of four runs."""
    place = tmp_path_factory.mktemp("reference")
    runs = [folder_of(place / str(s), rows_of(s), record_of(s)) for s in range(4)]
    write_json(place / "mine.json", MAKER["make"](runs))
    return place / "mine.json"


@pytest.fixture
def healthy(file):
    return reference.read_reference(file)


def test_a_band_is_the_prediction_interval_of_one_more_run():
    runs = np.array([[3.0] * 40, [5.0] * 40])  # without noise
    none = np.zeros(40)
    low, high = MAKER["band"]("loss", runs, runs.std(axis=0, ddof=1), none, 1)
    t = 31.8205  # Student's, one degree of freedom, 99 %: from a table
    assert high[7] == pytest.approx(4 + t * 2**0.5 * 1.5**0.5, rel=1e-4) and low[7] == 0
    assert MAKER["band"]("eval/txt_r1", runs, none + 9, none, 1)[1][0] == 100
    assert MAKER["band"]("codebook/unused_share", runs, none + 9, none, 1)[1][0] == 1
    noisy = np.random.default_rng(0).normal(size=(2, 4000)) + np.linspace(0, 9, 4000)
    assert MAKER["noise_of"](noisy).mean() == pytest.approx(1, rel=0.02)


def test_few_healthy_runs_leave_a_band(healthy, tmp_path):
    sentences = reference.compare(healthy, rows_of(0)).sentences
    assert sentences == ["7 curves are inside the reference band"]
    left, record = 0, record_of()
    for first in range(0, 32, 4):  # four seeds make a band
        seeds = range(first, first + 4)
        runs = [folder_of(tmp_path / str(s), rows_of(s), seeded(record, s)) for s in seeds]
        write_json(tmp_path / "mine.json", MAKER["make"](runs))
        bands = reference.read_reference(tmp_path / "mine.json")
        left += sum(bool(reference.compare(bands, rows_of(seed)).left) for seed in range(100, 120))
    assert left < 16  # of 160


@pytest.mark.parametrize("offset, side", [(0.2, "above"), (-0.2, "below")])
def test_a_run_that_gets_worse_is_told_since_when(healthy, offset, side):
    found = reference.compare(healthy, rows_of(1, offset=offset))
    value = rows_of(1, offset=offset)[len(STEPS) - 1]["loss/matching"]
    assert found.left == ["loss/matching"] and len(found.sentences) == 2
    said = f"loss/matching is {side} the reference band since step 300 (at step 540: {value:.3g}, "
    assert found.sentences[0].startswith(said)
    low, high = re.search(r"band (\S+) to (\S+)\)", found.sentences[0]).groups()
    assert float(low) < 0.5 < float(high)
    assert found.sentences[1] == "6 other curves are inside the reference band"
    first, *_ = curves(rows_of(1, offset=offset), found.bands, found.left).values()
    assert [chart["title"] for chart in first] == ["loss/matching"]


def test_a_departure_is_most_of_five_points_and_may_end(healthy):
    rows = rows_of(1)
    for at in (20, 22, 40):
        rows[at]["loss/matching"] = 9.0
    assert reference.compare(healthy, rows).left == []
    rows[23]["loss/matching"] = 9.0
    rows[30]["loss/matching"] = None  # not finite
    (sentence, _) = reference.compare(healthy, rows).sentences
    assert "loss/matching was above the reference band from step 2" in sentence
    assert "since" not in sentence


def test_two_validations_are_a_departure(healthy):
    rows = rows_of(1)
    for row in rows[-2:]:
        row["eval/img_r5"] -= 20
    found = reference.compare(healthy, rows)
    assert found.left == ["eval/img_r5"] and "below" in found.sentences[0]
    assert "since step 360 (at step 540: " in found.sentences[0]
    rows[-2]["eval/img_r5"] += 20
    assert reference.compare(healthy, rows).left == []


def test_recalls_among_another_number_of_pictures_are_not_compared(healthy):
    rows = [row | ({"eval/images": 32} if "eval/images" in row else {}) for row in rows_of(1)]
    found = reference.compare(healthy, rows)
    assert not any(name.startswith("eval/") for name in found.bands)
    assert "recall is not compared: among 32 pictures, not 1,000" in found.sentences


def test_a_run_of_another_length_is_compared_while_the_learning_rates_agree(healthy):
    for last in (300, 1000):
        found = reference.compare(healthy, rows_of(1, last=last))
        until = found.bands["loss"].steps[-1]
        there, here = (0.5 * (1 + np.cos(np.pi * until / steps)) for steps in (540, last))
        assert 50 < until < 250 and abs(there - here) < 0.1 * max(there, here)
        assert any(f"compared up to step {until}" in sentence for sentence in found.sentences)
    half = [row for row in rows_of(1) if row["step"] <= 200]  # still training
    found = reference.compare(healthy, half)
    assert found.bands["loss"].steps[-1] == 200 and len(found.sentences) == 1
    assert reference.compare(healthy, rows_of(1)[-1:]).bands == {}  # no training step is left
    assert reference.compare(healthy, []).sentences == ["no logged step can be compared yet"]


def test_a_run_is_compared_with_its_own_recipe_alone(file):
    def chosen(**changes):
        return reference.choose(record_of(**changes), str(file))

    for same in ({}, {"seed": 9}, {"train.steps": 90}, {"data.threads": 5}, {"fingerprint": "1"}):
        assert chosen(**same)[0] is not None
    assert "mine: 4 runs of 540 steps (seeds 0, 1, 2, 3)" in chosen()[1]
    for name, value in {
        "queue.size": 64,
        "optimizer.learning_rate": 1e-4,
        "data.global_batch": 4,
        "data.train": "json:other.json",
        "model.text.position_std": 0.02,
    }.items():
        found, sentence = chosen(**{name: value})
        assert found is None and sentence.endswith(f"recipe is another: {name}")
    assert chosen(changes=["optimizer.b1"])[1].endswith("recipe is another: optimizer.b1")


def test_data_of_ones_own_are_known_by_their_content_not_their_place(tmp_path):
    def record(place, fingerprint):
        return record_of(fingerprint=fingerprint, **{"data.train": f"json:{place}/pairs.json"})

    mine = record("/mine", "abc")
    runs = [folder_of(tmp_path / str(s), rows_of(s), seeded(mine, s)) for s in range(2)]
    content = MAKER["make"](runs)
    assert "/mine" not in json.dumps(content)
    write_json(tmp_path / "mine.json", content)
    assert reference.choose(record("/yours", "abc"), str(tmp_path / "mine.json"))[0]
    found, sentence = reference.choose(record("/mine", "abd"), str(tmp_path / "mine.json"))
    assert found is None and sentence.endswith("data.train")


def test_a_field_that_a_reference_is_too_old_to_have_has_its_older_value(file, tmp_path):
    content = json.loads(file.read_text())
    del content["recipe"]["queue.ids"]  # runs without it kept none
    write_json(tmp_path / "older.json", content)
    found, sentence = reference.choose(record_of(), str(tmp_path / "older.json"))
    assert found is None and sentence.endswith("queue.ids")
    assert reference.choose(record_of(**{"queue.ids": False}), str(tmp_path / "older.json"))[0]


def test_the_shipped_curves_are_of_the_shipped_recipe():
    config = base.get_config("tiny")
    config = task_class(config).resolve(config, None, shards=1, examples=20_000)
    record = record_of() | {"config": config.to_dict()}
    found, _ = reference.choose(record, None)
    assert found.name == "tiny-scenes" and found.train_steps == config.train.steps
    assert {"loss/matching", "codebook/unused_share", "eval/img_r10"} <= set(found.bands)
    for path in reference.SHIPPED.glob("*.json"):
        assert "/" not in reference.read_reference(path).recipe["data.train"]
    small = record | {"config": config.to_dict() | {"size": "small"}}
    assert reference.choose(small, None) == (
        None,
        "there are no reference curves of size small, task pretrain",
    )


DAMAGES = {
    "not there": lambda content: None,
    "no JSON": lambda content: "{",
    "a list": lambda content: [],
    "no recipe": lambda content: content | {"recipe": 3},
    "no size": lambda content: content | {"recipe": {"task": "pretrain"}},
    "no gallery": lambda content: content | {"gallery": {}},
    "no seeds": lambda content: {name: content[name] for name in content if name != "seeds"},
    "a text for a number": lambda content: changed(content, low=["x"] * len(STEPS)),
    "a short curve": lambda content: changed(content, low=[1.0]),
    "null": lambda content: changed(content, low=[None] * len(STEPS)),
    "steps back": lambda content: changed(content, step=STEPS[::-1]),
    "steps in lists": lambda content: changed(content, step=[STEPS]),
}


def changed(content, low=None, step=None):
    training = content["training"]
    bands = training["bands"] | ({"loss": [low, training["bands"]["loss"][1]]} if low else {})
    return content | {"training": training | {"bands": bands, "step": step or training["step"]}}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_file_is_refused(damage, file, tmp_path):
    path, content = tmp_path / "damaged.json", damage(json.loads(file.read_text()))
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=f"^{path} is no file of reference curves .*: make one"):
        reference.choose(record_of(), str(path))


@pytest.mark.parametrize("name, value", [("size", "small"), ("task", "sequences")])
def test_curves_of_another_kind_of_run_are_refused(name, value, file, tmp_path):
    content = json.loads(file.read_text())
    content["recipe"][name] = value
    write_json(tmp_path / "other.json", content)
    with pytest.raises(
        UserError,
        match=f"other.json is of .*{name} {value}.*{name} {{}}".format(record_of()["config"][name]),
    ):
        reference.choose(record_of(), str(tmp_path / "other.json"))


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda rows, record: (rows, record | {"changes": [1]}), "is no uninterrupted run"),
        (lambda rows, record: (rows, record_of(**{"queue.size": 64})), "is no uninterrupted run"),
        (lambda rows, record: (rows, record_of(0)), r"seeds of the runs are \[0, 0\]"),
        (lambda rows, record: (rows[:5] + rows[-1:], record), "less than 19 logged steps"),
        (lambda rows, record: (rows[:-3], record), "no validation"),
        (lambda rows, record: (rows[1:], record), "not logged the same steps"),
        (lambda rows, record: ([rows[0] | {"loss": None}, *rows[1:]], record), "not finite"),
    ],
)
def test_runs_that_make_no_reference_are_refused(spoil, sentence, tmp_path):
    first = folder_of(tmp_path / "first", rows_of(0), record_of())
    second = folder_of(tmp_path / "second", *spoil(rows_of(1), record_of(1)))
    with pytest.raises(UserError, match=sentence):
        MAKER["make"]([first, second])
    with pytest.raises(UserError, match="two runs or more"):
        MAKER["make"]([first])


def test_the_command_makes_the_band_that_the_report_of_a_run_draws(
    straight, one_device, tmp_path, capsys, monkeypatch
):
    workdir = shutil.copytree(straight.workdir, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    out, twin = tmp_path / "mine.json", shutil.copytree(workdir, tmp_path / "twin")
    record = json.loads((workdir / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(seeded(record, 7)))
    monkeypatch.setattr(sys, "argv", ["curves", str(workdir), str(twin), f"--out={out}"])
    MAKER["main"]()
    run.write_report(None, workdir, reference=str(out))
    said = capsys.readouterr().out
    assert "compared with the reference mine: 2 runs of 20 steps (seeds 0, 7)" in said
    assert "curves are inside the reference band\n" in said
    page = " ".join((workdir / "report.html").read_text().split())
    assert "Compared with the reference mine" in page and "<li>16 curves" in page
    run.write_report(None, workdir)
    assert "not compared with the reference tiny-" in capsys.readouterr().out
    assert '"band": [[' not in (workdir / "report.html").read_text()
    with pytest.raises(UserError, match="no file of reference curves"):
        run.write_report(None, workdir, reference=str(workdir / "config.json"))


def test_a_browser_draws_the_band_behind_the_curve(healthy, tmp_path):
    rows = rows_of(1)
    bands = reference.compare(healthy, rows).bands
    write_page(
        tmp_path / "report.html",
        "run.html",
        Pictures(),
        title="made up",
        facts=run.facts(rows, parameters=1),
        result=None,
        charts=curves(rows, bands),
        reference="compared",
        verdicts=["<b>"],
        seen=None,
        sees=True,
        record=test_report.RECORD,
        settings={},
        differs={},
        compared=False,
    )
    script = """
        const shaded = canvas => {
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return pixels.filter((value, at) => at % 4 === 3 && value === 43).length;
        };
        for (const figure of document.querySelectorAll(".chart:has(canvas)"))
            found[figure.querySelector("h4").textContent] = shaded(figure.querySelector("canvas"));
        found.named = [...document.querySelectorAll(".u-legend .edge")].filter(row => row.offsetParent).length;
    """  # noqa: E501
    found = browser.look(tmp_path / "report.html", script, tmp_path)
    assert "error" not in found and not found["complaints"], found
    assert found["Losses"] > 200 and found["Perplexity of the codebook"] > 200
    assert found["Time per step"] < 50 and found["named"] == 0
    found = browser.look(tmp_path / "report.html", browser.CHARTS, tmp_path)
    browser.check_page(found)
    assert "undefined" not in found["spoken"] + "".join(found["hovered"])
