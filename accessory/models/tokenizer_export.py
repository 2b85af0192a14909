"""A tokenizer for other programs: Hugging Face's files in place of a bare `tokenizer.model`.

What transformers makes of a LLaMA's `tokenizer.model` by itself (5.x) merges in another order, so that runs of spaces
get other ids, and writes no BOS where no `tokenizer_config.json` asks for it: the model would not read its prompts as
it was trained to.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from accessory.models.tokenizer import CONVERTED, HF_FILES, Tokenizer

SPACE = "\u2581"
# Where conversions go wrong: spaces, lines, bytes, normalization, digits, scripts.
PROBES = (
    "The quick brown fox, 12345 times: e = mc^2!",
    "  two in front, ten          within, and behind  ",
    "a\n\n\tindented\r\n    if x:\n        return [1,  2]\n",
    "naïve café, ﬁne ２０２６ ½ ™ e\u0301",
    "中文，日本語、한국어 \U0001f600\u200d\U0001f680 \u00a0 \x00",
    "### Instruction:\nWrap it.\n\n### Response:",
)


def save_for_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer into `folder`; of a sentencepiece model also what AutoTokenizer reads it from, where that
    gives the same ids."""
    tokenizer.save(folder)
    if not tokenizer.is_sentencepiece:
        return
    converted, config = _converted(tokenizer), folder / HF_FILES[1]
    if all(converted.encode(text) == tokenizer.encode(text, bos=True, eos=False) for text in PROBES):
        converted.save_pretrained(str(folder))
        content = json.loads(config.read_text())
        content["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that all versions know
    else:  # transformers' own conversion then, with BOS at least
        content = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
        content |= _special(tokenizer)
    config.write_text(json.dumps(content | {CONVERTED: True}, indent=2) + "\n")


def _converted(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    inner = tokenizer._inner
    pieces = [inner.id_to_piece(i) for i in range(tokenizer.n_words)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # By score, not by number: LLaMA's runs of spaces have low numbers, and are merged last.
    scores = {piece: inner.get_score(i) for i, piece in enumerate(pieces)}
    others = {piece for i, piece in enumerate(pieces) if inner.is_control(i) or inner.is_byte(i) or inner.is_unknown(i)}
    merges, special = generate_merges(vocab, scores, skip_tokens=others), _special(tokenizer)
    backend = BackendTokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=special.get("unk_token"), fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    bos = special["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def _special(tokenizer: Tokenizer) -> dict[str, str]:
    inner = tokenizer._inner
    ids = {"bos_token": inner.bos_id(), "eos_token": inner.eos_id(), "unk_token": inner.unk_id()}
    return {name: inner.id_to_piece(i) for name, i in ids.items() if i >= 0}
