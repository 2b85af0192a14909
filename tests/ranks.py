"""Several ranks on this machine, without torchrun: processes forked from one that has imported everything already (with
CUDA, which does not survive a fork, new ones)."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any

import pytest
import torch

# What the server imports once; torch._dynamo is what a first optimizer step would import.
PRELOAD = ["accessory.finetune", "torch._dynamo"]


@functools.cache
def process_context() -> BaseContext:
    """Where processes of a moment come from."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as patch:  # one thread: others, and the locks they hold, do not survive a fork
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("JE_ARROW_MALLOC_CONF", "background_thread:false")  # pyarrow's
        forkserver.ensure_running()
    return context


def torchrun_environments(ranks: int, nodes: int = 1) -> list[dict[str, str]]:
    """What torchrun gives to each rank."""
    local, port = ranks // nodes, free_port()
    shared = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": local,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",
    }
    return [
        {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank % local}).items()}
        for rank in range(ranks)
    ]


def run_ranks(
    target: Callable[..., Any], *arguments: Any, ranks: int = 2, nodes: int = 1, timeout: float = 120
) -> list[Any]:
    """What `target(*arguments)` returns on each rank. An exception on a rank is its result."""
    context = process_context()
    children, pipes = [], []
    for environment in torchrun_environments(ranks, nodes):
        parent, child = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(environment, child, target, arguments), daemon=True)
        process.start()
        child.close()
        children.append(process)
        pipes.append(parent)
    try:
        return [_result(pipe, timeout) for pipe in pipes]
    finally:
        for process in children:
            process.kill()
            process.join()


def _result(pipe: Connection, timeout: float) -> Any:
    if not wait([pipe], timeout):
        raise TimeoutError(f"a rank gave no result within {timeout} s")
    try:
        return pipe.recv()
    except EOFError as killed:
        return killed


def _rank(environment: dict[str, str], pipe: Connection, target: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        pipe.send(target(*arguments))
    except BaseException as error:  # the test shall see it
        traceback.print_exc()
        pipe.send(error)
    pipe.close()
    os._exit(0)  # at once: a rank that failed leaves collectives behind that the other one waits for


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
