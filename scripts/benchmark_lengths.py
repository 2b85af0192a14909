"""Rows of the lengths of real data, and how many of their tokens are answers.

    python scripts/benchmark_lengths.py my_data.yaml --tokenizer_path tokenizer.model --max_words 512 \
        --source "what this is" --output my_lengths.json
    python scripts/benchmark.py --task lengths --lengths my_lengths.json --models 7b --batches 16

Rows of one length flatter everyone: instruction data has short and long rows. The usual way pads the rows of a batch to
the longest of them and learns the answers alone, so what counts is answer tokens a second. The file holds lengths, no
text: {"source": …, "max_words": …, "pairs": [[length, answer tokens], …]}. benchmark_lengths.json is the data that
the issue names (its `source`).
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401

import accessory  # noqa: F401

# isort: split
import torch  # after accessory, which sets what torch reads when it is loaded
from benchmark_steps import DEVICE, Batch, seeded

DEFAULT = Path(__file__).with_name("benchmark_lengths.json")
IGNORE = -100
Pair = tuple[int, int]


@functools.lru_cache
def read_pairs(path: str) -> list[Pair]:
    """(length, answer tokens) of the items, in an order that is not the file's and always the same."""
    pairs = [tuple(pair) for pair in json.loads(Path(path).read_text())["pairs"]]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    return [pairs[i] for i in order]


def padded_rows(case: dict[str, Any], vocab: int, number: int) -> tuple[Batch, int]:
    """The next `batch` items, padded on the right to the longest; labels are -100 but at the answers."""
    pairs, batch = read_pairs(case["lengths"]), case["batch"]
    chosen = [pairs[i % len(pairs)] for i in range(number * batch, (number + 1) * batch)]
    shape = batch, max(length for length, _ in chosen)
    input_ids = torch.randint(vocab, shape, generator=seeded(case, number))
    labels, mask = torch.full(shape, IGNORE), torch.zeros(shape, dtype=torch.int64)
    for row, (length, answer) in enumerate(chosen):
        labels[row, length - answer : length] = input_ids[row, length - answer : length]
        mask[row, :length] = 1
    tensors = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}, sum(answer for _, answer in chosen)


@functools.lru_cache
def _packed(path: str, width: int) -> list[list[int]]:
    import numpy as np

    from accessory.data.packing import pack

    lengths = np.array([min(length, width) for length, _ in read_pairs(path)])
    rows = pack(lengths, np.arange(len(lengths)), width)
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()]


def packed_rows(case: dict[str, Any], vocab: int, number: int) -> tuple[Batch, int]:
    """As `data.packing=true` makes them: whole items behind each other in rows of `length` tokens, as many rows as hold
    about `batch` items."""
    from accessory.data.packing import collate

    width, pairs = case["length"], read_pairs(case["lengths"])
    rows = _packed(case["lengths"], width)
    count = max(1, round(case["batch"] * len(rows) / len(pairs)))
    generator, items = seeded(case, number), []
    for i in range(number * count, (number + 1) * count):
        row = []
        for item in rows[i % len(rows)]:
            length, answer = pairs[item]
            ids = torch.randint(vocab, (min(length, width),), generator=generator).tolist()
            row.append((ids, [IGNORE] * (len(ids) - answer) + ids[len(ids) - answer :]))
        items.append(row)
    batch = {name: tensor.to(DEVICE) for name, tensor in collate(items, width, 0).items()}
    return batch, int((batch["targets"] != IGNORE).sum())


def measure_lengths(data_config: str, tokenizer_path: str, max_words: int) -> list[Pair]:
    """(length, answer tokens) of every item of a data config, truncated as training truncates them; those without an
    answer left are skipped."""
    from accessory.data.prompts import encode, single_turn
    from accessory.data.sources import read_data_config, read_items
    from accessory.models.tokenizer import Tokenizer

    tokenizer, pairs = Tokenizer(tokenizer_path), []
    for entry in read_data_config(data_config, None):
        for _, item in read_items(entry.path):
            _, labels = encode(single_turn(item, entry.prompt_type, tokenizer), tokenizer)
            answer = sum(label != IGNORE for label in labels[1:max_words])
            if answer:
                pairs.append((min(len(labels), max_words), answer))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_config")
    parser.add_argument("--tokenizer_path", required=True)
    parser.add_argument("--max_words", type=int, default=512)
    parser.add_argument("--source", default="")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    pairs = measure_lengths(options.data_config, options.tokenizer_path, options.max_words)
    head = {"source": options.source or options.data_config, "max_words": options.max_words}
    options.output.write_text(json.dumps(head | {"pairs": pairs}) + "\n")
    total, answers = (sum(column) for column in zip(*pairs, strict=True))
    print(f"{len(pairs)} items, {total / len(pairs):.0f} tokens each, {answers / len(pairs):.0f} of them answer")


if __name__ == "__main__":
    main()
