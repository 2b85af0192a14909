"""What the model reads and what of it is learnt. The expected wordings are LLaMA2-Accessory's, copied from its
data/system_prompt.py and data/conversation/lib.py (commits 5a1954b and 03193ba)."""

from __future__ import annotations

import json

import pytest
from conftest import LLAMA_TOKENIZER, corpus, train_tokenizer

from accessory.config import PromptType
from accessory.data.prompts import (
    Example,
    dialog,
    dialog_prompt,
    encode,
    format_prompt,
    read_conversation,
    single_turn,
)
from accessory.errors import UserError
from accessory.models.tokenizer import Tokenizer

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nWrap it.\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nWrap it.\n\n### Input:\nlong lines\n\n### Response:"
)
SHORTQA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request "
    "using a single word or phrase.\n\n### Instruction:\nWrap it.\n\n### Response:"
)
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory) -> Tokenizer:
    """A sentencepiece model with LLaMA 2's settings: newlines and repeated spaces stay, a space is put in front."""
    return Tokenizer(train_tokenizer(tmp_path_factory.mktemp("llama"), corpus(), 384, **LLAMA_TOKENIZER))


def pieces(ids: list[int], labels: list[int], tokenizer: Tokenizer) -> list[str]:
    """The learnt parts as text, in order: each run of labels that are not -100, decoded."""
    runs, current = [], []
    for token, label in zip(ids, labels, strict=True):
        if label == -100:
            runs, current = ([*runs, current] if current else runs), []
        else:
            assert label == token
            current.append(token)
    return [tokenizer._inner.decode(run) for run in [*runs, current] if run]


# --- wording ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_type", "item", "expected"),
    [
        (PromptType.alpaca, {"instruction": "Wrap it."}, ALPACA),
        (PromptType.alpaca, {"instruction": "Wrap it.", "input": "long lines"}, ALPACA_WITH_INPUT),
        (PromptType.alpaca, {"instruction": "Wrap it.", "input": ""}, ALPACA),
        (PromptType.alpaca, {"instruction": "Wrap it.", "input": None}, ALPACA),
        (PromptType.alpaca, {"instruction": "Wrap it.", "input": " \n"}, ALPACA),
        (PromptType.shortqa, {"instruction": "Wrap it."}, SHORTQA),
        (PromptType.qg, {"instruction": "Wrap it."}, "Generate a question whose answer is:\nWrap it.\n\nQuestion:\n"),
        (PromptType.caption, {"instruction": "Wrap it."}, ""),
        (PromptType["None"], {"instruction": "Wrap it."}, "Wrap it."),
    ],
)
def test_prompt_is_the_ancestors_to_the_letter(prompt_type, item, expected):
    assert format_prompt(item, prompt_type) == expected


@pytest.mark.parametrize("prompt_type", [PromptType.alpaca, PromptType.shortqa, PromptType.qg, PromptType["None"]])
def test_braces_in_an_instruction_stay_as_they_are(prompt_type):
    assert "use {input} and {0}" in format_prompt({"instruction": "use {input} and {0}"}, prompt_type)


def test_answer_follows_response_directly(tokenizer):
    example = single_turn({"instruction": "Wrap it.", "output": "the text"}, PromptType.alpaca, tokenizer)
    assert example.text == ALPACA + "the text"


# --- single-turn labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["alpaca", "shortqa", "qg", "None"])
def test_prompt_is_masked_and_answer_and_eos_are_learnt(kind, llama_tokenizer):
    item = {"instruction": "Wrap the lines.", "output": "keeps whitespace"}
    ids, labels = encode(single_turn(item, PromptType(kind), llama_tokenizer), llama_tokenizer)
    prompt = format_prompt(item, PromptType(kind))
    inner = llama_tokenizer._inner
    assert ids == [1, *inner.encode(prompt + "keeps whitespace"), 2]
    learnt = [label for label in labels if label != -100]
    boundary = len(ids) - len(learnt)
    assert labels == [-100] * boundary + ids[boundary:]
    assert learnt[-1] == 2
    assert inner.decode(learnt[:-1]) == "keeps whitespace"


def test_token_in_which_prompt_and_answer_meet_is_learnt(llama_tokenizer):
    """'Wr' + 'ap' tokenizes differently from its halves; the first token that differs belongs to the answer."""
    inner = llama_tokenizer._inner
    prompt, answer = next(
        (word[:cut], word[cut:])
        for word in ("whitespace", "wrapping", "paragraph", "sentence")
        for cut in range(1, len(word))
        if inner.encode(word)[: len(inner.encode(word[:cut]))] != inner.encode(word[:cut])
    )
    ids, labels = encode(Example(prompt + answer, ((len(prompt), len(prompt + answer)),)), llama_tokenizer)
    alone = [1, *inner.encode(prompt)]
    shared = next(i for i, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b)
    assert shared < len(alone)
    assert labels == [-100] * shared + ids[shared:]


def test_token_0_can_be_learnt(tmp_path):
    """LLaMA2-Accessory used id 0 as its ignore index; in a tokenizer whose id 0 is a word, it must be learnt."""
    tokenizer = whole_word_tokenizer(tmp_path, ["yes", "Question", ":"], template=None)
    assert tokenizer.encode("yes", bos=False, eos=False) == [0]
    ids, labels = encode(
        single_turn({"instruction": "Question :", "output": " yes"}, PromptType["None"], tokenizer), tokenizer
    )
    assert ids == [tokenizer.bos_id, 1, 2, 0, tokenizer.eos_id]
    assert labels == [-100, -100, -100, 0, tokenizer.eos_id]


# --- conversations ---------------------------------------------------------------------------------------------------

CONVERSATION = [
    {"from": "human", "value": "Wrap it."},
    {"from": "gpt", "value": "the text"},
    {"from": "human", "value": "And now?"},
    {"from": "gpt", "value": "short lines"},
]


def test_dialog_text_is_the_ancestors_to_the_letter(tokenizer):
    messages = read_conversation({"conversations": CONVERSATION})
    assert dialog(messages, PromptType.alpaca, tokenizer).text == (
        f"{SYSTEM}\n\n### Human: Wrap it.\n### Assistant: the text\n"
        "### Human: And now?\n### Assistant: short lines\n###"
    )


def test_dialog_prompt_ends_where_the_answer_begins():
    messages = [{"role": "user", "content": "Wrap it."}]
    assert dialog_prompt(messages) == f"{SYSTEM}\n\n### Human: Wrap it.\n### Assistant:"


def test_every_answer_and_its_separator_are_learnt_and_nothing_else(llama_tokenizer):
    messages = read_conversation({"conversations": CONVERSATION})
    ids, labels = encode(dialog(messages, PromptType.alpaca, llama_tokenizer), llama_tokenizer)
    assert pieces(ids, labels, llama_tokenizer) == ["the text\n###", "short lines\n###"]


def test_system_turn_replaces_the_default_and_is_not_learnt(llama_tokenizer):
    turns = [{"from": "system", "value": "Be short."}, *CONVERSATION[:2]]
    example = dialog(read_conversation({"conversations": turns}), PromptType.alpaca, llama_tokenizer)
    assert example.text == "Be short.\n\n### Human: Wrap it.\n### Assistant: the text\n###"
    assert pieces(*encode(example, llama_tokenizer), llama_tokenizer) == ["the text\n###"]


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("chatgpt", "assistant"),
        ("bing", "assistant"),
        ("bard", "assistant"),
        ("system", "system"),
        ("GPT", "assistant"),
    ],
)
def test_sharegpt_names_of_speakers_are_understood(speaker, role):
    turns = [{"from": speaker, "value": "a"}, {"from": "gpt", "value": "b"}]
    assert read_conversation({"conversations": turns})[0] == {"role": role, "content": "a"}


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ({}, "conversations"),
        ({"conversations": []}, "conversations"),
        ({"conversations": "hello"}, "conversations"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "'martian'"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "{'from': 'gpt', 'value': 3}"),
        ({"conversations": [{"from": "gpt"}]}, "{'from': 'gpt'}"),
        ({"conversations": ["hi"]}, "hi"),
        ({"conversations": CONVERSATION[:1]}, "nothing to learn"),
    ],
)
def test_conversation_that_cannot_be_read_says_what_is_off(item, named):
    with pytest.raises(ValueError) as caught:
        read_conversation(item)
    assert named in str(caught.value)


# --- chat templates --------------------------------------------------------------------------------------------------

CHATML = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
# keeps only the last turn, as templates do that strip earlier reasoning
REWRITES = (
    "{{ '<s>' + messages[-1]['role'] + messages[-1]['content'] }}{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
)
# LLaMA 2's: no generation prompt of its own, and roles must alternate
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<s>' + 'INST ' + m['content'] + ' /INST' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)


def whole_word_tokenizer(folder, words, template) -> Tokenizer:
    """A Hugging Face tokenizer folder with one token a word, written by hand."""
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>"]
    vocab = {word: i for i, word in enumerate([*words, *specials])}
    added = [
        {
            "id": vocab[word],
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for word in specials
    ]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | ({"chat_template": template} if template else {}))
    )
    return Tokenizer(folder)


WORDS = ["user", "assistant", "system", "wrap", "it", "the", "text", "short", "lines", "now", "INST", "/"]


def words(ids: list[int], tokenizer: Tokenizer) -> str:
    return " ".join(tokenizer._inner.convert_ids_to_tokens(ids))


@pytest.fixture
def chatml(tmp_path):
    return whole_word_tokenizer(tmp_path / "chatml", WORDS, CHATML)


def test_chat_template_learns_the_answer_and_its_end_mark_only(chatml):
    ids, labels = encode(single_turn({"instruction": "wrap it", "output": "the text"}, PromptType.chat, chatml), chatml)
    assert words(ids, chatml) == "<s> <|im_start|> user wrap it <|im_end|> <|im_start|> assistant the text <|im_end|>"
    assert labels == [-100] * 8 + ids[8:]


def test_chat_template_learns_every_assistant_turn_of_a_dialog_only(chatml):
    turns = [
        {"role": "system", "content": "short"},
        {"role": "user", "content": "wrap it"},
        {"role": "assistant", "content": "the text"},
        {"role": "user", "content": "now"},
        {"role": "assistant", "content": "lines"},
    ]
    ids, labels = encode(dialog(turns, PromptType.chat, chatml), chatml)
    assert words(ids, chatml) == (
        "<s> <|im_start|> system short <|im_end|> <|im_start|> user wrap it <|im_end|> "
        "<|im_start|> assistant the text <|im_end|> <|im_start|> user now <|im_end|> "
        "<|im_start|> assistant lines <|im_end|>"
    )
    assert pieces(ids, labels, chatml) == ["the text <|im_end|>", "lines <|im_end|>"]


def test_a_chat_that_begins_with_an_answer_learns_it(chatml):
    turns = [{"role": "assistant", "content": "the text"}, {"role": "user", "content": "now"},
             {"role": "assistant", "content": "lines"}]  # fmt: skip
    ids, labels = encode(dialog(turns, PromptType.chat, chatml), chatml)
    assert words(ids, chatml).startswith("<s> <|im_start|> assistant the text <|im_end|> <|im_start|> user now")
    assert pieces(ids, labels, chatml) == ["the text <|im_end|>", "lines <|im_end|>"]


def test_the_end_mark_of_a_chat_template_is_known(chatml, llama_tokenizer):
    assert words([chatml.chat_end_id], chatml) == "<|im_end|>" != words([chatml.eos_id], chatml)
    assert llama_tokenizer.chat_end_id is None


def test_a_second_system_turn_has_no_place_in_a_conversation(llama_tokenizer):
    turns = [{"from": "system", "value": "Be short."}, *CONVERSATION[:2], {"from": "system", "value": "Be long."}]
    with pytest.raises(ValueError, match="several turns from 'system'"):
        dialog(read_conversation({"conversations": turns}), PromptType.alpaca, llama_tokenizer)


def test_bos_written_by_the_chat_template_is_not_doubled(chatml):
    ids, _ = encode(single_turn({"instruction": "wrap", "output": "it"}, PromptType.chat, chatml), chatml)
    assert ids.count(chatml.bos_id) == 1
    assert ids[0] == chatml.bos_id


def test_bos_is_added_where_the_chat_template_writes_none(tmp_path):
    tokenizer = whole_word_tokenizer(tmp_path / "bare", WORDS, CHATML.replace("{{ '<s>' }}", ""))
    ids, _ = encode(single_turn({"instruction": "wrap", "output": "it"}, PromptType.chat, tokenizer), tokenizer)
    assert words(ids, tokenizer).startswith("<s> <|im_start|> user")


def test_instruction_and_input_are_one_user_turn(chatml):
    item = {"instruction": "wrap", "input": "lines", "output": "it"}
    assert single_turn(item, PromptType.chat, chatml).text == (
        "<s><|im_start|>user wrap\n\nlines<|im_end|>\n<|im_start|>assistant it<|im_end|>"
    )


def test_prompt_for_an_answer_is_the_training_text_up_to_the_answer(chatml):
    item = {"instruction": "wrap it", "output": "the text"}
    prompt = format_prompt(item, PromptType.chat, chatml)
    assert single_turn(item, PromptType.chat, chatml).text == prompt + "the text<|im_end|>"


def test_template_without_generation_prompt_learns_answer_and_eos(tmp_path):
    tokenizer = whole_word_tokenizer(tmp_path / "llama", WORDS, ALTERNATING)
    turns = read_conversation(
        {"conversations": CONVERSATION[:1]}
        | {
            "conversations": [
                {"from": "human", "value": "wrap it"},
                {"from": "gpt", "value": "the text"},
                {"from": "human", "value": "now"},
                {"from": "gpt", "value": "lines"},
            ]
        }
    )
    ids, labels = encode(dialog(turns, PromptType.chat, tokenizer), tokenizer)
    assert ids.count(tokenizer.bos_id) == 2  # the template opens every exchange with one
    assert pieces(ids, labels, tokenizer) == ["the text </s>", "lines </s>"]


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    tokenizer = whole_word_tokenizer(tmp_path / "rewrites", WORDS, REWRITES)
    turns = read_conversation({"conversations": CONVERSATION})
    with pytest.raises(UserError, match=r"rewrites earlier turns.*another prompt_type"):
        dialog(turns, PromptType.chat, tokenizer)


def test_conversation_that_the_template_refuses_gives_the_templates_reason(tmp_path):
    tokenizer = whole_word_tokenizer(tmp_path / "llama", WORDS, ALTERNATING)
    turns = [{"from": "human", "value": "wrap"}, {"from": "human", "value": "it"}, {"from": "gpt", "value": "text"}]
    with pytest.raises(UserError, match="roles must alternate"):
        dialog(read_conversation({"conversations": turns}), PromptType.chat, tokenizer)


def test_chat_without_a_template_names_the_tokenizer(tokenizer):
    with pytest.raises(UserError, match=r"tokenizer\.model.*no chat template"):
        single_turn({"instruction": "a", "output": "b"}, PromptType.chat, tokenizer)
