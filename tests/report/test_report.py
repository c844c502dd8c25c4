"""The page of a run: what it computes, that it is self-contained, and that a browser shows it."""

import configparser
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import browser
import jax
import numpy as np
import pytest
from small_data import scenes_source, tokenizer_of
from small_run import ROOT, SMALL, config_of

from codebook_jax import report
from codebook_jax.build import Parts
from codebook_jax.data.sources.record import Record
from codebook_jax.errors import UserError
from codebook_jax.evaluation.encoding import Features, Gallery
from codebook_jax.method.numerics import unit
from codebook_jax.models import codis
from codebook_jax.parallel import sharding
from codebook_jax.report import charts, run
from codebook_jax.report.curves import curves
from codebook_jax.report.explained import explained_pairs
from codebook_jax.report.gallery import answers_of, explore_codebook, words_of
from codebook_jax.report.page import Pictures, write_page
from codebook_jax.weights.load import Codis

EVIL = (
    "a\0 red\x1b ring \ud83d \\ud83d </script><script>window.hacked = 1</script>"
    "<img src=x onerror='window.hacked = 2'> \u2028 & more"
)
SHOWN = EVIL.replace("\0", "").replace("\x1b", "").replace("\ud83d", "?")
RECORD = {
    "config": {
        "size": "tiny",
        "task": "pretrain",
        "data": {"train": EVIL, "global_batch": 8},
        "train": {"steps": 50},
    },
    "data": {"train": "made up", "examples": 400, "fingerprint": "0"},
    "devices": {"kind": "abacus", "count": 7, "processes": 2},
    "git": None,
    "versions": {"python": "3"},
    "changes": [{"step": 3, "fields": {"optimizer.b1": [0.9, "</script>"]}}],
}


def rows_of(count):
    """Rows as a run logs them, with a step that was not finite."""
    rows = []
    for step in range(1, count + 1):
        row = {"step": step, "loss": 9 / step, "time/step_s": 0.5}
        row |= {"loss/alignment": 4 / step, "loss/codebook": 5 / step, "loss/masked_lm": 1.0}
        row |= {"loss/codebook_transport": 2 / step, "codebook/perplexity": step}
        rows.append(row | {"codebook/agreement": 0.5})
    if count > 2:
        rows[1] |= {"loss": None, "loss/alignment": None, "bad_step": True}
    return rows


class Colours:
    """A source of plain pictures with these captions."""

    def __init__(self, captions):
        self._captions = captions

    def __len__(self):
        return len(self._captions)

    def __getitem__(self, index):
        noise = np.random.default_rng(index).integers(0, 256, (4, 6, 3), np.uint8)
        return Record(noise.repeat(20, 0).repeat(20, 1), (self._captions[index],), index)


def page_with(path, *, images, codes):
    """The page of random features, with two captions per picture, the first of them hostile."""
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "ring", "star", "moon"]
    captions = [EVIL, *(" ".join(rng.permutation(words)[:3]) for _ in range(2 * images - 1))]
    ids = np.arange(images)
    image, text = (np.asarray(unit(rng.normal(size=(count, 8)))) for count in (images, 2 * images))
    features = {"student": Features(image, text, None, None)}
    lengths = np.full(2 * images, 5)
    gallery = Gallery(ids, ids.repeat(2), lengths, captions, ids, features, 0, 0)
    codewords = np.asarray(unit(rng.normal(size=(codes, 8))))
    pictures = Pictures()
    seen = run.what_is_seen(gallery, Colours(captions[::2]), codewords, config_of(), pictures)
    seen |= {"step": 40, "data": "made up", "stories": None}
    assert seen["explained"] is None
    return page_of(path, rows_of(50), seen=seen, pictures=pictures)


def page_of(path, rows, *, seen=None, sees=True, pictures=None, result=None, scores=None):
    write_page(
        path,
        "run.html",
        pictures or Pictures(),
        title="made up",
        facts=run.facts(rows, parameters=1_900_000),
        result=result,
        charts=curves(rows, scores=scores or {}),
        reference="no reference",
        verdicts=[],
        seen=seen,
        sees=sees,
        record=RECORD,
        settings={"data.train": EVIL},
        differs={"data.train": ["scenes", EVIL]},
        compared=True,
    )
    return path


def embedded(page, name):
    pattern = rf'<script type="application/json" id="{name}">(.*?)</script>'
    return json.loads(re.search(pattern, page, re.DOTALL)[1])


def test_a_browser_draws_the_page_shows_values_and_filters_codewords(tmp_path):
    page = page_with(tmp_path / "report.html", images=300, codes=4000)
    assert page.stat().st_size < 10e6
    script = """
        const folded = document.querySelector("details:has(.chart)");
        const inside = () => folded.querySelectorAll("canvas").length;
        found.folded = inside();
        folded.open = true;
        folded.dispatchEvent(new Event("toggle"));
        found.unfolded = inside() - folded.querySelectorAll(".chart").length;
        const get = id => document.getElementById(id);
        const rows = () => [...document.querySelectorAll("#codewords > li")];
        found.all = JSON.parse(get("codebook").textContent).codewords.length;
        found.before = rows().length;
        while (!get("more").hidden) get("more").click();
        found.extended = rows().length;
        const type = text => { get("filter").value = text; get("filter").dispatchEvent(new Event("input")); };
        type("RED ring");
        found.texts = rows().map(item => item.innerText.toLowerCase());
        type("hacked");
        found.evil = rows().map(item => item.querySelector(".captions").textContent);
        type("nosuchword");
        found.none = rows().length;
        found.counted = get("matches").textContent;
        type("");
        get("sort").value = "code";
        get("sort").dispatchEvent(new Event("change"));
        found.numbers = rows().map(item => Number(item.querySelector("h3").textContent.split(" ")[1]));
        found.hacked = window.hacked ?? null;
    """  # noqa: E501
    found = browser.look(page, browser.CHARTS + script, tmp_path)
    browser.check_page(found)
    assert found["charts"] >= 5
    assert (found["folded"], found["unfolded"]) == (0, 0)  # drawn when they are opened
    last, pointed = found["hovered"]
    assert last != pointed and "50" in last and "\u2013" not in pointed
    assert "step 1," in found["spoken"]
    assert found["all"] > 200 and found["before"] == 40 and found["extended"] == found["all"]
    assert 0 < len(found["texts"]) < found["all"]
    assert all("red" in text and "ring" in text for text in found["texts"])
    assert any(SHOWN in text for text in found["evil"]) and found["hacked"] is None
    assert found["none"] == 0 and found["counted"].startswith("0 of")
    assert found["numbers"] == sorted(found["numbers"]) and len(found["numbers"]) == 40


def test_a_page_holds_data_as_text_and_asks_the_network_for_nothing(tmp_path):
    page = page_with(tmp_path / "report.html", images=30, codes=500).read_text()
    assert "<script>window" not in page and "<img src=x" not in page
    assert SHOWN in embedded(page, "codebook")["captions"].values()
    assert not re.search("[\\x00-\\x08\\x0b-\\x1f]", page)  # they end a browser
    assert set(embedded(page, "pictures")) == set(map(str, range(30)))
    asks = r"""(src|href|action)\s*=\s*["']?(https?:)?//|url\(|@import|\bfetch\(|XMLHttp|<link"""
    assert not re.search(asks, page) and "default-src 'none'" in page
    scripts = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert not any("\u2028" in script or "<" in script for script in scripts)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_short_run_has_a_page(count, tmp_path):
    page = page_of(tmp_path / "report.html", rows_of(count))
    found = browser.look(page, browser.CHARTS if count else "", tmp_path, width=600)
    if count:
        browser.check_page(found)
    assert not found["complaints"] and found.get("charts", 5) >= 5
    text = page.read_text()
    assert "no checkpoint yet" in text and "not been evaluated yet" in text and "abacus" in text
    assert ("In 1 of 3 logged steps" in text) == (count == 3)


def test_many_rows_are_thinned_to_their_extremes():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(100_003, 2))
    values[70_001, 0], values[123, 1], values[5000:9000, 1] = 50, -60, np.nan
    steps, thin = charts.thinned(np.arange(1, 100_004), values)
    assert len(steps) == len(thin) <= charts.MOST_POINTS and (np.diff(steps) >= 0).all()
    np.testing.assert_array_equal(np.nanmax(thin, axis=0), np.nanmax(values, axis=0))
    np.testing.assert_array_equal(np.nanmin(thin, axis=0), np.nanmin(values, axis=0))
    at = int(np.argmax(thin[:, 0]))
    assert abs(steps[at] - 70_002) <= 2 * 100_003 / charts.MOST_POINTS
    assert 0 < np.isnan(thin[:, 1]).sum() < 60 and not np.isnan(thin[:, 0]).any()


def test_every_number_of_a_row_is_in_a_chart_and_gaps_are_null():
    validation = {"eval/txt_r1": 4.0, "eval/img_r1": 5.0, "eval/images": 9, "eval/f1": 0.5}
    rows = [*rows_of(3), {"step": 3, **validation}]
    rows[0]["words"] = "no number"
    found = curves(rows)
    drawn = {chart["title"]: chart for group in found.values() for chart in group}
    losses = {series["label"]: series["values"] for series in drawn["Losses"]["series"]}
    assert losses["weighted sum"] == [9.0, None, 3.0]
    assert set(losses) == {"weighted sum", "alignment", "codebook", "masked lm"}
    (inner,) = drawn["Parts of the codebook loss"]["series"]
    assert inner["label"] == "transport"
    assert drawn["A caption finds its picture"]["series"][0]["values"] == [5.0]
    assert {"bad_step", "eval/f1"} <= set(drawn) and "words" not in drawn
    assert "Codebook" not in curves([{"step": 1, "loss": 1.0, "loss/alignment": 1.0}])
    assert curves([]) == {}
    rows = [{"step": 2, "time/step_s": "x", "loss": "y"}, {"step": 4, "time/step_s": 0.5}]
    found = run.facts(rows, 1)
    assert (found["step"], found["pace"], found["seconds"]) == (4, 0.5, 1.0)


def test_a_histogram_keeps_every_value_and_says_where_captions_are_cut():
    counts = np.zeros(513, int)
    counts[5:30], counts[500] = 100, 1
    found = charts.histogram(counts, title="", x="", y="", mark=24)
    assert sum(found["series"][0]["values"]) == 2501 and found["mark"] == 24
    assert len(found["xs"]) <= 40 and found["xs"][-1] <= 31
    wide = charts.histogram(np.ones(200, int), title="", x="", y="", mark=24)
    assert wide["step"] == 5 and 25 in wide["xs"] and sum(wide["series"][0]["values"]) == 200
    for mark in range(2, 90):  # no bar holds values of both sides
        found = charts.histogram(np.ones(300, int), title="", x="", y="", mark=mark)
        before = np.array(found["xs"]) <= mark
        assert np.array(found["series"][0]["values"])[before].sum() == mark + 1


def test_pictures_past_the_room_of_a_page_are_counted():
    pictures = Pictures(most_bytes=6000)
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 20, 3), np.uint8)
        pictures.add(str(number), pixels, "noise")
    assert 0 < len(pictures.files) < 20 and len(pictures.left_out) == 20 - len(pictures.files)
    assert sum(len(file["jpeg"]) for file in pictures.files.values()) <= 6000


def test_the_report_of_a_run_shows_what_it_has_learned(straight, one_device, tmp_path, capsys):
    workdir = shutil.copytree(straight.workdir, tmp_path / "run")
    run.write_report(config_of(**{"log_every_steps": 7}), workdir)
    assert f"report: {workdir / 'report.html'}" in capsys.readouterr().out
    page = (workdir / "report.html").read_text()
    script = """
        const all = name => [...document.querySelectorAll(name)];
        found.queries = all(".query").length;
        found.unmarked = all(".query").filter(query => !query.querySelector(".right")).length;
        found.codewords = all("#codewords > li").length;
        found.differs = all("tr.differs code").map(name => name.textContent);
    """
    found = browser.look(workdir / "report.html", browser.CHARTS + script, tmp_path)
    browser.check_page(found)
    assert found["queries"] == 10 and found["unmarked"] == 0
    kept = embedded(page, "codebook")
    assert found["codewords"] == len(kept["codewords"]) <= SMALL["codebook.size"]
    assert sum(code["images"] for code in kept["codewords"]) == 8
    assert "log_every_steps" in found["differs"] and "seed" not in found["differs"]
    assert "1 device (cpu)" in " ".join(page.split())


def test_a_run_without_a_checkpoint_has_a_page_of_its_curves(
    straight, one_device, tmp_path, capsys
):
    workdir = shutil.copytree(straight.workdir, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    run.write_report(None, workdir)
    assert "no checkpoint yet" in capsys.readouterr().out
    page = (workdir / "report.html").read_text()
    assert 'id="codebook"' not in page and page.count('class="plot"') > 10
    with pytest.raises(UserError, match="holds no trained run"):
        run.write_report(None, tmp_path / "nothing")


def test_the_result_is_that_of_eval_json_or_of_the_last_validation(tmp_path):
    chance = {f"eval/{kind}_chance_r{k}": 1.0 for kind in ("txt", "img") for k in (1, 5, 10)}
    recalls = {f"eval/{kind}_r{k}": 7.0 for kind in ("txt", "img") for k in (1, 5, 10)}
    teacher = {name.replace("eval/", "eval/teacher_"): 8.0 for name in recalls}
    counts = {"eval/images": 3, "eval/left_out": 0, "eval/truncated": 2}
    rows = [*rows_of(3), {"step": 3, **recalls, **teacher, **chance, **counts}]
    path = tmp_path / "eval.json"
    found = run.result(path, rows)
    assert found["step"] == 3 and list(found["protocols"]) == ["student/dual", "teacher/dual"]
    assert found["protocols"]["teacher/dual"]["img_r5"] == 8.0
    page = page_of(tmp_path / "report.html", rows, result=found).read_text()
    assert "<td>8.00</td>" in page and "validation data at step 3" in page
    dual = found["protocols"]["student/dual"] | {"img_r1": 42.0}
    path.write_text(json.dumps({"student/dual": dual}))
    found = run.result(path, rows)
    assert (found["step"], found["protocols"]["student/dual"]["img_r1"]) == (None, 42.0)
    page = page_of(tmp_path / "report.html", rows, result=found).read_text()
    assert "<strong>42.0 %</strong>" in page
    assert run.result(tmp_path / "none", rows_of(2)) is None
    path.write_text("{")
    with pytest.raises(UserError, match=f"{path} was not written by --mode=eval"):
        run.result(path, rows)


def test_a_fine_tuned_run_shows_its_accuracy_and_the_weights_between(tmp_path):
    evaluation = {"eval/accuracy": 61.25, "eval/chance_frequent": 33.0, "eval/examples": 1200.0}
    between = [{"step": 3, "between/share": share, "between/score": 60 + share} for share in (0.5,)]
    rows = [{"step": 0, **evaluation}, *rows_of(3), *between, {"step": 3, **evaluation}]
    rows[1] |= {"accuracy": 0.5}
    charts_of = curves(rows, scores={0: 58.0, 3: 61.25})
    accuracy, way = charts_of["Accuracy in validation"]
    assert accuracy["xs"] == [0, 3] and accuracy["series"][0]["values"] == [61.25, 61.25]
    assert [one["label"] for one in accuracy["series"]] == ["accuracy", "chance frequent"]
    assert way["xs"] == [0, 50, 100] and way["series"][0]["values"] == [58.0, 60.5, 61.25]
    facts = run.facts([*rows, {"step": 5, **evaluation}], 1)  # which is no step that is logged
    assert (facts["logged"], facts["not_finite"], facts["step"]) == (3, 1, 5)
    found = run.result(tmp_path / "none", rows)
    figures = {"accuracy": 61.25, "chance_frequent": 33.0, "examples": 1200.0}
    assert found["protocols"] == {"student": figures}
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"student": {"accuracy": 62.5, "examples": 1300.0}}))
    found = run.result(path, rows)
    page = page_of(tmp_path / "report.html", rows, result=found, sees=False, scores={0: 58.0})
    text = page.read_text()
    assert "<td>62.50</td>" in text and "<td>1,300</td>" in text and "61.25</td>" not in text
    assert "no checkpoint yet" not in text and "not been evaluated" not in text
    browser.check_page(browser.look(page, browser.CHARTS, tmp_path))


def test_the_words_of_a_caption_have_heat_maps_in_the_page(tmp_path):
    config = config_of(**{"model.text.fusion_depth": 2})
    tokenizer = tokenizer_of(scenes_source(), tmp_path / "run")
    words, rng = tokenizer.vocabulary.size, np.random.default_rng(0)
    mesh = sharding.make_mesh(2, 2, 2)
    student = codis.init_student(config, words, jax.random.key(0))
    student = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), student)
    student = jax.tree.map(np.float32, student)
    task = SimpleNamespace(model=codis.Model(config, words, mesh))
    parts = Parts(config, mesh, None, None, tokenizer, task)
    pairs = [(Colours([caption])[0], caption) for caption in ("a red ring", "red " * 30)]
    pictures = Pictures()
    found = explained_pairs(parts, student, pairs, pictures)
    first, second = found["pairs"]
    assert [word for word, _ in first["words"]] == ["a", "red", "ring"]
    assert len(second["words"]) == 12 and 0 < first["probability"] < 1 and found["layer"] == 1
    names = [name for pair in found["pairs"] for name in (pair["picture"], *dict(pair["words"]))]
    assert len(pictures.files) == 2 + 3 + 12 and "explained 0" in names
    looks = {pictures.files[name]["jpeg"] for _, name in first["words"]}
    alone = Codis(config, tokenizer, {"student": student}, 0).explain(
        pairs[0][0].image, "a red ring"
    )
    assert abs(alone.probability - first["probability"]) < 1e-4
    assert len(looks) == 3 and alone.maps.max() > 0


def test_every_file_of_the_page_is_installed():
    folder = Path(report.__file__).parent
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["codebook_jax.report"].split(",")
    shipped = {path for pattern in patterns for path in folder.glob(pattern.strip())}
    others = {path for path in folder.rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert {"base.html", "page.js", "uPlot.iife.min.js"} <= {path.name for path in shipped}
    assert others <= shipped


def test_answers_are_the_best_and_the_right_one_keeps_its_place():
    scores = np.array([0.1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    found = answers_of(scores, np.array([1, 0, 0, 0, 0, 0, 1], bool))
    assert [answer["at"] for answer in found["answers"]] == [1, 2, 3, 4, 5]
    assert not any(answer["right"] for answer in found["answers"])
    assert (found["further"], found["right"]) == (6, 6)
    found = answers_of(scores, np.array([0, 0, 0, 0, 1, 0, 1], bool))
    assert [answer["right"] for answer in found["answers"]] == [False, False, False, True, False]
    assert (found["further"], found["right"]) == (None, 4)


def test_codewords_are_ordered_by_use_and_their_users_by_probability():
    image = np.array([[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1]])
    text = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    features = {"student": Features(np.log(image), np.log(text), None, None)}
    ids, captions = np.arange(3), ["one", "two"]
    gallery = Gallery(ids, np.array([0, 2]), np.full(2, 5), captions, ids, features, 0, 0)
    found = explore_codebook(gallery, np.eye(3), temperature=1.0)
    first, second = found["codewords"]  # the third is used by none
    assert (first["code"], first["pictures"], first["texts"]) == (0, [1, 0], [0, 1])
    assert (first["agreeing"], first["pairs"], first["captions"]) == (1, 2, 2)
    assert (second["code"], second["pictures"], second["texts"]) == (1, [2], [])
    assert (second["agreeing"], second["pairs"], second["captions"]) == (0, 1, 0)
    assert (found["totals"]["used"], found["totals"]["shared"]) == (2, 1)
    assert found["totals"]["agreement"] == 0.5


def test_the_words_of_a_codeword_are_those_it_has_more_often():
    captions = ["a red ring", "a red star"]
    everywhere = Counter({"a": 10, "red": 2, "ring": 5, "star": 5})
    assert words_of(captions, everywhere, 10) == [("red", 1.0)]
