"""Runs with images: what trains, what stays as it was, what is saved, and that batching changes nothing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import IMAGE_WORDS, alpaca_items, blip2_weights, image_part_weights, meta_weights, write_data
from PIL import Image
from safetensors.torch import load_file
from test_finetune import assert_same_bits, tiny_config, tiny_settings, trainables
from test_module import run_two_ranks

import accessory
import accessory.finetune as finetune_module
from accessory.assemble import assemble
from accessory.config import (
    DataConfig,
    ImageTransform,
    ModelConfig,
    Precision,
    QuantizationConfig,
    QuantMethod,
    RecipeConfig,
)
from accessory.data.datamodule import DataModule, answer_loader
from accessory.data.images import ImageInput
from accessory.errors import UserError
from accessory.export import export_peft
from accessory.finetune import finetune
from accessory.models.qformer import image_input
from accessory.module import FinetuneModule, batch_loss
from accessory.quantization.nf4 import NF4
from accessory.tools import EvaluateConfig, evaluate

TRAINED_IMAGE_PART = {"qformer_proj.0.bias", "qformer_proj.1.weight", "qformer_proj.1.bias"}
CPU = torch.device("cpu")


def picture_items(folder, count: int = 24) -> list[dict]:
    """Every second item has a picture of its own; the others are text."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    items = alpaca_items(count)
    for i, item in enumerate(items):
        if i % 2:
            item["image"] = f"{i}.png"
            Image.fromarray(rng.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)).save(folder / item["image"])
    return items


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data YAML of 12 text and 12 image items."""
    folder = tmp_path_factory.mktemp("pictures")
    items = picture_items(folder / "images")
    return write_data(folder, items, prompt_type="None", root=str(folder / "images"))


def run(base, data, output_dir, **changes):
    return finetune(tiny_config(base, data, output_dir, **{"quantization.method": "nf4"} | changes))


def run_killed_at(step: int, monkeypatch, *where, **changes) -> None:
    """A run that ends by an exception in the given optimizer step."""
    training_step = FinetuneModule.training_step

    def killed(self, batch, index):
        if self.global_step == step:
            raise RuntimeError("killed")
        return training_step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneModule, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(*where, **changes)


def learner(folders: list, recipe: RecipeConfig, quantization: str = "none", **model):
    """A model ready to train."""
    config = ModelConfig(pretrained_path=[str(folder) for folder in folders], **model)
    return assemble(config, QuantizationConfig(method=QuantMethod(quantization)), recipe, CPU, torch.float32)


def write_base(folder, weights: dict[str, torch.Tensor], kind: str = "model") -> None:
    """Weights in LLaMA2-Accessory's format."""
    named = {f"llma.{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": named}, folder / f"consolidated.00-of-01.{kind}.pth")


# --- stage 2: QPEFT on a multimodal base -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, qformer_folder, pictures):
    folder = tmp_path_factory.mktemp("tuned")
    changes = {"recipe.lora": True, "recipe.rank": 2, "optim.lr": 1e-2, "train.epochs": 2, "data.val_fraction": 0.25}
    return run(qformer_folder, pictures, folder / "out", **changes)


def test_a_run_on_images_trains_llamas_parts_and_the_projectors_norm_and_biases(tuned):
    names = set(trainables(tuned))
    assert {name for name in names if not name.startswith("model.")} == TRAINED_IMAGE_PART
    assert len(names) == 5 + 14 + 28 + 3  # norms, biases, LoRA's two matrices a linear, projector
    assert not (tuned / "frozen.safetensors").exists()  # the base holds all the rest


def test_every_trainable_of_the_image_part_moved(tuned):
    before, after = image_part_weights(), trainables(tuned)
    assert all((after[name] - before[name]).abs().max() > 1e-4 for name in TRAINED_IMAGE_PART)


def test_meta_says_how_images_were_seen(tuned):
    meta = json.loads((tuned / "meta.json").read_text())
    assert meta["llama_type"] == "llama_qformerv2_peft"
    assert meta["image_transform"] == "random_resized_crop"
    assert (tuned / "vision_config.json").is_file()


def test_the_result_answers_questions_on_images(tuned, qformer_folder, pictures):
    model = accessory.load_model([str(qformer_folder), str(tuned)], quantization="nf4")
    image = pictures.parent / "images" / "1.png"
    tuned_answer = model.generate(["Wrap"], images=[image], max_new_tokens=8)
    base = accessory.load_model(str(qformer_folder), quantization="nf4")
    assert tuned_answer != base.generate(["Wrap"], images=[image], max_new_tokens=8)


def test_no_gradient_reaches_the_tower_and_its_bytes_stay(qformer_folder, pictures):
    model = learner([qformer_folder], RecipeConfig(lora=True), "nf4")
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert any(name.startswith("qformer.") for name in frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for batch in loader(pictures, model, 4):
        (batch_loss(model, batch) / 100).backward()
        optimizer.step()
        assert all(p.grad is None for p in model.qformer.parameters())
        optimizer.zero_grad()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_every_trainable_has_a_finite_gradient_with_and_without_images(qformer_folder, pictures):
    model = learner([qformer_folder], RecipeConfig(lora=True, projector=True), "nf4")
    kinds = set()
    for batch in loader(pictures, model, 1):
        model.zero_grad(set_to_none=True)
        batch_loss(model, batch).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
        kinds.add("images" in batch)
    assert kinds == {True, False}


# --- batching --------------------------------------------------------------------------------------------------------


def loader(pictures, model, batch_size: int, **changes):
    config = DataConfig(data_config=str(pictures), max_words=96, num_workers=0, **changes)
    return answer_loader(config, model.tokenizer, batch_size, image_input(model.vision_config))


def test_a_mixed_run_equals_in_loss_its_two_parts_run_apart(qformer_folder, pictures, tmp_path):
    model = accessory.load_model(str(qformer_folder))
    items = json.loads((pictures.parent / "data.json").read_text())
    parts = [[item for item in items if ("image" in item) == with_image] for with_image in (True, False)]
    root = str(pictures.parent / "images")
    files = [write_data(tmp_path / str(i), part, prompt_type="None", root=root) for i, part in enumerate(parts)]

    def total(file) -> float:
        return sum(batch_loss(model, batch).item() for batch in loader(file, model, 6))

    with torch.no_grad():
        assert abs(total(pictures) - sum(map(total, files))) < 1e-3
        assert total(files[0]) > 1


@pytest.mark.parametrize("sizes", [(2, 2), (1, 4)])
def test_runs_with_images_do_not_depend_on_the_split_into_micro_batches(tmp_path, qformer_folder, pictures, sizes):
    changes = {"quantization.method": "none", "train.batch_size": 4, "recipe.projector": True, "optim.lr": 1e-3}
    whole = trainables(run(qformer_folder, pictures, tmp_path / "whole", **changes))
    changes |= {"train.batch_size": sizes[0], "train.accum_iter": sizes[1]}
    split = trainables(run(qformer_folder, pictures, tmp_path / "split", **changes))
    assert all(torch.allclose(whole[name], split[name], atol=2e-5) for name in whole)


def test_two_ranks_of_which_one_has_no_image_train_as_one_process(tmp_path, qformer_folder):
    """Rows of like length, so that items with and without an image meet in a step; a row a rank."""
    items = picture_items(tmp_path / "images", 8)
    for item in items:  # a text item has as many words more as an image has positions
        item |= {
            "instruction": "Wrap",
            "input": "",
            "output": "the" + ("" if "image" in item else " the" * IMAGE_WORDS),
        }
    data = write_data(tmp_path / "data", items, prompt_type="None", root=str(tmp_path / "images"))
    config = tiny_config(qformer_folder, data, tmp_path / "out").data
    tokenizer = accessory.load_model(str(qformer_folder)).tokenizer
    with_image = []
    for rank in (0, 1):
        module = DataModule(config, tokenizer, 1, 1, 2, rank, 0, ImageInput(28, IMAGE_WORDS))
        with_image.append(["images" in batch for batch in module.train_dataloader()])
    assert any(one != other for one, other in zip(*with_image, strict=True))
    changes = {"train.batch_size": 2, "recipe.projector": True, "optim.lr": 1e-2, "optim.min_lr": 1e-3}
    whole = trainables(finetune(tiny_config(qformer_folder, data, tmp_path / "one", **changes)))
    changes["train.batch_size"] = 1
    code, output = run_two_ranks(tmp_path, tiny_settings(qformer_folder, data, tmp_path / "two", **changes))
    assert code == 0, output
    split = trainables(tmp_path / "two")
    assert all(torch.allclose(whole[name], split[name], atol=1e-4) for name in whole)


def test_the_summary_says_what_an_image_is_and_takes(tmp_path, qformer_folder, pictures, capsys):
    run(qformer_folder, pictures, tmp_path / "out", **{"train.max_steps": 1})
    shown = " ".join(capsys.readouterr().out.split())
    assert "ViT 2 x 32 on 28 pixels, Q-Former 2 x 48, float32, frozen; an image takes 8 positions" in shown
    assert "24 items (12 with an image)" in shown


def test_an_image_that_vanishes_while_training_is_skipped_and_counted(tmp_path, qformer_folder, monkeypatch):
    items = picture_items(tmp_path / "images", 8)
    data = write_data(tmp_path / "data", items, prompt_type="None", root=str(tmp_path / "images"))
    fit = finetune_module._fit

    def fit_without_one(*arguments):
        (tmp_path / "images" / "3.png").unlink()
        fit(*arguments)

    monkeypatch.setattr(finetune_module, "_fit", fit_without_one)
    out = run(qformer_folder, data, tmp_path / "out", **{"data.bad_images": "skip", "train.epochs": 2})
    named = [f"image {tmp_path / 'images' / '3.png'}: no such file"]
    assert json.loads((out / "meta.json").read_text())["unreadable_images"] == named


def test_packed_rows_with_images_give_the_loss_of_their_items(qformer_folder, pictures):
    model = accessory.load_model(str(qformer_folder))
    config = DataConfig(data_config=str(pictures), max_words=96, num_workers=0, val_fraction=0.0, packing=True)
    config.image_transform = model.image_transform
    data = DataModule(config, model.tokenizer, 3, 1, 1, 0, 0, image_input(model.vision_config))
    with torch.no_grad():
        packed = sum(batch_loss(model, batch).item() for batch in data.train_dataloader())
        plain = sum(batch_loss(model, batch).item() for batch in loader(pictures, model, 4))
    assert data.train_plan.rows < 24 and abs(packed - plain) < 1e-3


def test_a_killed_run_with_images_continues_to_the_same_bits(tmp_path, qformer_folder, pictures, monkeypatch):
    changes = {"save.step_interval": 2, "recipe.lora": True, "recipe.dropout": 0.1, "train.epochs": 2}
    whole = run(qformer_folder, pictures, tmp_path / "whole", **changes)
    run_killed_at(7, monkeypatch, qformer_folder, pictures, tmp_path / "part", **changes)
    assert_same_bits(trainables(run(qformer_folder, pictures, tmp_path / "part", **changes)), trainables(whole))


def test_resuming_on_a_base_with_another_image_part_is_refused(tmp_path, qformer_folder, pictures, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(qformer_folder, base)
    run_killed_at(3, monkeypatch, base, pictures, tmp_path / "out", **{"save.step_interval": 2})
    write_base(base, meta_weights() | image_part_weights(seed=9))
    with pytest.raises(UserError, match="its run was started with image_part="):
        run(base, pictures, tmp_path / "out", **{"save.step_interval": 2})


def test_a_diff_of_the_image_part_is_kept_as_the_sum_that_was_trained_on(tmp_path, qformer_folder, pictures):
    name = "qformer_proj.0.weight"
    (tmp_path / "diff").mkdir()
    write_base(tmp_path / "diff", {name: torch.full((64, 48), 0.01)}, "model-diff")
    folders = [str(qformer_folder), str(tmp_path / "diff")]
    out = run(qformer_folder, pictures, tmp_path / "out", **{"model.pretrained_path": folders})
    assert torch.allclose(load_file(out / "frozen.safetensors")[name], image_part_weights()[name] + 0.01)


# --- stage 1: alignment, where no multimodal checkpoint exists --------------------------------------------------------

ALIGNMENT = {
    "recipe.name": "projector",
    "recipe.norm": False,
    "recipe.bias": False,
    "recipe.projector": True,
    "model.llama_type": "llama_qformerv2_peft",
}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, meta_folder, blip2_folder, pictures):
    """A language base and a BLIP-2 folder, joined by a projector that trains."""
    folder = tmp_path_factory.mktemp("aligned")
    return run(meta_folder, pictures, folder / "out", **ALIGNMENT, **{"model.vision_path": str(blip2_folder)})


def test_alignment_trains_the_whole_projector_and_the_tags_alone(aligned):
    assert set(trainables(aligned)) == TRAINED_IMAGE_PART | {"qformer_proj.0.weight", "start_img", "end_img"}


def test_what_the_base_lacks_is_saved_though_it_does_not_train(aligned):
    kept = load_file(aligned / "frozen.safetensors")
    assert_same_bits(kept, {f"qformer.{name}": tensor for name, tensor in blip2_weights(seed=5).items()})


def test_base_and_alignment_make_the_whole_model_without_the_blip2_folder(aligned, meta_folder, blip2_folder):
    model = accessory.load_model([str(meta_folder), str(aligned)])
    assert torch.equal(model.qformer.query_tokens, blip2_weights(seed=5)["query_tokens"])
    assert model.start_img.requires_grad and not model.qformer.query_tokens.requires_grad
    assert model.generate(["Wrap"], images=[Image.new("RGB", (9, 9))], max_new_tokens=2)


def test_a_checkpoint_holds_the_vision_part_too_and_the_disk_once(aligned):
    (checkpoint,) = (aligned / "checkpoints").iterdir()
    assert (checkpoint / "frozen.safetensors").samefile(aligned / "frozen.safetensors")


def test_a_continued_alignment_still_holds_the_vision_part_once(
    tmp_path, meta_folder, blip2_folder, pictures, monkeypatch
):
    changes = ALIGNMENT | {"model.vision_path": str(blip2_folder), "save.step_interval": 2}
    run_killed_at(3, monkeypatch, meta_folder, pictures, tmp_path / "out", **changes)
    out = run(meta_folder, pictures, tmp_path / "out", **changes)
    files = [out / "frozen.safetensors", *out.glob("checkpoints/*/frozen.safetensors")]
    assert len(files) == 3 and len({file.stat().st_ino for file in files}) == 1
    accessory.load_model([str(meta_folder), str(out)])  # and its checksum is right


def test_a_later_stage_shares_the_vision_part_of_the_earlier_one(tmp_path, aligned, meta_folder, pictures):
    changes = ALIGNMENT | {"model.pretrained_path": [str(meta_folder), str(aligned)]}
    out = run(meta_folder, pictures, tmp_path / "out", **changes)
    assert (out / "frozen.safetensors").samefile(aligned / "frozen.safetensors")


def test_a_second_vision_model_beside_the_aligned_one_is_refused(
    tmp_path, aligned, meta_folder, blip2_folder, pictures
):
    changes = {"model.pretrained_path": [str(meta_folder), str(aligned)], "model.vision_path": str(blip2_folder)}
    with pytest.raises(UserError, match=f"{aligned} has an image part"):
        run(meta_folder, pictures, tmp_path / "out", **changes)


def test_qpeft_after_alignment_keeps_what_it_does_not_train(tmp_path, aligned, meta_folder, pictures):
    tuned = finetune(
        tiny_config(
            meta_folder,
            pictures,
            tmp_path / "out",
            **{"model.pretrained_path": [str(meta_folder), str(aligned)], "quantization.method": "nf4"},
        )
    )
    kept, before = load_file(tuned / "frozen.safetensors"), trainables(aligned)
    for name in ("qformer_proj.0.weight", "start_img", "end_img"):
        assert torch.equal(kept[name], before[name])
    direct = accessory.load_model([str(meta_folder), str(tuned)], quantization="nf4")
    by_way = accessory.load_model([str(meta_folder), str(aligned), str(tuned)], quantization="nf4")
    picture = [Image.new("RGB", (9, 9), "red")]
    assert direct.generate(["Wrap"], images=picture) == by_way.generate(["Wrap"], images=picture)


def test_a_projector_that_starts_from_nothing_begins_at_the_scale_of_embeddings(meta_folder, blip2_folder):
    recipe = RecipeConfig(norm=False, bias=False, projector=True)
    torch.manual_seed(0)
    model = learner([meta_folder], recipe, llama_type="llama_qformerv2_peft", vision_path=str(blip2_folder))
    embeddings = model.model.embed_tokens.weight
    found = model.encode_images(torch.randn(4, 3, 28, 28))
    assert found.shape == (4, IMAGE_WORDS, 64)
    assert 0.5 < found.std() / embeddings.std() < 2


def test_a_tower_may_train_in_fp32_and_is_saved(tmp_path, meta_folder, blip2_folder, pictures):
    changes = ALIGNMENT | {"recipe.vision": True, "model.vision_path": str(blip2_folder), "train.precision": "bf16"}
    out = run(meta_folder, pictures, tmp_path / "out", **changes, **{"optim.lr": 1e-3})
    after, before = trainables(out), blip2_weights(seed=5)
    assert not (out / "frozen.safetensors").exists()
    moved = [name for name in before if not torch.equal(after[f"qformer.{name}"], before[name])]
    assert len(moved) > 0.9 * len(before)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    asked = accessory.load_model([str(meta_folder), str(out)], dtype=torch.bfloat16)  # to answer it is frozen, 16 bit
    assert {(p.dtype, p.requires_grad) for p in asked.qformer.parameters()} == {(torch.bfloat16, False)}


def test_alignment_wants_images_to_learn_from(tmp_path, meta_folder, blip2_folder):
    text = write_data(tmp_path / "data", alpaca_items(8), prompt_type="None")
    with pytest.raises(UserError, match=r"recipe\.projector=true, but no item of --data_config .* has an image"):
        run(meta_folder, text, tmp_path / "out", **ALIGNMENT, **{"model.vision_path": str(blip2_folder)})


def test_a_merged_model_sees_images_as_the_run_did(tmp_path, qformer_folder, pictures):
    changes = {"quantization.method": "none", "only_save_trainable": False, "data.image_transform": "padded_resize"}
    out = run(qformer_folder, pictures, tmp_path / "out", **changes, **{"train.max_steps": 1})
    merged, by_parts = accessory.load_model(str(out / "model")), accessory.load_model([str(qformer_folder), str(out)])
    assert merged.image_transform is by_parts.image_transform is ImageTransform.padded_resize


def test_evaluate_finds_the_validation_loss_of_a_run_on_images(tmp_path, qformer_folder, pictures):
    val = {"data.val_config": str(pictures), "optim.lr": 1e-2}
    out = run(qformer_folder, pictures, tmp_path / "out", **val)
    config = EvaluateConfig(
        model=ModelConfig(pretrained_path=[str(qformer_folder), str(out)]),
        quantization=QuantizationConfig(method=QuantMethod.nf4),
        precision=Precision.tf32,
        data_config=str(pictures),
        device="cpu",
        seqlen=64,
    )
    figures = evaluate(config)
    logged = json.loads((out / "meta.json").read_text())["val_loss"]
    assert figures["nll"] / figures["tokens"] == pytest.approx(logged, rel=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["projector", "vision"])
def test_an_image_part_cannot_train_where_there_is_none(tmp_path, meta_folder, pictures, part):
    with pytest.raises(UserError, match=rf"recipe\.{part}=true: this model is language-only"):
        run(meta_folder, pictures, tmp_path / "out", **{f"recipe.{part}": True})


def test_a_language_model_refuses_items_with_images(tmp_path, meta_folder, pictures):
    with pytest.raises(UserError, match=r"data\.json: item 1: has an image"):
        run(meta_folder, pictures, tmp_path / "out")


def test_a_quantized_tower_cannot_train(tmp_path, meta_folder, pictures):
    changes = {"recipe.vision": True, "quantization.vision": True}
    with pytest.raises(UserError, match=r"recipe\.vision=true with quantization\.vision=true"):
        run(meta_folder, pictures, tmp_path / "out", **changes)


def test_storing_the_vision_part_in_4_bits_needs_a_method_and_a_vision_part(tmp_path, meta_folder, pictures):
    with pytest.raises(UserError, match=r"choose quantization=nf4"):
        run(meta_folder, pictures, tmp_path / "out", **{"quantization.method": "none", "quantization.vision": True})
    with pytest.raises(UserError, match=r"quantization\.vision=true: this model is language-only"):
        run(meta_folder, pictures, tmp_path / "out", **{"quantization.vision": True})


def test_a_bare_method_means_the_quantization_that_was_trained_on(tmp_path, qformer_folder, pictures, caplog):
    out = run(
        qformer_folder, pictures, tmp_path / "out", **{"quantization.vision": True, "quantization.blocksize": 128}
    )
    model = accessory.load_model([str(qformer_folder), str(out)], quantization="nf4")
    assert model.qformer_proj[0].backend == NF4(blocksize=128) and not caplog.messages
    other = QuantizationConfig(method=QuantMethod.nf4, blocksize=256)
    accessory.load_model([str(qformer_folder), str(out)], quantization=other)
    assert "blocksize=128, vision=True, and is used on one with blocksize=256, vision=False" in caplog.text


def test_a_trained_projector_cannot_become_a_peft_adapter(tmp_path, qformer_folder):
    recipe = RecipeConfig(norm=False, bias=False, lora=True, projector=True)
    with pytest.raises(UserError, match="cannot hold an image part"):
        export_peft(learner([qformer_folder], recipe), tmp_path / "out")


def test_a_projector_that_would_not_train_is_refused_before_images_are_read(
    tmp_path, meta_folder, blip2_folder, pictures, monkeypatch
):
    monkeypatch.setattr(finetune_module, "DataModule", None)
    changes = {"model.llama_type": "llama_qformerv2_peft"}
    with pytest.raises(UserError, match=r"model\.vision_path"):
        run(meta_folder, pictures, tmp_path / "out", **changes)
    with pytest.raises(UserError, match=r"recipe\.projector=true"):
        run(meta_folder, pictures, tmp_path / "out", **changes, **{"model.vision_path": str(blip2_folder)})


def test_a_damaged_frozen_file_is_refused(tmp_path, aligned, meta_folder):
    shutil.copytree(aligned, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    content = bytearray((tmp_path / "copy" / "frozen.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "copy" / "frozen.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"frozen\.safetensors: its checksum"):
        accessory.load_model([str(meta_folder), str(tmp_path / "copy")])


def test_trainables_of_an_image_part_are_refused_on_a_base_without_one(tuned, meta_folder, qformer_folder):
    with pytest.raises(UserError, match=r"image_part .*\(image_part None\)"):
        accessory.load_model([str(meta_folder), str(tuned)])
    alone = accessory.load_model([str(qformer_folder), str(tuned)], llama_type="llama_peft")
    assert alone.image_words == 0  # the language part is another matter


def test_trainables_of_another_image_part_are_refused(tmp_path, tuned, qformer_folder):
    shutil.copytree(qformer_folder, tmp_path / "other", ignore=shutil.ignore_patterns("*.pth"))
    write_base(tmp_path / "other", meta_weights() | image_part_weights(seed=9))
    with pytest.raises(UserError, match="image_part"):
        accessory.load_model([str(tmp_path / "other"), str(tuned)])
