"""What the demos share: loading, streaming to a terminal; and the page of single turns.

A page is bound to 127.0.0.1; it leaves the machine only with --share. Uploaded images lie
in Gradio's temporary folder, for a day at most, and no other file can be read through a page.
"""

from __future__ import annotations

import argparse
import html
import io
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch

import accessory
from accessory.assemble import assemble
from accessory.config import PromptType, QuantizationConfig, QuantMethod
from accessory.data.images import ImageProblem, read_image
from accessory.data.prompts import SEPARATOR, as_messages, dialog_prompt, format_prompt
from accessory.demo_flags import CONVERSATION, SINGLE_TURN
from accessory.errors import UserError
from accessory.generation import prompt_ids, stream
from accessory.models import find_device
from accessory.models.llama import Llama
from accessory.models.qformer import image_input
from accessory.models.tokenizer import Tokenizer, require_tokenizer
from accessory.precision import default_dtype
from accessory.sources import Sources, open_sources

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KEPT_SECONDS = 24 * 3600  # how long an uploaded image lies in Gradio's temporary folder
CSS = ".message-markdown-disabled .md { white-space: pre-wrap !important; }"  # the indentation of code in a chat


def load(args: argparse.Namespace, page_of_images: bool = False) -> Llama:
    """The model, after all that can be wrong. page_of_images: whether its page is for images."""
    sources = open_sources(
        accessory.describe_model(args.pretrained_path, args.llama_type, args.llama_config, args.tokenizer_path)
    )
    tokenizer = require_tokenizer(sources)
    if args.system_prompt == PromptType.chat and tokenizer.chat_template is None:
        raise UserError(f"--system_prompt chat: {tokenizer.path} has no chat template; choose another")
    if getattr(args, "image", None) is not None:
        _check_image(args.image, sources.vision is not None)
    if args.prompt is None and page_of_images and sources.vision is None:
        raise UserError("this model is language-only and takes no images; demos/single_turn.py serves its page")
    if args.prompt is None:
        _check_page(args)
    else:
        _check_length(args, sources)
    quantization = QuantizationConfig(method=QuantMethod.nf4 if args.quant else QuantMethod.none)
    device = find_device(args.device)
    is_quantized = args.quant or sources.folders[0].packed
    dtype = DTYPES[args.dtype] if args.dtype is not None else _usual_dtype(device, is_quantized)
    model = assemble(sources, quantization, None, device, dtype)
    if args.max_seq_len is not None:
        model.config.max_position_embeddings = args.max_seq_len
    return model


def _usual_dtype(device: torch.device, is_quantized: bool) -> torch.dtype:
    """Of a base in 16 bit a CPU gives a token as fast as it reads the weights, with or without instructions for bf16:
    fp32 would be twice the bytes."""
    return torch.bfloat16 if device.type == "cpu" and not is_quantized else default_dtype(device)


def _check_image(image: str, is_multimodal: bool) -> None:
    if not is_multimodal:
        raise UserError(f"--image {image}: this model is language-only; llama_qformerv2_peft takes images")
    try:
        read_image(image)
    except ImageProblem as problem:
        raise UserError(f"--image {image}: {problem}") from None


def _check_length(args: argparse.Namespace, sources: Sources) -> None:
    prompt, _ = prompt_of(args.prompt, getattr(args, "input", ""), args.system_prompt, sources.tokenizer)
    image_words = image_input(sources.vision).words if getattr(args, "image", None) is not None else 0
    limit = sources.architecture.max_position_embeddings if args.max_seq_len is None else args.max_seq_len
    prompt_ids(sources.tokenizer, prompt, image_words, args.max_gen_len, limit)


def _check_page(args: argparse.Namespace) -> None:
    """What would be told only once the weights are read."""
    open_gradio()
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", args.port))
    except (OSError, OverflowError):
        raise _port_taken(args) from None


def _port_taken(args: argparse.Namespace) -> UserError:
    return UserError(f"--port {args.port}: cannot be opened, another program may use it; choose another")


def answers(
    model: Llama,
    question: str,
    context: str,
    kind: str,
    length: int,
    temperature: float,
    top_p: float,
    image: Optional[str] = None,
) -> Iterator[str]:
    """The growing answer to a question in a prompt format."""
    prompt, stop_text = prompt_of(question, context, kind, model.tokenizer)
    yield from reply(model, prompt, length, temperature, top_p, stop_text, image)


def prompt_of(question: str, context: str, kind: str, tokenizer: Tokenizer) -> tuple[str, Optional[str]]:
    """A question in a prompt format, and the text that ends its answer, if not EOS alone."""
    item = {"instruction": question, "input": context}
    if kind == CONVERSATION:
        return dialog_prompt(as_messages(item)), f"\n{SEPARATOR}"
    return format_prompt(item, PromptType(kind), tokenizer), None


def reply(
    model: Llama,
    prompt: str,
    length: float,
    temperature: float,
    top_p: float,
    stop_text: Optional[str],
    image: Optional[str],
) -> Iterator[str]:
    """The growing answer to a prompt; numbers as a page's sliders give them."""
    for text in stream(model, prompt, int(length), float(temperature), float(top_p), stop_text, image):
        # The space in front of a conversation's answer is the format's, which writes it into the next prompt too; with
        # byte-level tokenizers an answer begins with it.
        yield text if stop_text is None else text.removeprefix(" ")


def print_answer(growing: Iterator[str]) -> None:
    """Print an answer as it grows; stdout holds the answer and nothing else."""
    if int(os.environ.get("RANK", 0)) != 0:
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    shown = ""
    try:
        for text in growing:
            print(text[len(shown) :], end="", flush=True)
            shown = text
        print(flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def answer_once(model: Llama, args: argparse.Namespace) -> None:
    how = args.system_prompt, args.max_gen_len, args.temperature, args.top_p, getattr(args, "image", None)
    print_answer(answers(model, args.prompt, args.input, *how))


# --- pages -----------------------------------------------------------------------------------------------------------


def serve_single_turn(model: Llama, args: argparse.Namespace) -> None:
    gr = open_gradio()

    def respond(*values: Any) -> Iterator[str]:
        if not values[0].strip() and values[2] != PromptType.caption:  # which asks none
            toast("There is no question yet.")
            return
        try:
            yield from answers(model, *values)
        except UserError as error:
            toast(str(error), values[-1])

    with gr.Blocks(title="Single turn", delete_cache=(3600, KEPT_SECONDS)) as page:
        gr.Markdown(heading("Single turn", args, model))
        with gr.Row():
            with gr.Column():
                image = image_box(model, "Image (optional)")
                question = gr.Textbox(lines=4, label="Question", autofocus=True, placeholder="Shift + Enter runs")
                context = gr.Textbox(lines=2, label="Input (optional)")
                with gr.Row():
                    run = gr.Button("Run", variant="primary")
                    stop = gr.Button("Stop", variant="stop")
            with gr.Column():
                answer = gr.Textbox(lines=14, label="Answer", interactive=False, buttons=["copy"])
        with gr.Row():
            settings = answer_settings(model, args, SINGLE_TURN)
        running = gr.on([run.click, question.submit], respond, [question, context, *settings, image], answer)
        stop.click(None, cancels=running)
    launch(page, args)


def heading(title: str, args: argparse.Namespace, model: Llama) -> str:
    method = model.quantization.method
    stored = "" if method is QuantMethod.none else f" in {method.value.upper()}"
    return f"## {title}\n`{' + '.join(args.pretrained_path)}`{stored}"


def image_box(model: Llama, label: str) -> Any:
    """Where an image is uploaded; hidden where the model takes none. Its value is a path in Gradio's folder."""
    box = open_gradio().Image(
        type="filepath", image_mode=None, sources=["upload"], height=260, label=label, visible=model.image_words > 0
    )
    # Gradio would open the file itself and lay its failure over the whole page; a broken one is `answers`' to tell.
    box.preprocess = lambda upload: None if upload is None else upload.path
    return box


def answer_settings(model: Llama, args: argparse.Namespace, formats: list[str]) -> list[Any]:
    """System prompt, length, temperature and top p, with the command line's values."""
    gr = open_gradio()
    known = [kind for kind in formats if kind != PromptType.chat or model.tokenizer.chat_template]
    longest = max(args.max_gen_len, min(2048, model.config.max_position_embeddings))
    return [
        gr.Dropdown(known, value=args.system_prompt, label="System prompt", visible=len(known) > 1),
        gr.Slider(1, longest, value=args.max_gen_len, step=1, label="Max length (tokens)"),
        gr.Slider(0, 1, value=args.temperature, label="Temperature", info="0: always the most likely answer"),
        gr.Slider(0.05, 1, value=args.top_p, label="Top p", info="for temperatures above 0"),
    ]


def toast(message: str, image: Optional[str] = None) -> None:
    """Tell a user's mistake in a corner of the page, which stays as it is. (gr.Error would cover every output.) An
    uploaded image is called by the user's name for it."""
    if image is not None:
        message = message.replace(image, Path(image).name)
    open_gradio().Warning(html.escape(message, quote=False))


def launch(page: Any, args: argparse.Namespace) -> None:
    """Serve until interrupted; one answer at a time, whoever asks."""
    page.queue(default_concurrency_limit=1)
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=args.port,
            share=args.share,
            show_error=True,
            footer_links=[],
            css=CSS,
        )
    except (OSError, OverflowError):
        raise _port_taken(args) from None


def open_gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # questions and answers would stay in the browser
    try:
        import gradio
    except ImportError:
        raise UserError("the page needs gradio: pip install gradio, or ask one question with --prompt") from None
    return gradio
