"""accessory-estimate: a training command's words, answered by the memory that it would take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import torch

from accessory.errors import UserError
from accessory.estimate.cases import Estimator
from accessory.estimate.parts import GIB, OVERHEAD
from accessory.estimate.report import chosen, sizes_table, table, title, verdict
from accessory.estimate_cli import EstimateConfig


def estimate(config: EstimateConfig) -> dict[str, Any]:
    """The estimate as the config asks for it; printed, and returned as plain numbers."""
    output = output_file(config.json) if config.json is not None else None
    memory = gpu_memory(config)
    estimator = Estimator(config, None if memory is None else memory - OVERHEAD)
    asked = estimator.asked
    none = "inputs on host" if asked.offloaded and asked.recomputed == 0 else "recompute none"
    names = {0: none, estimator.blocks: "recompute all"}
    columns = {number: names.get(number, f"{number} of them") for number in sorted({0, asked.recomputed, *names})}
    columns[asked.recomputed] += " *"
    cases = [estimator.recomputing(number) for number in columns]
    trainings = {name: estimator.train(case) for name, case in zip(columns.values(), cases, strict=True)}
    generation = estimator.generate()
    print(title(estimator), "", table(trainings, generation), f"  * {chosen(estimator, memory)}", "", sep="\n")
    figures: dict[str, Any] = {
        "model": estimator.described.name,
        "train": {
            str(n): vars(trainings[name]) | {"offloaded": case.offloaded, "keeps_attention": case.keeps_attention}
            for (n, name), case in zip(columns.items(), cases, strict=True)
        },
        "recomputed_blocks": asked.recomputed,
        "host_memory": estimator.on_host(),
        "generate": vars(generation),
    }
    if memory is None:
        print(sizes_table(estimator, generation.peak))
    else:
        words, suggestions = verdict(estimator, memory)
        print(words)
        fits = estimator.train(asked).peak <= memory - OVERHEAD
        figures |= {"gpu_memory": memory, "overhead": OVERHEAD, "fits": fits, "suggestions": dict(suggestions)}
    if output is not None:
        try:
            output.write_text(json.dumps(figures, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {output}: cannot be written ({error.strerror})") from None
    return figures


def gpu_memory(config: EstimateConfig) -> Optional[int]:
    if config.gpu_memory is not None:
        return int(config.gpu_memory * GIB)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def output_file(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.parent.is_dir() or file.is_dir():
        raise UserError(f"--json {path}: name a file in a folder that exists")
    return file
