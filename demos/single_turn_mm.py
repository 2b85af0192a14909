"""Ask a fine-tuned multimodal model: one streamed answer with --prompt (and --image), a page in the browser without.

torchrun --nproc-per-node=1 demos/single_turn_mm.py --llama_config params.json --tokenizer_path tokenizer.model \
    --pretrained_path <base> <trainables> --quant --image cat.png --prompt "What is on the image?"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

from accessory.cli import run_command
from accessory.demo_flags import add_generation_flags, add_image_flag, add_model_flags, parse


def main() -> None:
    parser = argparse.ArgumentParser(description="Single-turn demo with an image", allow_abbrev=False)
    add_model_flags(parser)
    add_generation_flags(parser)
    add_image_flag(parser)
    args = parse(parser)
    from accessory.demo import answer_once, load, serve_single_turn

    model = load(args, page_of_images=True)
    if args.prompt is not None:
        answer_once(model, args)
    else:
        serve_single_turn(model, args)


if __name__ == "__main__":
    run_command(main, goes_on=False)
