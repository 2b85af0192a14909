"""Data files on disk to tokenized items: formats, what is refused and how, what is counted, what is cached."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from conftest import alpaca_items, write_data
from pictures import cut, save, save_plain

import accessory.data.dataset as dataset_module
import accessory.data.sources as sources_module
from accessory.config import BadImages, DataConfig, PromptType
from accessory.data.dataset import open_dataset
from accessory.data.images import ImageInput
from accessory.data.packing import IMAGE_SLOT
from accessory.data.sources import read_data_config, read_items
from accessory.errors import UserError

ITEMS = [
    {"instruction": "Wrap the text", "input": "", "output": "short lines"},
    {"instruction": "Break, please", "input": "long\nlines", "output": 'keeps "whitespace"'},
]
TURNS = [{"from": "human", "value": "Wrap the text"}, {"from": "gpt", "value": "short lines"}]


def configure(folder: Path, *entries) -> str:
    """A data YAML with these META entries; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump({"META": list(entries)}))
    return str(file)


def data_file(folder: Path, items: list, name: str = "items.json") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(items))
    return str(folder / name)


def opened(path: str, tokenizer, **settings):
    return open_dataset(path, DataConfig(data_config=path, max_words=256, **settings), tokenizer)


def texts(items, tokenizer) -> list[str]:
    """The learnt part of each item as text, without EOS."""
    return [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in items]


# --- formats ---------------------------------------------------------------------------------------------------------


def write_json(path: Path) -> None:
    path.with_suffix(".json").write_text(json.dumps(ITEMS))


def write_jsonl(path: Path) -> None:
    path.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, ITEMS)) + "\n\n")


def write_csv(path: Path) -> None:
    path.with_suffix(".csv").write_text(
        'instruction,input,output\nWrap the text,,short lines\n"Break, please","long\nlines","keeps ""whitespace"""\n'
    )


def write_tabs(path: Path) -> None:
    path.with_suffix(".csv").write_text(
        "instruction\tinput\toutput\n"
        "Wrap the text\t\tshort lines\n"
        'Break, please\t"long\nlines"\t"keeps ""whitespace"""\n'
    )


@pytest.mark.parametrize("write", [write_json, write_jsonl, write_csv, write_tabs])
def test_json_jsonl_and_csv_give_the_same_items(write, tmp_path):
    write(tmp_path / "data")
    file = next(tmp_path.glob("data.*"))
    assert [item for _, item in read_items(file)] == ITEMS


@pytest.mark.parametrize("write", [write_json, write_jsonl, write_csv])
def test_byte_order_mark_in_front_of_a_file_is_no_part_of_it(write, tmp_path):
    """Spreadsheets write one; read as text it would hide the first column's name, and so every instruction."""
    write(tmp_path / "data")
    file = next(tmp_path.glob("data.*"))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [item for _, item in read_items(file)] == ITEMS


def test_field_of_a_table_may_be_as_long_as_a_book(tmp_path):
    """Python's csv module stops at 131,072 characters unless told otherwise."""
    (tmp_path / "data.csv").write_text(f"instruction,output\nRead,{'text ' * 100_000}\n")
    ((_, item),) = read_items(tmp_path / "data.csv")
    assert len(item["output"]) == 500_000


def test_json_and_jsonl_are_trained_on_alike(tmp_path, tokenizer):
    rows = []
    for write in (write_json, write_jsonl):
        folder = tmp_path / write.__name__
        folder.mkdir()
        write(folder / "data")
        items, report, _ = opened(configure(folder, {"path": str(next(folder.glob("data.json*")))}), tokenizer)
        rows.append(items.to_list())
        assert report.line() == "2 items"
        assert texts(items, tokenizer) == ["short lines", 'keeps "whitespace"']
    assert rows[0] == rows[1]


def test_columns_state_length_and_learnt_tokens(tmp_path, tokenizer):
    items, _, _ = opened(configure(tmp_path, {"path": data_file(tmp_path, ITEMS)}), tokenizer)
    for row in items:
        assert row["length"] == len(row["input_ids"]) == len(row["labels"])
        assert row["answer_tokens"] == sum(label != -100 for label in row["labels"])


def test_older_meta_entry_of_path_and_type_is_read(tmp_path):
    path = data_file(tmp_path, ITEMS)
    (entry,) = read_data_config(configure(tmp_path, [path, "text"]), None)
    assert (entry.path, entry.prompt_type) == (Path(path), PromptType.alpaca)


def test_relative_path_is_found_from_the_working_directory_then_from_the_yaml(tmp_path, monkeypatch):
    beside = data_file(tmp_path / "yaml", ITEMS)
    config = configure(tmp_path / "yaml", {"path": "items.json"})
    monkeypatch.chdir(tmp_path)
    assert read_data_config(config, None)[0].path.resolve() == Path(beside)
    here = data_file(tmp_path, ITEMS)
    assert read_data_config(config, None)[0].path.resolve() == Path(here)


def test_files_of_one_yaml_may_have_different_prompt_types(tmp_path, tokenizer):
    path = data_file(tmp_path, ITEMS[:1])
    config = configure(
        tmp_path, {"path": path, "prompt_type": "None"}, {"path": path, "prompt_type": "qg"}, {"path": path}
    )
    items, _, _ = opened(config, tokenizer, prompt_type=PromptType.shortqa)
    starts = [tokenizer.decode(row["input_ids"])[:24] for row in items]
    assert starts == ["Wrap the textshort lines", "Generate a question whos", "Below is an instruction "]
    assert "single word or phrase" in tokenizer.decode(items[2]["input_ids"])


def test_single_turn_llava_takes_question_and_answer_from_the_first_two_turns(tmp_path, tokenizer):
    path = data_file(tmp_path, [{"conversations": TURNS}])
    llava, _, _ = opened(configure(tmp_path / "l", {"path": path, "preprocess": "single_turn_llava"}), tokenizer)
    plain, _, _ = opened(configure(tmp_path / "p", {"path": data_file(tmp_path / "p", ITEMS[:1])}), tokenizer)
    assert llava.to_list() == plain.to_list()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.json", '[{"instruction": "a", "output": "b"},\n {"instruction" "x"}]', r"a\.json:2: not valid JSON"),
        ("a.json", "[" * 10**5, r"a\.json:1: not valid JSON \(nested too deeply"),
        ("a.jsonl", "[" * 10**5, r"a\.jsonl:1: not valid JSON \(nested too deeply"),
        ("a.json", '{"instruction": "a"}', r"a\.json: expected a list of items, found a dict"),
        ("a.json", '[{"instruction": "a", "output": "b"}, {"instruction": "c"}]', r"a\.json: item 1: no 'output'"),
        ("a.json", '[{"instruction": "a", "output": ""}]', r"a\.json: item 0: 'output' is empty"),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n\n{"instruction": "c"}\n', r"a\.jsonl:3: no 'output'"),
        ("a.csv", "instruction,output\na,b\nc,\n", r"a\.csv:3: 'output' is empty"),
        ("a.csv", "instruction,output\na,b, c\n", r"a\.csv:2: 1 more fields than the header has"),
        ("a.csv", 'instruction,output\na,b\nc,"d\ne,f\n', r"a\.csv:3: not a row of a table \(unexpected end of data\)"),
        ("a.csv", 'instruction,output\na,"b" c\n', r"a\.csv:2: not a row of a table"),
        ("a.csv", "question,output\na,b\n", r"a\.csv:2: no 'instruction'.* alpaca asks; its keys are question, output"),
        ("a.jsonl", '{"output": ' + "7" * 5000 + "}", r"a\.jsonl:1: not valid JSON \(Exceeds the limit"),
        ("a.json", '{"instruction": "a"}\n{"instruction": "b"}', r"a\.json:2: not valid JSON \(Extra.*name it \.jsonl"),
        ("a.json", '[{"instruction": "a", "output": 7}]', r"item 0: 'output' must be text, found int 7"),
        (
            "a.json",
            '[{"instruction": ["a"], "output": "b"}]',
            r"item 0: 'instruction' must be text, found list \['a'\]",
        ),
        ("a.json", '["hello"]', r"item 0: expected an object, found 'hello'"),
        ("a.json", "[]", r"data\.yaml: no items in .*a\.json"),
        ("a.jsonl", "\n", r"data\.yaml: no items in .*a\.jsonl"),
        ("a.csv", "instruction,output\n", r"data\.yaml: no items in .*a\.csv"),
        ("a.txt", "hello", r"a\.txt: unknown ending '\.txt'; \.json, \.jsonl and \.csv are read"),
        ("a.json", '[{"conversations": []}]', r"item 0: no 'output'.*add --dialog"),
        ("a.json", '[{"image": "x.png", "instruction": "a", "output": "b"}]', r"item 0: has an image.*language-only"),
    ],
)
def test_unusable_data_file_is_refused_by_file_and_item(name, content, complaint, tmp_path, tokenizer):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=complaint):
        opened(configure(tmp_path, {"path": str(tmp_path / name)}), tokenizer)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_file_that_is_not_utf8_is_refused(name, tmp_path, tokenizer):
    (tmp_path / name).write_bytes('[{"instruction": "café", "output": "b"}]'.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name}: not UTF-8"):
        opened(configure(tmp_path, {"path": str(tmp_path / name)}), tokenizer)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"path": "absent.json"}, r"data\.yaml: absent\.json: no such data file"),
        ({"path": "/"}, r"data\.yaml: /: is a folder; name a file in it"),
        ({"type": "text"}, r"data\.yaml: an entry of META has no path"),
        ("items.json", r"data\.yaml: an entry of META has no path"),
        (
            {"path": "items.json", "prompt_typ": "qg"},
            r"unknown key 'prompt_typ' in META \(did you mean prompt_type\?\)",
        ),
        (
            {"path": "items.json", "prompt_type": "alpca"},
            r"prompt_type 'alpca': known are alpaca, shortqa, qg, caption",
        ),
        (
            {"path": "items.json", "preprocess": "squash"},
            r"preprocess 'squash': known are single_turn_llava, multi_turn_llava, caption",
        ),
    ],
)
def test_unusable_meta_entry_is_refused_with_what_is_known(entry, complaint, tmp_path):
    data_file(tmp_path, ITEMS)
    with pytest.raises(UserError, match=complaint):
        read_data_config(configure(tmp_path, entry), None)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("META: [", "1: not valid YAML"),
        ("META:\n\t- path: a", r"2: not valid YAML \(found character '\\t'"),
        ("DATA: []", " needs a list META"),
        ("META: []", " needs a list META"),
        ("- a", " needs a list META"),
        ("", " needs a list META"),
    ],
)
def test_yaml_without_meta_is_refused(content, complaint, tmp_path):
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"--data_config .*data\.yaml:{complaint}"):
        read_data_config(str(tmp_path / "data.yaml"), None)


def test_missing_yaml_is_refused_by_its_flag(tmp_path):
    with pytest.raises(UserError, match=r"--data_config .*nowhere\.yaml: no such file"):
        read_data_config(str(tmp_path / "nowhere.yaml"), None)


def test_conversations_without_dialog_get_the_hint(tmp_path, tokenizer):
    config = configure(tmp_path, {"path": data_file(tmp_path, [{"conversations": TURNS}])})
    with pytest.raises(UserError, match=r"item 0: no 'output'.*it looks like a conversation: add --dialog"):
        opened(config, tokenizer)
    assert len(opened(config, tokenizer, dialog=True)[0]) == 1


def test_items_without_conversations_are_named_under_dialog(tmp_path, tokenizer):
    config = configure(tmp_path, {"path": data_file(tmp_path, [{"conversations": TURNS}, ITEMS[0]])})
    with pytest.raises(UserError, match="item 1: no list 'conversations'"):
        opened(config, tokenizer, dialog=True)


def test_single_turn_llava_without_two_turns_names_the_item(tmp_path, tokenizer):
    path = data_file(tmp_path, [{"conversations": TURNS[:1]}])
    with pytest.raises(UserError, match="item 0: no turn from 'gpt', so there is nothing to learn"):
        opened(configure(tmp_path, {"path": path, "preprocess": "single_turn_llava"}), tokenizer)


def test_caption_data_is_refused_on_a_language_only_model(tmp_path, tokenizer):
    path = data_file(tmp_path, [{"url": "x.png", "caption": "a text"}])
    with pytest.raises(UserError, match="item 0: has an image, but the model is language-only"):
        opened(configure(tmp_path, {"path": path, "preprocess": "caption"}), tokenizer)


# --- max_words -------------------------------------------------------------------------------------------------------


def test_cut_items_and_items_without_an_answer_are_counted(tmp_path, tokenizer):
    """With prompt_type None an item is BOS + instruction + output + EOS; the tokenizer itself says how long that is."""
    items = [
        {"instruction": "a", "output": "b"},  # fits
        {"instruction": "a", "output": "the text " * 40},  # its answer is cut
        {"instruction": "the text " * 40, "output": "b"},  # its answer is cut off
    ]
    encoded = [tokenizer.encode(item["instruction"] + item["output"], bos=True, eos=True) for item in items]
    assert len(encoded[0]) <= 20 < min(len(encoded[1]), len(encoded[2]))
    path = configure(tmp_path, {"path": data_file(tmp_path, items), "prompt_type": "None"})
    rows, report, _ = open_dataset(path, DataConfig(data_config=path, max_words=20), tokenizer)
    assert (report.items, report.truncated, report.without_answer) == (3, 2, 1)
    assert [row["input_ids"] for row in rows] == [encoded[0], encoded[1][:20]]
    assert report.line() == (
        f"3 items, 2 cut to max_words, 1 left out: cut before their answer ({tmp_path / 'items.json'}: item 2)"
    )


def test_max_words_shorter_than_every_prompt_is_refused(data_yaml, tokenizer):
    config = DataConfig(data_config=str(data_yaml), max_words=10)
    with pytest.raises(UserError, match=r"--max_words 10: shorter than every prompt of .*data\.yaml"):
        open_dataset(str(data_yaml), config, tokenizer)


# --- cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def encodings(monkeypatch):
    """Counts the items that are tokenized."""
    calls = []

    def counting(example, tokenizer):
        calls.append(example)
        return encode(example, tokenizer)

    encode = dataset_module.encode
    monkeypatch.setattr(dataset_module, "encode", counting)
    return calls


def test_second_opening_does_not_tokenize_again(data_yaml, tokenizer, encodings):
    first, report, key = opened(str(data_yaml), tokenizer)
    assert len(encodings) == 40
    again, same_report, same_key = opened(str(data_yaml), tokenizer)
    assert len(encodings) == 40
    assert (again.to_list(), same_report, same_key) == (first.to_list(), report, key)


@pytest.mark.parametrize(
    "change",
    [
        {"items": [*alpaca_items(39), {"instruction": "new", "output": "text"}]},
        {"settings": {"max_words": 200}},
        {"settings": {"prompt_type": PromptType.shortqa}},
        {"entry": {"prompt_type": "qg"}},
    ],
    ids=["file", "max_words", "default prompt_type", "prompt_type"],
)
def test_change_of_what_decides_the_tokens_tokenizes_again(change, data_yaml, tokenizer, encodings):
    _, _, before = opened(str(data_yaml), tokenizer)
    path = str(write_data(data_yaml.parent, change.get("items", alpaca_items()), **change.get("entry", {})))
    config = DataConfig(**{"data_config": path, "max_words": 256} | change.get("settings", {}))
    _, _, after = open_dataset(path, config, tokenizer)
    assert len(encodings) == 80
    assert after != before


def test_interrupted_tokenizing_leaves_nothing_that_is_taken_for_data(data_yaml, tokenizer, monkeypatch):
    encode, calls = dataset_module.encode, []

    def interrupted(example, tokenizer):
        calls.append(example)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return encode(example, tokenizer)

    monkeypatch.setattr(dataset_module, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened(str(data_yaml), tokenizer)
    items, report, _ = opened(str(data_yaml), tokenizer)
    assert len(items) == report.items == 40


def test_cache_that_cannot_be_written_names_the_setting(data_yaml, tokenizer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data cache .*file.*choose another with data\.cache_dir"):
        opened(str(data_yaml), tokenizer, cache_dir=str(tmp_path / "file"))


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", ["items.arrow", "report.json"])
def test_truncated_cache_is_built_again(name, kept, data_yaml, tokenizer, tmp_path, encodings):
    first, report, key = opened(str(data_yaml), tokenizer)
    rows = first.to_list()
    file = tmp_path / "cache" / "accessory" / key / name
    content = file.read_bytes()
    file.unlink()  # a new file, as the old one is mapped into memory
    file.write_bytes(content[: int(kept * len(content))])
    again, same_report, _ = opened(str(data_yaml), tokenizer)
    assert (again.to_list(), same_report) == (rows, report)
    assert len(encodings) == 80


def test_data_file_that_cannot_be_read_is_named_and_not_the_cache(data_yaml, tokenizer, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sources_module, "_read_json", broken)
    with pytest.raises(UserError) as caught:
        opened(str(data_yaml), tokenizer)
    assert str(caught.value) == f"{data_yaml.parent / 'data.json'}: cannot be read (Input/output error)"


def test_half_a_surrogate_pair_is_named_by_item(tmp_path, tokenizer):
    path = data_file(tmp_path, [ITEMS[0], {"instruction": "a", "output": "b \ud800"}])
    with pytest.raises(UserError, match=r"item 1: holds '\\ud800', half of a surrogate pair"):
        opened(configure(tmp_path, {"path": path}), tokenizer)


# --- images ----------------------------------------------------------------------------------------------------------

IMAGES = ImageInput(size=16, words=34)


def image_data(folder: Path, count: int = 4, **entry) -> str:
    """A YAML of `count` items with an image and one without, the pictures beside it."""
    items = alpaca_items(count)
    for i, item in enumerate(items):
        item["image"] = f"{i}.png"
        save_plain(folder / f"{i}.png", (40 * i, 0, 0))
    return str(write_data(folder, [*items, {"instruction": "Wrap", "output": "lines"}], **entry))


def with_images(path: str, tokenizer, words: int = 34, **settings):
    config = DataConfig(**{"data_config": path, "max_words": 256} | settings)
    return open_dataset(path, config, tokenizer, ImageInput(size=16, words=words))


def test_report_counts_the_items_with_an_image(tmp_path, tokenizer):
    items, report, _ = with_images(image_data(tmp_path), tokenizer)
    assert report.line() == "5 items (4 with an image)"
    assert [Path(image).name for image in items["image"]] == ["0.png", "1.png", "2.png", "3.png", ""]


def test_image_counts_in_max_words(tmp_path, tokenizer):
    """Of 40 tokens BOS and the image take 35; with 35 and fewer no answer is left."""
    item = {"instruction": "a", "output": "the text " * 40, "image": "x.png"}
    save(tmp_path / "x.png")
    encoded = tokenizer.encode("a" + item["output"], bos=True, eos=True)
    path = str(write_data(tmp_path, [item, {"instruction": "a", "output": "b"}], prompt_type="None"))
    rows, report, _ = with_images(path, tokenizer, max_words=40)
    assert rows[0]["input_ids"] == [encoded[0], *[IMAGE_SLOT] * 34, *encoded[1:6]]
    assert (report.truncated, report.without_answer) == (1, 0)
    for max_words in (35, 34, 20, 5):  # within the image: nothing of it stays
        rows, report, _ = with_images(path, tokenizer, max_words=max_words)
        assert (len(rows), report.without_answer) == (1, 1)
        assert IMAGE_SLOT not in rows[0]["input_ids"]


def test_max_words_without_room_behind_the_images_says_what_they_take(tmp_path, tokenizer):
    path = str(write_data(tmp_path, [{"instruction": "a", "output": "b", "image": save(tmp_path / "x.png")}]))
    with pytest.raises(UserError, match=r"--max_words 20: shorter than every prompt of .*an image takes 34 of them"):
        with_images(path, tokenizer, max_words=20)


def test_bad_image_stops_with_its_item_its_reason_and_their_number(tmp_path, tokenizer):
    path = image_data(tmp_path)
    (tmp_path / "1.png").unlink()
    cut(save(tmp_path / "3.png", 200, 150))
    with pytest.raises(UserError) as caught:
        with_images(path, tokenizer)
    assert str(caught.value) == (
        f"{tmp_path / 'data.json'}: item 1: image {tmp_path / '1.png'}: no such file; 2 of 4 images cannot be used: "
        "mend them, or leave their items out with data.bad_images=skip"
    )


def test_item_that_is_wrong_stops_before_the_images_are_decoded(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(dataset_module, "check_images", lambda paths: pytest.fail("decoded"))
    path = str(write_data(tmp_path, [{"instruction": "a", "output": "b", "image": "x.png"}, {"instruction": "a"}]))
    with pytest.raises(UserError, match="item 1: no 'output'"):
        with_images(path, tokenizer)


def test_bad_images_are_left_out_and_counted_where_asked(tmp_path, tokenizer):
    path = image_data(tmp_path, count=6)
    for i in (1, 2, 3, 5):
        cut(save(tmp_path / f"{i}.png", 200, 150))
    items, report, _ = with_images(path, tokenizer, bad_images=BadImages.skip)
    assert [Path(image).name for image in items["image"]] == ["0.png", "4.png", ""]
    file = tmp_path / "data.json"
    named = ", ".join(f"{file}: item {i}: {tmp_path / f'{i}.png'}: truncated" for i in (1, 2, 3))
    assert report.line() == f"7 items (6 with an image), 4 left out: image unreadable ({named}, …)"


def test_data_of_which_no_item_is_left_is_refused(tmp_path, tokenizer):
    path = str(write_data(tmp_path, [{"instruction": "a", "output": "b", "image": "x.png"}]))
    with pytest.raises(UserError, match=r"no item is left to learn from: 1 items .*x\.png: no such file"):
        with_images(path, tokenizer, bad_images=BadImages.skip)


# --- images and the cache --------------------------------------------------------------------------------------------


def test_second_opening_neither_tokenizes_nor_decodes(tmp_path, tokenizer, encodings, monkeypatch):
    path = image_data(tmp_path / "data")
    first, report, key = with_images(path, tokenizer)
    monkeypatch.setattr(dataset_module, "check_images", lambda paths: pytest.fail("decoded"))
    again, same_report, same_key = with_images(path, tokenizer)
    assert len(encodings) == 5
    assert (again.to_list(), same_report, same_key) == (first.to_list(), report, key)


def test_image_that_changed_is_checked_again_and_changes_the_key(tmp_path, tokenizer, encodings):
    path = image_data(tmp_path / "data")
    _, _, before = with_images(path, tokenizer)
    save_plain(tmp_path / "data" / "2.png", (9, 9, 9), width=41)
    _, _, after = with_images(path, tokenizer)
    assert len(encodings) == 10
    assert after != before


def test_image_that_was_only_touched_is_checked_again_under_the_same_key(tmp_path, tokenizer, encodings):
    path = image_data(tmp_path / "data")
    _, _, before = with_images(path, tokenizer)
    os.utime(tmp_path / "data" / "2.png", ns=(1, 1))
    assert with_images(path, tokenizer)[2] == before
    assert len(encodings) == 10


@pytest.mark.parametrize("place", ["data", "here"])
def test_image_that_vanishes_or_comes_back_is_noticed(place, tmp_path, tokenizer, monkeypatch):
    """It may come back at either place at which it is looked up."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = image_data(tmp_path / "data")
    skip = {"bad_images": BadImages.skip}
    _, _, whole = with_images(path, tokenizer, **skip)
    content = (tmp_path / "data" / "2.png").read_bytes()
    (tmp_path / "data" / "2.png").unlink()
    items, report, key = with_images(path, tokenizer, **skip)
    assert (len(items), report.unreadable) == (4, 1)
    assert key != whole
    (tmp_path / place / "2.png").write_bytes(content)
    items, report, key = with_images(path, tokenizer, **skip)
    assert (len(items), report.unreadable, key) == (5, 0, whole)


def test_key_depends_on_what_the_images_show_and_not_on_where_they_lie(tmp_path, tokenizer):
    _, _, key = with_images(image_data(tmp_path / "a"), tokenizer)
    path = image_data(tmp_path / "b" / "images")
    moved = tmp_path / "b" / "data.yaml"
    data = {"path": str(Path(path).parent / "data.json"), "root": "images"}
    moved.write_text(yaml.safe_dump({"META": [data]}))
    items, _, same = with_images(str(moved), tokenizer)
    assert same == key
    assert Path(items[0]["image"]).parent == tmp_path / "b" / "images"
    save_plain(tmp_path / "b" / "images" / "0.png", (1, 2, 3))
    assert with_images(str(moved), tokenizer)[2] != key


def test_the_same_data_under_another_root_has_its_own_paths(tmp_path, tokenizer):
    """Both are kept in the same cache, under one returned key."""
    path = image_data(tmp_path / "data")
    image_data(tmp_path / "copy")
    first, _, key = with_images(path, tokenizer, image_root=str(tmp_path / "data"))
    other, _, same = with_images(path, tokenizer, image_root=str(tmp_path / "copy"))
    assert same == key
    assert {Path(row["image"]).parent for row in first if row["image"]} == {tmp_path / "data"}
    assert {Path(row["image"]).parent for row in other if row["image"]} == {tmp_path / "copy"}


def test_number_of_slots_is_part_of_the_key(tmp_path, tokenizer):
    path = image_data(tmp_path)
    (more, _, one), (fewer, _, other) = (with_images(path, tokenizer, words=words) for words in (34, 18))
    assert one != other
    assert [a - b for a, b in zip(more["length"], fewer["length"], strict=True)] == [16, 16, 16, 16, 0]


def test_text_has_the_same_items_and_key_whether_the_model_takes_images_or_not(data_yaml, tokenizer):
    text, report, key = opened(str(data_yaml), tokenizer)
    also, same_report, same_key = with_images(str(data_yaml), tokenizer)
    assert (also.to_list(), same_report, same_key) == (text.to_list(), report, key)
