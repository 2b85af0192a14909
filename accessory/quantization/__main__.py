"""python -m accessory.quantization settings.yaml: the job that `cached` runs in a process of its own."""

import sys
from pathlib import Path

from omegaconf import OmegaConf

from accessory.cli import run_command
from accessory.config import to_typed
from accessory.quantization.job import quantize_base
from accessory.quantization.options import QuantizeConfig

if __name__ == "__main__":
    run_command(lambda: quantize_base(to_typed(OmegaConf.create(Path(sys.argv[1]).read_text()), QuantizeConfig)))
