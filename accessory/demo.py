"""What the demos share: their flags, loading, streaming to a terminal, and the Gradio page.

Flags are LLaMA2-Accessory's. A page is bound to 127.0.0.1; it leaves the machine only with --share.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

import torch

import accessory
from accessory.config import PromptType
from accessory.data.prompts import SEPARATOR, as_messages, dialog_prompt, format_prompt
from accessory.errors import UserError, suggest
from accessory.generation import stream
from accessory.models import find_device
from accessory.models.llama import Llama
from accessory.models.tokenizer import require_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONVERSATION = "conversation"  # the format of models trained with --dialog


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--llama_type", default=None, help="llama_peft or llama_qformerv2_peft; unset: as the folders say")
    add("--llama_config", nargs="+", default=None, help="JSON files that describe the model; unset: from the folders")
    add("--tokenizer_path", default=None, help="tokenizer.model or a Hugging Face folder; unset: from the folders")
    add("--pretrained_path", nargs="+", required=True, help="base folder, then the trainables' folder")
    add("--quant", action="store_true", help="quantize the base to NF4")
    add("--dtype", choices=list(DTYPES), default="bf16", help="compute type")
    add("--device", default=None, help="cuda, cuda:1, cpu; unset: cuda where there is one")
    add("--max_seq_len", type=int, default=None, help="longest prompt + answer in tokens; unset: the model's own")
    for ignored in ("--model_parallel_size", "--world_size", "--local_rank", "--dist_url"):  # old launchers pass them
        add(ignored, default=None, help=argparse.SUPPRESS)
    add("--dist_on_itp", action="store_true", help=argparse.SUPPRESS)


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt", default=None, help="answer this question and exit; unset: serve a page")
    add("--input", default="", help="the question's optional input")
    kinds = [*(kind.value for kind in PromptType), CONVERSATION]
    add("--system_prompt", choices=kinds, default="alpaca", help="as in training; conversation: --dialog")
    add("--max_gen_len", type=int, default=128, help="longest answer in tokens")
    add("--temperature", type=float, default=0.0, help="0: the most likely answer, always the same")
    add("--top_p", type=float, default=0.75, help="nucleus of the sampling, where temperature is above 0")
    add("--port", type=int, default=7860, help="port of the page")
    add("--share", action="store_true", help="also open a public link through Gradio's servers")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, with unknown flags as one line with a suggestion."""
    args, unknown = parser.parse_known_args()
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"unknown argument {unknown[0]}{suggest(unknown[0], known)}; --help lists them")
    if args.model_parallel_size not in (None, "1"):
        raise UserError("--model_parallel_size: tensor parallelism is not offered; one GPU answers")
    return args


def load(args: argparse.Namespace) -> Llama:
    model = accessory.load_model(
        args.pretrained_path,
        args.llama_type,
        args.llama_config,
        args.tokenizer_path,
        quantization="nf4" if args.quant else "none",
        device=find_device(args.device),
        dtype=DTYPES[args.dtype],
    )
    require_tokenizer(model)
    if args.max_seq_len is not None:
        model.config.max_position_embeddings = args.max_seq_len
    return model


def answers(model: Llama, question: str, context: str, kind: str, length: int, temperature: float, top_p: float):
    """The growing answer to a question in a prompt format."""
    item, stop_text = {"instruction": question, "input": context}, None
    if kind == CONVERSATION:  # its answers end with a separator, not with EOS
        prompt, stop_text = dialog_prompt(as_messages(item)), f"\n{SEPARATOR}"
    else:
        prompt = format_prompt(item, PromptType(kind), model.tokenizer)
    yield from stream(model, prompt, int(length), float(temperature), float(top_p), stop_text)


def answer_once(model: Llama, args: argparse.Namespace) -> None:
    """Print the answer as it grows; stdout holds the answer and nothing else."""
    if int(os.environ.get("RANK", 0)) != 0:
        return
    shown = ""
    for text in answers(
        model, args.prompt, args.input, args.system_prompt, args.max_gen_len, args.temperature, args.top_p
    ):
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print(flush=True)


def serve_single_turn(model: Llama, args: argparse.Namespace) -> None:
    gr = _gradio()

    def respond(*values: Any) -> Iterator[str]:
        question = values[0]
        if not question.strip():
            raise gr.Error("Please type a question.")
        try:
            yield from answers(model, *values)
        except UserError as error:
            raise gr.Error(str(error)) from None

    with gr.Blocks(title="Single turn") as page:
        gr.Markdown(f"## Single turn\n`{' + '.join(args.pretrained_path)}`{' in NF4' if args.quant else ''}")
        with gr.Row():
            with gr.Column():
                question = gr.Textbox(lines=4, label="Question", autofocus=True)
                context = gr.Textbox(lines=2, label="Input (optional)")
                kinds = [
                    kind.value for kind in PromptType if kind is not PromptType.chat or model.tokenizer.chat_template
                ] + [CONVERSATION]
                system = gr.Dropdown(kinds, value=args.system_prompt, label="System prompt")
                length = gr.Slider(1, 2048, value=args.max_gen_len, step=1, label="Max length (tokens)")
                temperature = gr.Slider(0, 1, value=args.temperature, label="Temperature (0: always the same answer)")
                top_p = gr.Slider(0.05, 1, value=args.top_p, label="Top p")
                with gr.Row():
                    run = gr.Button("Run", variant="primary")
                    stop = gr.Button("Stop", variant="stop")
            answer = gr.Textbox(lines=20, label="Answer", interactive=False)
        inputs = [question, context, system, length, temperature, top_p]
        running = [run.click(respond, inputs, answer), question.submit(respond, inputs, answer)]
        stop.click(None, cancels=running)
    page.queue(default_concurrency_limit=1)
    try:
        page.launch(server_name="127.0.0.1", server_port=args.port, share=args.share)
    except (OSError, OverflowError):
        raise UserError(f"--port {args.port}: cannot be opened, another program may use it; choose another") from None


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise UserError("the page needs gradio: pip install gradio, or ask one question with --prompt") from None
    return gradio
