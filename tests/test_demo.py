"""The demos without a browser: flags, what is refused and when, one answer on stdout, the prompt of a conversation."""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import accessory
from accessory import demo, demo_chat, demo_flags
from accessory.config import PromptType
from accessory.data.prompts import as_messages, dialog_prompt, format_prompt
from accessory.errors import UserError
from accessory.generation import generate

DEMOS = Path(__file__).resolve().parents[1] / "demos"
SCRIPTS = ["single_turn.py", "single_turn_mm.py", "multi_turn.py"]
WITH_IMAGES = SCRIPTS[1:]
QUESTION = "Wrap the text"


@pytest.fixture
def ask(monkeypatch, capsys):
    """Run a demo here: (exit code, stdout, stderr)."""

    def run(script: str, *words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        code = 0
        try:
            runpy.run_path(str(DEMOS / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


@pytest.fixture(scope="module")
def language_model(meta_folder):
    return accessory.load_model(str(meta_folder))


@pytest.fixture(scope="module")
def image_model(qformer_folder):
    return accessory.load_model(str(qformer_folder))


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag_with_its_meaning(ask, script):
    code, out, _ = ask(script, "--help")
    options = out.partition("options:\n")[2].split("\n  --")[1:]
    meanings = {option.split()[0]: " ".join(option.split()[1:]) for option in options}
    common = "llama_type llama_config tokenizer_path pretrained_path quant dtype device max_seq_len prompt max_gen_len"
    wanted = {*common.split(), "temperature", "top_p", "port", "share", "system_prompt"}
    wanted |= {"image"} if script in WITH_IMAGES else set()
    wanted |= {"input"} if script != "multi_turn.py" else set()
    assert code == 0 and set(meanings) == wanted
    assert all(any(word.islower() and len(word) > 2 for word in text.split()) for text in meanings.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flag_is_refused_with_the_nearest_one(ask, script):
    code, _, err = ask(script, "--pretrained_path", "x", "--temprature", "1")
    assert code == 2
    assert err == "error: unknown argument --temprature (did you mean --temperature?); --help lists them\n"


@pytest.mark.parametrize("script", WITH_IMAGES)
def test_missing_image_is_refused_before_the_model_is_looked_for(ask, script):
    code, out, err = ask(script, "--pretrained_path", "nowhere", "--image", "no.png", "--prompt", QUESTION)
    assert (code, out, err) == (2, "", "error: --image no.png: no such file\n")


@pytest.mark.parametrize("script", WITH_IMAGES)
def test_image_without_a_question_is_refused(ask, script, picture):
    code, _, err = ask(script, "--pretrained_path", "nowhere", "--image", picture)
    assert code == 2 and err.startswith("error: --image goes with --prompt")


@pytest.mark.parametrize("script", WITH_IMAGES)
def test_language_only_model_refuses_an_image(ask, script, picture, meta_folder):
    code, out, err = ask(script, "--pretrained_path", meta_folder, "--image", picture, "--prompt", QUESTION)
    assert (code, out) == (2, "")
    assert err == f"error: --image {picture}: this model is language-only; llama_qformerv2_peft takes images\n"


def test_page_with_images_is_refused_for_a_language_only_model(ask, meta_folder):
    code, _, err = ask("single_turn_mm.py", "--pretrained_path", meta_folder)
    assert code == 2 and "takes no images; demos/single_turn.py serves its page" in err


@pytest.mark.parametrize("script", SCRIPTS)
def test_chat_without_a_template_is_refused(ask, script, meta_folder):
    code, _, err = ask(script, "--pretrained_path", meta_folder, "--system_prompt", "chat", "--prompt", QUESTION)
    assert code == 2 and err.startswith("error: --system_prompt chat:") and "has no chat template" in err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--prompt", "Wrap it.", "--max_seq_len", "20"], "exceed the model's 20 positions"),
        (["--port", "70000"], "--port 70000: cannot be opened"),
        (["--prompt", "caf\udce9"], "--prompt: not UTF-8 text"),
    ],
)
def test_what_can_be_known_is_told_before_weights_are_read(ask, meta_folder, monkeypatch, flags, complaint):
    monkeypatch.setattr(demo, "assemble", lambda *args: pytest.fail("weights are read"))
    code, out, err = ask("single_turn.py", "--pretrained_path", meta_folder, *flags)
    assert (code, out) == (2, "") and complaint in err


def test_the_space_in_front_of_a_conversations_answer_is_the_formats_own(monkeypatch, language_model):
    monkeypatch.setattr(demo, "stream", lambda *args: iter([" ", " Ah", " Ah  so"]))
    assert list(demo.reply(language_model, "p", 9, 0, 1, "\n###", None)) == ["", "Ah", "Ah  so"]
    assert list(demo.reply(language_model, "p", 9, 0, 1, None, None)) == [" ", " Ah", " Ah  so"]


def test_a_caption_is_asked_for_without_a_question(ask, qformer_folder, picture):
    words = [
        "--pretrained_path",
        qformer_folder,
        "--image",
        picture,
        "--system_prompt",
        "caption",
        "--max_gen_len",
        "4",
    ]
    code, out, err = ask("single_turn_mm.py", *words)
    assert code == 0 and out.endswith("\n"), err


def test_answer_without_tokens_is_refused(ask):
    code, _, err = ask("multi_turn.py", "--pretrained_path", "nowhere", "--max_gen_len", "0")
    assert (code, err) == (2, "error: --max_gen_len 0: an answer has at least 1 token\n")


def test_unreadable_image_is_a_line(ask, tmp_path, qformer_folder):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    words = "--pretrained_path", qformer_folder, "--image", tmp_path / "broken.png", "--prompt", QUESTION
    code, out, err = ask("multi_turn.py", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --image {tmp_path / 'broken.png'}: ") and err.count("\n") == 1


# --- one answer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_answer_on_stdout_is_that_of_generate(
    script, language_model, image_model, meta_folder, qformer_folder, picture
):
    model, folder = (image_model, qformer_folder) if script in WITH_IMAGES else (language_model, meta_folder)
    shown = ["--image", picture] if script in WITH_IMAGES else []
    words = ["--pretrained_path", folder, "--prompt", QUESTION, "--max_gen_len", "12", "--dtype", "fp32", *shown]
    answer = subprocess.run(
        [sys.executable, DEMOS / script, *words, "--device", "cpu"],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        check=True,
    )
    item, stop_text = {"instruction": QUESTION}, None
    prompt = format_prompt(item, PromptType.alpaca)
    if script == "multi_turn.py":
        prompt, stop_text = dialog_prompt(as_messages(item)), "\n###"
    images = [str(picture)] if shown else None
    assert answer.stdout == generate(model, [prompt], 12, 0.0, 0.75, stop_text, images)[0] + "\n"


def test_question_without_an_image_is_answered(ask, qformer_folder, image_model):
    words = "--prompt", QUESTION, "--max_gen_len", 8, "--dtype", "fp32", "--device", "cpu"
    code, out, _ = ask("single_turn_mm.py", "--pretrained_path", qformer_folder, *words)
    prompt = format_prompt({"instruction": QUESTION}, PromptType.alpaca)
    assert (code, out) == (0, generate(image_model, [prompt], 8, 0.0, 0.75)[0] + "\n")


# --- conversations ---------------------------------------------------------------------------------------------------


def conversation(turns: int) -> list[dict[str, str]]:
    """A question, after `turns` answered ones."""
    roles = ["user", "assistant"] * turns + ["user"]
    return [{"role": role, "content": f"{role} {i}: wrap the lines"} for i, role in enumerate(roles)]


def test_third_turn_is_asked_with_all_before_it(monkeypatch, language_model):
    asked = []
    monkeypatch.setattr(demo, "stream", lambda model, *values, **_: asked.append(values) or iter(["short", "short l"]))
    messages = conversation(2)
    steps = list(
        demo_chat.respond(language_model, messages[-1]["content"], messages[:-1], "conversation", 8, 0, 1, None)
    )
    assert [values[0] for values in asked] == [dialog_prompt(messages)]
    assert steps[0] == (messages, "")
    assert steps[-1] == ([*messages, {"role": "assistant", "content": "short l"}], "")


def test_chat_is_asked_in_the_tokenizers_own_template(monkeypatch, language_model):
    def render(messages, answer_follows):
        return f"{[m['content'] for m in messages]} {answer_follows}"

    monkeypatch.setattr(language_model.tokenizer, "render_chat", render)
    assert demo_chat.chat_prompt(language_model, conversation(0), "chat") == (
        "['user 0: wrap the lines'] True",
        None,
    )


@pytest.mark.parametrize("with_image", [False, True])
def test_oldest_turns_are_dropped_where_one_more_would_not_fit(monkeypatch, image_model, picture, with_image):
    """Against generation itself: what is kept is answered, a turn more is refused."""
    messages, image = conversation(4), str(picture) if with_image else None
    prompts = [dialog_prompt(messages[first:]) for first in range(0, 9, 2)]
    lengths = [len(image_model.tokenizer.encode(prompt, bos=True, eos=False)) for prompt in prompts]
    positions = lengths[2] + 8 + image_model.image_words * with_image
    for limit, first in ((positions, 4), (positions - 1, 6)):
        monkeypatch.setattr(image_model.config, "max_position_embeddings", limit)
        kept = demo_chat.newest_that_fit(image_model, messages, "conversation", 8, image)
        assert kept == messages[first:]
        generate(image_model, [dialog_prompt(kept)], 8, 0.0, 1.0, images=[image])
        with pytest.raises(UserError, match="exceed the model's"):
            generate(image_model, [dialog_prompt(messages[first - 2 :])], 8, 0.0, 1.0, images=[image])


def test_dropped_turns_are_named_and_stay_on_the_page(monkeypatch, language_model):
    messages = conversation(2)
    fits_one = len(language_model.tokenizer.encode(dialog_prompt(messages[-1:]), bos=True, eos=False)) + 4
    monkeypatch.setattr(language_model.config, "max_position_embeddings", fits_one)
    steps = demo_chat.respond(language_model, messages[-1]["content"], messages[:-1], "conversation", 4, 0, 1, None)
    shown, note = list(steps)[-1]
    assert shown[:-1] == messages and shown[-1]["role"] == "assistant"
    expected = f"The 2 oldest turns are no longer sent to the model: the conversation outgrew its {fits_one} positions."
    assert note == expected


def test_question_too_long_by_itself_is_refused(monkeypatch, language_model):
    monkeypatch.setattr(language_model.config, "max_position_embeddings", 20)
    with pytest.raises(UserError, match="exceed the model's 20 positions"):
        list(demo_chat.respond(language_model, QUESTION, conversation(1)[:-1], "conversation", 4, 0, 1, None))


def test_question_whose_answer_was_stopped_before_its_first_word_is_not_sent(monkeypatch, language_model):
    monkeypatch.setattr(demo, "stream", lambda *_, **__: iter(["short"]))
    stopped = conversation(1)
    shown, _ = next(demo_chat.respond(language_model, "Again", stopped, "conversation", 8, 0, 1, None))
    assert shown == [*stopped[:-1], {"role": "user", "content": "Again"}]


@pytest.mark.parametrize(
    ("history", "kept", "question"),
    [
        ([], 0, ""),
        (conversation(2)[:-1], 2, "user 2: wrap the lines"),
        (conversation(1), 2, "user 2: wrap the lines"),  # stopped before an answer
    ],
)
def test_undo_takes_the_last_question_back(history, kept, question):
    assert demo_chat.undo(history) == (history[:kept], question)


def test_chat_stays_a_conversation_unless_asked():
    parser = argparse.ArgumentParser()
    demo_flags.add_chat_flags(parser)
    assert parser.parse_args([]).system_prompt == "conversation"
