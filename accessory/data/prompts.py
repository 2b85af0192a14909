"""From a data item to text and the parts of it that are learnt.

The wordings of alpaca, shortqa, qg, caption and None, and the conversation format, are LLaMA2-Accessory's: models tuned
there expect them to the letter. The answer follows `### Response:` directly, without a space or newline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from accessory.config import PromptType
from accessory.errors import UserError
from accessory.models.tokenizer import Tokenizer

_TASK = "Below is an instruction that describes a task"
_COMPLETES = "Write a response that appropriately completes the request"
_TEMPLATES = {
    PromptType.alpaca: f"{_TASK}. {_COMPLETES}.\n\n### Instruction:\n{{instruction}}\n\n### Response:",
    PromptType.shortqa: (
        f"{_TASK}. {_COMPLETES} using a single word or phrase.\n\n### Instruction:\n{{instruction}}\n\n### Response:"
    ),
    PromptType.qg: "Generate a question whose answer is:\n{instruction}\n\nQuestion:\n",
    PromptType.caption: "",
    PromptType["None"]: "{instruction}",
}
_ALPACA_WITH_INPUT = (
    f"{_TASK}, paired with an input that provides further context. {_COMPLETES}.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
SEPARATOR = "###"
ROLES = {"user": "Human", "assistant": "Assistant"}
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Example:
    """text, and the half-open character ranges of it that are learnt; learn_eos: EOS follows and is learnt too."""

    text: str
    spans: tuple[tuple[int, int], ...]
    learn_eos: bool = True


def format_prompt(item: Mapping[str, Any], prompt_type: PromptType, tokenizer: Optional[Tokenizer] = None) -> str:
    """The prompt of a single-turn item {"instruction", "input"?}; chat needs the tokenizer's template."""
    if prompt_type is PromptType.chat:
        return tokenizer.render_chat(as_messages(item), answer_follows=True)
    instruction, context = item.get("instruction") or "", item.get("input") or ""
    if prompt_type is PromptType.alpaca and context.strip():
        return _ALPACA_WITH_INPUT.format(instruction=instruction, input=context)
    return _TEMPLATES[prompt_type].format(instruction=instruction)


def single_turn(item: Mapping[str, Any], prompt_type: PromptType, tokenizer: Tokenizer) -> Example:
    """prompt + item["output"], of which the output is learnt."""
    if prompt_type is PromptType.chat:
        return _chat([*as_messages(item), {"role": "assistant", "content": item["output"]}], tokenizer)
    prompt = format_prompt(item, prompt_type)
    text = prompt + item["output"]
    return Example(text, ((len(prompt), len(text)),))


def as_messages(item: Mapping[str, Any]) -> list[dict[str, str]]:
    """The question of a single-turn item as a conversation of one turn."""
    parts = [item.get("instruction") or "", item.get("input") or ""]
    return [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]


def read_conversation(item: Mapping[str, Any]) -> list[dict[str, str]]:
    """ShareGPT's {"conversations": [{"from", "value"}, …]} -> [{"role", "content"}, …]; ValueError says what is off."""
    turns = item.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError("no list 'conversations' (--dialog and multi_turn_llava need one in each item)")
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise ValueError(f"a turn is not {{'from': …, 'value': text}}: {str(turn)[:80]}")
        speaker = str(turn.get("from")).lower()
        if speaker not in _SPEAKERS:
            raise ValueError(f"unknown speaker {turn.get('from')!r}; known: {', '.join(_SPEAKERS)}")
        messages.append({"role": _SPEAKERS[speaker], "content": turn["value"]})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no turn from 'gpt', so there is nothing to learn")
    return messages


def dialog(messages: list[dict[str, str]], prompt_type: PromptType, tokenizer: Tokenizer) -> Example:
    """A whole conversation, of which every answer and the separator that ends it are learnt."""
    if prompt_type is PromptType.chat:
        return _chat(messages, tokenizer)
    if sum(message["role"] == "system" for message in messages) > 1:
        raise ValueError("several turns from 'system': the conversation format has one (prompt_type chat has more)")
    text, spans = system_of(messages) + f"\n\n{SEPARATOR}", []
    for message in messages:
        if message["role"] == "system":
            continue
        text += f" {ROLES[message['role']]}: "
        start = len(text)
        text += f"{message['content']}\n{SEPARATOR}"
        if message["role"] == "assistant":
            spans.append((start, len(text)))
    return Example(text, tuple(spans), learn_eos=False)


def dialog_prompt(messages: list[dict[str, str]]) -> str:
    """A conversation that the assistant is to continue, in the format of `dialog`."""
    text = dialog([*messages], PromptType.alpaca, None).text  # type: ignore[arg-type]
    return f"{text} {ROLES['assistant']}:"


def system_of(messages: list[dict[str, str]]) -> str:
    return next((message["content"] for message in messages if message["role"] == "system"), SYSTEM)


def _chat(messages: list[dict[str, str]], tokenizer: Tokenizer) -> Example:
    text = tokenizer.render_chat(messages, answer_follows=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = text[: text.find(message["content"].strip())]  # of a conversation that begins with an answer
        if i:
            start = tokenizer.render_chat(messages[:i], answer_follows=True)
        end = tokenizer.render_chat(messages[: i + 1], answer_follows=False)
        if not (text.startswith(end) and end.startswith(start)):
            raise UserError(
                f"{tokenizer.path}: the chat template rewrites earlier turns, so answers cannot be told from prompts; "
                "choose another prompt_type"
            )
        spans.append((len(start), len(end.rstrip("\n"))))
    return Example(text.rstrip("\n"), tuple(spans), learn_eos=False)


def encode(example: Example, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Text -> (input_ids, labels); labels are -100 outside the learnt spans.

    The text is tokenized as a whole. A span starts after the tokens that its prefix, tokenized alone, shares with the
    whole: where prompt and answer meet within one token, that token is learnt.
    """
    opens_itself = tokenizer.bos_text is not None and example.text.startswith(tokenizer.bos_text)
    ids = tokenizer.encode(example.text, bos=not opens_itself, eos=example.learn_eos)
    labels = [-100] * len(ids)
    for start, end in example.spans:
        first = _shared(ids, tokenizer.encode(example.text[:start], bos=not opens_itself, eos=False))
        if end == len(example.text):
            last = len(ids)
        else:
            last = _shared(ids, tokenizer.encode(example.text[:end], bos=not opens_itself, eos=False))
        labels[first:last] = ids[first:last]
    return ids, labels


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
