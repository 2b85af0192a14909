"""A sentencepiece tokenizer in an export: transformers must give the ids that the model was trained on."""

from __future__ import annotations

import json

import pytest
from conftest import LLAMA_TOKENIZER, corpus, train_tokenizer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from accessory.models.tokenizer import Tokenizer, find_tokenizer
from accessory.models.tokenizer_export import PROBES, save_for_transformers


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory) -> Tokenizer:
    """With LLaMA 2's settings, and its scores of runs of spaces, which are merged last though their numbers are low."""
    indented = [" " * (i % 9) + "wrap  it   now" for i in range(200)]
    file = train_tokenizer(tmp_path_factory.mktemp("llama"), [*corpus(), *indented], 420, **LLAMA_TOKENIZER)
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(file.read_bytes())
    spaces = [piece for piece in proto.pieces if set(piece.piece) == {"\u2581"}]
    assert len(spaces) > 1
    for piece in spaces:
        piece.score = -1e9
    file.write_bytes(proto.SerializeToString())
    return Tokenizer(file)


def test_transformers_reads_the_ids_and_the_text_of_the_original(llama_like, tmp_path):
    save_for_transformers(llama_like, tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in (*PROBES, *corpus()[:50], "", " ", "x" * 300, "    four   =  3"):
        ids = llama_like.encode(text, bos=True, eos=False)
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == llama_like.decode(ids), text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (llama_like.bos_id, llama_like.eos_id)


def test_the_original_beside_it_is_what_we_read(llama_like, tmp_path):
    save_for_transformers(llama_like, tmp_path)
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.model"
    assert Tokenizer(tmp_path).fingerprint() == llama_like.fingerprint()


def test_a_model_that_rewrites_text_is_left_to_transformers_with_bos(tokenizer, tmp_path):
    """It turns newlines into spaces, which the conversion does not."""
    save_for_transformers(tokenizer, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"] == "<s>"
    assert AutoTokenizer.from_pretrained(str(tmp_path))("the text").input_ids[0] == tokenizer.bos_id
