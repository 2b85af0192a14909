"""The demos' flags, LLaMA2-Accessory's: --help and what is refused need no torch, which takes seconds to import."""

from __future__ import annotations

import argparse
from pathlib import Path

from accessory.config import PromptType
from accessory.errors import UserError, suggest
from accessory.folders import require_folders

CONVERSATION = "conversation"  # the format of models trained with --dialog
SINGLE_TURN = [*(kind.value for kind in PromptType), CONVERSATION]
DTYPE_HELP = (
    "compute type; unset: bf16, and without instructions for it fp16 on a GPU (before Ampere), fp32 on a CPU with a "
    "quantized base"
)
CHAT = [CONVERSATION, PromptType.chat.value]


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--llama_type", default=None, help="llama_peft or llama_qformerv2_peft; unset: as the folders say")
    add("--llama_config", nargs="+", default=None, help="JSON files that describe the model; unset: from the folders")
    add("--tokenizer_path", default=None, help="tokenizer.model or a Hugging Face folder; unset: from the folders")
    add("--pretrained_path", nargs="+", required=True, help="base folder, then the trainables' folder")
    add("--quant", action="store_true", help="quantize the base to NF4")
    add("--dtype", choices=["bf16", "fp16", "fp32"], default=None, help=DTYPE_HELP)
    add("--device", default=None, help="cuda, cuda:1, cpu; unset: cuda where there is one")
    add("--max_seq_len", type=int, default=None, help="longest prompt + answer in tokens; unset: the model's own")
    for ignored in ("--model_parallel_size", "--world_size", "--local_rank", "--dist_url"):  # old launchers pass them
        add(ignored, default=None, help=argparse.SUPPRESS)
    add("--dist_on_itp", action="store_true", help=argparse.SUPPRESS)


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every demo: the question, how it is answered, and the page."""
    add = parser.add_argument
    add("--prompt", default=None, help="answer this question and exit; unset: serve a page")
    add("--max_gen_len", type=int, default=128, help="longest answer in tokens")
    add("--temperature", type=float, default=0.0, help="0: the most likely answer, always the same")
    add("--top_p", type=float, default=0.75, help="nucleus of the sampling, where temperature is above 0")
    add("--port", type=int, default=7860, help="port of the page")
    add("--share", action="store_true", help="also open a public link through Gradio's servers")


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a single turn."""
    add_answer_flags(parser)
    add = parser.add_argument
    add("--input", default="", help="the question's optional input")
    add("--system_prompt", choices=SINGLE_TURN, default="alpaca", help="as in training; conversation: --dialog")


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    add_answer_flags(parser)
    parser.add_argument(
        "--system_prompt",
        choices=CHAT,
        default=CONVERSATION,
        help="conversation: the format of models trained with --dialog; chat: the tokenizer's own template",
    )


def add_image_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", default=None, help="image file that --prompt asks about; on a page, upload it")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse and check; unknown flags are one line with a suggestion."""
    args, unknown = parser.parse_known_args()
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"unknown argument {unknown[0]}{suggest(unknown[0], known)}; --help lists them")
    if args.model_parallel_size not in (None, "1"):
        raise UserError("--model_parallel_size: tensor parallelism is not offered; one GPU answers")
    if args.max_gen_len < 1:
        raise UserError(f"--max_gen_len {args.max_gen_len}: an answer has at least 1 token")
    for name in ("prompt", "input"):
        try:
            (getattr(args, name, None) or "").encode()
        except UnicodeEncodeError:
            raise UserError(f"--{name}: not UTF-8 text; set the terminal's encoding to UTF-8") from None
    if getattr(args, "image", None) is not None:
        if args.prompt is None and args.system_prompt == PromptType.caption:  # which asks nothing
            args.prompt = ""
        if args.prompt is None:
            raise UserError("--image goes with --prompt; without it a page is served, where images are uploaded")
        args.image = str(Path(args.image).expanduser())
        if not Path(args.image).is_file():
            raise UserError(f"--image {args.image}: no such file")
    require_folders(args.pretrained_path)
    return args
