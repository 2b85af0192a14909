"""Figures as text: a line for each while they are measured, and the tables of docs/performance.md.

The document's prose is the document's own. What stands between the two marks is written from the results, and nothing
else, so no figure there can be other than measured; a document that is not there yet starts as a title and the marks.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

from benchmark_cases import flops_per_token

BEGIN, END = "<!-- figures: begin (scripts/benchmark.py --report writes these lines) -->", "<!-- figures: end -->"
START = f"""# Speed and memory

LLaMA2's shapes with random weights, made and quantized on the device, so nothing is downloaded. Each system is a
process of its own and takes turns with the others, a few steps at a time, on the same tokens. A training step is
forward, backward, clipping and AdamW on one micro-batch; peak memory is what the process has allocated on the GPU, its
model included, and in brackets what `accessory-estimate` says. *ours is* gives how many times the other's tokens/s ours
has: the median of the rounds, and the range. *Of the product's rate* is the share of the measured matrix product's rate
that the frozen weights' arithmetic alone accounts for. What could not run says why.

{BEGIN}
{END}

To repeat it, run the commands above on a machine with the packages they name (litgpt and unsloth are optional), each
with `--output results.json`, then `python scripts/benchmark.py --report docs/performance.md results.json`.
"""
NAMES = {"plain": "transformers + PEFT + bitsandbytes"}
BASES = {"nf4": "NF4", "rtn": "int4"}
TITLES = {
    "train": "Training, rows of one length, every token learnt",
    "lengths": "Training on rows of the lengths of real data: answer tokens/s",
    "generate": "Answering: new tokens/s",
}
HEAD = (
    f"{'system':<8} {'task':<8} {'model':<5} {'base':<5} {'recipe':<15} {'rows':>9} {'ckpt':>4} {'tokens/s':>9} "
    f"{'ms/step':>8} {'quartiles':>15} {'peak GiB':>8}  ours is"
)


def line(row: dict[str, Any]) -> str:
    shape = f"{row['batch']} x {row['length']}"
    base = row["base"] + (f"+{row['images']}" if row["images"] else "")
    head = (
        f"{row['system']:<8} {row['task']:<8} {row['model']:<5} {base:<5} {row['recipe']:<15} {shape:>9} "
        f"{_ckpt(row):>4} "
    )
    if "error" in row:
        return f"{head} failed: {row['error']}"
    low, high = row["ms_quartiles"]
    return (
        f"{head}{row['tokens_per_s']:>9,.0f} {row['ms_per_step']:>8,.1f} {f'{low:,.1f}-{high:,.1f}':>15} "
        f"{row['peak_gib']:>8.2f}{_estimate(row)}  {_times(row)}"
    ).rstrip()


def _ckpt(row: dict[str, Any]) -> str:
    if row["checkpointing"]:
        return "yes"
    again = _attends_again(row)
    return ("min" if again else "host") if row.get("offload") else "attn" if again else "no"


def _attends_again(row: dict[str, Any]) -> bool:
    return not row["checkpointing"] and row.get("keep_attention") is False


def _times(row: dict[str, Any]) -> str:
    found = row.get("ours_over_this")
    if not found:
        return ""
    return f"{statistics.median(found):.2f} x ({min(found):.2f}-{max(found):.2f})"


def write(document: Path, sources: Iterable[Path]) -> None:
    """Put the tables of these result files, in their order, between the document's marks."""
    text = document.read_text() if document.exists() else START
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{document}: has no lines {BEGIN} and {END} to write between")
    together: dict[str, list[dict[str, Any]]] = {}
    for source in sources:
        results = json.loads(source.read_text())
        together.setdefault(_heading(results), []).append(results)
    tables = "\n\n".join(map(tabulate, together.values()))
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")


def tabulate(runs: list[dict[str, Any]]) -> str:
    """Runs of one machine, versions and day: what they were measured on, their tables, how to repeat them."""
    rows = [row | {"product_tflops": _product(run["machine"])} for run in runs for row in run["results"]]
    parts = [_heading(runs[0]) + _machine([run["machine"] for run in runs])]
    for task, title in TITLES.items():
        chosen = [row for row in rows if row["task"] == task]
        if chosen:
            parts.append(f"### {title}\n\n" + _table(task, chosen))
    profiled = [row for row in rows if row.get("profile", {}).get("kernels")]
    if profiled:
        parts.append("### Where a step's time goes, ms\n\n" + _profiles(profiled))
    notes = sorted({f"{_name(row)}: {note}" for row in rows for note in row.get("notes", [])})
    crowded = sorted({_shape(row) for row in rows if row.get("crowded")})
    if crowded:
        notes.append(
            f"not all systems fit into the memory together, each warmed up anew for its turn: {', '.join(crowded)}"
        )
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    parts.append("```bash\n" + "\n".join(run["command"] for run in runs) + "\n```")
    return "\n\n".join(parts)


def _heading(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    return (
        f"## {machine.get('device', 'unknown device')}{driver}, {results['date']}\n\n"
        f"Python {machine['python']}, {machine['cores']} cores, {versions}; this project at {machine['commit']}."
    )


def _product(machine: dict[str, Any]) -> Optional[float]:
    """TFLOP/s of the large square product of the same run."""
    return machine.get("matmul_tflops", {}).get(" ".join([str(machine.get("square"))] * 3))


def _machine(machines: list[dict[str, Any]]) -> str:
    """What products and copies reached, run by run; the shapes of products are the first run's."""
    if None in map(_product, machines):
        return ""
    square = machines[0]["square"]
    rates, copies = ([f"{value:,.3g}" for value in values] for values in (
        map(_product, machines), (machine["copy_gb_s"] / 1000 for machine in machines)))  # fmt: skip
    runs = "run" if len(machines) == 1 else "runs, in their order"
    text = (
        f" In the same {runs}, a bf16 product of {square} x {square} matrices ran at {', '.join(rates)} TFLOP/s"
        f"{_sustained(machines)}, and memory was copied at {', '.join(copies)} TB/s, read and written.\n\n"
        "| product, tokens x out x in | TFLOP/s |\n|---|---|\n"
    )
    return text + "\n".join(
        f"| {shape.replace(' ', ' x ')} | {rate:,.3g} |" for shape, rate in machines[0]["matmul_tflops"].items()
    )


def _sustained(machines: list[dict[str, Any]]) -> str:
    """Of runs that measured it."""
    found = [f"{rate:,.3g}" if (rate := machine.get("sustained_tflops")) else "-" for machine in machines]
    return f" (after seconds of it, {', '.join(found)})" if set(found) != {"-"} else ""


def _table(task: str, rows: list[dict[str, Any]]) -> str:
    share = "| of the product's rate " if task == "train" and all(row["product_tflops"] for row in rows) else ""
    dashes = "|---" * (7 if share else 6)
    peaks = "peak GiB (estimate)" if any(map(_estimate, rows)) else "peak GiB"
    lines = [f"| | system | tokens/s | ms a step, median (quartiles) | {peaks} | ours is {share}|", f"{dashes}|"]
    last = ""
    for row in rows:
        shape, last = (_shape(row), _shape(row)) if _shape(row) != last else ("", last)
        if "error" in row:
            lines.append(f"| {shape} | {_name(row)} | {row['error']} | | | " + ("| |" if share else "|"))
            continue
        low, high = row["ms_quartiles"]
        rate = row["tokens_per_s"]
        milliseconds = f"{row['ms_per_step']:,.1f} ({low:,.1f} to {high:,.1f})"
        cells = [shape, _name(row), f"{rate:,.0f}" if rate >= 100 else f"{rate:,.1f}", milliseconds]
        cells += [f"{row['peak_gib']:.2f}" + _estimate(row), _times(row)]
        if share:
            cells.append(f"{row['tokens_per_s'] * flops_per_token(row) / row['product_tflops'] / 1e10:.0f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _profiles(rows: list[dict[str, Any]]) -> str:
    """A step of each system, by kind of kernel. What its kernels leave of the median step is time in which the GPU
    waits for its next one; steps of different lengths have no such median."""
    kinds = list(rows[0]["profile"]["by_kind"])
    lines = ["| | system | kernels | " + " | ".join(kinds) + " | idle |", "|---" * (4 + len(kinds)) + "|"]
    last = ""
    for row in rows:
        shape, last = (_shape(row), _shape(row)) if _shape(row) != last else ("", last)
        profile = row["profile"]
        idle = row["ms_per_step"] - profile["busy_ms"]
        figures = [f"{profile['by_kind'][kind]:,.1f}" for kind in kinds]
        figures.append("" if row["task"] == "lengths" or idle < 0 else f"{idle:,.1f}")
        lines.append("| " + " | ".join([shape, _name(row), f"{profile['kernels']:,}", *figures]) + " |")
    return "\n".join(lines)


def _estimate(row: dict[str, Any]) -> str:
    return f" ({row['estimate_gib']:.2f})" if row.get("estimate_gib") else ""


def _name(row: dict[str, Any]) -> str:
    return NAMES.get(row["system"], row["system"])


def _shape(row: dict[str, Any]) -> str:
    images = f", images {row['images']}" if row["images"] else ""
    checkpointing = ", checkpointing" if row["checkpointing"] else ", offload" if row.get("offload") else ""
    checkpointing += ", attention recomputed" if _attends_again(row) else ""
    rows = f"{row['batch']} items" if row["task"] == "lengths" else f"{row['batch']} x {row['length']}"
    rows += f" + {row['new_tokens']}" if row["task"] == "generate" else ""
    return f"{row['model'].upper()} {BASES[row['base']]} `{row['recipe']}`, {rows}{checkpointing}{images}"
