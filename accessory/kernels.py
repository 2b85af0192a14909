"""Optional GPU kernels: tried once, and done without, after one warning that says why, where they do not work.

Triton compiles at run time: it wants a C compiler, a driver of its own generation, and a GPU that it knows. A module of
kernels therefore has a `try_out()`, which runs each of them once on the smallest input and raises what Triton raises.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Optional

from accessory.errors import first_line

log = logging.getLogger(__name__)


@functools.cache
def working(module: str, otherwise: str) -> Optional[ModuleType]:
    """The module of kernels called `module`, if they run on this machine. otherwise: what is to be said where not."""
    try:
        kernels = importlib.import_module(module)
        kernels.try_out()
    except Exception as error:  # of Triton, the compiler or the driver
        log.warning("%s: %s", otherwise, first_line(error))
        return None
    return kernels
