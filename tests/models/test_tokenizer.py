"""Which files make a tokenizer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from accessory.errors import UserError
from accessory.models.tokenizer import Tokenizer, find_tokenizer, require_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A folder with tokenizer.json alone."""
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"wrap": 0, "it": 1, "</s>": 2, "<unk>": 3}, "unk_token": "<unk>"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return tmp_path


def test_tokenizer_json_alone_is_enough_where_an_eos_is_known(folder):
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
    tokenizer = Tokenizer(find_tokenizer(folder))
    assert tokenizer.encode("wrap it", bos=False, eos=True) == [0, 1, 2]
    assert Tokenizer(folder).fingerprint() == tokenizer.fingerprint()


def test_tokenizer_json_without_an_eos_names_the_missing_file(folder):
    with pytest.raises(UserError, match=r"no EOS token; set eos_token in tokenizer_config\.json, which is missing"):
        Tokenizer(folder)


def test_tokenizer_json_that_cannot_be_read_alone_names_the_missing_file(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer cannot be read \(.*\); tokenizer_config\.json is missing"):
        Tokenizer(folder)


def test_sentencepiece_is_preferred_to_tokenizer_json_alone(folder, tokenizer_file):
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    assert find_tokenizer(folder) == folder / "tokenizer.model"


def test_rows_of_the_embedding_that_no_token_has_are_no_text(tokenizer_file):
    tokenizer = Tokenizer(tokenizer_file)
    ids = tokenizer.encode("a line of text", bos=False, eos=False)
    assert tokenizer.decode([*ids, tokenizer.n_words, tokenizer.n_words + 3]) == "a line of text"


def test_a_file_that_is_no_tokenizer_is_refused(folder):
    (folder / "params.json").write_text("{}")
    with pytest.raises(UserError, match=r"params\.json: no tokenizer; name a \*\.model file"):
        Tokenizer(folder / "params.json")


def test_a_model_without_a_tokenizer_says_how_to_name_one(tokenizer):
    assert require_tokenizer(SimpleNamespace(tokenizer=tokenizer)) is tokenizer
    with pytest.raises(UserError, match="name it with --tokenizer_path"):
        require_tokenizer(SimpleNamespace(tokenizer=None))
