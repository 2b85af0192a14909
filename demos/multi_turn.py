"""Chat with a fine-tuned model, about an image too where it takes one: a page in the browser; with --prompt one answer.

torchrun --nproc-per-node=1 demos/multi_turn.py --llama_config params.json --tokenizer_path tokenizer.model \
    --pretrained_path <base> <trainables of --dialog> --quant
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

from accessory.cli import run_command
from accessory.demo_flags import add_chat_flags, add_image_flag, add_model_flags, parse


def main() -> None:
    parser = argparse.ArgumentParser(description="Multi-turn demo", allow_abbrev=False)
    add_model_flags(parser)
    add_chat_flags(parser)
    add_image_flag(parser)
    args = parse(parser)
    from accessory.demo import load
    from accessory.demo_chat import chat_once, serve_chat

    model = load(args)
    if args.prompt is not None:
        chat_once(model, args)
    else:
        serve_chat(model, args)


if __name__ == "__main__":
    run_command(main, goes_on=False)
