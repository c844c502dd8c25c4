"""Packing on Apache Beam writes the same bytes as packing in processes."""

import sys

import pytest
from small_packing import content, pack, write_kinds, write_many

from codebook_jax.data import packing
from codebook_jax.errors import UserError
from codebook_jax.tools import prepare

pytest.importorskip("apache_beam")
DIRECT = {"beam_runner": "DirectRunner", "beam_options": "--direct_running_mode=in_memory"}


def test_beam_leaves_the_same_bytes_as_processes(tmp_path, capsys):
    path = write_kinds(tmp_path / "pictures")
    assert pack(path, tmp_path / "here") == 0
    assert pack(path, tmp_path / "beam", **DIRECT) == 0
    assert "4 shards in" in (said := capsys.readouterr().out) and "by DirectRunner" in said
    assert content(tmp_path / "beam") == content(tmp_path / "here")
    assert pack(path, tmp_path / "beam", **DIRECT) == 0
    assert "already complete" in capsys.readouterr().out


def test_beam_continues_after_a_worker_fails_and_repeats_its_message(tmp_path, monkeypatch, capsys):
    path = write_many(tmp_path / "pictures", 12)

    def fails(*arguments):
        if arguments[1] == 1:
            raise RuntimeError("write() failed: No space left on device; writing a")
        return packing.write_shard(*arguments)

    monkeypatch.setattr(prepare, "write_shard", fails)
    with pytest.raises(UserError, match="no space left while writing shards to .*beam: free some"):
        pack(path, tmp_path / "beam", **DIRECT)
    monkeypatch.undo()
    capsys.readouterr()
    assert pack(path, tmp_path / "beam", **DIRECT) == 0
    assert "of 3 shards are packed already" in capsys.readouterr().out
    assert pack(path, tmp_path / "here") == 0
    assert content(tmp_path / "beam") == content(tmp_path / "here")


def test_a_runner_that_does_not_exist_and_beam_not_installed_are_user_errors(tmp_path, monkeypatch):
    path = write_many(tmp_path / "pictures", 2)
    with pytest.raises(UserError, match="Beam's CloudRunner failed .*config.prepare.beam_runner"):
        pack(path, tmp_path / "packed", beam_runner="CloudRunner")
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r'pip install "codebook_jax\[beam\]"'):
        pack(path, tmp_path / "packed", **DIRECT)
