"""Several ranks on this machine, without torchrun: processes forked from one that has imported everything already (with
CUDA, which does not survive a fork, new ones)."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

_context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
if not torch.cuda.is_available():
    _context.set_forkserver_preload(["accessory.finetune", "torch.distributed"])


def run_ranks(
    target: Callable[..., Any], *arguments: Any, ranks: int = 2, nodes: int = 1, timeout: float = 120
) -> list[Any]:
    """What `target(*arguments)` returns on each rank, with the environment that torchrun gives them. An exception on a
    rank is its result."""
    local = ranks // nodes
    port = free_port()
    children, pipes = [], []
    for rank in range(ranks):
        parent, child = _context.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % local),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "tests",
        }
        process = _context.Process(target=_rank, args=(environment, child, target, arguments), daemon=True)
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
    return pipe.recv()


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
