"""`--plan.compiler=tpu`: the step compiled by libtpu, which needs no TPU; reading its text is
tested on samples, without it.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_run import SMALL

from codebook_jax.errors import UserError
from codebook_jax.parallel import memory
from codebook_jax.tools.plan import chips, foresight, hlo, options, report, tpu
from codebook_jax.tools.plan.options import PlanOptions, environment

ROOT = Path(__file__).parents[2]
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
FIELDS = SMALL | {
    "data.global_batch": 32,
    "losses.matching": 0.0,
    "losses.masked_lm": 0.0,
    "data.train": "",
    "data.eval": "",
}
CHANNEL = "channel_id=7, replica_groups={{0,1,2,3}}"

# As libtpu 0.0.50 writes them: a gather that goes on beside two fusions, and a sum of which each
# device keeps a part.
PROGRAM = f"""HloModule jit_f, num_partitions=4

%start (a: f32[16,64]) -> (f32[16,64], f32[64,64]) {{
  %a = f32[16,64]{{1,0}} parameter(0)
  %all-gather.1 = f32[64,64]{{1,0:T(8,128)}} all-gather(%a), {CHANNEL}, dimensions={{0}}
  ROOT %c = (f32[16,64]{{1,0}}, f32[64,64]{{1,0}}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.1 (b: f32[16,64]) -> f32[64,64] {{
  %b = f32[16,64]{{1,0}} parameter(0)
  ROOT %all-gather.2 = f32[64,64]{{1,0:T(8,128)S(1)}} all-gather(%b), {CHANNEL}, dimensions={{0}}
}}

%all-reduce-scatter.3 (d: f32[128,32]) -> f32[32,32] {{
  %d = f32[128,32]{{1,0}} parameter(0)
  %all-reduce.4 = f32[128,32]{{1,0}} all-reduce(%d), channel_id=9, replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  ROOT %e = f32[32,32]{{1,0}} dynamic-slice(%all-reduce.4, %n, %m), dynamic_slice_sizes={{32,32}}
}}

ENTRY %main (p: f32[16,64], q: f32[128,32]) -> f32[64,64] {{
  %p = f32[16,64]{{1,0}} parameter(0)
  %q = f32[128,32]{{1,0}} parameter(1)
  %s = (f32[16,64]{{1,0}}, f32[64,64]{{1,0}}) fusion(%p), kind=kCustom, calls=%start
  %f = f32[64,64]{{1,0}} fusion(%s), kind=kOutput, calls=%async_collective_fusion.1
  %g = f32[64,64]{{1,0}} fusion(%f), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %h = f32[32,32]{{1,0}} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.3
}}
"""


def test_what_goes_on_beside_several_fusions_is_sent_once():
    gather, scatter = hlo.collectives(PROGRAM)
    assert (gather.kind, gather.times, gather.early, gather.sent) == (
        "all-gather",
        1,
        True,
        64 * 64 * 4 * 3 / 4,
    )
    assert (scatter.kind, scatter.times, scatter.early, scatter.sent) == (
        "reduce-scatter",
        1,
        False,
        128 * 32 * 4 * 3 / 4,
    )


@pytest.mark.parametrize(
    ("chip", "count", "name", "host"),
    [
        ("v5p", 256, "v5p:8x8x4", (2, 2, 1)),
        ("v5p", 4, "v5p:2x2x1", (2, 2, 1)),
        ("v5p", 2, "v5p:2x1x1", (2, 1, 1)),
        ("v5e", 16, "v5e:4x4", (2, 2, 1)),
        ("v6e", 1, "v6e:1x1", (1, 1, 1)),
    ],
)
def test_slices_have_the_names_that_libtpu_knows(chip, count, name, host):
    assert tpu.layout(chips.CHIPS[chip], count) == (name, host)


def test_what_no_compiler_for_tpus_can_do_is_refused_in_a_sentence(monkeypatch):
    with pytest.raises(UserError, match="--plan.chip=h100 "):
        tpu.layout(chips.CHIPS["h100"], 8)
    with pytest.raises(UserError, match="--plan.compiler=gpu is not one of cpu, tpu"):
        environment(PlanOptions(compiler="gpu"))
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs libtpu, which is not installed: pip install -e .\[tpu\]"
    ):
        environment(PlanOptions(compiler="tpu"))


def test_what_libtpu_says_of_memory_is_cut_to_the_numbers():
    said = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    error = RuntimeError(
        f"{said}temporaries (556.58G) exceeds available HBM (15.75G). HLO module: jit__step."
    )
    assert memory.out_of_memory(error).endswith(
        "for HLO temporaries (556.58G) exceeds available HBM (15.75G)"
    )
    older = RuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.1G of 15.7G hbm. "
        "Exceeded"
    )
    assert memory.out_of_memory(older) == "Used 17.1G of 15.7G hbm"
    assert memory.out_of_memory(RuntimeError("INTERNAL: something else")) is None


def test_a_plan_by_libtpu_says_so():
    figures = json.loads((ROOT / "benchmarks" / "results" / "plans.json").read_text())[
        "base, 256 v5p, 64 a chip, libtpu"
    ]
    said = report.text(figures)
    assert (
        "libtpu for this chip: 3.3 GB held, 4.0 GB in between, 153 MB of program: 7.4 GB "
        "of 95.0 GB: fits" in said
    )
    assert "as libtpu places them" in said and "partitioner for CPUs" not in said


@pytest.mark.parametrize(("compiler", "fits"), [("cpu", False), ("tpu", True)])
def test_what_libtpu_has_found_room_for_fits_whatever_was_estimated(compiler, fits, monkeypatch):
    need = memory.Estimate(*[3e9] * 6)  # of a chip's 16 GB
    found = SimpleNamespace(
        argument_size_in_bytes=4,
        output_size_in_bytes=2,
        alias_size_in_bytes=1,
        temp_size_in_bytes=7,
        generated_code_size_in_bytes=3,
    )
    compiled = SimpleNamespace(memory_analysis=lambda: found)
    ways = [({"data.global_batch": 8}, need)]
    monkeypatch.setattr(memory, "fitting_settings", lambda planner, need, limit: ways)
    planner = SimpleNamespace(estimate=lambda: need, has=chips.CHIPS["v5e"].memory)
    monkeypatch.setattr(foresight, "_by_fsdp", lambda planner: {})
    figures = foresight._memory_figures(planner, compiled, compiler)
    assert figures["fits"] is fits and len(figures["what_fits"]) == (not fits)
    assert figures["assigned_by_xla"] == {"held": 5, "in_between": 7, "program": 3}


def plan(out, changes, *flags):
    """The command for TPUs in its own process, with its output."""
    command = [
        sys.executable,
        "-m",
        "codebook_jax.main",
        "--mode=plan",
        "--config=configs/base.py:tiny",
    ]
    command += [f"--config.{name}={value}" for name, value in (FIELDS | changes).items()]
    command += ["--plan.compiler=tpu", f"--plan.json={out}", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)


needs_libtpu = pytest.mark.skipif(
    not HAS_LIBTPU, reason="libtpu is not installed: pip install -e .[tpu]"
)


@needs_libtpu
def test_libtpu_compiles_the_step(tmp_path, one_device_environment):
    done = plan(tmp_path / "plan.json", {"mesh.fsdp": 2}, "--plan.chip=v5e", "--plan.devices=8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr.strip()
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    need, assigned = figures["memory"]["need"], figures["memory"]["assigned_by_xla"]
    state = sum(need[part] for part in ("parameters", "teacher", "moments", "queues"))
    assert (
        state <= assigned["held"] < 4 * state
    )  # a TPU pads to tiles of 8 x 128, and these arrays are narrower
    counts = {(part["kind"], part["axes"]): part["count"] for part in figures["sent"]}
    assert counts["all-reduce", "data, fsdp"] >= 2 * SMALL["codebook.iterations"]
    assert counts["all-gather", "fsdp"] > 0  # of parameters
    assert "libtpu for this chip" in done.stdout and "as libtpu places them" in done.stdout


@needs_libtpu
def test_libtpu_says_what_does_not_fit(tmp_path, one_device_environment):
    large = {
        "data.global_batch": 65_536,
        "queue.size": 65_536,
        "itm.groups": 64,
        "model.remat": "none",
    }
    done = plan(tmp_path / "plan.json", large, "--plan.chip=v5e", "--plan.devices=1")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "compiler for v5e" in done.stderr and "--config.data.global_batch=" in done.stderr
    assert not (tmp_path / "plan.json").exists()


@needs_libtpu
def test_a_slice_that_libtpu_does_not_know_is_refused(tmp_path):
    done = plan(tmp_path / "plan.json", {}, "--plan.chip=v5e", "--plan.devices=9")
    assert done.returncode == 2 and "slice v5e:3x3" in done.stderr
