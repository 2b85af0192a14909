"""The chat: a conversation's prompt, what of it fits the model, and its page."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, Optional

from accessory.config import PromptType
from accessory.data.prompts import SEPARATOR, dialog_prompt
from accessory.demo import (
    KEPT_SECONDS,
    answer_settings,
    heading,
    image_box,
    launch,
    open_gradio,
    print_answer,
    reply,
    toast,
)
from accessory.demo_flags import CHAT
from accessory.errors import UserError
from accessory.models.llama import Llama

Messages = list[dict[str, str]]


def chat_prompt(model: Llama, messages: Messages, kind: str) -> tuple[str, Optional[str]]:
    """A conversation that the model is to continue, as text; and the text that ends its answer, if not EOS alone."""
    if kind == PromptType.chat:
        return model.tokenizer.render_chat(messages, answer_follows=True), None
    return dialog_prompt(messages), f"\n{SEPARATOR}"


def newest_that_fit(model: Llama, messages: Messages, kind: str, length: int, image: Optional[str]) -> Messages:
    """`messages` without its oldest turns (question and answer), as many as leave no room for the answer."""
    room = model.config.max_position_embeddings - int(length) - (model.image_words if image is not None else 0)
    for first in range(0, len(messages), 2):
        prompt, _ = chat_prompt(model, messages[first:], kind)
        if len(model.tokenizer.encode(prompt, bos=True, eos=False)) <= room:
            return messages[first:]
    return messages[-1:]


def chat_answers(
    model: Llama, messages: Messages, kind: str, length: int, temperature: float, top_p: float, image: Optional[str]
) -> Iterator[str]:
    """The growing answer to the last of `messages`, whose first is a question."""
    prompt, stop_text = chat_prompt(model, messages, kind)
    yield from reply(model, prompt, length, temperature, top_p, stop_text, image)


def chat_once(model: Llama, args: argparse.Namespace) -> None:
    """Print the answer to the first turn."""
    messages = [{"role": "user", "content": args.prompt}]
    how = args.system_prompt, args.max_gen_len, args.temperature, args.top_p, args.image
    print_answer(chat_answers(model, messages, *how))


def respond(
    model: Llama, message: str, history: Messages, kind: str, length: int, temperature: float, top_p: float, image: Any
) -> Iterator[tuple[Messages, str]]:
    """Per step of the answer: the conversation so far, and a note on what of it the model does not see."""
    answered = history[: len(history) // 2 * 2]  # without a question whose answer was stopped before its first word
    asked = [*answered, {"role": "user", "content": message}]
    sent = newest_that_fit(model, asked, kind, length, image)
    dropped = (len(asked) - len(sent)) // 2
    note = dropped_note(dropped, model.config.max_position_embeddings)
    yield asked, note
    for text in chat_answers(model, sent, kind, length, temperature, top_p, image):
        yield [*asked, {"role": "assistant", "content": text}], note


def dropped_note(turns: int, positions: int) -> str:
    if not turns:
        return ""
    which = "oldest turn is" if turns == 1 else f"{turns} oldest turns are"
    return f"The {which} no longer sent to the model: the conversation outgrew its {positions} positions."


def undo(history: Messages) -> tuple[Messages, str]:
    """The conversation without its last question and what followed it; and that question."""
    last = max((i for i, message in enumerate(history) if message["role"] == "user"), default=0)
    return history[:last], history[last]["content"] if history else ""


def serve_chat(model: Llama, args: argparse.Namespace) -> None:
    gr = open_gradio()

    def show(history: Messages, text: Any, note: str = "") -> tuple:
        """history (kept), conversation, note, message"""
        return history, history, gr.update(value=note, visible=bool(note)), text

    def on_send(message: str, history: Messages, *how: Any) -> Iterator[tuple]:
        if not message.strip():
            toast("There is no message yet.")
            return
        text: Any = ""
        try:
            for grown, note in respond(model, message, history, *how):
                yield show(grown, text, note)
                text = gr.skip()  # what is typed meanwhile stays
        except UserError as error:
            toast(str(error), how[-1])
            yield show(history, message)

    def on_undo(history: Messages, message: str) -> tuple:
        if not history:
            toast("There is nothing to undo.")
        kept, question = undo(history)
        return show(kept, message if message.strip() else question)

    with gr.Blocks(title="Chat", delete_cache=(3600, KEPT_SECONDS)) as page:
        gr.Markdown(heading("Chat", args, model))
        history = gr.State([])
        with gr.Row():
            with gr.Column(scale=3):
                # Not rendered as Markdown: a demo shows what the model wrote, to the letter.
                conversation = gr.Chatbot(label="Conversation", height=480, render_markdown=False, buttons=["copy"])
                note = gr.Markdown(visible=False)
                message = gr.Textbox(
                    label="Message", max_lines=8, autofocus=True, placeholder="Enter sends, Shift + Enter: new line"
                )
                with gr.Row():
                    send = gr.Button("Send", variant="primary")
                    stop = gr.Button("Stop", variant="stop")
                    back = gr.Button("Undo")
                    clear = gr.Button("Clear")
            with gr.Column(scale=1, min_width=260):
                image = image_box(model, "Image (a new one starts over)")
                settings = answer_settings(model, args, CHAT)
        shown = [history, conversation, note, message]
        running = gr.on([send.click, message.submit], on_send, [message, history, *settings, image], shown)
        stop.click(None, cancels=running)
        back.click(on_undo, [history, message], shown, cancels=running)
        gr.on([clear.click, conversation.clear], lambda: (*show([], ""), None), None, [*shown, image], cancels=running)
        gr.on([image.upload, image.clear], lambda: show([], "")[:-1], None, shown[:-1], cancels=running)
    launch(page, args)
