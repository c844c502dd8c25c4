"""The page of a run of pre-training whose test data are labels, which it tells by prompts."""

import json
import shutil

import pytest
from small_run import config_of

from codebook_jax.report import run


@pytest.mark.parametrize("validation", ["scenes", "scenes:labels"])
def test_test_data_with_labels_leave_what_is_seen_to_those_of_validation(
    straight, one_device, tmp_path, capsys, validation
):
    workdir = shutil.copytree(straight.workdir, tmp_path / "run")
    (workdir / "eval.json").write_text(json.dumps({"zero_shot": {"accuracy": 12.34}}))
    config = config_of(**{"data.test": "scenes:labels", "data.eval": validation})
    run.write_report(config, workdir)
    said, page = capsys.readouterr().out, (workdir / "report.html").read_text()
    assert "scenes:labels lists labels" in said and "no checkpoint yet" not in said + page
    assert "<td>12.34</td>" in page and page.count('class="plot"') > 5
    assert ("pictures of <code>scenes</code>" in page) == (validation == "scenes")
    assert ("scenes: 8 of" in said) == ('id="codebook"' in page) == (validation == "scenes")
