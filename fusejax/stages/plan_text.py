"""A plan as text for the terminal and as Markdown for the golden tables."""

__all__ = ["bytes_text", "render"]

from collections.abc import Mapping
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def bytes_text(count: float) -> str:
    """Returns a size in the binary unit that leaves it at least 1."""
    size, unit = float(count), 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 else f"{size:.2f} {_UNITS[unit]}"


def render(plan: Mapping[str, Any]) -> str:
    """Returns the plan in paragraphs of aligned lines."""
    parts = [_head(plan), _memory(plan), _speed(plan), _traffic(plan), _disk(plan)]
    return "\n\n".join(parts + ["Note: " + note for note in plan["notes"]])


def _lines(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)])


def _head(plan: Mapping[str, Any]) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    step = plan["step"]
    return (
        f"{plan['parameters'] / 1e9:.2f} G parameters on {plan['devices']} x {plan['device_kind']} ({mesh})\n"
        f"{step['batch_size']} rows of {step['seq_len']} tokens per step, {step['accumulation']} micro-batches of "
        f"{step['rows_per_device']} rows per device, {step['compute_dtype']}, remat {step['remat']}"
    )


def _memory(plan: Mapping[str, Any]) -> str:
    found, usable = plan["per_device_bytes"], plan["assumptions"]["usable_share"]
    rows = [(name, bytes_text(size)) for name, size in found.items()]
    if plan["memory_items"]:
        parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in plan["memory_items"].items())
        said = " (as predicted)" if plan["memory_source"] != "model" else ""
        rows.insert(4, ("  of these", parts + said))
    rows.append(
        ("usable", f"{bytes_text(plan['usable_bytes'])} of {bytes_text(plan['hbm_bytes'])} ({usable:.0%} assumed)")
    )
    rows.append(("fits", "yes" if plan["fits"] else "NO"))
    if "refused" in plan:
        rows.append(("compiler", plan["refused"]))
    for entry in plan["suggestions"]:
        change = ", ".join(f"{name} {value}" for name, value in entry["change"].items())
        rows.append(("would fit", f"{change}: {bytes_text(entry['total_bytes'])}"))
    if not plan["fits"] and not plan["suggestions"]:
        rows.append(("would fit", "nothing of remat, accumulation and fsdp up to 32 times; take a larger device"))
    return _lines(f"Memory per device (by {plan['memory_source']})", rows)


def _speed(plan: Mapping[str, Any]) -> str:
    shares = plan["assumptions"]
    rate, time = plan["tokens_per_second"], plan["seconds_per_step"]
    rows = [
        ("operations per token", f"{plan['flops_per_token']:.4g} ({plan['flops_per_token_source']})"),
        ("  as compiled", f"{plan['flops_per_token_program']:.4g} (XLA's matrix products, recomputed ones included)"),
        ("tokens per second", f"{rate['expected']:,.0f} (without overlap {rate['without_overlap']:,.0f})"),
        ("share of peak", f"{plan['mfu']:.1%} of the operations that training needs"),
        ("seconds per step", ", ".join(f"{name} {time[name]:.3g}" for name in ("compute", "memory", "communication"))),
        ("memory traffic", ", ".join(f"{name} {bytes_text(size)}" for name, size in plan["memory_traffic"].items())),
        (
            "  assumed",
            f"what a layer makes passes {shares['layer_passes']} times (once less with remat none), logits "
            f"{shares['logits_passes']} times; the update moves {shares['optimizer_bytes_per_parameter']} bytes per "
            "parameter",
        ),
    ]
    title = (
        f"Speed (matrix products at {shares['matmul_share']:.0%} of the peak, memory at {shares['memory_share']:.0%}, "
        f"links at {shares['link_share']:.0%}; collectives behind the rest)"
    )
    return _lines(title, rows)


def _traffic(plan: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{row['kind']} {row['dtype']} over {row['devices']}",
            f"{row['count']:>6} times, {bytes_text(row['bytes'])}, sent {bytes_text(row['wire_bytes'])}",
        )
        for row in plan["collectives"]
    ]
    title = f"Collectives per step: each device sends {bytes_text(plan['collective_bytes'])}"
    return _lines(title, rows) if rows else title


def _disk(plan: Mapping[str, Any]) -> str:
    rows = [(name, bytes_text(size)) for name, size in plan["disk"].items()]
    told = plan["disk_assumptions"]
    rows.append(
        (
            "assumed",
            f"{told['text_bytes_per_token']:g} bytes of text per token, documents of {told['document_bytes']:,.0f} "
            f"bytes, models in {told['dtype_of_models']}, {told['train_states_kept']} train states of "
            f"{told['train_state_bytes_per_parameter']} bytes per parameter",
        )
    )
    title = f"Disk: {bytes_text(plan['disk_bytes'])} for {plan['tokens']:,} tokens ({plan['tokens_source']})"
    return _lines(title, rows)
