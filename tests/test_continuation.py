"""Runs that start from other runs: nothing of either is lost or changed in silence."""

from __future__ import annotations

import json

import pytest
import torch
from test_finetune import assert_same_bits, logged, short_data, tiny_config, trainables

import accessory
import accessory.finetune as finetune_module
from accessory.errors import UserError
from accessory.finetune import finetune


@pytest.fixture
def data(tmp_path):
    return short_data(tmp_path / "data")


@pytest.fixture
def norm_bias_run(tmp_path, meta_folder, data):
    return finetune(tiny_config(meta_folder, data, tmp_path / "first", **{"train.max_steps": 2}))


def chained(meta_folder, first, data, output_dir, **changes):
    return tiny_config(
        meta_folder, data, output_dir, **{"model.pretrained_path": [str(meta_folder), str(first)], **changes}
    )


def test_a_recipe_that_would_lose_what_an_earlier_run_trained_is_refused(meta_folder, norm_bias_run, data, tmp_path):
    config = chained(meta_folder, norm_bias_run, data, tmp_path / "out", **{"recipe.norm": False, "recipe.lora": True})
    with pytest.raises(UserError, match=r"first: .*norm\.weight would be lost.*choose a recipe that does, or merge"):
        finetune(config)
    assert not (tmp_path / "out").exists()


def test_a_second_whole_model_is_refused_naming_both(meta_folder, data, tmp_path):
    config = chained(meta_folder, meta_folder, data, tmp_path / "out")
    with pytest.raises(UserError, match=rf"{meta_folder} is a whole model, as {meta_folder} is; name the one"):
        finetune(config)


def test_a_run_that_goes_on_from_trainables_starts_at_their_values(meta_folder, norm_bias_run, data, tmp_path):
    config = chained(meta_folder, norm_bias_run, data, tmp_path / "out", **{"optim.lr": 1e-12, "train.max_steps": 1})
    config.optim.min_lr = 0.0
    after, before = trainables(finetune(config)), trainables(norm_bias_run)
    assert all(torch.allclose(after[name], before[name], atol=1e-9, rtol=0) for name in before)


def test_going_on_from_lora_with_another_scale_is_refused_naming_both(meta_folder, data, tmp_path):
    lora = {"recipe.norm": False, "recipe.bias": False, "recipe.lora": True, "recipe.rank": 4, "train.max_steps": 1}
    first = finetune(tiny_config(meta_folder, data, tmp_path / "first", **lora, **{"recipe.alpha": 16.0}))
    with pytest.raises(UserError, match=r"rank 4 and alpha 16, the recipe says 4 and 4; set .* recipe\.alpha=16"):
        finetune(chained(meta_folder, first, data, tmp_path / "out", **lora))
    finetune(chained(meta_folder, first, data, tmp_path / "out", **lora, **{"recipe.alpha": 16.0}))


def test_a_finished_run_that_is_repeated_is_left_as_it_is_and_one_of_other_settings_refused(
    meta_folder, norm_bias_run, data, capsys
):
    before = {path: path.stat().st_mtime_ns for path in norm_bias_run.rglob("*")}
    config = tiny_config(meta_folder, data, norm_bias_run, **{"train.max_steps": 2})
    assert finetune(config, repeated=True) == norm_bias_run
    assert capsys.readouterr().out.splitlines()[-1] == f"{norm_bias_run}: finished before"
    config.optim.lr *= 2
    with pytest.raises(UserError, match=r"first: its run was started with optim\.lr="):
        finetune(config, repeated=True)
    assert {path: path.stat().st_mtime_ns for path in norm_bias_run.rglob("*")} == before


def test_resuming_into_the_folder_of_another_run_is_refused_and_leaves_it(meta_folder, norm_bias_run, data, tmp_path):
    other = finetune(tiny_config(meta_folder, data, tmp_path / "other", **{"train.max_steps": 1}))
    before = trainables(other)
    config = tiny_config(meta_folder, data, other, **{"resume.path": str(norm_bias_run), "train.max_steps": 2})
    with pytest.raises(UserError, match="holds a finished run"):
        finetune(config)
    (other / "trainable.safetensors").rename(tmp_path / "kept")
    with pytest.raises(UserError, match="holds another run than --resume"):
        finetune(config)
    (tmp_path / "kept").rename(other / "trainable.safetensors")
    assert_same_bits(trainables(other), before)


def test_continuing_with_another_rope_is_refused(meta_folder, norm_bias_run, data, tmp_path):
    (norm_bias_run / "trainable.safetensors").unlink()
    stretched = tmp_path / "rope.json"
    stretched.write_text(json.dumps(json.loads((meta_folder / "params.json").read_text()) | {"rope_theta": 5e5}))
    changes = {"train.max_steps": 2, "model.llama_config": [str(stretched)]}
    with pytest.raises(UserError, match="its run was started with architecture="):
        finetune(tiny_config(meta_folder, data, norm_bias_run, **changes))


def test_a_run_that_ends_between_validations_is_validated_at_its_end(meta_folder, data, tmp_path):
    changes = {"data.val_fraction": 0.25, "train.epochs": 3, "train.max_steps": 10, "optim.lr": 1e-2}
    out = finetune(tiny_config(meta_folder, data, tmp_path / "out", **changes))
    meta = json.loads((out / "meta.json").read_text())
    assert meta["steps"] == 10
    assert meta["val_loss"] == pytest.approx(logged(out, "val_loss")[-1])
    assert len(logged(out, "val_loss")) == 2  # after the first epoch's 8 steps, and after step 10


def test_a_run_whose_merged_model_could_not_be_written_is_finished_by_starting_it_again(
    meta_folder, data, tmp_path, monkeypatch
):
    config = tiny_config(meta_folder, data, tmp_path / "out", **{"only_save_trainable": False, "train.max_steps": 2})

    def full_disk(*_):
        raise UserError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(finetune_module, "export_hf", full_disk)
        with pytest.raises(UserError, match="no space left"):
            finetune(config)
    out = finetune(config)
    merged = accessory.load_model(str(out / "model"))
    tuned = accessory.load_model([str(meta_folder), str(out)], dtype=torch.bfloat16)
    input_ids = torch.tensor([[1, 5, 9, 33]])
    assert torch.allclose(merged(input_ids), tuned(input_ids), atol=0.1)
