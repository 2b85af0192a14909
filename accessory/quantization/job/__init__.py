"""A 16-bit base -> an int4 folder, as a table of contents: check all, go block by block, write, prove, measure."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Optional

import torch

from accessory.errors import UserError
from accessory.export import check_target
from accessory.files import atomic_folder
from accessory.models import read_json
from accessory.precision import multiplies_bf16
from accessory.quantization.job.flow import Flow
from accessory.quantization.job.measure import Texts, perplexity_on_rows
from accessory.quantization.job.memory import PeakMemory
from accessory.quantization.job.plan import Plan, make_plan
from accessory.quantization.job.result import (
    MANIFEST_FILE,
    check_reloaded,
    damage,
    file_sizes,
    manifest,
    model_config,
    write_folder,
)
from accessory.quantization.job.work import TRANS, Work
from accessory.quantize_options import QuantizeConfig


def quantize_base(config: QuantizeConfig, repeated: bool = False) -> Path:
    """Quantize a base as `config` says and return the new folder.

    Raises UserError for anything the user can mend, before weights are read where that is possible. What an interrupted
    job has done lies beside the folder, block by block, and the same call goes on from there. repeated: a folder that
    the same call has finished is left as it is, where otherwise it is refused.
    """
    target = Path(config.output_dir).expanduser()
    trans = Path(config.save_trans).expanduser() if config.save_trans is not None else None
    if repeated and (manifests := sorted(target.glob(f"**/{MANIFEST_FILE}"))):
        plan = make_plan(config)
        if all(damage(file.parent) is None and read_json(file).get("settings") == plan.digest for file in manifests):
            print(f"{target}: finished before", flush=True)
            return target
    check_target(target)
    if trans is not None:
        _check_trans(trans, target)
    plan = make_plan(config)
    texts = Texts(plan)
    configs = [model_config(plan, kind) for kind in plan.formats]  # all of them: one may not hold this model
    work = Work(target, plan.settings)
    with work.locked():
        work.open(configs[0])
        print(describe_plan(plan, work), flush=True)
        _work(plan, work, texts, target, trans)
    return target


def _work(plan: Plan, work: Work, texts: Texts, target: Path, trans: Optional[Path]) -> None:
    began = time.monotonic()
    in_trans = nullcontext() if trans is None else atomic_folder(trans)
    with PeakMemory(plan.device) as memory, atomic_folder(target) as partial, in_trans as partial_trans:
        flow = Flow(plan, work, memory)
        hidden = flow.run()
        folders = {kind: partial if len(plan.formats) == 1 else partial / kind.value for kind in plan.formats}
        for kind, folder in folders.items():
            folder.mkdir(exist_ok=True)
            write_folder(plan, work.files(), folder, kind)
            check_reloaded(folder, hidden, flow)
        seconds, peak = time.monotonic() - began, memory.gib
        measured = {"calibration": perplexity_on_rows(plan, hidden, flow) if plan.is_calibrated else {}}
        del flow, hidden  # before whole models are loaded
        if partial_trans is not None:
            write_folder(plan, work.files(TRANS), partial_trans, None)
        measured |= texts.measure(folders[plan.formats[0]], partial_trans)
        content = manifest(plan, measured, seconds, peak)
        for folder in folders.values():
            described = content | {"files": file_sizes(folder)}
            (folder / MANIFEST_FILE).write_text(json.dumps(described, indent=2) + "\n")
    work.remove()
    size = sum(file_sizes(target).values()) / 2**20
    print(f"wrote {target} ({size:,.0f} MiB, {seconds:.0f} s, peak {peak:.2f} GiB)", flush=True)


def _check_trans(trans: Path, target: Path) -> None:
    one, other = trans.absolute(), target.absolute()
    if one == other or one in other.parents or other in one.parents:
        raise UserError(f"save_trans={trans} and output_dir={target} lie in each other; give each its own folder")
    if trans.exists():
        raise UserError(f"save_trans={trans}: exists already; choose another, or remove it")


def _slow(plan: Plan) -> str:
    if plan.device.type != "cpu" or plan.dtype is not torch.bfloat16 or multiplies_bf16(plan.device):
        return ""
    return (
        " (it has no instructions for bf16: scripts/quantize.py --precision tf32 is faster, and leaves the unquantized "
        "in fp32)"
    )


def describe_plan(plan: Plan, work: Work) -> str:
    """What is about to happen, on a few lines."""
    usual, config = next(iter(plan.schemes.values())), plan.config
    rows, seqlen = plan.rows.ids.shape
    lines = [
        f"base        {plan.sources.base['path']}",
        f"method      {config.method.value}, {usual}, {len(plan.schemes)} linears"
        + (f"; {len(plan.unquantized)} stay in 16 bit" if plan.unquantized else ""),
    ]
    if plan.unused:
        lines.append(f"not used    {', '.join(plan.unused)}: method={config.method.value} has no use for it")
    if plan.is_calibrated:
        lines.append(f"calibration {rows} rows of {seqlen} tokens; {'; '.join(plan.rows.report)}")
    lines.append(f"device      {plan.device}, {str(plan.dtype).removeprefix('torch.')}{_slow(plan)}")
    lines.append(f"output      {config.output_dir} ({config.format})")
    if done := len(work.files()):
        lines.append(f"continues   after {done} finished blocks in {work.folder}")
    return "\n".join(lines)
