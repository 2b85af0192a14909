"""A whole run on a tiny model: what it leaves behind, what it refuses, and that killing it costs nothing."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
import yaml
from conftest import VOCAB, alpaca_items, corpus, write_data
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file

import accessory
import accessory.continuation as continuation
import accessory.finetune as finetune_module
import accessory.result as result
import accessory.resume as resume
from accessory.callbacks import read_series
from accessory.config import Config
from accessory.continuation import damage
from accessory.errors import UserError
from accessory.finetune import finetune
from accessory.module import FinetuneModule
from accessory.schema import to_typed

SCRIPT = Path(accessory.__file__).resolve().parents[1] / "main_finetune.py"


def tiny_settings(base: Path, data: Path, output_dir: Path, **changes) -> dict:
    """Settings of a run of seconds, by dotted key."""
    settings = {
        "model.pretrained_path": [str(base)],
        "data.data_config": str(data),
        "data.max_words": 64,
        "data.cache_dir": str(output_dir.parent / "cache"),
        "data.num_workers": 0,
        "data.val_fraction": 0.0,
        "output_dir": str(output_dir),
        "only_save_trainable": True,
        "train.epochs": 1,
        "train.precision": "tf32",
    }
    return settings | changes


def short_data(folder: Path, items: list[dict] | None = None) -> Path:
    """Prompts without wording (prompt_type None), so that rows are short; the YAML."""
    return write_data(folder, alpaca_items() if items is None else items, prompt_type="None")


def tiny_config(base: Path, data: Path, output_dir: Path, **changes) -> Config:
    node = OmegaConf.structured(Config)
    for key, value in tiny_settings(base, data, output_dir, **changes).items():
        OmegaConf.update(node, key, value)
    return to_typed(node)


def trainables(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "trainable.safetensors")


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


def log_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "logs" / "version_0" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logged(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in log_rows(folder) if row[name]]


@pytest.fixture
def data(tmp_path) -> Path:
    return short_data(tmp_path / "data")


# --- what a run leaves -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, meta_folder) -> Path:
    """The output folder of a run: 40 items, 10 held out, batches of 4, 2 epochs = 16 steps."""
    folder = tmp_path_factory.mktemp("finished")
    data = short_data(folder / "data")
    changes = {"data.val_fraction": 0.25, "train.epochs": 2, "optim.lr": 1e-2, "optim.min_lr": 1e-3}
    return finetune(
        tiny_config(
            meta_folder, data, folder / "out", **changes, **{"quantization.method": "nf4", "optim.warmup_epochs": 0.5}
        )
    )


def test_finished_run_holds_all_that_describes_it(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"trainable.safetensors", "meta.json", "config.yaml", "tokenizer.model", "curves.png", "logs"}
    assert not any(name.startswith(".") for name in names)


def test_meta_says_base_recipe_quantization_and_versions(finished, meta_folder):
    meta = json.loads((finished / "meta.json").read_text())
    assert meta["base"] == accessory.load_model(str(meta_folder)).base
    assert meta["base"]["path"] == str(meta_folder.resolve())
    assert meta["llama_type"] == "llama_peft"
    quantization = {"method": "nf4", "blocksize": 64, "double_quant": True, "lm_head": False, "vision": False}
    assert meta["quantization"].items() >= quantization.items()
    assert meta["recipe"]["name"] == "norm_bias"
    assert meta["versions"]["torch"] == torch.__version__
    assert meta["steps"] == 16


def test_saved_config_starts_the_same_run_again(finished):
    node = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(finished / "config.yaml"))
    config = to_typed(node)
    assert config.optim.lr == 1e-2
    assert config.output_dir == str(finished)
    assert yaml.safe_load((finished / "config.yaml").read_text())["quantization"]["method"] == "nf4"


def test_saved_tokenizer_is_the_bases(finished, meta_folder):
    assert (finished / "tokenizer.model").read_bytes() == (meta_folder / "tokenizer.model").read_bytes()


def test_curves_are_drawn(finished):
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_log_has_a_row_of_figures_for_every_step(finished):
    losses, rates, speeds = (logged(finished, name) for name in ("loss", "lr", "tokens_per_s"))
    assert (len(losses), len(rates), len(speeds)) == (16, 16, 16)
    assert all(speed > 0 for speed in speeds)
    assert len(logged(finished, "val_loss")) == 2


def test_logged_rate_is_the_one_that_the_step_was_taken_with(finished):
    """8 steps an epoch: 4 of warmup, then 12 of a cosine from 1e-2 to 1e-3."""
    warmup = [1e-2 * step / 4 for step in (1, 2, 3, 4)]
    cosine = [1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * step / 12)) for step in range(1, 13)]
    assert logged(finished, "lr") == pytest.approx(warmup + cosine, rel=1e-5)


def test_training_lowers_the_loss(finished):
    losses = logged(finished, "loss")
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    first, last = logged(finished, "val_loss")
    assert last < first


def test_validation_loss_in_meta_is_the_last_logged_one(finished):
    meta = json.loads((finished / "meta.json").read_text())
    assert meta["val_loss"] == pytest.approx(logged(finished, "val_loss")[-1], rel=1e-6)


def test_result_loads_as_a_model_with_the_trained_values(finished, meta_folder):
    model = accessory.load_model([str(meta_folder), str(finished)], quantization="nf4")
    saved = trainables(finished)
    loaded = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_second_start_in_a_finished_folder_is_refused(finished, meta_folder):
    config = tiny_config(meta_folder, finished.parent / "data" / "data.yaml", finished)
    with pytest.raises(UserError, match=r"--output_dir .*out: holds a finished run; choose another, or remove it"):
        finetune(config)


def test_without_only_save_trainable_a_merged_model_is_written_too(tmp_path, meta_folder, data):
    from transformers import AutoModelForCausalLM

    config = tiny_config(meta_folder, data, tmp_path / "out", **{"only_save_trainable": False, "train.max_steps": 2})
    out = finetune(config)
    ids = torch.arange(3, 35).view(2, 16)
    merged = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)(ids).logits
    ours = accessory.load_model([str(meta_folder), str(out)])(ids)
    # the merged model is stored in 16 bit: 8 bits of mantissa
    assert (merged - ours).norm() < 2e-2 * ours.norm()


# --- numbers of a run ------------------------------------------------------------------------------------------------


def test_validation_loss_is_the_mean_over_all_answer_tokens(tmp_path, meta_folder, hf_folder, data):
    """Against transformers on the same weights, item by item; nothing is trained (a rate of almost 0)."""
    from transformers import AutoModelForCausalLM

    items = alpaca_items(9)
    items[4]["output"] = "short"
    items[7]["output"] = " ".join(item["output"] for item in items[5:9])
    val = short_data(tmp_path / "val", items)
    changes = {"data.val_config": str(val), "data.max_words": 256, "optim.lr": 1e-30, "optim.min_lr": 0.0}
    out = finetune(tiny_config(hf_folder, data, tmp_path / "out", **changes, **{"train.max_steps": 1}))

    reference = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    tokenizer = accessory.load_model(str(hf_folder)).tokenizer
    nll, tokens, per_item = 0.0, 0, []
    for item in items:
        prompt = tokenizer.encode(item["instruction"], bos=True, eos=False)
        ids = tokenizer.encode(item["instruction"] + item["output"], bos=True, eos=True)
        shared = next(i for i, (a, b) in enumerate(zip([*prompt, None], ids, strict=False)) if a != b)
        with torch.no_grad():
            log_p = reference(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses = [-log_p[i - 1, ids[i]].item() for i in range(shared, len(ids))]
        nll, tokens = nll + sum(losses), tokens + len(losses)
        per_item.append(sum(losses) / len(losses))
    assert logged(out, "val_loss") == [pytest.approx(nll / tokens, rel=1e-5)]
    assert logged(out, "val_loss") != [pytest.approx(sum(per_item) / len(per_item), rel=1e-3)]  # not a mean of means


def test_bf16_nf4_training_keeps_trainables_and_moments_fp32_and_the_base_as_it_was(
    tmp_path, meta_folder, data, caught_model
):
    def bits(model) -> dict[str, bytes]:
        frozen = dict(model.named_buffers()) | {n: p for n, p in model.named_parameters() if not p.requires_grad}
        return {
            name: tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in frozen.items()
        }

    before = {}
    caught_model["prepare"] = lambda model: before.update(bits(model))
    changes = {"train.precision": "bf16", "quantization.method": "nf4", "recipe.lora": True}
    changes |= {"train.epochs": 2, "train.max_steps": 10, "train.batch_size": 7, "save.step_interval": 5}
    changes |= {"data.val_fraction": 0.1, "train.val_interval": 0.5}
    out = finetune(tiny_config(meta_folder, data, tmp_path / "out", **changes))

    state = torch.load(out / "checkpoints" / "step-00000010" / "state.ckpt", weights_only=False)
    moments = state["optimizer_states"][0]["state"].values()
    assert len(moments) == len(state["state_dict"]) == 14 + 28 + 5  # biases, LoRA matrices, norms
    assert {t.dtype for t in state["state_dict"].values()} == {torch.float32}
    assert {m[name].dtype for m in moments for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    assert {t.dtype for t in trainables(out).values()} == {torch.float32}
    after = bits(caught_model["model"])
    assert len(before) == len(after) > 14
    assert [name for name in before if before[name] != after[name]] == []


@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_every_trainable_has_a_finite_gradient_before_and_after_a_validation(
    precision, method, tmp_path, meta_folder, data, monkeypatch
):
    """bitsandbytes' own layer loses all gradients behind it after one evaluation on some CPUs."""
    seen: list = []

    def clip(module, *arguments, **named):
        gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        seen.append([name for name, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()])
        return original(module, *arguments, **named)

    original = FinetuneModule.configure_gradient_clipping
    monkeypatch.setattr(FinetuneModule, "configure_gradient_clipping", clip)
    monkeypatch.setattr(FinetuneModule, "on_validation_epoch_start", _noting(seen, "validation"))
    changes = {"train.precision": precision, "quantization.method": method, "train.val_interval": 0.5}
    finetune(tiny_config(meta_folder, data, tmp_path / "out", **changes, **{"data.val_fraction": 0.6}))
    assert seen == [[], [], "validation", [], [], "validation"]


def _noting(seen: list, word: str):
    original = FinetuneModule.on_validation_epoch_start

    def on_validation_epoch_start(module):
        seen.append(word)
        original(module)

    return on_validation_epoch_start


def test_dropout_is_active_in_training_and_off_in_validation(tmp_path, meta_folder, data, monkeypatch):
    modes: dict[str, set[bool]] = {"training_step": set(), "validation_step": set()}
    for step, found in modes.items():

        def noting(module, *arguments, step=step, found=found, original=getattr(FinetuneModule, step)):
            found |= {m.training for name, m in module.named_modules() if "lora_dropout.default" in name}
            return original(module, *arguments)

        monkeypatch.setattr(FinetuneModule, step, noting)
    changes = {"recipe.lora": True, "recipe.dropout": 0.1, "train.max_steps": 2, "data.val_fraction": 0.25}
    finetune(tiny_config(meta_folder, data, tmp_path / "out", **changes))
    assert modes == {"training_step": {True}, "validation_step": {False}}


# --- loss that is not finite -----------------------------------------------------------------------------------------


def test_non_finite_loss_names_step_and_items_and_leaves_the_weights(tmp_path, meta_folder, caught_model, tokenizer):
    """The embedding of a token that only item 5 has becomes NaN."""
    items = alpaca_items(8)
    (rare,) = set(tokenizer.encode("Q", bos=False, eos=False)) - set(tokenizer.encode("W", bos=False, eos=False))
    items[5]["output"] += " Q"
    assert [
        i for i, item in enumerate(items) if rare in tokenizer.encode(item["instruction"] + item["output"], 0, 0)
    ] == [5]
    initial = {}

    def spoil(model):
        with torch.no_grad():
            model.model.embed_tokens.weight[rare] = torch.nan
        initial.update({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})

    caught_model["prepare"] = spoil
    data = short_data(tmp_path / "data", items)
    changes = {"train.batch_size": 1, "train.accum_iter": 8, "recipe.lora": True}
    with pytest.raises(
        UserError, match=r"step 1: the loss is not finite; stopped before the update\..*: \[5\]\. Lower"
    ):
        finetune(tiny_config(meta_folder, data, tmp_path / "out", **changes))
    after = {name: p for name, p in caught_model["model"].named_parameters() if p.requires_grad}
    assert_same_bits(after, initial)
    assert not (tmp_path / "out" / "trainable.safetensors").exists()


def test_diverging_run_is_stopped_before_its_weights_are_nan(tmp_path, meta_folder, data, caught_model):
    changes = {"optim.lr": 1e30, "optim.warmup_epochs": 0.0}
    with pytest.raises(UserError, match=r"step 2: the (loss|gradient .*) is not finite.*Lower --lr"):
        finetune(tiny_config(meta_folder, data, tmp_path / "out", **changes))
    assert all(p.isfinite().all() for p in caught_model["model"].parameters() if p.requires_grad)


def test_fp16_overflow_lowers_the_loss_scale_and_goes_on(tmp_path, meta_folder, data, monkeypatch, caught_model):
    """Loss scaling works by trying too large a scale now and then: that step is skipped, the run is not stopped."""
    scalers = []

    def scaler(device):
        scalers.append(original(device, init_scale=2.0**26))
        return scalers[-1]

    original = torch.amp.GradScaler
    monkeypatch.setattr("accessory.strategies.torch.amp.GradScaler", scaler)
    out = finetune(tiny_config(meta_folder, data, tmp_path / "out", **{"train.precision": "fp16"}))
    assert 1.0 <= scalers[0].get_scale() < 2.0**26
    assert all(value.isfinite().all() for value in trainables(out).values())
    norm = trainables(out)["model.norm.weight"]
    assert not torch.equal(norm, accessory.load_model(str(meta_folder)).model.norm.weight)


def test_fp16_gradient_that_stays_non_finite_stops_the_run(tmp_path, meta_folder, data, caught_model):
    """Otherwise every step would be skipped, and the result be what was there before."""

    def spoil(model):
        model.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)

    caught_model["prepare"] = spoil
    with pytest.raises(UserError, match=r"the gradient \(norm nan\) is not finite"):
        finetune(tiny_config(meta_folder, data, tmp_path / "out", **{"train.precision": "fp16", "train.epochs": 3}))


# --- never losing work -----------------------------------------------------------------------------------------------

# 30 items to train on in steps of 2 x 2: 7 whole steps and a half one an epoch, 16 steps in all; LoRA with dropout, so
# that the random state matters; a validation twice an epoch; a checkpoint every 3 steps and at the end of each epoch.
RESUMED = {
    "recipe.lora": True,
    "recipe.rank": 4,
    "recipe.dropout": 0.3,
    "train.epochs": 2,
    "train.batch_size": 2,
    "train.accum_iter": 2,
    "train.val_interval": 0.5,
    "data.val_fraction": 0.25,
    "optim.lr": 1e-2,
    "save.step_interval": 3,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, meta_folder) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    data = short_data(folder / "data")
    return finetune(tiny_config(meta_folder, data, folder / "out", **RESUMED))


class _Stop(Exception):
    """The power goes."""


def interrupt(monkeypatch, config: Config, micro_batch: int) -> None:
    """Run until `micro_batch` micro-batches are done, and break off."""
    count = []

    def training_step(module, batch, batch_idx):
        count.append(batch_idx)
        if len(count) > micro_batch:
            raise _Stop
        return original(module, batch, batch_idx)

    original = FinetuneModule.training_step
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneModule, "training_step", training_step)
        with pytest.raises(_Stop):
            finetune(config)


def checkpoints(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("micro_batch", "newest"),
    [
        (6, "step-00000003"),  # right after a checkpoint
        (9, "step-00000003"),  # in the middle of an accumulation
        (14, "step-00000006"),
        (15, "step-00000008"),  # right after the first epoch, whose last step is half as large
        (16, "step-00000008"),
        (22, "step-00000009"),
        (29, "step-00000015"),
    ],
)
def test_interrupted_run_continues_to_the_same_bits(
    micro_batch, newest, tmp_path, meta_folder, data, uninterrupted, monkeypatch
):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    interrupt(monkeypatch, config, micro_batch)
    assert checkpoints(tmp_path / "out")[-1] == newest
    out = finetune(config)
    assert_same_bits(trainables(out), trainables(uninterrupted))


def test_run_interrupted_twice_continues_to_the_same_bits(tmp_path, meta_folder, data, uninterrupted, monkeypatch):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    interrupt(monkeypatch, config, 8)
    interrupt(monkeypatch, config, 12)
    out = finetune(config)
    assert_same_bits(trainables(out), trainables(uninterrupted))


def test_checkpoint_on_the_last_step_of_an_epoch_continues_to_the_same_bits(
    tmp_path, meta_folder, data, uninterrupted, monkeypatch
):
    """Step 8 ends the first epoch: its checkpoint is written before that epoch's validation."""
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED | {"save.step_interval": 4})
    interrupt(monkeypatch, config, 18)
    assert checkpoints(tmp_path / "out")[-1] == "step-00000008"
    assert_same_bits(trainables(finetune(config)), trainables(uninterrupted))


def test_continued_run_counts_tokens_per_second_from_its_own_start(tmp_path, meta_folder, data, monkeypatch):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    interrupt(monkeypatch, config, 14)
    out = finetune(config)
    with (out / "logs" / "version_1" / "metrics.csv").open(newline="") as file:
        first, *others = [float(row["tokens_per_s"]) for row in csv.DictReader(file) if row["tokens_per_s"]]
    assert first > min(others) / 100


def test_curves_of_a_continued_run_are_those_of_an_uninterrupted_one(
    tmp_path, meta_folder, data, uninterrupted, monkeypatch
):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    interrupt(monkeypatch, config, 22)
    out = finetune(config)
    for name in ("loss", "lr", "val_loss"):
        assert read_series(out, name) == read_series(uninterrupted, name), name


def test_killed_process_started_again_ends_with_the_same_bits(tmp_path, meta_folder, data):
    """As a user sees it: the same command twice, killed after its first checkpoint the first time. With a worker."""
    settings = RESUMED | {"data.num_workers": 1, "train.epochs": 5}
    out = tmp_path / "killed"
    overrides = tiny_settings(meta_folder, data, out, **settings)
    command = [sys.executable, str(SCRIPT), *(f"{key}={json.dumps(value)}" for key, value in overrides.items())]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    whole = finetune(tiny_config(meta_folder, data, tmp_path / "whole", **settings))
    process = subprocess.Popen(command, **options, start_new_session=True)
    deadline = time.monotonic() + 100
    while not list(out.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(out.glob("checkpoints/step-*"))
    assert not (out / "trainable.safetensors").exists()
    subprocess.run(command, check=True, timeout=100, **options)
    assert_same_bits(trainables(out), trainables(whole))


def test_last_two_checkpoints_are_kept(uninterrupted):
    assert checkpoints(uninterrupted) == ["step-00000015", "step-00000016"]


def test_checkpoint_is_a_folder_of_trainables_that_loads(uninterrupted, meta_folder):
    checkpoint = uninterrupted / "checkpoints" / "step-00000016"
    assert_same_bits(trainables(checkpoint), trainables(uninterrupted))
    model = accessory.load_model([str(meta_folder), str(checkpoint)])
    assert sum(p.requires_grad for p in model.parameters()) == 14 + 28 + 5


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("spoil", [truncate, empty, flip_a_bit, Path.unlink])
def test_any_damaged_file_of_a_checkpoint_is_found_and_named(spoil, uninterrupted, tmp_path):
    checkpoint = uninterrupted / "checkpoints" / "step-00000015"
    names = sorted(path.name for path in checkpoint.iterdir())
    assert {"trainable.safetensors", "state.ckpt", "rng.pt", "split.json", "checksums.json"} < set(names)
    assert damage(checkpoint) is None
    for name in names:
        copy = shutil.copytree(checkpoint, tmp_path / name)
        spoil(copy / name)
        assert damage(copy) is not None
        if name != "checksums.json":
            assert name in damage(copy)


@pytest.mark.parametrize(
    ("name", "spoil"), [("state.ckpt", truncate), ("trainable.safetensors", flip_a_bit), ("checksums.json", empty)]
)
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(
    name, spoil, tmp_path, meta_folder, data, uninterrupted, monkeypatch, capsys
):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    interrupt(monkeypatch, config, 14)
    assert checkpoints(tmp_path / "out") == ["step-00000003", "step-00000006"]
    spoil(tmp_path / "out" / "checkpoints" / "step-00000006" / name)
    capsys.readouterr()
    out = finetune(config)
    printed = capsys.readouterr().out
    assert "step-00000006 is damaged" in printed
    assert "continuing from step-00000003" in printed
    assert_same_bits(trainables(out), trainables(uninterrupted))


@contextlib.contextmanager
def full_disk(monkeypatch, name: str):
    """No space for what is written into any file of this name. The kernel says so to torch; safetensors writes to a
    file of its own choice, so its error is made here."""
    original = torch.save

    def save(content, file):
        if Path(file).name == name:
            Path(file).symlink_to("/dev/full")
        original(content, file)

    def save_file(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        if name == "trainable.safetensors":
            patch.setattr(result, "save_file", save_file)
        yield


@pytest.mark.parametrize("name", ["state.ckpt", "rng.pt", "trainable.safetensors"])
def test_disk_that_is_full_while_a_checkpoint_is_saved_costs_nothing_that_was_saved(
    name, tmp_path, meta_folder, data, uninterrupted, monkeypatch
):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    interrupt(monkeypatch, config, 6)
    with full_disk(monkeypatch, name), pytest.raises(UserError) as caught:
        finetune(config)
    assert re.fullmatch(
        r"no space left for .*step-00000006 \(\d+ MiB free\); nothing was overwritten; free some and rerun",
        str(caught.value),
    )
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000003"]
    assert_same_bits(trainables(finetune(config)), trainables(uninterrupted))


@pytest.fixture
def interrupted(tmp_path, meta_folder, data, monkeypatch) -> Config:
    """A run broken off after its checkpoint at step 3, ready to be continued."""
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    interrupt(monkeypatch, config, 6)
    return config


def test_run_without_a_whole_checkpoint_is_refused(interrupted):
    truncate(Path(interrupted.output_dir) / "checkpoints" / "step-00000003" / "state.ckpt")
    with pytest.raises(UserError, match="no checkpoint in it is whole; choose another folder, or remove it"):
        finetune(interrupted)


def test_half_written_checkpoint_is_never_taken_for_one(interrupted, uninterrupted):
    """What a kill during saving leaves: a hidden folder."""
    (Path(interrupted.output_dir) / "checkpoints" / ".step-00000006.partial").mkdir()
    assert_same_bits(trainables(finetune(interrupted)), trainables(uninterrupted))


@pytest.mark.parametrize(
    ("section", "name", "value", "told"),
    [
        ("train", "batch_size", 4, "batch_size=2, this one has 4;"),
        ("train", "accum_iter", 1, "accum_iter=2, this one has 1;"),
        ("train", "epochs", 3, "epochs=2, this one has 3;"),
        ("train", "max_steps", 9, "max_steps=-1, this one has 9;"),
        ("data", "max_words", 32, "max_words=64, this one has 32;"),
        ("data", "packing", True, "packing=False, this one has True;"),
        ("data", "val_fraction", 0.5, "val_fraction=0.25, this one has 0.5;"),
        ("data", "val_items", 3, "val_items=None, this one has 3;"),
        (None, "seed", 1, "seed=0, this one has 1;"),
        ("optim", "lr", 0.5, "optim.lr=0.01, this one has 0.5;"),
        ("recipe", "dropout", 0.0, "recipe.dropout=0.3, this one has 0.0;"),
    ],
)
def test_continuing_with_another_setting_is_refused_naming_both(section, name, value, told, interrupted):
    setattr(getattr(interrupted, section) if section else interrupted, name, value)
    with pytest.raises(UserError, match=f"its run was started with {told} give the same settings to continue it"):
        finetune(interrupted)


def test_continuing_with_other_data_is_refused(interrupted, data):
    short_data(data.parent, alpaca_items(41))
    with pytest.raises(UserError, match=r"its run was started with data='[0-9a-f]+', this one has '[0-9a-f]+'"):
        finetune(interrupted)


def test_continuing_on_another_base_is_refused(interrupted, hf_folder):
    interrupted.model.pretrained_path = [str(hf_folder)]
    with pytest.raises(UserError, match=r"its run was started with base='[0-9a-f]+', this one has '[0-9a-f]+'"):
        finetune(interrupted)


def test_continuing_with_another_tokenizer_is_refused(interrupted, tmp_path):
    """One with the same words in another order."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(reversed(corpus())).upper())
    train = sentencepiece.SentencePieceTrainer.train
    train(input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=VOCAB, model_type="bpe",
          byte_fallback=True, bos_id=1, eos_id=2, unk_id=0, minloglevel=2)  # fmt: skip
    interrupted.model.tokenizer_path = str(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=r"its run was started with tokenizer='[0-9a-f]+', this one has '[0-9a-f]+'"):
        finetune(interrupted)


def test_change_that_decides_no_numbers_is_no_obstacle(interrupted, uninterrupted):
    interrupted.save.step_interval, interrupted.logger.log_every_n_steps, interrupted.data.num_workers = 5, 2, 1
    assert_same_bits(trainables(finetune(interrupted)), trainables(uninterrupted))


@pytest.mark.parametrize("named", ["checkpoint", "run"])
def test_resume_continues_another_folders_run(named, interrupted, uninterrupted, tmp_path):
    run = Path(interrupted.output_dir)
    interrupted.resume.path = str(run if named == "run" else run / "checkpoints" / "step-00000003")
    interrupted.output_dir = str(tmp_path / "elsewhere")
    assert_same_bits(trainables(finetune(interrupted)), trainables(uninterrupted))


@pytest.mark.parametrize(
    ("content", "told"),
    [('{"a":', "run.json:1: not valid JSON"), ("[]", "run.json: expected a JSON object, found a list")],
)
def test_settings_that_cannot_be_read_are_told_in_a_line(content, told, interrupted):
    (Path(interrupted.output_dir) / "run.json").write_text(content)
    with pytest.raises(UserError, match=told):
        finetune(interrupted)


@pytest.mark.parametrize("content", ["{}", "[]", '{"state.ckpt": "0"}'])
def test_checksums_must_name_all_that_a_run_continues_from(content, interrupted):
    (Path(interrupted.output_dir) / "checkpoints" / "step-00000003" / "checksums.json").write_text(content)
    with pytest.raises(UserError, match="no checkpoint in it is whole"):
        finetune(interrupted)


def test_what_a_killed_process_was_writing_is_removed(interrupted):
    partial = Path(interrupted.output_dir) / "checkpoints" / ".step-00000099.partial"
    partial.mkdir()
    finetune(interrupted)
    assert not partial.exists()


def test_going_back_to_an_older_checkpoint_sets_the_later_ones_aside(
    tmp_path, meta_folder, data, uninterrupted, monkeypatch, capsys
):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED)
    interrupt(monkeypatch, config, 14)
    folder = tmp_path / "out" / "checkpoints"
    assert checkpoints(tmp_path / "out") == ["step-00000003", "step-00000006"]
    config.resume.path = str(folder / "step-00000003")
    assert_same_bits(trainables(finetune(config)), trainables(uninterrupted))
    assert "step-00000006 lies behind the checkpoint that is continued" in capsys.readouterr().out
    assert (folder / "aside-step-00000006" / "trainable.safetensors").is_file()


def test_what_was_set_aside_stays_where_that_happens_again(tmp_path):
    for _ in range(3):
        (tmp_path / "step-00000006").mkdir()
        continuation.set_later_aside(tmp_path / "step-00000003", tmp_path)
    kept = {"aside-step-00000006", "aside-2-step-00000006", "aside-3-step-00000006"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_resume_from_a_damaged_checkpoint_is_refused(interrupted):
    checkpoint = Path(interrupted.output_dir) / "checkpoints" / "step-00000003"
    truncate(checkpoint / "state.ckpt")
    interrupted.resume.path = str(checkpoint)
    with pytest.raises(UserError, match=r"--resume .*step-00000003: not a whole checkpoint \(state\.ckpt differs"):
        finetune(interrupted)


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("nowhere", "no such folder"),
        ("items.json", "a file; name its folder"),
        ("out/checkpoints", "checksums.json is not there; it holds step-00000003"),
    ],
)
def test_resume_from_what_is_no_checkpoint_tells_what_is_there(named, found, interrupted, tmp_path):
    (tmp_path / "items.json").touch()
    interrupted.resume.path = str(tmp_path / named)
    with pytest.raises(UserError, match=rf"--resume .*{named}: not a whole checkpoint \({found}"):
        finetune(interrupted)


def test_resume_from_another_run_without_a_whole_checkpoint_names_that(interrupted, tmp_path, capsys):
    truncate(Path(interrupted.output_dir) / "checkpoints" / "step-00000003" / "state.ckpt")
    interrupted.resume.path, interrupted.output_dir = interrupted.output_dir, str(tmp_path / "other")
    with pytest.raises(UserError, match=rf"--resume {interrupted.resume.path}: no checkpoint in it is whole"):
        finetune(interrupted)
    assert "trying the one before" not in capsys.readouterr().out


def test_the_bases_own_folder_as_output_dir_is_refused(meta_folder, data):
    before = sorted(meta_folder.iterdir())
    with pytest.raises(UserError, match=r"--output_dir .*: is a folder of --pretrained_path; choose another"):
        finetune(tiny_config(meta_folder, data, meta_folder))
    assert sorted(meta_folder.iterdir()) == before


def test_the_base_where_the_merged_model_is_to_be_written_is_refused_untouched(hf_folder, data, tmp_path):
    base = shutil.copytree(hf_folder, tmp_path / "out" / "model")
    with pytest.raises(
        UserError, match=r"written to .*/out/model, which holds something; choose another, or add --only"
    ):
        finetune(tiny_config(base, data, tmp_path / "out", only_save_trainable=False))
    assert sorted(path.name for path in base.iterdir()) == sorted(path.name for path in hf_folder.iterdir())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_what_a_user_calls_result_stays(meta_folder, data, tmp_path):
    table = tmp_path / "out" / "result" / "table.csv"
    table.parent.mkdir(parents=True)
    table.touch()
    finetune(tiny_config(meta_folder, data, tmp_path / "out", **{"train.max_steps": 1}))
    assert table.exists()


def test_a_checkpoint_that_cannot_be_removed_stops_no_run(meta_folder, data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(resume, "shutil", SimpleNamespace(rmtree=lambda path, ignore_errors: None))
    changes = {"train.max_steps": 2, "save.step_interval": 1, "save.keep": 1}
    out = finetune(tiny_config(meta_folder, data, tmp_path / "out", **changes))
    assert (out / "trainable.safetensors").is_file()
    assert "step-00000001 is no longer needed and cannot be removed" in caplog.text


def test_a_run_that_starts_takes_no_checkpoint_that_lies_about(meta_folder, data, tmp_path, monkeypatch, uninterrupted):
    """Lightning would, under SLURM: hpc_ckpt_1.ckpt of the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"another's")
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0",
                        "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert_same_bits(
        trainables(finetune(tiny_config(meta_folder, data, tmp_path / "out", **RESUMED))), trainables(uninterrupted)
    )


# --- what cannot start -----------------------------------------------------------------------------------------------


def test_output_dir_that_cannot_be_written_is_refused(tmp_path, meta_folder, data):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_dir .*file/out: cannot be written"):
        finetune(tiny_config(meta_folder, data, tmp_path / "file" / "out", **{"data.cache_dir": str(tmp_path)}))


def test_a_logger_without_its_package_is_told_before_anything_is_read(tmp_path, data, monkeypatch):
    for name in ("tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UserError, match="logger=tensorboard: needs tensorboard: pip install"):
        finetune(tiny_config(tmp_path / "nowhere", data, tmp_path / "out", **{"logger.name": "tensorboard"}))


def test_wrong_base_is_refused_before_anything_is_read(tmp_path, data, monkeypatch):
    monkeypatch.setattr(finetune_module, "assemble", None)
    with pytest.raises(UserError, match=r"--pretrained_path .*nowhere: no such folder"):
        finetune(tiny_config(tmp_path / "nowhere", data, tmp_path / "out"))


def test_base_without_a_tokenizer_asks_for_one(tmp_path, meta_folder, data):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("consolidated.00.pth", "params.json"):
        (bare / name).write_bytes((meta_folder / name).read_bytes())
    with pytest.raises(UserError, match="--tokenizer_path"):
        finetune(tiny_config(bare, data, tmp_path / "out"))
