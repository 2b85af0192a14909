"""EleutherAI's lm-evaluation-harness on our models: tasks in, tables of its metrics out. Prompts, few-shot examples and
metrics are the harness's own; `HarnessModel` answers.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import random
import sys
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from accessory.errors import UserError, first_line, suggest
from accessory.harness_model import HarnessModel, generation_settings
from accessory.models.llama import Llama

SEED, FEWSHOT_SEED = 0, 1234  # the harness's own: of Python's generator, and of all others
BOOTSTRAP = 1000  # resamples for a standard error that has no formula; the harness's 100,000 take minutes a task
LOCAL_DATA = ("json", "csv", "text", "parquet", "arrow", "xml")  # dataset_path of files rather than of the Hub


def open_tasks(names: list[str], include_path: Optional[Path], positions: int) -> dict[str, Any]:
    """The tasks (groups, tags, `*` patterns) of these names with their data, as lm-eval's TaskDict.

    include_path: folder with more task YAMLs, which win over the harness's. positions: of the model that will be asked.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what its own YAMLs leave out
    random.seed(SEED)
    np.random.seed(FEWSHOT_SEED)
    manager, found = _find_tasks(names, include_path)
    loaded: dict[str, Any] = {}
    for name in found:
        try:
            opened = manager.load([name])
        except Exception as error:  # whatever the Hub, the task's YAML or its Python code raise
            raise UserError(_explain(name, manager, error)) from None
        for part, content in opened.items():
            loaded.setdefault(part, {}).update(content)
    for name, task in loaded["tasks"].items():
        _check_task(name, task, positions)
    return loaded


def _find_tasks(names: list[str], include_path: Optional[Path]) -> tuple[TaskManager, list[str]]:
    own = None
    if include_path is not None:
        if not include_path.is_dir():
            raise UserError(f"--include_path {include_path}: no such folder")
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if not own.all_tasks:
            raise UserError(f"--include_path {include_path}: no *.yaml with a `task:` in it")
        if set(names) <= set(own.all_subtasks):  # reading the harness's 14,000 takes seconds
            return own, list(dict.fromkeys(names))
    manager = TaskManager(include_path=str(include_path)) if own else TaskManager()
    found: dict[str, None] = {}
    for name in names:
        matching = fnmatch.filter(manager.all_tasks, name)
        if not matching:
            where = "" if own else "; tasks of your own need --include_path <folder of their YAMLs>"
            raise UserError(f"--tasks {name}: no such task{suggest(name, manager.all_tasks)}{where}")
        found |= dict.fromkeys(matching)
    return manager, list(found)


def _explain(name: str, manager: TaskManager, error: Exception) -> str:
    config = manager.task_index[name].cfg or {}
    data = str(config.get("dataset_path"))
    if data in LOCAL_DATA or Path(data).exists():
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        return f"task {name}: cannot be loaded from {files} ({first_line(error)}); paths start at the working directory"
    if isinstance(error, OSError):  # ConnectionError, DatasetNotFoundError, offline mode
        return (
            f"task {name} takes its data from the Hugging Face Hub ({first_line(error)}); without network put it into "
            "a task of your own: --include_path <folder> with a YAML that says dataset_path: json and "
            "dataset_kwargs: {data_files: …}"
        )
    return f"task {name}: cannot be loaded ({type(error).__name__}: {first_line(error)})"


def _check_task(name: str, task: Any, positions: int) -> None:
    """Refuse before the model is read what would fail after it."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"task {name}: runs code that the model writes, which is not offered here; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name}: asks about images; tasks are asked without images here; leave it out")
    if task.OUTPUT_TYPE == "generate_until":
        try:
            generation_settings(task.config.generation_kwargs or {}, positions)
        except UserError as error:
            raise UserError(f"task {name}: {error}") from None


def run_tasks(
    model: Llama, tasks: dict[str, Any], batch_size: int, num_fewshot: Optional[int] = None,
    limit: Optional[float] = None,
) -> dict[str, Any]:  # fmt: skip
    """lm-eval's results of `open_tasks`' tasks: results, groups, n-shot, n-samples, versions, higher_is_better.

    num_fewshot: examples in front of each question, unset: as the task says; a task that says 0 keeps it. limit: only
    so many items of each task, or below 1 that share of them.
    """
    for task in tasks["tasks"].values():
        stated = task.get_config("num_fewshot")
        if stated != 0:
            task.set_config("num_fewshot", num_fewshot if num_fewshot is not None else stated or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its pool would fork this process, model and all, for each core
    with contextlib.redirect_stdout(sys.stderr):  # what it says of its progress
        found = evaluate(HarnessModel(model, batch_size), tasks, limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
    return {key: value for key, value in found.items() if key not in ("configs", "group_subtasks")}


def results_table(results: dict[str, Any]) -> str:
    """A line for each metric of each task and group."""
    scored = results["results"] | results.get("groups", {})
    width = max(16, *map(len, scored))
    lines = [f"{'task':<{width}}{'items':>8}{'n-shot':>8}  {'filter':<18}{'metric':<22}{'value':>10}{'stderr':>10}"]
    for name, values in scored.items():
        items = results["n-samples"].get(name, {}).get("effective", "")
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr"):
                arrow = {True: " ↑", False: " ↓"}.get(results["higher_is_better"].get(name, {}).get(metric), "")
                numbers = (value, values.get(f"{metric}_stderr,{filtered}"))
                shown = "".join(f"{n:>10.4f}" if isinstance(n, float) else f"{'-':>10}" for n in numbers)
                shots = results["n-shot"].get(name, "")
                lines.append(f"{name:<{width}}{items:>8}{shots:>8}  {filtered:<18}{metric + arrow:<22}{shown}")
    return "\n".join(lines)
