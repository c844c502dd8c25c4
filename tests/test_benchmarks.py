"""The benchmarks, most of which take too long to run here, use what the package has."""

import ast
import importlib

import pytest
from small_run import ROOT


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
