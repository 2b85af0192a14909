"""What only a CUDA GPU can show. Each test skips, with its reason, where there is none."""

from __future__ import annotations

import pytest
import torch
from conftest import image_part_weights, write_data
from test_finetune import tiny_config, trainables
from test_multimodal import picture_items

import accessory
from accessory.config import QuantizationConfig, QuantMethod, RecipeConfig
from accessory.finetune import finetune
from accessory.models import build_model, config_from_params
from accessory.quantization import quantize
from accessory.quantization.linear import QuantLinear
from accessory.quantization.nf4 import NF4
from accessory.tuning.recipe import add_trainables, mark_trainable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch sees none"),
]


def small_model(recipe: RecipeConfig, dtype: torch.dtype = torch.bfloat16):
    """Four blocks of dim 512 in NF4, random weights and trainables, on the GPU."""
    from accessory.weights import weight_places

    torch.manual_seed(0)
    params = {"dim": 512, "n_layers": 4, "n_heads": 8, "vocab_size": 1000}
    model = build_model(config_from_params(params, 1000, "test"))
    quantize(model, QuantizationConfig(method=QuantMethod.nf4), dtype)
    add_trainables(model, recipe)
    device = torch.device("cuda")
    for name, (shape, store, _) in weight_places(model, device, dtype):
        store(0.02 * torch.randn(shape, device=device) + ("norm" in name))
    model.model.rotary_emb.to(device)
    mark_trainable(model, recipe)
    return model


def gradients(model, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.hidden_states(input_ids).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_nf4_on_the_gpu_dequantizes_to_what_it_does_on_the_cpu():
    weight = torch.randn(256, 512)
    payloads = [NF4().quantize(weight.to(device)) for device in ("cpu", "cuda")]
    cpu, gpu = (NF4().dequantize(payload, (256, 512), torch.float32).cpu() for payload in payloads)
    assert (cpu - gpu).norm() / cpu.norm() < 1e-3  # a rare code at a tie may differ
    moved = QuantLinear(512, 256, NF4())
    moved.load_weight(weight)
    assert torch.equal(moved.to("cuda").dequantize(torch.float32).cpu(), cpu)


@pytest.mark.parametrize("lora", [False, True])
def test_compiled_blocks_are_as_near_to_fp32_gradients_as_eager_ones(lora):
    recipe = RecipeConfig(lora=lora)
    input_ids = torch.randint(1000, (2, 64), device="cuda")
    exact = gradients(small_model(recipe, torch.float32), input_ids)
    eager = gradients(small_model(recipe), input_ids)
    model = small_model(recipe)
    for block in model.model.layers:
        block.compile()
    compiled = gradients(model, input_ids)
    scale = torch.stack([gradient.norm() for gradient in exact.values()]).norm()
    for name, reference in exact.items():
        # A key's bias hardly moves the softmax: its gradient is mostly rounding, so errors are weighed against all.
        assert (compiled[name] - reference).norm() < 2 * (eager[name] - reference).norm() + 1e-3 * scale, name


def test_compiled_blocks_do_not_keep_dequantized_weights_for_backward():
    model = small_model(RecipeConfig())
    for block in model.model.layers:
        block.compile()
    input_ids = torch.randint(1000, (1, 8), device="cuda")  # few tokens, so that activations weigh little
    gradients(model, input_ids)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    hidden = model.hidden_states(input_ids)
    kept = torch.cuda.memory_allocated() - before
    weights = sum(2 * m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))
    assert hidden.requires_grad
    assert kept < 0.2 * weights


def test_a_run_on_the_gpu_saves_a_model_that_answers(meta_folder, data_yaml, tmp_path):
    import accessory
    from accessory.config import Config, DataConfig, ModelConfig, TrainConfig
    from accessory.finetune import finetune

    config = Config(
        output_dir=str(tmp_path / "run"),
        only_save_trainable=True,
        model=ModelConfig(pretrained_path=[str(meta_folder)]),
        quantization=QuantizationConfig(method=QuantMethod.nf4),
        data=DataConfig(data_config=str(data_yaml), num_workers=0, packing=True, max_words=128),
        train=TrainConfig(max_steps=3, accum_iter=2),
    )
    folder = finetune(config)
    model = accessory.load_model([str(meta_folder), str(folder)], quantization="nf4", device="cuda")
    assert model.generate(["Wrap 1: the text"], max_new_tokens=4)[0]


def test_a_run_on_images_trains_and_answers_on_the_gpu(tmp_path, qformer_folder):
    """bf16, compiled blocks, the vision part in NF4 too: finite trainables that moved, and answers."""
    items = picture_items(tmp_path / "images", 16)
    data = write_data(tmp_path / "data", items, prompt_type="None", root=str(tmp_path / "images"))
    changes = {"train.precision": "bf16", "quantization.method": "nf4", "quantization.vision": True}
    out = finetune(tiny_config(qformer_folder, data, tmp_path / "out", **changes, **{"optim.lr": 1e-2}))
    trained = trainables(out)
    assert all(tensor.isfinite().all() for tensor in trained.values())
    before = image_part_weights()
    assert (trained["qformer_proj.0.bias"].cpu() - before["qformer_proj.0.bias"]).abs().max() > 1e-3
    model = accessory.load_model([str(qformer_folder), str(out)], quantization="nf4", device="cuda")
    pictures = [tmp_path / "images" / "1.png", None]
    together = model.generate(["Wrap", "Wrap"], images=pictures, max_new_tokens=4)
    assert together == [model.generate(["Wrap"], images=[picture], max_new_tokens=4)[0] for picture in pictures]
