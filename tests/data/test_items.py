"""Items with an image: the forms that are read, LLaVA's placeholder, and where the picture is looked up."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_data
from pictures import save

from accessory.config import DataConfig, PromptType
from accessory.data.dataset import open_dataset
from accessory.data.images import ImageInput
from accessory.data.packing import IMAGE_SLOT
from accessory.errors import UserError

IMAGES = ImageInput(size=16, words=4)
TURNS = [
    {"from": "human", "value": "Wrap the text"},
    {"from": "gpt", "value": "short lines"},
    {"from": "human", "value": "And now?"},
    {"from": "gpt", "value": "whitespace"},
]


@pytest.fixture
def open_items(tmp_path, tokenizer):
    """Rows of a data file that lies beside x.png and y.png; images=None: for a language-only model."""
    save(tmp_path / "x.png"), save(tmp_path / "y.png", seed=1)

    def opened(items: list, images=IMAGES, entry=None, **settings):
        path = str(write_data(tmp_path, items, **(entry or {})))
        rows, _, _ = open_dataset(path, DataConfig(data_config=path, max_words=256, **settings), tokenizer, images)
        return rows.to_list()

    return opened


def without_slots(row: dict) -> dict:
    """The row of the same text without an image; the slots must stand behind BOS and carry no label."""
    ids, labels = row["input_ids"], row["labels"]
    assert ids[1:5] == [IMAGE_SLOT] * 4
    assert labels[:5] == [-100] * 5
    assert IMAGE_SLOT not in ids[:1] + ids[5:]
    return row | {
        "input_ids": ids[:1] + ids[5:],
        "labels": labels[:1] + labels[5:],
        "length": len(ids) - 4,
        "image": "",
    }


# --- forms -----------------------------------------------------------------------------------------------------------


def test_alpaca_item_is_its_text_with_slots_behind_bos(open_items, tmp_path):
    text = {"instruction": "Wrap the text", "input": "lines", "output": "short lines"}
    (row,) = open_items([text | {"image": "x.png"}])
    assert row["length"] == len(row["input_ids"])
    assert row["image"] == str(tmp_path / "x.png")
    assert without_slots(row) == open_items([text], images=None)[0]


@pytest.mark.parametrize("image", [{}, {"image": None}, {"image": ""}, {"image": []}])
def test_item_without_an_image_is_a_text_item_among_the_others(image, open_items):
    text = {"instruction": "Wrap the text", "output": "short lines"}
    with_image, without = open_items([text | {"image": "x.png"}, text | image])
    assert without == without_slots(with_image) == open_items([text], images=None)[0]


def test_single_turn_llava_takes_the_image_and_the_first_two_turns(open_items):
    entry = {"preprocess": "single_turn_llava"}
    (row,) = open_items([{"image": "x.png", "conversations": TURNS}], entry=entry)
    (expected,) = open_items([{"instruction": "Wrap the text", "output": "short lines"}], images=None)
    assert without_slots(row) == expected


@pytest.mark.parametrize("before", ["system", "gpt"])
def test_single_turn_llava_goes_by_who_speaks_not_by_the_place(before, open_items):
    turns = [{"from": before, "value": "be nice"}, *TURNS[:2]]
    entry = {"preprocess": "single_turn_llava"}
    (row,) = open_items([{"image": "x.png", "conversations": turns}], entry=entry)
    (expected,) = open_items([{"image": "x.png", "conversations": TURNS}], entry=entry)
    assert row == expected


def test_single_turn_llava_wants_an_answer_right_after_a_question(open_items):
    turns = [TURNS[1], TURNS[0]]
    with pytest.raises(UserError, match=r"item 0: preprocess single_turn_llava needs a turn of 'human' with one of"):
        open_items([{"conversations": turns}], entry={"preprocess": "single_turn_llava"})


@pytest.mark.parametrize(
    ("item", "entry", "told"),
    [
        ({"image": "x.png", "conversations": TURNS}, {}, "add --dialog, or preprocess: multi_turn_llava"),
        ({"image": "x.png", "caption": "A wrapper."}, {}, "add preprocess: caption to its entry"),
        ({"image": "x.png", "output": "a"}, {"preprocess": "caption"}, "no 'caption' .*; its keys are image, output"),
    ],
)
def test_an_item_of_another_kind_is_told_what_its_entry_lacks(item, entry, told, open_items):
    with pytest.raises(UserError, match=told):
        open_items([item], entry=entry)


def test_a_list_of_one_image_under_images_is_an_image(open_items):
    item = {"instruction": "Wrap the text", "output": "short lines"}
    assert open_items([item | {"images": ["x.png"]}]) == open_items([item | {"image": "x.png"}])


def test_multi_turn_llava_is_the_whole_conversation_without_the_flag(open_items):
    entry = {"preprocess": "multi_turn_llava"}
    (row,) = open_items([{"image": "x.png", "conversations": TURNS}], entry=entry)
    (by_flag,) = open_items([{"image": "x.png", "conversations": TURNS}], dialog=True)
    (expected,) = open_items([{"conversations": TURNS}], images=None, dialog=True)
    assert without_slots(row) == without_slots(by_flag) == expected
    assert open_items([{"conversations": TURNS}], images=None, entry=entry) == [expected]


@pytest.mark.parametrize("key", ["image", "url"])
def test_caption_is_learnt_whole_from_the_last_slot_on(key, open_items, tokenizer):
    (row,) = open_items([{key: "x.png", "caption": "short lines"}], entry={"preprocess": "caption"})
    ids = tokenizer.encode("short lines", bos=False, eos=True)
    assert row["input_ids"] == [tokenizer.bos_id, *[IMAGE_SLOT] * 4, *ids]
    assert row["labels"] == [-100] * 5 + ids


def test_caption_keeps_a_prompt_type_that_is_named(open_items, tokenizer):
    items = [{"image": "x.png", "caption": "short lines"}]
    (by_yaml,) = open_items(items, entry={"preprocess": "caption", "prompt_type": "qg"})
    (by_flag,) = open_items(items, entry={"preprocess": "caption"}, prompt_type=PromptType.qg)
    assert tokenizer.decode(by_yaml["input_ids"][5:]).startswith("Generate a question")
    assert by_flag == by_yaml


def test_caption_files_stay_captions_under_the_flag_for_conversations(open_items):
    items, entry = [{"image": "x.png", "caption": "short lines"}], {"preprocess": "caption"}
    assert open_items(items, entry=entry, dialog=True) == open_items(items, entry=entry)


def test_of_several_captions_the_items_number_chooses(open_items, tokenizer):
    items = [{"image": "x.png", "caption": ["the text", "short lines", "whitespace"]} for _ in range(4)]
    rows = open_items(items, entry={"preprocess": "caption"})
    learnt = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in rows]
    assert learnt == ["the text", "short lines", "whitespace", "the text"]


def test_table_may_have_a_column_of_images(tmp_path, tokenizer):
    save(tmp_path / "x.png")
    (tmp_path / "a.csv").write_text("image,instruction,output\nx.png,Wrap,lines\n,Wrap,lines\n")
    (tmp_path / "data.yaml").write_text(f"META:\n  - path: {tmp_path / 'a.csv'}\n")
    config = DataConfig(data_config=str(tmp_path / "data.yaml"))
    rows, report, _ = open_dataset(config.data_config, config, tokenizer, IMAGES)
    assert without_slots(rows[0]) == rows[1]
    assert report.line() == "2 items (1 with an image)"


# --- refusals --------------------------------------------------------------------------------------------------------

ALPACA = {"instruction": "Wrap", "output": "lines"}


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        (ALPACA | {"image": ["x.png", "y.png"]}, "item 1: has 2 images; an item takes one"),
        (ALPACA | {"image": 7}, "item 1: 'image' must be a path, found int 7"),
        (ALPACA | {"image": {"path": "x.png"}}, "item 1: 'image' must be a path, found dict"),
        (ALPACA | {"image": [7]}, "item 1: 'image' must be a path, found int 7"),
        (ALPACA | {"image": "https://a.b/x.png"}, "item 1: image https://a.b/x.png: .*download it first"),
        (ALPACA | {"image": "\ud800.png"}, "item 1: holds .*half of a surrogate pair"),
    ],
)
def test_unusable_image_field_is_refused_by_item(item, complaint, open_items):
    with pytest.raises(UserError, match=rf"data\.json: {complaint}"):
        open_items([ALPACA, item])


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ({"caption": "a text"}, "item 0: no 'image' or 'url'"),
        ({"image": "x.png"}, "item 0: no 'caption'"),
        ({"image": "x.png", "caption": []}, r"item 0: 'caption' must be text or a list of texts, found '\[\]'"),
        ({"image": "x.png", "caption": [3]}, "item 0: 'caption' must be text or a list of texts"),
        ({"image": "x.png", "caption": ""}, "item 0: 'caption' must be text or a list of texts"),
    ],
)
def test_caption_item_needs_a_picture_and_a_text(item, complaint, open_items):
    with pytest.raises(UserError, match=complaint):
        open_items([item], entry={"preprocess": "caption"})


@pytest.mark.parametrize("settings", [{"dialog": True}, {"entry": {"preprocess": "single_turn_llava"}}, {}])
def test_language_only_model_refuses_items_with_an_image(settings, open_items):
    with pytest.raises(UserError, match="item 0: has an image, but the model is language-only"):
        open_items([ALPACA | {"image": "x.png", "conversations": TURNS}], images=None, **settings)


# --- placeholders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "instruction",
    [
        "<image>\nWrap the text",
        "Wrap the text\n<image>",
        "<image> Wrap the text",
        "\n<image>\n\nWrap the text",
        " <image>",
    ],
)
def test_placeholder_goes_with_the_space_around_it(instruction, open_items):
    text = "Wrap the text" if "Wrap" in instruction else ""
    (plain,) = open_items([{"image": "x.png", "instruction": text, "output": "short lines"}])
    (row,) = open_items([{"image": "x.png", "instruction": instruction, "output": "short lines"}])
    assert row == plain


def test_placeholder_in_any_question_of_a_conversation_is_taken_out(open_items):
    marked = [dict(turn) for turn in TURNS]
    marked[2]["value"] = "And now?\n<image>"
    assert open_items([{"image": "x.png", "conversations": marked}], dialog=True) == open_items(
        [{"image": "x.png", "conversations": TURNS}], dialog=True
    )


def test_placeholder_within_a_sentence_or_in_an_answer_is_text(open_items, tokenizer):
    item = {"instruction": "What does <image> do in SVG?", "output": "<image> shows one. <image>"}
    (row,) = open_items([item])
    text = tokenizer.decode(row["input_ids"])
    assert text.count("<image>") == 3
    assert row["input_ids"] == open_items([item], images=None)[0]["input_ids"]


def test_language_only_model_reads_the_placeholder_as_text(open_items, tokenizer):
    (row,) = open_items([{"instruction": "<image>\nWrap", "output": "lines"}], images=None)
    assert "<image>" in tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize(
    ("item", "count", "images"),
    [
        ({"image": "x.png", "instruction": "<image>\n<image>\nWrap"}, 2, 1),
        ({"image": "x.png", "instruction": "<image> Wrap <image>"}, 2, 1),
        ({"image": "x.png", "instruction": "<image>\nWrap", "input": "<image>"}, 2, 1),
        ({"instruction": "<image>\nWrap"}, 1, 0),
        ({"instruction": "Wrap", "input": "<image>"}, 1, 0),
    ],
)
def test_more_placeholders_than_images_are_refused_with_both_numbers(item, count, images, open_items):
    with pytest.raises(UserError, match=rf"data\.json: item 1: placeholders <image>: {count}, images: {images}; "):
        open_items([ALPACA, item | {"output": "lines"}])


def test_placeholders_of_a_conversation_are_counted_over_all_its_questions(open_items):
    marked = [{"from": t["from"], "value": "<image>\n" * (t["from"] == "human") + t["value"]} for t in TURNS]
    with pytest.raises(UserError, match="item 0: placeholders <image>: 2, images: 1; give it one"):
        open_items([{"image": "x.png", "conversations": marked}], dialog=True)
    with pytest.raises(UserError, match="item 0: placeholders <image>: 2, images: 0; name the image"):
        open_items([{"conversations": marked}], dialog=True)


# --- where the picture lies ------------------------------------------------------------------------------------------


def image_of(tmp_path, tokenizer, name: str, entry=None, **settings) -> Path:
    path = str(write_data(tmp_path / "data", [ALPACA | {"image": name}], **(entry or {})))
    rows, _, _ = open_dataset(path, DataConfig(data_config=path, **settings), tokenizer, IMAGES)
    return Path(rows[0]["image"])


def test_relative_image_is_found_from_the_working_directory_then_beside_the_data(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    beside = Path(save(tmp_path / "data" / "x.png"))
    assert image_of(tmp_path, tokenizer, "x.png") == beside
    (tmp_path / "x.png").write_bytes(beside.read_bytes())
    assert image_of(tmp_path, tokenizer, "./x.png") == tmp_path / "x.png"


def test_image_root_comes_before_them_and_the_entrys_root_before_it(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("", "data", "global", "data/own"):
        save(tmp_path / folder / "x.png")
    assert image_of(tmp_path, tokenizer, "x.png", image_root="global") == tmp_path / "global" / "x.png"
    own = image_of(tmp_path, tokenizer, "x.png", entry={"root": "own"}, image_root="global")
    assert own == tmp_path / "data" / "own" / "x.png"


def test_image_that_is_not_below_its_root_is_not_looked_for_elsewhere(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "x.png")
    (tmp_path / "root").mkdir()
    with pytest.raises(UserError, match=rf"image {tmp_path}/root/x\.png: no such file"):
        image_of(tmp_path, tokenizer, "x.png", image_root="root")


def test_absolute_path_needs_no_root(tmp_path, tokenizer):
    (tmp_path / "root").mkdir()
    path = save(tmp_path / "x.png")
    assert image_of(tmp_path, tokenizer, path, image_root=str(tmp_path / "root")) == Path(path)


def test_root_that_is_no_folder_is_refused_before_the_data_is_read(tmp_path, tokenizer):
    path = str(write_data(tmp_path, ["not an item"], root="nowhere"))
    with pytest.raises(UserError, match=r"root nowhere of .*data\.json: no such folder"):
        open_dataset(path, DataConfig(data_config=path), tokenizer, IMAGES)
    path = str(write_data(tmp_path, ["not an item"]))
    with pytest.raises(UserError, match=r"--image_root nowhere: no such folder"):
        open_dataset(path, DataConfig(data_config=path, image_root="nowhere"), tokenizer, IMAGES)


def test_root_means_nothing_to_a_language_only_model(tmp_path, tokenizer):
    path = str(write_data(tmp_path, [ALPACA], root="nowhere"))
    rows, _, _ = open_dataset(path, DataConfig(data_config=path, image_root="nowhere"), tokenizer)
    assert len(rows) == 1
