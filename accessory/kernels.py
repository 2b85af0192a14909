"""Optional GPU kernels: tried once, and done without, after one warning that says why, where they do not work.

Triton compiles at run time: it wants a C compiler, a driver of its own generation, and a GPU that it knows. A module of
kernels therefore has a `try_out()`, which runs each of them once on the smallest input, on the current GPU, and raises
what Triton raises.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Optional

import torch

from accessory.errors import first_line

log = logging.getLogger(__name__)


@functools.cache
def obstacle(module: str, device: torch.device) -> Optional[str]:
    """Why the module of kernels called `module` does not run on the GPU `device`; None where it does."""
    try:
        with torch.cuda.device(device):  # another one may have no memory left
            importlib.import_module(module).try_out()
    except Exception as error:  # of Triton, the compiler or the driver
        return first_line(error)
    return None


@functools.cache
def working(module: str, otherwise: str, device: torch.device) -> Optional[ModuleType]:
    """The module, if it runs on the GPU `device`. otherwise: what is to be said where not."""
    if (reason := obstacle(module, device)) is not None:
        log.warning("%s: %s", otherwise, reason)
        return None
    return importlib.import_module(module)
