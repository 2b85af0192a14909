"""A 16-bit base -> an int4 folder, as a table of contents: check all, go block by block, write, prove, measure."""

from __future__ import annotations

import json
import time
from pathlib import Path

from accessory.export import check_target
from accessory.files import atomic_folder
from accessory.quantization.job.flow import Flow
from accessory.quantization.job.measure import Texts, perplexity_on_rows
from accessory.quantization.job.memory import PeakMemory
from accessory.quantization.job.plan import Plan, make_plan
from accessory.quantization.job.result import MANIFEST_FILE, check_reloaded, manifest, model_config, write_folder
from accessory.quantization.job.work import TRANS, Work
from accessory.quantization.options import QuantizeConfig


def quantize_base(config: QuantizeConfig) -> Path:
    """Quantize a base as `config` says and return the new folder.

    Raises UserError for anything the user can mend, before weights are read where that is possible. What an interrupted
    job has done lies beside the folder, block by block, and the same call goes on from there.
    """
    target = Path(config.output_dir).expanduser()
    trans = Path(config.save_trans).expanduser() if config.save_trans is not None else None
    for folder in (target, trans):
        if folder is not None:
            check_target(folder)
    plan = make_plan(config)
    texts = Texts(plan)
    work = Work(target, plan.settings)
    print(describe_plan(plan, work), flush=True)
    work.open(model_config(plan, plan.formats[0]))
    began = time.monotonic()
    with PeakMemory(plan.device) as memory, atomic_folder(target) as partial:
        flow = Flow(plan, work, memory)
        hidden = flow.run()
        folders = {kind: partial if len(plan.formats) == 1 else partial / kind.value for kind in plan.formats}
        for kind, folder in folders.items():
            folder.mkdir(exist_ok=True)
            write_folder(plan, work.files(), folder, kind)
            check_reloaded(folder, hidden, flow)
        seconds, peak = time.monotonic() - began, memory.gib
        measured = perplexity_on_rows(plan, hidden, flow) if plan.is_calibrated else {}
        if trans is not None:
            with atomic_folder(trans) as partial_trans:
                write_folder(plan, work.files(TRANS), partial_trans, None)
        measured = {"calibration": measured} | texts.measure(folders[plan.formats[0]], trans)
        content = manifest(plan, measured, seconds, peak)
        for folder in folders.values():
            (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=2) + "\n")
    work.remove()
    print(f"wrote {target} ({_size(target)}, {seconds:.0f} s, peak {peak:.2f} GiB)", flush=True)
    return target


def describe_plan(plan: Plan, work: Work) -> str:
    """What is about to happen, on a few lines."""
    usual, config = next(iter(plan.schemes.values())), plan.config
    rows, seqlen = plan.rows.ids.shape
    lines = [
        f"base        {plan.sources.base['path']}",
        f"method      {config.method.value}, {usual}, {len(plan.schemes)} linears"
        + (f"; {len(plan.unquantized)} stay in 16 bit" if plan.unquantized else ""),
    ]
    if plan.is_calibrated:
        lines.append(f"calibration {rows} rows of {seqlen} tokens; {'; '.join(plan.rows.report)}")
    lines.append(f"device      {plan.device}, {str(plan.dtype).removeprefix('torch.')}")
    lines.append(f"output      {config.output_dir} ({config.format})")
    if done := len(work.files()):
        lines.append(f"continues   after {done} finished blocks in {work.folder}")
    return "\n".join(lines)


def _size(folder: Path) -> str:
    return f"{sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 2**20:,.0f} MiB"
