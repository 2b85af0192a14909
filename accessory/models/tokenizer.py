"""One face for sentencepiece models and Hugging Face tokenizers.

transformers' own LLaMA tokenizer encodes a bare `tokenizer.model` without BOS since version 5, so sentencepiece files
are read with sentencepiece itself; BOS and EOS are added here, where the caller asks for them, and nowhere else.
"""

from __future__ import annotations

import hashlib
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from accessory.errors import UserError

SENTENCEPIECE_FILE = "tokenizer.model"
HF_FILES = ("tokenizer.json", "tokenizer_config.json")
CONVERTED = "converted_from_tokenizer_model"  # in the latter: the file beside it is the original


class Tokenizer:
    """path: a sentencepiece `*.model` file, or a folder with tokenizer.json or tokenizer.model.

    bos_id, eos_id: int; n_words: number of token ids.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise UserError(f"--tokenizer_path {path}: no such file or folder")
        if self.path.is_dir():
            found = find_tokenizer(self.path)
            if found is None:
                raise UserError(f"--tokenizer_path {path}: holds neither tokenizer.json nor {SENTENCEPIECE_FILE}")
            self.path = found
        elif self.path.name == HF_FILES[0]:
            self.path = self.path.parent
        elif self.path.suffix != ".model":
            raise UserError(f"--tokenizer_path {path}: no tokenizer; name a *.model file of sentencepiece, or a folder")
        self.is_sentencepiece = self.path.is_file() and self.path.suffix == ".model"
        self._open_sentencepiece() if self.is_sentencepiece else self._open_huggingface()

    def _open_sentencepiece(self) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._inner = SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError):
            raise UserError(f"{self.path}: not a sentencepiece model (is it truncated?)") from None
        self.bos_id, self.eos_id = self._inner.bos_id(), self._inner.eos_id()
        self.n_words, self.chat_template = self._inner.vocab_size(), None
        self.bos_text: Optional[str] = None

    def _open_huggingface(self) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        folder = self.path if self.path.is_dir() else self.path.parent
        is_whole = (folder / HF_FILES[1]).is_file()
        reader = AutoTokenizer if is_whole else PreTrainedTokenizerFast
        try:
            self._inner = reader.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the library raises whatever its parsers raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            hint = "" if is_whole else f"; {HF_FILES[1]} is missing"
            raise UserError(f"{folder}: tokenizer cannot be read ({reason}){hint}") from None
        self.path = folder
        self.eos_id = self._inner.eos_token_id
        if self.eos_id is None:
            where = HF_FILES[1] if is_whole else f"{HF_FILES[1]}, which is missing"
            raise UserError(f"{folder}: the tokenizer names no EOS token; set eos_token in {where}")
        bos = self._inner.bos_token_id
        self.bos_id = self.eos_id if bos is None else bos
        self.n_words, self.chat_template = len(self._inner), self._inner.chat_template
        self.bos_text = self._inner.bos_token  # a chat template may write it out

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        # verbose: a warning about texts longer than a model's positions, which are cut into windows here.
        options = {} if self.is_sentencepiece else {"add_special_tokens": False, "verbose": False}
        ids = self._inner.encode(text, **options)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer, left to itself, puts BOS in front of a text: LLaMA's do."""
        return self.is_sentencepiece or self._inner.encode("a")[:1] == [self.bos_id]

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        if self.is_sentencepiece:
            special = (self.bos_id, self.eos_id)
            # A model may answer with a row of its embedding that no token has (`check_vocabulary`).
            return self._inner.decode([i for i in ids if i < self.n_words and i not in special])
        return self._inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def render_chat(self, messages: list[dict[str, str]], answer_follows: bool) -> str:
        """Messages ({"role", "content"}) -> text in the tokenizer's own chat template."""
        if self.chat_template is None:
            raise UserError(f"{self.path}: the tokenizer has no chat template; choose another prompt_type")
        try:
            return self._inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_follows)
        except Exception as error:  # a template raises what its author chose
            raise UserError(f"the chat template of {self.path} refuses it ({error})") from None

    @cached_property
    def chat_end_id(self) -> Optional[int]:
        """The special token with which the chat template ends an answer; None if it has none. It need not be EOS."""
        if self.chat_template is None:
            return None
        asked, answer = [{"role": "user", "content": "question"}], "answer"
        try:
            prompt = self.render_chat(asked, answer_follows=True)
            whole = self.render_chat([*asked, {"role": "assistant", "content": answer}], answer_follows=False)
        except UserError:
            return None
        behind = whole.removeprefix(prompt).partition(answer)[2].strip()
        first = self.encode(behind, bos=False, eos=False)[:1]
        return first[0] if first and self.decode(first) == "" else None

    def save(self, folder: Path) -> None:
        """Copy what makes this tokenizer into `folder`, under the names that are looked for."""
        if self.is_sentencepiece:
            shutil.copyfile(self.path, folder / SENTENCEPIECE_FILE)
        else:
            self._inner.save_pretrained(str(folder))

    def fingerprint(self) -> str:
        """Digest of everything that decides the ids: 16 hex digits."""
        if self.is_sentencepiece:
            content = self._inner.serialized_model_proto()
        else:
            content = (self._inner.backend_tokenizer.to_str() + str(self.chat_template)).encode()
        return hashlib.sha256(content + f"{self.bos_id},{self.eos_id}".encode()).hexdigest()[:16]


def find_tokenizer(folder: Path) -> Optional[Path]:
    """A tokenizer in a checkpoint folder: Hugging Face's files first, as only they hold added tokens and templates,
    unless they were made from a sentencepiece model (`tokenizer_export.py`)."""
    if all((folder / name).is_file() for name in HF_FILES) and not _is_converted(folder):
        return folder
    if (folder / SENTENCEPIECE_FILE).is_file():
        return folder / SENTENCEPIECE_FILE
    return folder if (folder / HF_FILES[0]).is_file() else None


def _is_converted(folder: Path) -> bool:
    has_original = (folder / SENTENCEPIECE_FILE).is_file()
    return has_original and f'"{CONVERTED}"' in (folder / HF_FILES[1]).read_text(errors="replace")


def require_tokenizer(model: Any) -> Tokenizer:
    """The tokenizer of a model that is to work on text."""
    if model.tokenizer is None:
        raise UserError("no tokenizer in the folders of --pretrained_path; name it with --tokenizer_path")
    return model.tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer made for another model.

    A model may have a few rows more than its tokenizer has tokens (rounded up for speed), never fewer.
    """
    if tokenizer.n_words > vocab_size or tokenizer.n_words < 0.95 * vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.path} has {tokenizer.n_words:,} tokens, the model's embedding {vocab_size:,} rows: "
            "they do not belong together; give the model's own with --tokenizer_path"
        )
