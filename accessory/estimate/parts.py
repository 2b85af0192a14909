"""What an estimate is: bytes by part, and their peak."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
CUBLAS_WORKSPACE = 32 * 2**20  # on Hopper, for each stream and thread that multiply
THREADS = 2  # that do so in training: forward's, and autograd's for backward
OVERHEAD = int(0.75 * GIB)  # CUDA context, kernels, fragmentation: held by the process, but not by tensors


@dataclass(frozen=True)
class Estimate:
    """Bytes by part. They do not all exist at the same time, so `peak` is not their sum: see above."""

    parts: dict[str, int]
    peak: int

    def line(self) -> str:
        """For the summary of a run."""
        held = {name: self.parts[name] for name in ("base", "activations")}
        held["trainables, gradients, optimizer"] = sum(self.parts[n] for n in ("trainables", "gradients", "optimizer"))
        held["the rest"] = self.peak - sum(held.values())
        return f"{self.peak / GIB:.1f} GiB: " + "; ".join(f"{name} {size / GIB:.1f}" for name, size in held.items())
