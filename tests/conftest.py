"""Eight virtual CPU devices stand in for a pod slice; nothing uses the network."""

import os
from importlib.metadata import version
from types import SimpleNamespace

import pytest

# Saved before the changes below: parallel test processes inherit the environment as the first one
# has changed it.
GIVEN_XLA_FLAGS = os.environ.setdefault("XLA_FLAGS_BEFORE_TESTS", os.environ.get("XLA_FLAGS", ""))
# Most of the time would go into compiling programs that run for milliseconds. Runs in processes of
# their own (`one_device_environment`) are compiled as a user's are.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 12):  # XLA aborts at a flag that is gone
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = (
    f"{COMPILE_FAST} {GIVEN_XLA_FLAGS} --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # none, instead of the one in the user's home
# many processes, plans and, in a folder of their own, launchers: what a change rarely touches
SLOW = ("test_processes.py", "test_plan.py")
LONGEST = "test_processes.py"  # last, it would run while the other process is idle


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist's own order: files with most tests first


@pytest.hookimpl(wrapper=True)
def pytest_collect_file():
    """Tests alone: files in this folder are not imported in search of examples in docstrings."""
    return [found for found in (yield) if type(found) is pytest.Module]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != LONGEST)
    for item in items:
        if item.path.name in SLOW or item.path.parent.name == "launch":
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def one_device_environment(tmp_path_factory):
    """The environment of a small run in its own process: one device, and a shared folder of
    compiled programs.
    """
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return {**os.environ, "XLA_FLAGS": GIVEN_XLA_FLAGS, **settings}


@pytest.fixture
def one_device(one_device_environment, monkeypatch):
    """Makes a run in this process use one device too, and the same folder of compiled programs."""
    import jax

    from codebook_jax.parallel import sharding

    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_, **__: mesh)
    settings = {
        "jax_compilation_cache_dir": one_device_environment["JAX_COMPILATION_CACHE_DIR"],
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def world(monkeypatch):
    """What a test may change of a run whose model is a single weight; see one_weight.py."""
    from one_weight import make_world

    return make_world(monkeypatch)


@pytest.fixture(scope="session")
def straight(one_device_environment, tmp_path_factory):
    """Twenty uninterrupted steps of a small run, and what it printed.

    Copy it before changing it.
    """
    from small_run import command, ran

    workdir = tmp_path_factory.mktemp("straight") / "run"
    done = ran(command(workdir), one_device_environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(workdir=workdir, said=done.stdout, progress=done.stderr)


@pytest.fixture(scope="session")
def pretrained(straight, tmp_path_factory):
    """The export of `straight`, with its teacher."""
    import shutil

    from small_finetune import exported
    from small_run import config_of

    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    shutil.copytree(straight.workdir, workdir)
    exported(workdir, config_of(**{"export.teacher": True}))
    return workdir / "export"


@pytest.fixture(scope="module")
def one_device_for_all(one_device_environment):
    """`one_device` for a whole module."""
    import jax
    from small_finetune import on_one_device

    cache = "jax_compilation_cache_dir"
    before = getattr(jax.config, cache)
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch, one_device_environment["JAX_COMPILATION_CACHE_DIR"])
        yield
    jax.config.update(cache, before)
