"""python -m accessory.quantization settings.yaml: the job that `cached` runs in a process of its own."""

import sys
from pathlib import Path

from omegaconf import OmegaConf

from accessory.child import end_with_parent
from accessory.cli import run_command
from accessory.errors import UserError
from accessory.quantization.job import quantize_base
from accessory.quantize_options import QuantizeConfig
from accessory.schema import to_typed


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        raise UserError("python -m accessory.quantization is what a run calls; by hand, accessory-quantize quantizes")
    quantize_base(to_typed(OmegaConf.create(Path(sys.argv[1]).read_text()), QuantizeConfig))


if __name__ == "__main__":
    end_with_parent()
    run_command(main)
