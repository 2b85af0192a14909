"""Several nodes, here two on one machine: ranks that are each the first of theirs, and the SLURM script."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import alpaca_items
from ranks import free_port, run_ranks
from test_finetune import SCRIPT, assert_same_bits, logged, short_data, tiny_config, tiny_settings, trainables
from test_module import RUN, update_distance

from accessory.files import sole_user
from accessory.finetune import finetune

SBATCH = SCRIPT.parent / "exps" / "slurm" / "finetune.sbatch"
# A job of two nodes as SLURM would start it. srun runs its command once a node, and kills it when it is itself told to
# end, as SLURM's does; scancel reaches the tasks; scontrol names the nodes and takes notes.
STAND_INS = {
    "srun": """
        shift # --cpus-per-task
        trap 'kill -KILL -- -$one -$two' TERM
        set -m
        SLURM_NODEID=0 "$@" & one=$!
        SLURM_NODEID=1 "$@" & two=$!
        echo "$one $two" > "$TASKS"
        wait $one; code=$?
        wait $two
        exit $code
    """,
    "scancel": """
        for task in $(cat "$TASKS"); do kill -TERM -- -$task; done
    """,
    "scontrol": """
        case "$1" in
            show) printf 'localhost\\nlocalhost\\n' ;;
            *) echo "$@" >> "$NOTES" ;;
        esac
    """,
    "torchrun": f"""
        exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"
    """,
}


def run(base: Path, data: Path, out: Path, changes: dict) -> None:
    finetune(tiny_config(base, data, out, **changes))


@pytest.mark.parametrize("strategy", ["sdp", "fsdp"])
def test_two_nodes_train_as_one_process(strategy, tmp_path, meta_folder):
    data = short_data(tmp_path / "data", alpaca_items(9))
    changes = RUN | {"quantization.method": "nf4"}
    run(meta_folder, data, tmp_path / "alone", changes)
    changes |= {"train.batch_size": 2, "strategy.data_parallel": strategy}
    assert run_ranks(run, meta_folder, data, tmp_path / "two", changes, nodes=2) == [None, None]
    assert logged(tmp_path / "two", "loss") == pytest.approx(logged(tmp_path / "alone", "loss"), rel=1e-5)
    assert update_distance(tmp_path / "alone", tmp_path / "two", meta_folder) < 1e-4


def start_job(folder: Path, settings: dict) -> subprocess.Popen:
    """exps/slurm/finetune.sbatch in what SLURM would give it."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (folder / "bin" / name).write_text("#!/usr/bin/env bash\n" + textwrap.dedent(text))
        (folder / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "NOTES": str(folder / "notes"),
        "TASKS": str(folder / "tasks"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost,localhost",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            ["bash", str(SBATCH), *words],
            cwd=SCRIPT.parent,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def test_ranks_whose_torchrun_is_killed_save_and_end(tmp_path, meta_folder):
    out = tmp_path / "out"
    changes = {"train.epochs": 1000, "save.step_interval": 10**6, "logger.log_every_n_steps": 1}
    settings = tiny_settings(meta_folder, short_data(tmp_path / "data"), out, **changes)
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    with (tmp_path / "log").open("w") as log:
        torchrun = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT), *words],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + 100
        while not list(out.glob("logs/version_*/metrics.csv")) and time.monotonic() < deadline:
            time.sleep(0.05)
        torchrun.kill()
        torchrun.wait()
    with sole_user(out, "", patience=30):  # which they are no longer
        step = re.search(r"stopped by SIGTERM after step (\d+)", (tmp_path / "log").read_text())[1]
        assert (out / "checkpoints" / f"step-{int(step):08d}" / "checksums.json").is_file()


def test_a_slurm_job_that_is_stopped_saves_is_queued_again_and_continues(tmp_path, meta_folder):
    data = short_data(tmp_path / "data")
    changes = {
        "recipe.lora": True,
        "recipe.rank": 2,
        "recipe.dropout": 0.2,
        "train.epochs": 12,
        "train.batch_size": 2,
        "save.step_interval": 1000,
        "save.epoch_interval": 1000,
        "logger.log_every_n_steps": 1,
    }
    whole = tmp_path / "whole"
    assert run_ranks(run, meta_folder, data, whole, changes, nodes=2) == [None, None]
    out = tmp_path / "job" / "out"
    out.parent.mkdir()
    settings = tiny_settings(meta_folder, data, out, **changes)
    settings["data.cache_dir"] = str(tmp_path / "cache")
    job = start_job(tmp_path, settings)
    try:
        deadline = time.monotonic() + 100
        while not list(out.glob("logs/version_*/metrics.csv")) and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)  # to the batch script alone, as --signal=B:TERM does
        assert job.wait(timeout=60) != 0, (tmp_path / "log").read_text()
        log = (tmp_path / "log").read_text()
        assert "stopped by SIGTERM after step" in log, log
        assert len(list((out / "checkpoints").glob("step-*"))) == 1
        assert (tmp_path / "notes").read_text().split() == ["requeue", "7"]
        job = start_job(tmp_path, settings)
        assert job.wait(timeout=150) == 0, (tmp_path / "log").read_text()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert_same_bits(trainables(out), trainables(whole))
