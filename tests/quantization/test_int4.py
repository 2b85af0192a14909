"""Weights in whole numbers in memory, and runs on int4 folders: training, continuing, answering, exporting."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import alpaca_items, write_data
from int4_folders import act_order, write_base, write_int4
from safetensors.torch import load_file, save_file
from test_finetune import assert_same_bits, short_data, tiny_config, trainables
from test_multimodal import picture_items
from torch import Tensor, nn

import accessory
import accessory.finetune as finetune_module
from accessory.assemble import assemble
from accessory.bases import open_folder
from accessory.config import ModelConfig, QuantizationConfig, QuantMethod, RecipeConfig
from accessory.errors import UserError
from accessory.export import block_linears_by_name, export_hf, export_peft
from accessory.finetune import finetune
from accessory.models.llama import Llama
from accessory.models.qformer import CastLinear
from accessory.module import FinetuneModule, batch_loss
from accessory.quantization import QuantLinear, block_linears, formats, rtn
from accessory.quantization.dense import Dense
from accessory.quantization.int4 import Int4, pack_codes, unpack_codes
from accessory.quantization.packed import Packed, Scheme
from accessory.quantize_options import Format
from accessory.sources import open_sources

CPU = torch.device("cpu")
LORA = RecipeConfig(name="norm_bias_lora", lora=True, rank=4)
V_PROJ, DOWN = "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"
every_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def random_packed(bits: int, reordered: bool = False, seed: int = 0) -> Packed:
    """64 x 192 codes in groups of 32, every code and zero point among them, scales of both signs."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (64, 192), generator=g, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (64, 6), generator=g, dtype=torch.uint8)
    g_idx = torch.randperm(192, generator=g).int() // 32 if reordered else None
    return Packed(codes, torch.randn(64, 6, generator=g).half(), zeros, bits, g_idx)


def layer_of(packed: Packed) -> QuantLinear:
    layer = QuantLinear(192, 64, Int4(packed.bits, 32, reordered=packed.g_idx is not None))
    layer.load_packed(packed)
    return layer


def batch() -> dict[str, Tensor]:
    ids = torch.arange(24).reshape(2, 12) * 7 % 300 + 3
    return {"input_ids": ids, "position_ids": torch.arange(12).expand(2, 12), "targets": ids.roll(-1, 1)}


def gradients(model: Llama) -> dict[str, Tensor]:
    model.zero_grad()
    batch_loss(model, batch()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_file) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tokenizer_file)


@pytest.fixture(scope="module")
def int4(base, tmp_path_factory) -> Path:
    """4 bit asymmetric in groups of 32; one linear in 16 bit, one in 8."""
    folder = tmp_path_factory.mktemp("folders") / "int4"
    write_int4(base, folder, exceptions={DOWN: None, V_PROJ: Scheme(8, -1, True)})
    return folder


# --- numbers ---------------------------------------------------------------------------------------------------------


@every_width
def test_codes_lie_in_one_stream_of_bits_lowest_first(bits):
    codes = torch.arange(48).remainder(2**bits).flip(0).view(2, 24).to(torch.uint8)
    for row, stored in zip(codes.tolist(), pack_codes(codes, bits).tolist(), strict=True):
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        assert stored == list(stream.to_bytes(24 * bits // 8, "little"))


@every_width
@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_holds_the_values_of_the_whole_numbers_bit_for_bit(bits, reordered, dtype):
    packed = random_packed(bits, reordered)
    layer = layer_of(packed)
    assert torch.equal(layer.dequantize(dtype), packed.dequantize(dtype))
    group = packed.g_idx if reordered else torch.arange(192) // 32
    exact = (packed.codes.double() - packed.zeros[:, group].double()) * packed.scales[:, group].double()
    assert torch.equal(layer.dequantize(torch.float16), exact.half())


@every_width
@pytest.mark.parametrize("reordered", [False, True])
def test_a_payload_gives_back_the_weight_that_it_was_made_of(bits, reordered):
    packed = random_packed(bits, reordered)
    layer = layer_of(packed)
    found = layer.backend.unpack(layer.payload)
    for leaf in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(found, leaf), getattr(packed, leaf))
    assert not reordered or torch.equal(found.g_idx, packed.g_idx)
    assert torch.equal(unpack_codes(layer.codes, bits), packed.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_other_backend_takes_the_values(dtype):
    packed = random_packed(4, reordered=True)
    layer = QuantLinear(192, 64, Dense(dtype))
    layer.load_packed(packed)
    assert torch.equal(layer.dense, packed.dequantize(dtype))


@every_width
@pytest.mark.parametrize("reordered", [False, True])
def test_output_and_input_gradient_are_those_of_f_linear_bit_for_bit(bits, reordered):
    packed = random_packed(bits, reordered)
    x, same = (torch.randn(7, 192, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    y, expected = layer_of(packed)(x), F.linear(same, packed.dequantize(torch.float32))
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, same.grad)


def test_columns_in_any_order_compute_alike_compiled():
    layer = layer_of(random_packed(4, reordered=True))
    x = torch.randn(3, 192, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch sees none")
@every_width
@pytest.mark.parametrize("reordered", [False, True])
def test_the_gpu_kernel_gives_the_values_of_the_cpu_bit_for_bit(bits, reordered):
    from accessory.quantization.int4 import _kernels

    assert _kernels(torch.device("cuda")) is not None
    layer = layer_of(random_packed(bits, reordered))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = layer.to("cpu").dequantize(dtype)
        assert torch.equal(layer.to("cuda").dequantize(dtype).cpu(), expected)


# --- 16-bit bases that are rounded while loading ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (QuantizationConfig(QuantMethod.rtn), Scheme(4, 64, False)),
        (QuantizationConfig(QuantMethod.rtn, group_size=32), Scheme(4, 32, False)),
        (QuantizationConfig(QuantMethod.rtn, group_size=-1), Scheme(4, -1, False)),
        (QuantizationConfig(QuantMethod.int8), Scheme(8, -1, True)),
    ],
)
@pytest.mark.parametrize("lm_head", [False, True])
def test_rtn_and_int8_round_the_stored_weights_while_loading(base, config, scheme, lm_head):
    config = QuantizationConfig(config.method, group_size=config.group_size, lm_head=lm_head)
    model = accessory.load_model(base, quantization=config, dtype=torch.bfloat16)
    linears = block_linears(model) | ({"lm_head": model.lm_head} if lm_head else {})
    stored = load_file(base / "model.safetensors")
    assert len(linears) == 7 + lm_head and isinstance(model.lm_head, QuantLinear) is lm_head
    for name, layer in linears.items():
        expected = rtn.quantize(stored[f"{name}.weight"], scheme)
        assert layer.backend.scheme == scheme
        assert torch.equal(layer.dequantize(torch.float32), expected.dequantize(torch.float32))


@pytest.mark.parametrize(
    ("size", "line"),
    [
        (128, r"group_size=128 does not divide the 64 inputs of model\.layers\.0.*quantization\.group_size=64 does"),
        (0, r"quantization\.group_size=0: must be a multiple of 8, or -1"),
        (12, r"quantization\.group_size=12: must be a multiple of 8"),
    ],
)
def test_a_group_size_that_does_not_fit_is_refused(base, size, line):
    with pytest.raises(UserError, match=line):
        accessory.load_model(base, quantization=QuantizationConfig(QuantMethod.rtn, group_size=size))


# --- int4 folders as bases -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["none", "nf4", "int4"])
def test_an_int4_folder_stays_what_it_is_under_none_nf4_and_int4(int4, method):
    model = accessory.load_model(int4, quantization=method)
    assert model.quantization == QuantizationConfig(QuantMethod.int4)
    names = {name: layer.backend.name for name, layer in block_linears(model).items()}
    assert names.pop(DOWN) == "none" and names.pop(V_PROJ) == "int8" and set(names.values()) == {"int4"}
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("method", ["rtn", "int8"])
def test_an_int4_folder_is_not_rounded_again(int4, method):
    with pytest.raises(UserError, match=f"quantization={method}: .*int4 is quantized already .*leave it out"):
        accessory.load_model(int4, quantization=method)


def test_int4_on_a_16_bit_base_says_how_to_make_one(base):
    with pytest.raises(UserError, match=r"quantization=int4: .* no weights in whole numbers; scripts/quantize\.py"):
        accessory.load_model(base, quantization="int4")


@pytest.mark.parametrize("part", ["lm_head", "vision"])
def test_a_part_that_an_int4_folder_has_in_16_bit_cannot_be_quantized_while_loading(int4, part):
    config = QuantizationConfig(QuantMethod.nf4, **{part: True})
    with pytest.raises(UserError, match=rf"quantization\.{part}=true: .* holds it in 16 bit"):
        accessory.load_model(int4, quantization=config)


def test_an_int4_folder_cannot_stand_behind_another(base, int4):
    with pytest.raises(UserError, match="int4 is a base in whole numbers; it can only come first"):
        accessory.load_model([base, int4])


def test_an_int4_folder_needs_no_auto_round(int4, monkeypatch):
    for name in ("auto_round", "auto_round_extension"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    assert accessory.load_model(int4)(batch()["input_ids"]).isfinite().all()


@pytest.mark.parametrize("kind", ["int4", "nf4", "act_order"])
def test_every_trainable_has_the_same_finite_gradient_before_and_after_a_validation_pass(base, int4, tmp_path, kind):
    """Of bitsandbytes' own layers, and of AutoRound's under backend="auto", some end the gradient there."""
    folder = {"int4": int4, "nf4": base, "act_order": tmp_path / "ordered"}[kind]
    if kind == "act_order":
        write_int4(base, folder, Format.auto_gptq, quantize=act_order, reordered=True)
    method = QuantMethod.nf4 if kind == "nf4" else QuantMethod.none
    config = ModelConfig(pretrained_path=[str(folder)])
    model = assemble(config, QuantizationConfig(method), LORA, CPU, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)  # as after a step: at 0 no gradient reaches lora_A
    model.train()
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        batch_loss(model, batch())
    model.train()
    after = gradients(model)
    assert len(before) == 7 + 14 + 3  # biases, LoRA matrices, norms
    for name, gradient in before.items():
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0, name
        assert torch.equal(gradient, after[name]), name


def test_no_layer_of_an_int4_model_keeps_more_than_its_payload_for_backward(int4):
    config = ModelConfig(pretrained_path=[str(int4)])
    model = assemble(config, QuantizationConfig(), RecipeConfig(), CPU, torch.bfloat16)
    for name, layer in block_linears(model).items():
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            layer(torch.randn(5, layer.in_features, dtype=torch.bfloat16, requires_grad=True))
        own = {tensor.untyped_storage().data_ptr() for tensor in layer.payload}
        assert {tensor.untyped_storage().data_ptr() for tensor in kept} == own, name


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return short_data(tmp_path_factory.mktemp("data") / "data", alpaca_items(16))


def run(base: Path, data: Path, output_dir: Path, **changes) -> Path:
    settings = {"recipe.lora": True, "recipe.name": "norm_bias_lora", "recipe.rank": 4, "train.epochs": 2}
    return finetune(tiny_config(base, data, output_dir, **settings | {"data.val_fraction": 0.25} | changes))


@pytest.fixture(scope="module")
def finished(int4, data, tmp_path_factory) -> Path:
    """2 epochs of 3 steps on an int4 folder that nothing but --pretrained_path names."""
    return run(int4, data, tmp_path_factory.mktemp("finished") / "out", **{"optim.lr": 1e-2})


def test_a_run_says_that_its_base_is_int4(finished, int4, capsys):
    meta = json.loads((finished / "meta.json").read_text())
    assert meta["quantization"]["method"] == "int4" and meta["base"]["path"] == str(int4)
    assert "method: int4" in (finished / "config.yaml").read_text()


def test_the_screen_before_a_run_says_int4_and_its_bits(int4, data, tmp_path, capsys):
    run(int4, data, tmp_path / "out", **{"train.max_steps": 1})
    shown = capsys.readouterr().out
    assert "of 7 linears in int4" in shown


def test_a_run_on_an_int4_folder_gives_a_model_with_its_trainables(finished, int4):
    model = accessory.load_model([int4, finished])
    saved = trainables(finished)
    loaded = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.replace(".base_layer.", ".").replace(".default.", ".") for name in loaded} == saved.keys()
    ids = batch()["input_ids"]
    assert not torch.equal(model(ids), accessory.load_model(int4)(ids))
    assert model.generate(["Wrap 1: the"], max_new_tokens=4)


def test_training_leaves_every_bit_of_the_payload_as_it_was(int4, data, tmp_path, caught_model):
    run(int4, data, tmp_path / "out", **{"train.max_steps": 2, "train.precision": "bf16"})
    trained, fresh = (block_linears_by_name(m) for m in (caught_model["model"], accessory.load_model(int4)))
    for name, layer in fresh.items():
        for before, after in zip(layer.payload, trained[name].payload, strict=True):
            assert torch.equal(before.to(after.dtype), after)


def test_a_killed_run_on_an_int4_folder_ends_with_the_same_bits(finished, int4, data, tmp_path, monkeypatch):
    """Continued with --quant, which means nothing here."""
    step = FinetuneModule.training_step

    def killed(self, batch, index):
        if self.global_step == 4:
            raise RuntimeError("killed")
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneModule, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(int4, data, tmp_path / "out", **{"optim.lr": 1e-2})
    assert list((tmp_path / "out" / "checkpoints").iterdir())
    changes = {"optim.lr": 1e-2, "quantization.method": "nf4"}
    assert_same_bits(trainables(run(int4, data, tmp_path / "out", **changes)), trainables(finished))


def test_an_int4_base_needs_only_save_trainable_before_anything_is_read(int4, data, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_module, "assemble", None)
    with pytest.raises(UserError, match=r"quantization=int4 .*needs --only_save_trainable"):
        run(int4, data, tmp_path / "out", only_save_trainable=False)


def test_trainables_go_with_the_base_that_they_were_trained_on(finished, base, int4, tmp_path):
    with pytest.raises(UserError, match=r"was trained on .*not on"):
        accessory.load_model([base, finished])
    write_int4(base, tmp_path / "other", scheme=Scheme(4, 64, False))
    with pytest.raises(UserError, match=r"was trained on .*not on"):
        accessory.load_model([tmp_path / "other", finished])


def test_the_export_is_the_dequantized_base_with_the_trainables_merged(finished, int4, tmp_path):
    from transformers import AutoModelForCausalLM

    model = accessory.load_model([int4, finished])
    export_hf(model, tmp_path / "hf", torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    ids = batch()["input_ids"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(merged, model(ids), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(accessory.load_model(tmp_path / "hf")(ids), model(ids), atol=1e-4, rtol=1e-4)


def test_an_adapter_names_the_int4_folder_as_its_base(int4, data, tmp_path):
    only_lora = {"recipe.norm": False, "recipe.bias": False, "recipe.name": "lora", "train.max_steps": 1}
    out = run(int4, data, tmp_path / "out", **only_lora)
    export_peft(accessory.load_model([int4, out]), tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(int4)


@pytest.mark.parametrize("method", ["rtn", "int8"])
def test_a_run_on_weights_rounded_while_loading_is_answered_on_the_same(base, data, tmp_path, method):
    changes = {"quantization.method": method, "train.max_steps": 1}
    changes |= {"quantization.group_size": 32} if method == "rtn" else {}
    out = run(base, data, tmp_path / "out", **changes)
    model = accessory.load_model([base, out], quantization=method)  # group_size as it was trained
    expected = Int4(4, 32) if method == "rtn" else Int4(8, -1, True)
    assert {layer.backend for layer in block_linears(model).values()} == {expected}


# --- with images -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int4_images(qformer_folder, tmp_path_factory) -> Path:
    """A multimodal folder, all linears of the image part in 4 bits too, as scripts/quantize.py lays it out."""
    folder = tmp_path_factory.mktemp("images") / "int4"
    model = accessory.load_model(qformer_folder)
    export_hf(model, folder.with_name("hf"), torch.float32)
    (folder.with_name("hf") / "tokenizer.model").write_bytes((qformer_folder / "tokenizer.model").read_bytes())
    write_int4(folder.with_name("hf"), folder)
    tensors = load_file(folder.with_name("hf") / "image_part.safetensors")
    for name, module in model.named_modules():
        if name.startswith("qformer") and type(module) in (nn.Linear, CastLinear):
            packed = rtn.quantize(tensors.pop(f"{name}.weight"), Scheme(4, -1, False))
            tensors |= formats.pack(name, packed, Format.auto_round, sym=False)
    save_file(tensors, folder / "image_part.safetensors")
    for name in ("vision_config.json", "meta.json"):
        (folder / name).write_bytes((folder.with_name("hf") / name).read_bytes())
    return folder


def test_a_packed_image_part_is_held_packed_and_computes_with_its_values(int4_images, qformer_folder):
    model, reference = accessory.load_model(int4_images), accessory.load_model(qformer_folder)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear) and n.startswith("qformer")}
    assert {layer.backend for layer in linears.values()} == {Int4(4, -1)} and "qformer_proj.0" in linears
    assert model.quantization == QuantizationConfig(QuantMethod.int4, vision=True)
    opened = open_folder(int4_images)
    for name in linears:
        reference.get_submodule(name).weight.data = opened.tensor(f"{name}.weight").dequantize(torch.float32)
    pixels = torch.randn(2, 3, 28, 28)
    assert torch.equal(model.encode_images(pixels), reference.encode_images(pixels))


def test_the_language_part_of_a_multimodal_int4_folder_loads_alone(int4_images):
    model = accessory.load_model(int4_images, llama_type="llama_peft")
    assert model.quantization == QuantizationConfig(QuantMethod.int4) and model.image_words == 0


def test_a_projector_that_trains_starts_from_the_values_of_its_packed_weight(int4_images):
    sources = open_sources(ModelConfig(pretrained_path=[str(int4_images)]))
    recipe = RecipeConfig(name="projector", norm=False, bias=False, projector=True)
    model = assemble(sources, QuantizationConfig(), recipe, CPU, torch.bfloat16)
    stored = sources.folders[0].tensor("qformer_proj.0.weight").dequantize(torch.float32)
    assert torch.equal(model.qformer_proj[0].weight, stored) and model.qformer_proj[0].weight.requires_grad


def test_a_projector_trained_on_an_int4_folder_takes_the_packed_ones_place(int4_images, tmp_path):
    items = picture_items(tmp_path / "images", 8)
    data = write_data(tmp_path / "data", items, prompt_type="None", root=str(tmp_path / "images"))
    changes = {"recipe.projector": True, "train.max_steps": 1, "optim.lr": 1e-2, "data.val_fraction": 0.0}
    out = run(int4_images, data, tmp_path / "out", **changes)
    model = accessory.load_model([int4_images, out])
    assert torch.equal(model.qformer_proj[0].weight, trainables(out)["qformer_proj.0.weight"])


def test_a_packed_vision_model_cannot_train(int4_images, data, tmp_path):
    with pytest.raises(UserError, match=r"recipe\.vision=true.*a quantized vision model cannot train"):
        run(int4_images, data, tmp_path / "out", **{"recipe.vision": True})


def test_a_packed_vision_part_cannot_be_borrowed(int4_images, base):
    with pytest.raises(UserError, match=r"model\.vision_path=.*its vision part is quantized"):
        open_sources(ModelConfig(pretrained_path=[str(base)], vision_path=str(int4_images)))


def test_values_cannot_be_added_to_whole_numbers(int4, tmp_path):
    diff = tmp_path / "diff"
    diff.mkdir()
    torch.save(
        {"model": {"layers.0.attention.wo.weight": torch.zeros(64, 64)}}, diff / "consolidated.00-of-01.model-diff.pth"
    )
    with pytest.raises(UserError, match=r"would be added to a weight that .* holds in whole numbers; give the 16-bit"):
        accessory.load_model([int4, diff])
