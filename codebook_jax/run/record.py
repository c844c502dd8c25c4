"""What a run's folder records about the run, and what that means when the folder is used again."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from codebook_jax import config as fields
from codebook_jax.config import changed_fields, restart_of, with_fields
from codebook_jax.console import say
from codebook_jax.errors import UserError, first_few
from codebook_jax.files import parse_json, refused, write_json

RECORD = "config.json"
PACKAGE = Path(__file__).parent.parent
# beginnings of fields that make another model
SHAPES = ("task", "model.", "codebook.size", "vqa.decoder_depth", "vqa.answer_tokens")
COMPUTES = "jax jaxlib flax optax orbax-checkpoint grain ott-jax numpy transformers".split()


def code_digest() -> str:
    """A digest of the package's own files, equal on hosts that run the same code."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def check_folder(workdir: Path, is_own: Callable[[str], bool], purpose: str) -> list[str]:
    """The sorted names in a folder that a mode without a run writes to, `purpose` being e.g. "to
    pack into"; raises UserError if it holds other files that are not hidden.
    """
    with refused(workdir):
        names = sorted(os.listdir(workdir)) if workdir.exists() else []
    foreign = [name for name in names if not (name.startswith(".") or is_own(name))]
    if foreign:
        holds = f"a training run ({RECORD})" if RECORD in names else f"other files ({foreign[0]})"
        raise UserError(f"--workdir={workdir} holds {holds}: give an empty folder {purpose}")
    return names


def read_record(workdir: Path | str, *, has_checkpoint: bool = False) -> dict[str, Any] | None:
    """`config.json` of a workdir, see `write_record`; None before the first start. Raises UserError
    if it is no record, or missing though the workdir has a checkpoint.
    """
    path = Path(workdir) / RECORD
    if not path.exists() and not has_checkpoint:
        return None
    try:
        record = parse_json(path.read_bytes())
        record["config"], record["data"]["fingerprint"]
    except (FileNotFoundError, IsADirectoryError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not the record of a run ({type(error).__name__}: {error}): put the "
            "original back, or give another --workdir"
        ) from error
    return record


def recorded_config(record: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config a run was last started with; what an older run lacks is set to what it did, in the
    sections that its task has.
    """
    config = ml_collections.ConfigDict(_with_tuples(record["config"]))
    known = fields.flat(record["config"])
    sections = {name.rpartition(".")[0] for name in known}
    missing = {
        name: field.older
        for name, field in fields.FIELDS.items()
        if name not in known and name.rpartition(".")[0] in sections
    }
    return with_fields(config, {name: old for name, old in missing.items() if old is not None})


def trained_config(
    workdir: Path | str,
    record: dict[str, Any],
    config: ml_collections.ConfigDict | None,
    flags: Container[str] | None = None,
    adopts: Sequence[str] = (),
) -> ml_collections.ConfigDict:
    """The run's own config, except where `config` changes how a trained run is used; raises
    UserError if it asks for another model. A config file names data of its own: if `flags`, the
    fields set by flags, are given, the run's `data` and `vqa` stay but for those among them. What
    the run took from its weights, `adopts` and the layer norms' epsilon, and from its data stays.
    """
    trained = recorded_config(record)
    if trained.evaluation.get("rerank_add_dual", False):
        say("this run's evaluation.rerank_add_dual is gone: set evaluation.rerank_dual_weight")
    if config is None:
        return trained
    changes = changed_fields(trained.to_dict(), config.to_dict())
    if trained.init != "random":
        own = lambda name: name in adopts or "layer_norm_eps" in name  # noqa: E731
        changes = {name: pair for name, pair in changes.items() if not own(name)}
    for name in fields.FROM_DATA:
        if name in changes and not changes[name][1]:  # not filled in
            del changes[name]
    named = changes if flags is None else flags
    other, uses = [], {}
    for name, (old, new) in changes.items():
        restart = restart_of(name)
        if restart == fields.FIXED and name.startswith(SHAPES):
            other.append(_change(name, old, new))
        elif restart == fields.FREE and name.startswith(("data.", "vqa.")) and name not in named:
            say(f"config.{name}={old}, the run's own: name it by a flag to change it")
        elif restart == fields.FREE:
            uses[name] = new
    if other:
        raise UserError(
            f"--workdir={workdir} holds another model: {_listed(other)}: give the old values, "
            "or leave out --config to use the run's own"
        )
    return with_fields(trained, uses)


def check_restart(
    workdir: Path | str,
    record: dict[str, Any],
    config: ml_collections.ConfigDict,
    fingerprint: str,
    *,
    has_checkpoint: bool,
) -> dict[str, list[Any]]:
    """The fields that changed since the last start, {name: [old, new]}; prints them.

    Raises UserError for those that fit neither the checkpoints nor, before them, the tokenizer.
    """
    changes = changed_fields(recorded_config(record).to_dict(), config.to_dict())
    same_data = record["data"]["fingerprint"] == fingerprint
    accepted, refused = [], []
    for name in sorted(changes, key=lambda name: name not in ("data.train", "size")):
        change, restart = _change(name, *changes[name]), restart_of(name)
        if name == "data.train" and same_data:  # under another path
            accepted.append(f"{change}: the same data by its fingerprint")
        elif restart == fields.TOKENIZER or (restart == fields.FIXED and has_checkpoint):
            refused.append(change)
        else:
            learned = ": changes what is learned from here on"
            accepted.append(change + learned * (restart == fields.LEARNED and has_checkpoint))
    if not same_data and not any(change.startswith("data.") for change in refused):
        refused.append(
            f"the training data {config.data.train}, whose content is no longer the same"
        )
    if refused:
        raise UserError(
            f"--workdir={workdir} holds a run that was started with other settings: "
            f"{_listed(refused)}: give the old values to continue it, or another --workdir"
        )
    versions = changed_fields({"versions": record["versions"]}, {"versions": package_versions()})
    accepted += [f"{_change(name, *pair)}: results may differ" for name, pair in versions.items()]
    for sentence in accepted:
        say(f"changed since the last start: {sentence}")
    return changes | versions


def write_record(
    workdir: Path | str,
    previous: dict[str, Any] | None,
    facts: dict[str, Any],
    *,
    changes: dict[str, Any],
    step: int,
) -> None:
    """Writes `config.json`: `facts` are its config, data and devices, `changes` those of a restart
    at `step`.
    """
    former = [] if previous is None else previous["changes"]
    latest = [{"step": step, "fields": changes}] if changes else []
    about = {"git": git_commit(), "versions": package_versions(), "changes": [*former, *latest]}
    write_json(Path(workdir) / RECORD, facts | about)


def package_versions() -> dict[str, str]:
    """Versions of Python, this package and the packages it computes with."""
    versions = {"python": platform.python_version()}
    for package in ("codebook_jax", *COMPUTES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def git_commit() -> str | None:
    """The commit of the package's checkout, with "-dirty" if it was edited since; None without."""
    try:
        if not _git("log", "-1", "--format=%H", "--", "."):  # git does not track the package
            return None
        edited = _git("status", "--porcelain", "--", ".")
        return _git("rev-parse", "HEAD") + ("-dirty" if edited else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(PACKAGE), *arguments]  # changes no file
    return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=9).strip()


def _change(name: str, old: Any, new: Any) -> str:
    return f"{name}={json.dumps(old)}, now {json.dumps(new)}"


def _listed(changes: list[str]) -> str:
    return first_few(changes, 8, between="; ", last=", and")


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
