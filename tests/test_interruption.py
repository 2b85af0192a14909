"""SIGTERM and Ctrl-C: the step is finished and saved, the run ends in order, and going on costs nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_finetune import (
    RESUMED,
    assert_same_bits,
    checkpoints,
    short_data,
    tiny_config,
    tiny_settings,
    trainables,
)

import accessory.finetune as finetune_module
from accessory.callbacks import read_series
from accessory.config import Config
from accessory.continuation import damage
from accessory.errors import Interrupted
from accessory.finetune import finetune
from accessory.module import FinetuneModule


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return short_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell starts background jobs, this suite as one too, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, meta_folder, data) -> Path:
    """16 steps of 2 micro-batches: 15 micro-batches an epoch, validated after steps 3 and 6 of each and at the end."""
    return finetune(tiny_config(meta_folder, data, tmp_path_factory.mktemp("uninterrupted") / "out", **RESUMED))


def assert_same_run(one: Path, other: Path) -> None:
    assert_same_bits(trainables(one), trainables(other))
    for name in ("loss", "lr", "val_loss"):
        assert read_series(one, name) == read_series(other, name), name


@contextmanager
def signals_in(monkeypatch, owner: object, method: str, call: int, *numbers: int) -> Iterator[None]:
    """This process gets signals in the call-th call of a method."""
    calls, original = [], getattr(owner, method)

    def called(*arguments, **named):
        calls.append(method)
        if len(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, called)
        yield
    assert len(calls) >= call


def stopped(config: Config) -> Interrupted:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        finetune(config)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    return caught.value


@pytest.mark.parametrize(
    ("micro_batch", "step"),
    [
        (3, 2),  # in the middle of an accumulation
        (6, 3),  # a validation was to follow
        (15, 8),  # the end of an epoch
        (30, 16),  # the end of the run
    ],
)
def test_stopped_run_continues_to_the_same_bits_and_curves(
    micro_batch, step, tmp_path, meta_folder, data, uninterrupted, monkeypatch
):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    with signals_in(monkeypatch, FinetuneModule, "training_step", micro_batch, signal.SIGTERM):
        stop = stopped(config)
    assert checkpoints(tmp_path / "out")[-1] == f"step-{step:08d}"
    assert stop.code == 128 + signal.SIGTERM
    saved = tmp_path / "out" / "checkpoints" / f"step-{step:08d}"
    assert stop.message == f"stopped by SIGTERM after step {step}; saved {saved}; the same command continues"
    assert_same_run(finetune(config), uninterrupted)


@pytest.mark.parametrize(
    ("batch", "step"),
    [(2, 3), (21, 16)],  # 5 batches a validation: after steps 3, 6, 11, 14, 16
)
def test_run_stopped_while_validating_validates_when_it_goes_on(
    batch, step, tmp_path, meta_folder, data, uninterrupted, monkeypatch
):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    with signals_in(monkeypatch, FinetuneModule, "validation_step", batch, signal.SIGTERM):
        stop = stopped(config)
    assert f"after step {step};" in stop.message
    assert checkpoints(tmp_path / "out")[-1] == f"step-{step:08d}"
    assert_same_run(finetune(config), uninterrupted)


def test_run_stopped_again_and_again_continues_to_the_same_bits_and_curves(tmp_path, meta_folder, data, monkeypatch):
    settings = RESUMED | {"train.epochs": 3, "train.max_steps": 21, "data.num_workers": 1}
    whole = finetune(tiny_config(meta_folder, data, tmp_path / "whole", **settings))
    config = tiny_config(meta_folder, data, tmp_path / "out", **settings)
    for micro_batch in (15, 6, 9):  # at the end of the first epoch, before a validation, at the end of the second
        with signals_in(monkeypatch, FinetuneModule, "training_step", micro_batch, signal.SIGTERM):
            stopped(config)
    assert_same_run(finetune(config), whole)


def test_signal_while_a_checkpoint_is_written_leaves_it_whole(tmp_path, meta_folder, data, monkeypatch):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED | {"save.step_interval": 4})
    with signals_in(monkeypatch, finetune_module, "save_trainable", 1, signal.SIGTERM):
        stop = stopped(config)
    assert "after step 5;" in stop.message
    assert [damage(path) for path in sorted((tmp_path / "out" / "checkpoints").iterdir())] == [None, None]


def test_second_ctrl_c_stops_at_once_and_says_what_is_left(tmp_path, meta_folder, data, uninterrupted, monkeypatch):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    with signals_in(monkeypatch, FinetuneModule, "training_step", 8, signal.SIGINT, signal.SIGINT):
        stop = stopped(config)
    assert checkpoints(tmp_path / "out") == ["step-00000003"]
    newest = tmp_path / "out" / "checkpoints" / "step-00000003"
    told = f"stopped at once by a second Ctrl-C; the same command continues from {newest}"
    assert (stop.code, stop.message) == (130, told)
    assert_same_bits(trainables(finetune(config)), trainables(uninterrupted))


def test_ctrl_c_that_torchrun_passes_on_a_second_time_is_one(tmp_path, meta_folder, data, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    with signals_in(monkeypatch, FinetuneModule, "training_step", 8, *[signal.SIGINT] * 3):
        stop = stopped(config)
    assert stop.code == 130 and "stopped by SIGINT after step 4;" in stop.message


def test_ctrl_c_before_the_first_step_is_told_as_that(tmp_path, meta_folder, data, monkeypatch):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    with signals_in(monkeypatch, FinetuneModule, "configure_optimizers", 1, signal.SIGINT):
        stop = stopped(config)
    told = "stopped before the first step; the same command continues, from its start"
    assert (stop.code, stop.message) == (130, told)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_stopped_run_that_named_its_checkpoint_goes_on_without_naming_it(tmp_path, meta_folder, data, monkeypatch):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    with signals_in(monkeypatch, FinetuneModule, "training_step", 2, signal.SIGTERM):
        stopped(config)
    config.resume.path = str(tmp_path / "out")
    with signals_in(monkeypatch, FinetuneModule, "training_step", 2, signal.SIGTERM):
        stop = stopped(config)
    assert "after step 2;" in stop.message
    assert stop.message.endswith("the same command without --resume continues")


def test_stopped_before_a_checkpoint_of_its_own_a_run_keeps_the_named_one(tmp_path, meta_folder, data, monkeypatch):
    config = tiny_config(meta_folder, data, tmp_path / "first", **RESUMED)
    with signals_in(monkeypatch, FinetuneModule, "training_step", 2, signal.SIGTERM):
        stopped(config)
    config.resume.path, config.output_dir = config.output_dir, str(tmp_path / "second")
    with signals_in(monkeypatch, FinetuneModule, "configure_optimizers", 1, signal.SIGINT):
        stop = stopped(config)
    saved = tmp_path / "first" / "checkpoints" / "step-00000001"
    assert stop.message == f"stopped before the first step; the same command continues from {saved}"


# --- whole processes -------------------------------------------------------------------------------------------------

SLOW = """
    import sys, time
    from accessory.cli import finetune_main
    from accessory.module import FinetuneModule

    def telling(name, seconds):
        original = getattr(FinetuneModule, name)

        def step(module, batch, index):
            print(f"{name} {module.global_rank} {module.global_step} {index}", flush=True)
            time.sleep(seconds(module.global_rank))
            return original(module, batch, index)

        setattr(FinetuneModule, name, step)

    telling("training_step", lambda rank: 0.05)
    telling("validation_step", lambda rank: 0.4 if rank == 0 else 0.0)
    finetune_main()
"""


class Process:
    """A run as a user starts it, but slow, and telling its steps: `SLOW`."""

    def __init__(self, folder: Path, settings: dict, *launcher: str):
        script = folder / "slow.py"
        script.write_text(textwrap.dedent(SLOW))
        words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *launcher, str(script), *words],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for(self, told: str) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if told in line:
                return
        raise AssertionError("".join(self.lines))

    def end(self) -> str:
        """All that it printed; the exit code is in `process`."""
        try:
            rest, _ = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return "".join(self.lines) + rest


def test_ctrl_c_ends_a_process_and_its_workers_with_one_line_and_130(
    tmp_path, meta_folder, data, uninterrupted, monkeypatch
):
    """At a terminal it goes to all processes of the group."""
    out = tmp_path / "out"
    settings = tiny_settings(meta_folder, data, out, **RESUMED, **{"data.num_workers": 1})
    run = Process(tmp_path, settings)
    run.wait_for("training_step 0 4 ")
    os.killpg(run.process.pid, signal.SIGINT)
    output = run.end()
    assert run.process.returncode == 130, output
    saved = out / "checkpoints" / "step-00000005"
    assert output.endswith(f"stopped by SIGINT after step 5; saved {saved}; the same command continues\n")
    assert not re.search("Traceback|Error|KeyboardInterrupt|graceful", output), output
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # its workers have ended too
            os.killpg(run.process.pid, 0)
            time.sleep(0.1)
    config = tiny_config(meta_folder, data, out, **RESUMED)
    assert_same_run(finetune(config), uninterrupted)


def test_a_signal_to_all_processes_of_a_run_is_as_one_to_the_run_alone(tmp_path, meta_folder, data):
    """As pkill, systemd and SLURM send it: the processes that prepare batches hear it too."""
    out = tmp_path / "out"
    settings = tiny_settings(meta_folder, data, out, **RESUMED, **{"data.num_workers": 1})
    run = Process(tmp_path, settings)
    run.wait_for("training_step 0 4 ")
    pid = run.process.pid
    workers = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    assert workers
    for each in (*workers, pid):
        os.kill(each, signal.SIGTERM)
    output = run.end()
    assert run.process.returncode == 128 + signal.SIGTERM, output
    assert output.endswith(f"saved {out / 'checkpoints' / 'step-00000005'}; the same command continues\n"), output
    assert "Traceback" not in output
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.kill(worker, 0)
                time.sleep(0.1)


def stopped_rank(config: Config, micro_batch: int) -> str:
    """What a rank says at its end; the second one alone gets a signal."""
    calls, original = [], FinetuneModule.training_step

    def training_step(module, batch, index):
        calls.append(index)
        if module.global_rank == 1 and len(calls) == micro_batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(module, batch, index)

    FinetuneModule.training_step = training_step
    try:
        finetune(config)
    except Interrupted as stop:
        return stop.message
    return "finished"


def test_two_ranks_stopped_while_validating_and_while_training_go_on_to_the_same_curves(tmp_path, meta_folder, data):
    """First by torchrun, where the first rank is still validating and the other waits for it; then one rank alone."""
    changes = {"train.batch_size": 2, "train.val_interval": 0.5, "data.val_fraction": 0.25, "optim.lr": 1e-2}
    out = tmp_path / "out"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run = Process(tmp_path, tiny_settings(meta_folder, data, out, **changes), *launcher)
    run.wait_for("validation_step 0 4 1")
    run.process.terminate()
    output = run.end()
    line = "stopped by SIGTERM after step {}; saved {}; the same command continues"
    saved = out / "checkpoints" / "step-00000004"
    assert [told for told in output.splitlines() if "stopped by" in told] == [line.format(4, saved)], output
    assert not re.search("Error|Detected|exitcode", output), output
    assert damage(saved) is None

    config = tiny_config(meta_folder, data, out, **changes)
    saved = out / "checkpoints" / "step-00000006"
    assert run_ranks(stopped_rank, config, 2) == [line.format(6, saved)] * 2
    assert run_ranks(stopped_rank, config, 99) == ["finished"] * 2
    alone = finetune(tiny_config(meta_folder, data, tmp_path / "alone", **changes | {"train.batch_size": 4}))
    for name in ("loss", "lr", "val_loss"):
        steps, values = read_series(out, name)
        expected_steps, expected = read_series(alone, name)
        assert steps == expected_steps and values == pytest.approx(expected, rel=1e-4), name
