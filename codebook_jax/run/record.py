"""What a run's folder records about the run, and what may change when it is started again."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

from codebook_jax.errors import UserError
from codebook_jax.files import parse_json, refused, write_json

RECORD = "config.json"

# What a restart may change, first match wins: "free" changes how the run is computed or watched,
# "fixed" would break the order of the data or the shapes of the state, everything else changes what
# is learned.
RULES = (
    ("free", "model.remat", "model.scan_unroll", "model.attention", "mesh.*", "log_every_steps"),
    ("free", "checkpoint.*", "evaluation.*", "optimizer.accumulation", "optimizer.max_bad_steps"),
    (
        "free",
        "data.workers",
        "data.threads",
        "data.patience_s",
        "data.prefetch",
        "data.max_bad_rate",
        "data.image_root",
        "data.path_map",
        "data.damaged_shards",
    ),
    ("free", "data.eval", "data.test", "export.*", "train.memory_check", "init_allow_partial"),
    ("free", "prepare.*", "check.*"),
    (
        "fixed",
        "task",
        "size",
        "seed",
        "init",
        "model.*",
        "codebook.size",
        "queue.size",
        "itm.groups",
    ),
    ("fixed", "data.train", "data.scenes_examples", "data.global_batch"),
    ("fixed", "data.tokenizer", "data.tokenizer_*"),
    ("learned", "*"),
)
# The workdir's tokenizer was made from these, so they hold even before the first checkpoint.
TOKENIZER_FIELDS = (
    *("data.train", "data.tokenizer", "data.tokenizer_vocabulary", "init"),
    *("data.tokenizer_lowercase", "data.tokenizer_strip_accents"),
)
# Fields that older runs lack, with the value that means what those runs did.
LATER = {
    "init": "random",
    "init_allow_partial": False,
    "mesh.slices": 0,
    "data.path_map": "",
    "data.damaged_shards": "refuse",
    "data.patience_s": 600.0,
    "data.tokenizer_lowercase": True,
    # their tokenizers stripped accents and still do; the same command continues them
    "data.tokenizer_strip_accents": False,
    "export.format": "codis",
    "model.image.mlp_width": 0,
    "model.text.mlp_width": 0,
}
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "ott-jax",
    "numpy",
    "transformers",
)


def code_digest() -> str:
    """A digest of the package's own files: equal on hosts that run the same code, whatever git
    says.
    """
    folder = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def check_folder(workdir: Path, is_own: Callable[[str], bool], purpose: str) -> list[str]:
    """The sorted names in a folder that a mode without a run writes to; raises UserError if it
    holds anything else.

    Hidden files are ignored. `purpose` ends the sentence, such as "to pack into".
    """
    with refused(workdir):
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir={workdir} is a file: give a folder {purpose}")
        names = sorted(os.listdir(workdir)) if workdir.exists() else []
    if RECORD in names:
        raise UserError(
            f"--workdir={workdir} holds a training run ({RECORD}): give another folder {purpose}"
        )
    foreign = [name for name in names if not (name.startswith(".") or is_own(name))]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"--workdir={workdir} holds other files ({foreign[0]}{more}): give an empty folder "
            f"{purpose}"
        )
    return names


def read_record(workdir: Path | str) -> dict[str, Any] | None:
    """`config.json` of a workdir: {"config", "data", "devices", "git", "versions", "changes"}; None
    before the first start.
    """
    path = Path(workdir) / RECORD
    if not path.exists():
        return None
    try:
        record = parse_json(path.read_bytes())
        record["config"], record["data"]["fingerprint"]
    except (IsADirectoryError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not the record of a run ({type(error).__name__}: {error}): put the "
            "original back, or give another --workdir"
        ) from error
    return record


def recorded_config(record: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config a run was last started with, locked."""
    config = ml_collections.ConfigDict(_with_tuples(record["config"]))
    known = flat(record["config"])
    config.update_from_flattened_dict(
        {name: value for name, value in LATER.items() if name not in known}
    )
    return config.lock()


def trained_config(
    workdir: Path | str, record: dict[str, Any], config: ml_collections.ConfigDict | None
) -> ml_collections.ConfigDict:
    """The config to use a trained run with: the run's own, except where `config` changes how it is
    used.

    Raises UserError if `config` asks for a different model.
    """
    trained = recorded_config(record)
    if config is None:
        return trained
    changes = changed_fields(trained.to_dict(), config.to_dict())
    shape = ("task", "model.*", "codebook.size")
    refused = [
        _change(name, old, new)
        for name, (old, new) in changes.items()
        if kind_of(name) == "fixed" and any(fnmatch.fnmatch(name, pattern) for pattern in shape)
    ]
    if refused:
        more = f", and {len(refused) - 8} more" if len(refused) > 8 else ""
        raise UserError(
            f"--workdir={workdir} holds another model: {'; '.join(refused[:8])}{more}: give the "
            "old values, or leave out --config to use the run's own"
        )
    with trained.unlocked():
        for name, (_, new) in changes.items():
            if kind_of(name) == "free":
                trained.update_from_flattened_dict({name: new})
    return trained


def resolve_groups(
    config: ml_collections.ConfigDict, record: dict[str, Any] | None, *, data_shards: int
) -> ml_collections.ConfigDict:
    """The config with `itm.groups` a number: the given one, else the run's, else data shards x
    accumulation.
    """
    groups = config.itm.groups
    if groups == 0 and record is not None:
        groups = record["config"]["itm"]["groups"]
    if groups == 0:
        groups = data_shards * config.optimizer.accumulation
    if groups < 1 or config.data.global_batch % groups:
        raise UserError(
            f"config.itm.groups={groups} does not split "
            f"config.data.global_batch={config.data.global_batch} into equal groups: choose a "
            "divisor of the batch, or another batch"
        )
    return with_fields(config, {"itm.groups": groups})


def with_fields(
    config: ml_collections.ConfigDict, fields: dict[str, Any]
) -> ml_collections.ConfigDict:
    """A copy of the config with these fields, by their dotted names, locked."""
    changed = ml_collections.ConfigDict(config.to_dict())
    changed.update_from_flattened_dict(fields)
    return changed.lock()


def check_restart(
    workdir: Path | str,
    record: dict[str, Any],
    config: ml_collections.ConfigDict,
    fingerprint: str,
    *,
    has_checkpoint: bool,
) -> tuple[dict[str, Any], list[str]]:
    """The fields that changed since the last start ({name: [old, new]}) and a sentence on each.

    Raises UserError naming every change that does not fit the run's checkpoints (before the first:
    its tokenizer).
    """
    changes = changed_fields(recorded_config(record).to_dict(), config.to_dict())
    versions = changed_fields({"versions": record["versions"]}, {"versions": package_versions()})
    same_data = record["data"]["fingerprint"] == fingerprint
    if same_data and "data.train" in changes:  # the same pairs under another path
        sentences = [
            f"{_change('data.train', *changes['data.train'])}: the same data by its fingerprint"
        ]
    else:
        sentences = []
    refused = []
    for name, (old, new) in sorted(changes.items(), key=lambda change: change[0] != "size"):
        kind = kind_of(name)
        if name == "data.train" and same_data:
            continue
        if kind == "fixed" and (has_checkpoint or name in TOKENIZER_FIELDS):
            refused.append(_change(name, old, new))
        elif kind == "learned" and has_checkpoint:
            sentences.append(f"{_change(name, old, new)}: changes what is learned from here on")
        else:
            sentences.append(_change(name, old, new))
    if not same_data and not any(change.startswith("data.") for change in refused):
        refused.append(
            f"the training data {config.data.train}, whose content is no longer the same"
        )
    if refused:
        more = f", and {len(refused) - 8} more" if len(refused) > 8 else ""
        raise UserError(
            f"--workdir={workdir} holds a run that was started with other settings: "
            f"{'; '.join(refused[:8])}{more}: give the old values to continue it, or another "
            "--workdir"
        )
    sentences += [f"{_change(name, *pair)}: results may differ" for name, pair in versions.items()]
    return changes | versions, sentences


def write_record(
    workdir: Path | str,
    previous: dict[str, Any] | None,
    config: ml_collections.ConfigDict,
    *,
    data: dict[str, Any],
    devices: dict[str, Any],
    changes: dict[str, Any],
    step: int,
) -> None:
    """Writes `config.json`: the config now in force, the data, devices, git commit, versions, and
    earlier changes.

    `data` is {"train", "examples", "fingerprint"}, `devices` {"kind", "count", "processes"}.
    """
    record = {
        "config": config.to_dict(),
        "data": data,
        "devices": devices,
        "git": git_commit(),
        "versions": package_versions(),
        "changes": [] if previous is None else list(previous["changes"]),
    }
    if changes:
        record["changes"].append({"step": step, "fields": changes})
    write_json(Path(workdir) / RECORD, record)


def kind_of(name: str) -> str:
    """Whether the config field `name` is "fixed", "free" or "learned" once a run has begun."""
    return next(
        kind for kind, *patterns in RULES if any(fnmatch.fnmatch(name, p) for p in patterns)
    )


def changed_fields(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """{dotted name: [old, new]} of the fields in both that differ; fields that only one of them has
    are ignored.
    """
    before, after = flat(json.loads(json.dumps(old))), flat(json.loads(json.dumps(new)))
    return {
        name: [before[name], after[name]]
        for name in after
        if name in before and before[name] != after[name]
    }


def package_versions() -> dict[str, str]:
    """Versions of Python, this package and the packages it computes with."""
    versions = {"python": platform.python_version()}
    for package in ("codebook_jax", *PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit this package was checked out at, "-dirty" if it was edited since; None outside a
    checkout.
    """
    folder = Path(__file__).parent.parent
    try:
        commit = _git(
            folder, "log", "-1", "--format=%H", "--", "."
        )  # empty if git does not track the package
        if not commit:
            return None
        head = _git(folder, "rev-parse", "HEAD")
        return head + "-dirty" if _git(folder, "status", "--porcelain", "--", ".") else head
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()


def _change(name: str, old: Any, new: Any) -> str:
    return f"{name}={json.dumps(old)}, now {json.dumps(new)}"


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of a config's nested sections."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
