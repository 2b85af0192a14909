"""Processes of their own for what quantizes, that end with the process that started them: also where that was killed,
and could not tell them."""

from __future__ import annotations

import os
import threading
import time

PARENT = "ACCESSORY_PARENT"  # in a child's environment: the process that it ends with
INTERVAL = 0.2  # seconds between two looks


def child_environment() -> dict[str, str]:
    return os.environ | {PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """In a child, first of all. Started by hand it does nothing."""
    parent = os.environ.pop(PARENT, None)
    if parent is not None:
        threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:  # an orphan is given another
        time.sleep(INTERVAL)
    os._exit(1)  # as a kill would: from whatever it does, and what is on the disk is whole or absent
