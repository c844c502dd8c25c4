"""A plan's figures as text."""

from __future__ import annotations

from typing import Any

from codebook_jax.parallel.memory import size_of
from codebook_jax.tools.plan.operations import PASSES


def text(figures: dict[str, Any]) -> str:
    """The whole plan, one fact per line."""
    parts = (_setting, _memory, _operations, _sent, _time)
    return "\n\n".join("\n".join(part(figures)) for part in parts)


def _setting(figures: dict[str, Any]) -> list[str]:
    chip, mesh, batch = figures["chip"], figures["mesh"], figures["batch"]
    shards = mesh["data"] * mesh["fsdp"]
    slices = f" in {figures['slices']} slices" if figures["slices"] > 1 else ""
    return [
        f"plan for {figures['devices']} x {chip['name']}{slices}: {chip['peak'] / 1e12:,.0f} "
        f"TFLOP/s in bfloat16, {size_of(chip['memory'])} at {chip['memory_rate'] / 1e12:.2f} "
        f"TB/s, links {chip['link_rate'] / 1e9:,.0f} GB/s, network "
        f"{chip['network_rate'] / 1e9:.1f} GB/s per chip",
        f"mesh {', '.join(f'{axis} {size}' for axis, size in mesh.items())}",
        f"global batch {batch['global']:,} = {shards} data shards x {batch['global'] // shards} "
        f"(accumulation {batch['accumulation']})",
        f"{figures['parameters'] / 1e6:,.1f} M trained parameters",
    ]


def _memory(figures: dict[str, Any]) -> list[str]:
    found = figures["memory"]
    need = found["need"]
    lines = ["memory per device, estimated for the chip (bfloat16 is two bytes)"]
    lines += [f"  {name:12} {size_of(size):>9}" for name, size in need.items() if name != "total"]
    answer = "fits" if found["fits"] else "DOES NOT FIT"
    lines.append(f"  {'sum':12} {size_of(need['total']):>9} of {size_of(found['has'])}: {answer}")
    for way in found["what_fits"]:
        flags = " ".join(f"--config.{name}={value}" for name, value in way["changes"].items())
        lines.append(f"  would fit: {flags} ({size_of(way['total'])})")
    if not found["fits"] and not found["what_fits"]:
        lines.append(
            "  no batch size, accumulation, remat, dtype or fsdp would fit: use a smaller model or "
            "more devices"
        )
    if len(found["by_fsdp"]) > 1:
        sizes = ", ".join(f"{fsdp}: {size_of(total)}" for fsdp, total in found["by_fsdp"].items())
        lines.append(f"  sum by fsdp: {sizes}")
    return [*lines, _assigned(found["assigned_by_xla"], figures["compiler"], found["has"])]


def _assigned(xla: dict[str, int], compiler: str, has: float) -> str:
    said = f"{size_of(xla['held'])} held, {size_of(xla['in_between'])} in between"
    if compiler == "cpu":
        return f"  XLA for a CPU, which computes bfloat16 in float32: {said}"
    whole = sum(xla.values())
    return f"  libtpu for this chip: {said}, {size_of(xla['program'])} of program: {size_of(whole)} of {size_of(has)}: fits"


def _operations(figures: dict[str, Any]) -> list[str]:
    whole, moved = figures["operations_total"], figures["moved"]
    scale, unit = (1e12, "T") if whole >= 1e12 else (1e9, "G")
    size, byte = (1e9, "GB") if sum(moved.values()) >= 1e9 else (1e6, "MB")
    lines = [f"matrix products of a step, all devices: {whole / scale:,.2f} {unit}FLOP"]
    heads = "".join(f"{name:>12}" for name in (*PASSES, "share"))
    lines.append(f"  {'':32}{heads}    {byte} moved/device")
    for part in dict.fromkeys((*figures["operations"], *moved)):
        passes = figures["operations"].get(part, {})
        cells = "".join(
            f"{passes[name] / scale:12,.3f}" if name in passes else f"{'':12}" for name in PASSES
        )
        share = sum(passes.values()) / whole
        lines.append(f"  {part:32}{cells}{share:12.1%}{moved.get(part, 0) / size:19,.2f}")
    return lines


def _sent(figures: dict[str, Any]) -> list[str]:
    sent = figures["sent"]
    lines = [f"sent per step by each device: {sum(row['bytes'] for row in sent) / 1e9:,.3f} GB"]
    if not sent:
        return lines
    lines.append(
        f"  {'collective':20} {'over':28} {'times':>6} {'MB':>10} {'ms':>8} {'latency, ms':>14}"
    )
    lines += [
        f"  {row['kind']:20} {row['axes']:28} {row['count']:6} {row['bytes'] / 1e6:10,.2f} "
        f"{1e3 * row['seconds']:8.2f} {1e3 * row['latency']:14.2f}"
        for row in sent
    ]
    if figures["compiler"] == "tpu":
        early = sum(row["early"] for row in sent)
        return [
            *lines,
            f"  as libtpu places them; {early / 1e6:,.2f} MB start early and overlap with "
            "computation",
        ]
    lines.append(
        "  as the partitioner for CPUs places them, with gradients of products in float32: a TPU "
        "or GPU sends them in bfloat16, so this is an overestimate; --plan.compiler=tpu shows what "
        "a TPU sends"
    )
    return lines


def _time(figures: dict[str, Any]) -> list[str]:
    seconds, share = figures["seconds"], figures["communication_share"]
    assumed = f"{figures['utilisation_assumed']:.0%}"
    lines = [
        "time of a step, in ms",
        f"  matrix products      {1e3 * seconds['compute_at_peak']:10,.2f} at the peak, "
        f"{1e3 * seconds['compute']:,.2f} at {assumed} of it (an assumption)",
        f"  memory               {1e3 * seconds['memory']:10,.2f}",
        f"  communication        {1e3 * seconds['communication']:10,.2f}, of which latency "
        f"{1e3 * seconds['waiting']:,.2f}",
        f"  at least             {1e3 * seconds['at_the_least']:10,.2f}",
        f"  likely, at {assumed}: {1e3 * seconds['overlapped']:,.2f} with all communication "
        f"hidden, {1e3 * seconds['serial']:,.2f} with none (communication {share:.1%})",
        f"  bound by {figures['bound_by']}",
    ]
    steps, batch = figures["train_steps"], figures["batch"]["global"]
    lines.append(
        f"{steps:,} steps of {batch:,} pairs: {_span(figures['images_per_s'], '{:,.0f}')} "
        f"images/s, {_span(figures['days'], '{:,.2f}')} days, "
        f"{_span(figures['chip_hours'], '{:,.0f}')} chip-hours; not counting start-up, saving and "
        "evaluation"
    )
    return lines


def _span(ends: dict[str, float], form: str) -> str:
    """The smaller and the larger value, or one number if both read the same."""
    return "-".join(dict.fromkeys(form.format(value) for value in sorted(ends.values())))
