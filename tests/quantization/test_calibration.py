"""Files of any documented kind to calibration rows: what they hold, how samples are chosen, joined and cut, and what is
refused. Texts are tokenized and prompts are made by hand for comparison."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import alpaca_items, corpus
from PIL import Image

from accessory.config import BadImages, ImageTransform, PromptType
from accessory.data.images import ImageInput, load_pixels
from accessory.data.packing import IMAGE_SLOT
from accessory.data.prompts import SYSTEM, format_prompt
from accessory.errors import UserError
from accessory.quantization.calibration import read_calibration
from accessory.quantization.calibration.samples import Samples
from accessory.quantization.calibration.sources import parse_dataset
from accessory.quantize_options import CalibrationConfig

BOS, EOS = 1, 2
WORDS = 8  # of an image
IMAGE = ImageInput(size=28, words=WORDS)
TURNS = [{"from": "human", "value": "Wrap the text"}, {"from": "gpt", "value": "short lines"}]
DIALOG = f"{SYSTEM}\n\n### Human: Wrap the text\n### Assistant: short lines\n###"


def write(path: Path, content) -> Path:
    """Text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines_file(folder: Path, count: int = 60, name: str = "text.txt") -> Path:
    return write(folder / name, "\n".join(corpus()[:count]))


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return path


def read(dataset, tokenizer, nsamples=2, seqlen=32, seed=0, image=None, **settings):
    config = CalibrationConfig(dataset=str(dataset), **settings)
    return read_calibration(config, tokenizer, nsamples, seqlen, seed, image)


def all_samples(dataset, tokenizer, image=None, **settings) -> list[str]:
    """The text of every sample of a dataset, in order; with <EOS> where it follows and (file) in front for an image."""
    config = CalibrationConfig(dataset=str(dataset), **settings)
    found = []
    for request in parse_dataset(config):
        samples = Samples(request, config, tokenizer, takes_images=image is not None)
        for i in range(len(samples)):
            if (sample := samples.read(i)) is not None:
                mark = f"({Path(sample.image).name})" if sample.image else ""
                found.append(mark + sample.example.text + "<EOS>" * sample.example.learn_eos)
    return found


def split_at_bos(ids: list[int]) -> list[list[int]]:
    starts = [i for i, token in enumerate(ids) if token == BOS]
    return [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def ids_of(text: str, tokenizer) -> list[int]:
    return [BOS, *tokenizer.encode(text, bos=False, eos=False)]


def alpaca(item: dict) -> str:
    return format_prompt(item, PromptType.alpaca) + item["output"]


# --- texts -----------------------------------------------------------------------------------------------------------


def test_rows_are_the_lines_of_a_file_in_some_order_each_after_bos_cut_without_a_gap(tmp_path, tokenizer):
    data = read(lines_file(tmp_path), tokenizer, nsamples=12, seqlen=40)
    assert data.rows.shape == (12, 40) and data.rows.dtype == torch.int64
    expected = [ids_of(line.strip(), tokenizer) for line in corpus()[:60]]
    *whole, last = split_at_bos(data.rows.flatten().tolist())
    for piece in whole:
        expected.remove(piece)  # each line once
    assert any(line[: len(last)] == last for line in expected)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(tmp_path, tokenizer):
    file = lines_file(tmp_path)
    first, again, other = (read(file, tokenizer, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.rows, again.rows) and first.fingerprint == again.fingerprint
    assert not torch.equal(first.rows, other.rows) and first.fingerprint != other.fingerprint


def test_more_rows_begin_with_the_same_rows(tmp_path, tokenizer):
    file = lines_file(tmp_path)
    assert torch.equal(read(file, tokenizer, nsamples=9).rows[:4], read(file, tokenizer, nsamples=4).rows)


def test_a_whole_file_is_one_document_whose_rows_are_windows_of_it(tmp_path, tokenizer):
    file = lines_file(tmp_path)
    ids = ids_of(file.read_text(), tokenizer)
    windows = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    rows = read(file, tokenizer, nsamples=10, whole_file=True).rows.tolist()
    assert all(row in windows for row in rows) and len({tuple(row) for row in rows}) == 10
    assert rows != windows[:10]
    assert read(f"{file}:whole", tokenizer, nsamples=10).rows.tolist() == rows


def test_without_concat_rows_are_the_starts_of_samples_that_are_long_enough(tmp_path, tokenizer):
    texts = [" ".join(corpus()[i : i + 6]) for i in range(0, 30, 6)]
    file = write(tmp_path / "a.json", [*texts, "short", "lines"])
    starts = [ids_of(text, tokenizer)[:50] for text in texts]
    rows = read(file, tokenizer, nsamples=5, seqlen=50, concat=False).rows.tolist()
    assert sorted(rows) == sorted(starts)
    assert read(f"{file}:concat=false", tokenizer, nsamples=5, seqlen=50).rows.tolist() == rows


def test_without_concat_too_few_long_samples_are_named_with_their_lengths(tmp_path, tokenizer):
    long = " ".join(corpus()[:6])
    file = write(tmp_path / "a.json", [long, "short", "lines"])
    lengths = sorted(len(ids_of(text, tokenizer)) for text in (long, "short", "lines"))
    with pytest.raises(UserError) as error:
        read(file, tokenizer, nsamples=2, seqlen=50, concat=False)
    assert str(error.value) == (
        f"calib.dataset: 1 of 2 samples of at least 50 tokens ({file}: 1 rows from 3 of 3 samples; samples have "
        f"{lengths[1]} tokens (median) and at most {lengths[2]}): join samples with calib.concat=true, or set "
        "calib.nsamples=1, or set a smaller calib.seqlen, or name more data"
    )


def test_too_little_text_is_an_error_that_names_the_rows_there_are(tmp_path, tokenizer):
    file = lines_file(tmp_path, count=8)
    tokens = sum(len(ids_of(line.strip(), tokenizer)) for line in corpus()[:8])
    rows = tokens // 32
    with pytest.raises(UserError) as error:
        read(file, tokenizer, nsamples=500)
    assert str(error.value) == (
        f"calib.dataset: {rows} of 500 rows of 32 tokens ({file}: {rows} rows from 8 of 8 samples): set "
        f"calib.nsamples={rows}, or set a smaller calib.seqlen, or name more data"
    )
    assert len(read(file, tokenizer, nsamples=rows).rows) == rows


def test_with_allow_fewer_the_rows_there_are_suffice_but_not_none(tmp_path, tokenizer):
    file = lines_file(tmp_path, count=8)
    tokens = sum(len(ids_of(line.strip(), tokenizer)) for line in corpus()[:8])
    assert len(read(file, tokenizer, nsamples=500, allow_fewer=True).rows) == tokens // 32
    with pytest.raises(UserError, match=r"0 of 500 rows of 4,096 tokens"):
        read(file, tokenizer, nsamples=500, seqlen=4096, allow_fewer=True)


def test_skip_long_leaves_out_and_counts_texts_longer_than_a_row(tmp_path, tokenizer):
    long, short = " ".join(corpus()[:9]), corpus()[:12]
    data = read(write(tmp_path / "a.json", [long, *short]), tokenizer, nsamples=3, seqlen=60, skip_long=True)
    known = [ids_of(text, tokenizer) for text in short]
    assert all(piece in known for piece in split_at_bos(data.rows.flatten().tolist())[:-1])
    with pytest.raises(UserError, match=r"1 left out: longer than a row.*cut long texts with calib.skip_long=false"):
        read(tmp_path / "a.json", tokenizer, nsamples=300, seqlen=60, skip_long=True)


def test_a_sample_of_training_ends_in_eos_as_in_training(tmp_path, tokenizer):
    item = alpaca_items(1)[0]
    file = write(tmp_path / "a.json", [item] * 4)
    once = tokenizer.encode(alpaca(item), bos=True, eos=True)
    assert read(file, tokenizer, nsamples=1, seqlen=2 * len(once)).rows[0].tolist() == once * 2


# --- kinds of files --------------------------------------------------------------------------------------------------


def test_blank_lines_are_no_samples(tmp_path, tokenizer):
    assert all_samples(write(tmp_path / "a.txt", "\ufeffone\n\n  two \r\n\n"), tokenizer) == ["one", "two"]


ITEMS = {
    "a string": ("some text", "some text"),
    "text": ({"text": "some text", "meta": {"set": "pile"}, "url": "http://x"}, "some text"),
    "a single key": ({"sentence": "some text"}, "some text"),
    "alpaca": (alpaca_items(1)[0], alpaca(alpaca_items(1)[0]) + "<EOS>"),
    "alpaca with its prompt": (alpaca_items(1)[0] | {"text": "Below"}, alpaca(alpaca_items(1)[0]) + "<EOS>"),
    "conversations": ({"id": "1", "conversations": TURNS}, DIALOG),
    "messages": (
        {"messages": [{"role": "user", "content": "Wrap the text"}, {"role": "assistant", "content": "short lines"}]},
        DIALOG,
    ),
    "a question": ({"question": "some text", "image": None, "audio": ""}, "some text"),
    "question and answer": (
        {"question": "Wrap it", "answer": "short"},
        alpaca({"instruction": "Wrap it", "output": "short"}) + "<EOS>",
    ),
}


@pytest.mark.parametrize("kind", ITEMS)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_every_kind_of_item_becomes_its_text(kind, ending, tmp_path, tokenizer):
    item, text = ITEMS[kind]
    content = [item, item] if ending == "json" else f"{json.dumps(item)}\n{json.dumps(item)}\n"
    assert all_samples(write(tmp_path / f"a.{ending}", content), tokenizer) == [text, text]


def test_answers_are_left_out_on_request(tmp_path, tokenizer):
    file = write(tmp_path / "samples.json", [{"question": "Wrap it", "answer": "short"}])
    assert all_samples(file, tokenizer, add_answer=False) == ["Wrap it"]


def test_a_table_is_read_as_in_training(tmp_path, tokenizer):
    file = write(tmp_path / "a.csv", "instruction,output\nWrap,lines\n")
    assert all_samples(file, tokenizer) == [alpaca({"instruction": "Wrap", "output": "lines"}) + "<EOS>"]


def test_a_data_yaml_is_read_as_in_training(tmp_path, tokenizer):
    write(tmp_path / "a.json", [{"instruction": "Wrap", "output": "lines"}])
    write(tmp_path / "b.json", [{"conversations": TURNS}])
    metas = [{"path": "a.json", "prompt_type": "None"}, {"path": "b.json", "preprocess": "single_turn_llava"}]
    file = write(tmp_path / "data.yaml", yaml.safe_dump({"META": metas}))
    turn = {"instruction": "Wrap the text", "output": "short lines"}
    assert all_samples(file, tokenizer) == ["Wraplines<EOS>", alpaca(turn) + "<EOS>"]


def test_of_a_folder_samples_json_is_read_before_all_else(tmp_path, tokenizer):
    write(tmp_path / "samples.json", [{"question": "asked"}])
    write(tmp_path / "other.txt", "not this")
    assert all_samples(tmp_path, tokenizer) == ["asked"]


def test_a_folder_without_samples_json_gives_its_files(tmp_path, tokenizer):
    write(tmp_path / "b.json", ["three"])
    write(tmp_path / "a.txt", "one\ntwo")
    write(tmp_path / "notes.md", "not this")
    assert all_samples(tmp_path, tokenizer) == ["one", "two", "three"]


def test_a_data_set_that_llmcs_download_script_saved_is_read(tmp_path, tokenizer):
    datasets.Dataset.from_dict({"text": ["one", "", "two"], "meta": ["a", "b", "c"]}).save_to_disk(tmp_path / "pileval")
    assert all_samples(tmp_path / "pileval", tokenizer) == ["one", "two"]


def chat(messages, answer_follows):
    return "".join(f"[{m['role']}] {m['content']}\n" for m in messages) + ("[assistant]" if answer_follows else "")


def test_the_chat_template_is_put_around_texts_questions_and_turns(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "render_chat", chat)
    items = ["a text", {"question": "Why?", "answer": "So."}, {"conversations": TURNS}]
    file = write(tmp_path / "a.json", items)
    expected = [
        "[user] a text\n[assistant]",
        "[user] Why?\n[assistant] So.",
        "[user] Wrap the text\n[assistant] short lines",
    ]
    assert all_samples(file, tokenizer, apply_chat_template=True) == expected
    assert all_samples(f"{file}:apply_chat_template", tokenizer) == expected


# --- several files ---------------------------------------------------------------------------------------------------


def letters_file(folder: Path, letter: str, count: int) -> Path:
    return write(folder / f"{letter}.txt", "\n".join([" ".join(letter * 30)] * count))


def shares(data, tokenizer) -> dict[str, int]:
    texts = [set(tokenizer.decode(row).replace(" ", "")) for row in data.rows.tolist()]
    return {letter: sum(text == {letter} for text in texts) for letter in "abc"}


def test_num_gives_exactly_so_many_rows_and_the_others_share_the_rest(tmp_path, tokenizer):
    a, b, c = (letters_file(tmp_path, letter, 40) for letter in "abc")
    data = read(f"{a}:num=3, {b},{c}", tokenizer, nsamples=13)
    assert shares(data, tokenizer) == {"a": 3, "b": 5, "c": 5}
    assert [report.rows for report in data.report] == [3, 5, 5]


def test_a_small_file_gives_what_it_has_and_the_others_make_up_for_it(tmp_path, tokenizer):
    a, b = letters_file(tmp_path, "a", 4), letters_file(tmp_path, "b", 100)
    found = shares(read(f"{a},{b}", tokenizer, nsamples=30), tokenizer)
    assert found == {"a": 4 * len(ids_of(" ".join("a" * 30), tokenizer)) // 32, "b": 30 - found["a"], "c": 0}


def test_numbers_that_do_not_sum_to_nsamples_are_refused(tmp_path, tokenizer):
    a, b = letters_file(tmp_path, "a", 9), letters_file(tmp_path, "b", 9)
    with pytest.raises(UserError, match=r"asks for 4 rows \(num\), calib.nsamples=3: set calib.nsamples=4$"):
        read(f"{a}:num=2,{b}:num=2", tokenizer, nsamples=3)
    with pytest.raises(UserError, match=r"calib.nsamples=9: set calib.nsamples=4, or leave num out where the rest"):
        read(f"{a}:num=2,{b}:num=2", tokenizer, nsamples=9)
    with pytest.raises(UserError, match=r"calib.nsamples=2: leaves no row for .*b.txt; set calib.nsamples=3 or more"):
        read(f"{a}:num=2,{b}", tokenizer, nsamples=2)


def test_a_file_that_has_fewer_rows_than_its_num_is_refused(tmp_path, tokenizer):
    a = letters_file(tmp_path, "a", 4)
    with pytest.raises(UserError, match=r"3 of 7 rows of 32 tokens .*: set num=3"):
        read(f"{a}:num=7", tokenizer, nsamples=7)


@pytest.mark.parametrize("name", ["a,b.txt", "a:b.txt", "my file.txt"])
def test_a_path_may_hold_commas_and_colons(name, tmp_path, tokenizer):
    file = write(tmp_path / name, "one")
    assert all_samples(file, tokenizer) == ["one"]
    assert all_samples(f'"{file}":concat=false,{write(tmp_path / "c.txt", "two")}', tokenizer) == ["one", "two"]


# --- images ----------------------------------------------------------------------------------------------------------


def image_folder(folder: Path, images: int, texts: int = 0, words: int = 12) -> Path:
    """llmc's: questions on pictures, and questions alone."""
    vocabulary = " ".join(corpus()).split()
    items = []
    for i in range(images):
        question, answer = (" ".join(vocabulary[i : i + count]) for count in (3, words))
        items.append({"image": f"images/{i}.png", "question": question, "answer": answer})
    for i in range(images):
        picture(folder / f"images/{i}.png", seed=i)
    write(folder / "samples.json", items + [{"question": " ".join(vocabulary[i : i + 20])} for i in range(texts)])
    return folder


def slot_runs(row: list[int]) -> list[int]:
    """Lengths of the runs of slots, each of which has BOS in front."""
    runs, i = [], 0
    while i < len(row):
        if row[i] == IMAGE_SLOT:
            assert row[i - 1] == BOS
            end = next((j for j in range(i, len(row)) if row[j] != IMAGE_SLOT), len(row))
            runs.append(end - i)
            i = end
        i += 1
    return runs


@pytest.mark.parametrize("texts", [0, 20], ids=["images alone", "images and texts"])
@pytest.mark.parametrize("seqlen", [30, 64, 131, 200])
def test_images_stand_whole_behind_bos_and_every_row_opens_with_one(texts, seqlen, tmp_path, tokenizer):
    data = read(image_folder(tmp_path, 40, texts), tokenizer, nsamples=6, seqlen=seqlen, image=IMAGE)
    assert data.rows.shape == (6, seqlen)
    for i, row in enumerate(data.rows.tolist()):
        assert row[:2] == [BOS, IMAGE_SLOT]
        assert slot_runs(row) == [WORDS] * len(data.images[i])
    assert len({path for row in data.images for path in row}) == data.report[0].images  # no image twice


def test_the_text_behind_the_slots_is_that_of_the_image(tmp_path, tokenizer):
    folder = image_folder(tmp_path, 9)
    items = json.loads((folder / "samples.json").read_text())
    data = read(folder, tokenizer, nsamples=3, seqlen=260, image=IMAGE)
    for row, images in zip(data.rows.tolist(), data.images, strict=True):
        pieces = [piece for piece in split_at_bos(row) if piece[1] == IMAGE_SLOT]
        for piece, image in zip(pieces, images, strict=True):
            item = items[int(Path(image).stem)]
            text = alpaca({"instruction": item["question"], "output": item["answer"]})
            whole = [BOS, *[IMAGE_SLOT] * WORDS, *tokenizer.encode(text, bos=False, eos=True)]
            assert piece == whole[: len(piece)]


def test_a_long_text_goes_on_behind_the_image_of_the_next_row(tmp_path, tokenizer):
    text, image = " ".join(corpus()[:30]), {"image": str(picture(tmp_path / "a.png")), "question": "why"}
    file = write(tmp_path / "samples.json", [text, *[image] * 4])
    prompt = tokenizer.encode(format_prompt({"instruction": "why"}, PromptType.alpaca), bos=False, eos=False)
    shown = [BOS, *[IMAGE_SLOT] * WORDS, *prompt]
    found = []
    for row in read(file, tokenizer, nsamples=4, seqlen=150, image=IMAGE).rows.tolist():
        while row[:2] == [BOS, IMAGE_SLOT]:
            assert row[: len(shown)] == shown[: len(row)]
            row = row[len(shown) :]
        found += row
    assert len(found) > 100 and found == ids_of(text, tokenizer)[: len(found)]


def test_rows_without_an_image_follow_where_images_are_used_up(tmp_path, tokenizer):
    data = read(image_folder(tmp_path, 2, texts=40), tokenizer, nsamples=5, seqlen=64, image=IMAGE)
    assert [len(row) for row in data.images] == [1, 1, 0, 0, 0]
    assert data.pixels(2) is None


def test_an_end_too_short_for_an_image_is_filled_with_the_text_of_the_one_that_waits(tmp_path, tokenizer):
    image = {"image": str(picture(tmp_path / "a.png")), "question": "why"}
    file = write(tmp_path / "samples.json", [image] * 4)
    prompt = tokenizer.encode(format_prompt({"instruction": "why"}, PromptType.alpaca), bos=False, eos=False)
    sample = [BOS, *[IMAGE_SLOT] * WORDS, *prompt]
    data = read(file, tokenizer, nsamples=2, seqlen=len(sample) + 5, image=IMAGE)
    assert data.rows.tolist() == [[*sample, BOS, *prompt[:4]]] * 2


def test_images_without_text_fill_rows_of_a_multiple_of_their_size_only(tmp_path, tokenizer):
    file = write(tmp_path / "samples.json", [{"image": str(picture(tmp_path / "a.png"))}] * 20)
    assert read(file, tokenizer, seqlen=27, image=IMAGE).rows.tolist() == [[BOS, *[IMAGE_SLOT] * WORDS] * 3] * 2
    with pytest.raises(
        UserError, match=r"the last 3 of 30 tokens of a row are too few for another: choose a multiple of 9"
    ):
        read(file, tokenizer, seqlen=30, image=IMAGE)


def test_pixels_are_those_of_the_row_in_order_by_the_deterministic_transform(tmp_path, tokenizer):
    data = read(image_folder(tmp_path, 12), tokenizer, nsamples=2, seqlen=240, image=IMAGE)
    assert len(data.images[0]) > 1
    expected = [load_pixels(path, ImageTransform.resized_center_crop, 28) for path in data.images[0]]
    assert torch.equal(data.pixels(0), torch.stack(expected))


TEXT = alpaca({"instruction": "Wrap the text", "output": "short lines"}) + "<EOS>"
ASKED = {"from": "human", "value": "<image>\nWrap the text"}
IMAGE_ITEMS = {
    "llava": ({"image": "a.png", "conversations": [ASKED, TURNS[1]]}, DIALOG),
    "alpaca": ({"image": "a.png", "instruction": "Wrap the text", "output": "short lines"}, TEXT),
    "caption": ({"image": "a.png", "caption": "short lines"}, "short lines<EOS>"),
    "llmc": ({"image": "a.png", "question": "<image>\nWrap the text", "answer": "short lines"}, TEXT),
    "llmc, a list": ({"image": ["a.png"], "question": "Wrap the text", "answer": "short lines"}, TEXT),
    "llmc, a question": ({"image": "a.png", "question": "Wrap the text"}, TEXT.removesuffix("short lines<EOS>")),
    "llmc, an image": ({"image": "a.png"}, ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMAGE_ITEMS)
def test_every_kind_of_image_item_becomes_its_image_and_text(kind, tmp_path, tokenizer):
    item, text = IMAGE_ITEMS[kind]
    picture(tmp_path / "a.png")
    assert all_samples(write(tmp_path / "b.json", [item]), tokenizer, IMAGE) == ["(a.png)" + text]


def test_images_are_looked_up_beside_the_file_or_in_image_root(tmp_path, tokenizer):
    file = write(tmp_path / "b.json", [{"image": "a.png", "caption": "wrap the text and the lines"}] * 9)
    root = picture(tmp_path / "elsewhere" / "a.png").parent
    with pytest.raises(UserError, match=r"item \d: image .*/a.png: no such file; mend it \(is calib.image_root right"):
        read(file, tokenizer, image=IMAGE)
    assert read(file, tokenizer, image=IMAGE, image_root=str(root)).images[0][0] == str(root / "a.png")


def test_broken_images_are_left_out_and_counted_on_request(tmp_path, tokenizer):
    folder = image_folder(tmp_path, 6, texts=9)
    for i in (1, 4):
        file = folder / f"images/{i}.png"
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match=r"leave such samples out with calib.bad_images=skip"):
        read(folder, tokenizer, nsamples=5, seqlen=120, image=IMAGE)
    data = read(folder, tokenizer, nsamples=5, seqlen=120, image=IMAGE, bad_images=BadImages.skip)
    assert sorted(Path(path).stem for row in data.images for path in row) == ["0", "2", "3", "5"]
    assert len(data.report[0].unreadable) == 2
    assert "2 left out: image unreadable (" in data.report[0].line()


def test_the_fingerprint_changes_with_an_images_content_and_not_with_its_place(tmp_path, tokenizer):
    def fingerprint(name: str) -> str:
        return read(tmp_path / name, tokenizer, image=IMAGE).fingerprint

    image_folder(tmp_path / "a", 5)
    image_folder(tmp_path / "b", 5)
    before = fingerprint("a")
    assert before == fingerprint("b") and len(before) == 16
    for i in range(5):
        picture(tmp_path / f"b/images/{i}.png", seed=i + 1)
    assert before != fingerprint("b")


def test_an_image_that_vanishes_meanwhile_is_named(tmp_path, tokenizer):
    data = read(image_folder(tmp_path, 3), tokenizer, nsamples=1, image=IMAGE)
    Path(data.images[0][0]).unlink()
    with pytest.raises(UserError, match=r"no such file, and it could be read when calibration began"):
        data.pixels(0)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NeelNanda/pile-10k", "wikitext2", "pileval", "missing.txt"])
def test_a_name_that_is_no_file_is_refused_and_nothing_is_downloaded(name, tokenizer):
    with pytest.raises(UserError, match=f"calib.dataset: '{name}': no such file or folder; nothing is downloaded, so"):
        read(name, tokenizer)


def test_no_dataset_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"calib.dataset is not set: calibration needs data"):
        read_calibration(CalibrationConfig(), tokenizer, 1, 8, 0)


OPTIONS = {
    "nmu=3": r"unknown option 'nmu=3' \(did you mean num\?\); known are num=ROWS, concat, whole, apply_chat_template",
    "train": r"unknown option 'train'; known .* \(a file has no splits\)",
    "num=many": "num=many: must be a number of rows, at least 1",
    "num=0": "num=0: must be a number",
    "concat=maybe": "concat=maybe: must be true or false",
    '"x"': 'expected path:option=value, or "path" where it holds , or :',
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_none_is_refused(option, tmp_path, tokenizer):
    with pytest.raises(UserError, match=OPTIONS[option]):
        read(f"{lines_file(tmp_path)}:{option}", tokenizer)


BAD_ITEMS = {
    "keys": ({"prompt": "a", "reply": "b"}, "of no kind that is read: its keys are prompt, reply; known are text"),
    "nothing": ({}, "of no kind that is read: its keys are none"),
    "a number": (3, "expected an object, found '3'"),
    "audio": ({"audio": "a.wav", "question": "why"}, "has 'audio', but the model takes text and images"),
    "a question of numbers": ({"question": [1], "answer": "a"}, r"'question' must be text, found '\[1\]'"),
    "a turn": ({"messages": [{"content": "a"}]}, "a turn is not"),
    "two images": ({"image": ["a.png", "b.png"], "question": "why"}, "has 2 images; an item takes one"),
    "half a character": ("a \ud800", r"holds '\\ud800', half of a surrogate pair"),
    "placeholders": ({"question": "<image>\nwhy", "answer": "so"}, "placeholders <image>: 1, images: 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ITEMS)
def test_an_item_of_no_known_kind_is_named_with_what_is_wrong(kind, tmp_path, tokenizer):
    item, message = BAD_ITEMS[kind]
    file = write(tmp_path / "a.json", [item])
    with pytest.raises(UserError, match=f"^{file}: item 0: {message}"):
        read(file, tokenizer, image=IMAGE)


def test_an_image_is_refused_by_a_language_model(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"item 0: has an image, but the model is language-only"):
        read(image_folder(tmp_path, 1), tokenizer)


def test_a_row_too_short_for_an_image_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"calib.seqlen=9: an image takes 8 positions behind BOS, so a row has no room"):
        read(image_folder(tmp_path, 1), tokenizer, seqlen=9, image=IMAGE)


def test_a_line_that_is_no_text_is_named(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"a.txt:2: not UTF-8 text \(byte 0\)"):
        read(tmp_path / "a.txt", tokenizer)


def test_a_line_that_is_no_json_is_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"a.jsonl:2: not valid JSON \(Expecting value, column 10\)"):
        read(write(tmp_path / "a.jsonl", '{"text": "fine"}\n{"text": oops}\n'), tokenizer)
    with pytest.raises(UserError, match=r"a.jsonl:1: not valid JSON \(nested too deeply"):
        read(write(tmp_path / "a.jsonl", "[" * 10**5), tokenizer)


def test_a_file_of_another_kind_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"unknown ending '.parquet'; .json, .jsonl and .csv are read"):
        read(write(tmp_path / "a.parquet", "x"), tokenizer)


def test_a_folder_without_data_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"holds neither samples.json nor .txt, .json, .jsonl, .csv files"):
        read(tmp_path, tokenizer)


def test_an_image_root_that_is_no_folder_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"calib.image_root=/nowhere: no such folder"):
        read(lines_file(tmp_path), tokenizer, image_root="/nowhere")


@pytest.mark.parametrize("name", ["a.json", "a.yaml"])
def test_whole_is_refused_where_there_is_no_document(name, tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"whole is for .txt files"):
        read(f"{write(tmp_path / name, ['a'])}:whole", tokenizer)


def test_saved_data_sets_with_splits_with_images_or_broken_are_refused(tmp_path, tokenizer):
    data = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "split")
    with pytest.raises(UserError, match=r"holds the splits train, test; name one, as in .*split/train"):
        read(tmp_path / "split", tokenizer)
    datasets.Dataset.from_dict({"image": ["a.png"], "question": ["why"]}).save_to_disk(tmp_path / "MME")
    with pytest.raises(UserError, match=r"a saved data set with images; write them to files, and samples.json beside"):
        read(tmp_path / "MME", tokenizer, image=IMAGE)
    (tmp_path / "split/train/state.json").write_text("{}")
    with pytest.raises(UserError, match=r"split/train: a saved data set that cannot be read"):
        read(tmp_path / "split/train", tokenizer)
