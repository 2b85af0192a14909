"""What only a CUDA GPU can show. Each test skips, with its reason, where there is none."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from conftest import image_part_weights, write_data
from test_finetune import short_data, tiny_config, trainables
from test_multimodal import picture_items

import accessory
from accessory.callbacks import read_series
from accessory.capture import capturing
from accessory.config import QuantizationConfig, QuantMethod, RecipeConfig
from accessory.errors import UserError
from accessory.estimate import Step, estimate_training
from accessory.figures import StepFigures, StepLog
from accessory.finetune import finetune
from accessory.fused import pointwise
from accessory.fused.graph import GraphedLoss
from accessory.fused.host import HostStack
from accessory.fused.model import fuse_blocks, keep_attention, keep_on_host
from accessory.models import build_model, config_from_params
from accessory.module import batch_loss
from accessory.quantization import quantize
from accessory.quantization.int4 import Int4
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


@pytest.mark.parametrize("fast", ["rows", "packed", "graph"])
@pytest.mark.parametrize("lora", [False, True])
def test_fused_blocks_are_as_near_to_fp32_gradients_as_plain_ones(lora, fast):
    recipe = RecipeConfig(lora=lora)
    bounds = torch.tensor([0, 11, 64, 100, 128, 128], dtype=torch.int32, device="cuda")
    input_ids = torch.randint(1000, (2, 64), device="cuda")
    batch = {"input_ids": input_ids, "targets": input_ids.roll(-1, 1), "position_ids": torch.arange(64, device="cuda")}
    batch["position_ids"] = batch["position_ids"].expand(2, 64).contiguous()
    batch["targets"][:, :9] = -100
    if fast != "rows":
        batch["bounds"] = bounds

    def run(model):
        model.zero_grad()
        batch_loss(model, batch).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    exact, plain = run(small_model(recipe, torch.float32)), run(small_model(recipe))
    model = small_model(recipe)
    fuse_blocks(model)
    trainables = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ways = ((0, False, False), (3, False, False), (0, True, False), (2, True, False), (4, True, False), (0, True, True))
    for recomputed, on_host, keeps_attention in ways:
        model.model.recomputed = recomputed
        if on_host:
            keep_on_host(model, input_ids.numel())
        if keeps_attention:
            keep_attention(model)
        if fast == "graph":
            graphed = GraphedLoss(lambda b: batch_loss(model, b, fixed_shape=True), list(trainables.values()))
            graphed.attach()
            losses = []
            for _ in range(3):  # as ever, captured, replayed
                graphed.zero()
                losses.append(graphed(batch).item())
            assert losses[0] == pytest.approx(losses[2], rel=1e-3) and len(graphed._captured) == 1
            fused = {name: p.grad.clone() for name, p in trainables.items()}
        else:
            fused = run(model)
        scale = torch.stack([gradient.norm() for gradient in exact.values()]).norm()
        for name, reference in exact.items():
            limit = 1.5 * (plain[name] - reference).norm() + 2e-3 * scale
            assert (fused[name] - reference).norm() < limit, name


@pytest.mark.parametrize("recomputed", [0, 2, 4])
def test_what_lies_in_host_memory_is_waited_for_however_long_its_copies_take(recomputed, monkeypatch):
    input_ids = torch.randint(1000, (2, 64), device="cuda")
    model = small_model(RecipeConfig())
    fuse_blocks(model)
    expected = gradients(model, input_ids)
    copy = HostStack._copy

    def late(self, to, source):
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(20_000_000)  # cycles: some ten milliseconds, where a block takes a fraction of one
        copy(self, to, source)

    monkeypatch.setattr(HostStack, "_copy", late)
    keep_on_host(model, input_ids.numel())
    model.model.recomputed = recomputed
    for _ in range(2):
        for name, gradient in gradients(model, input_ids).items():
            assert (gradient - expected[name]).norm() <= 2e-2 * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize(("recomputed", "keeps_attention"), [(0, True), (0, False), (4, True), (4, False), (8, False)])
def test_a_steps_peak_is_the_estimated_one(recomputed, keeps_attention, offloaded):
    from accessory.weights import weight_places

    torch.manual_seed(0)
    params = {"dim": 1024, "n_layers": 8, "n_heads": 8, "vocab_size": 1000}
    model = build_model(config_from_params(params, 1000, "test"))
    quantize(model, QuantizationConfig(method=QuantMethod.nf4), torch.bfloat16)
    add_trainables(model, RecipeConfig())
    mark_trainable(model, RecipeConfig())
    for name, (shape, store, _) in weight_places(model, torch.device("cuda"), torch.bfloat16):
        store(0.02 * torch.randn(shape, device="cuda") + ("norm" in name))
    model.model.rotary_emb.to("cuda")
    fuse_blocks(model)
    if offloaded:
        keep_on_host(model, 16 * 512)
    if keeps_attention:
        keep_attention(model)
    model.model.recomputed = recomputed
    ids = torch.randint(1000, (16, 512), device="cuda")
    positions = torch.arange(512, device="cuda").expand(16, 512)
    batch = {"input_ids": ids, "targets": ids.roll(-1, 1), "position_ids": positions}
    batch_loss(model, batch).backward()  # the gradients are there from now on, and the libraries' workspaces
    gc.collect()  # what went in reference cycles before this test would be missed on the way
    there = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    batch_loss(model, batch).backward()
    step = Step(16, 512, captured=False, offloaded=offloaded, keeps_attention=keeps_attention)
    parts = estimate_training(model, step, recomputed).parts
    passing = parts["activations"] + max(parts["loss"], parts["backward"])
    measured = torch.cuda.max_memory_allocated() - there
    assert 0.95 < passing / measured < 1.08


@pytest.mark.parametrize(
    "backend", [NF4(), NF4(double_quant=False), Int4(4, 64), Int4(4, 128, True), Int4(8, -1, True)]
)
def test_lora_folded_into_the_weight_is_summed_before_rounding(backend):
    weight = 0.02 * torch.randn(300, 512, device="cuda")
    payload = backend.quantize(weight)
    b, a = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((300, 16), (16, 512)))
    b *= 1e-4  # far below the spacing of bf16 numbers of the weights' size
    folded = torch.empty(300, 512, dtype=torch.bfloat16, device="cuda")
    backend.dequantize_into(payload, folded, (b, a))
    exact = backend.dequantize(payload, (300, 512), torch.float32).double() + b.double() @ a.double()
    assert (folded.double() - exact).norm() / exact.norm() < 2e-3
    moved = folded.double() - backend.dequantize(payload, (300, 512), torch.float32).double()
    update = b.double() @ a.double()
    share = ((moved * update).sum() / update.square().sum()).item()
    assert share == pytest.approx(1, abs=0.1)  # none of it is lost on average


def test_pointwise_kernels_are_the_plain_functions():
    torch.manual_seed(0)
    angles = torch.rand(40, 32)
    cos, sin = (f(angles).repeat(1, 2) for f in (torch.cos, torch.sin))
    qkv, gate_up, dh = torch.randn(40, 8, 64), torch.randn(40, 2 * 300), torch.randn(40, 300)
    heads = [torch.randn(5, h, 8, 64) for h in (4, 2, 2)]
    x, dy, residual, weight = torch.randn(40, 96), torch.randn(40, 96), torch.randn(40, 96), torch.randn(96)
    calls = [
        (pointwise.norm, (x, weight, 1e-5)),
        (pointwise.add_norm, (x, residual, weight, 1e-5)),
        (pointwise.norm_again, (x, torch.rand(40, 1), weight)),
        (pointwise.norm_backward, (dy, x, torch.rand(40, 1), weight, residual, True)),
        (pointwise.rotate_, (qkv, cos, sin, 6)),
        (pointwise.rotate_back_, (torch.empty(40, 8, 64), *heads, cos, sin, True)),
        (pointwise.swiglu, (gate_up,)),
        (pointwise.swiglu_backward_, (gate_up, dh, True)),
    ]
    for function, arguments in calls:
        on_gpu = [t.cuda() if isinstance(t, torch.Tensor) else t for t in arguments]
        torch.testing.assert_close(function(*on_gpu), function(*arguments), check_device=False, rtol=1e-4, atol=1e-4)


def test_a_capture_that_fails_leaves_stream_and_generator_as_they_were():
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    numbers = torch.arange(4.0, device="cuda")
    state = torch.cuda.get_rng_state()
    expected = torch.randn(8, device="cuda")
    torch.cuda.set_rng_state(state)
    with pytest.raises(RuntimeError), capturing(graph, numbers.device):
        numbers.sum().item()  # waits, which a capture cannot
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.randn(8, device="cuda"), expected)  # as if nothing had been
    again = torch.cuda.CUDAGraph()
    with capturing(again, numbers.device):
        doubled = 2 * numbers
    again.replay()
    assert doubled.tolist() == [0, 2, 4, 6]


def test_a_step_that_cannot_be_captured_is_computed_as_ever_with_one_warning(caplog):
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    graphed = GraphedLoss(lambda batch: (weight * batch["x"]).sum() * float(batch["x"].sum().item() > 0), [weight])
    graphed.attach()
    for _ in range(4):
        graphed.zero()
        assert graphed({"x": torch.tensor([1.0, 2.0, 3.0], device="cuda")}).item() == 6
        assert weight.grad.tolist() == [1, 2, 3]
    assert len([record for record in caplog.records if "fast.graphs" in record.getMessage()]) == 1


def test_a_captured_run_that_diverges_is_stopped_before_its_weights_are_nan(meta_folder, tmp_path, caught_model):
    changes = {"train.precision": "bf16", "quantization.method": "nf4", "optim.lr": 1e30, "optim.warmup_epochs": 0.0}
    with pytest.raises(UserError, match=r"step \d+: the (loss|gradient .*) is not finite.*Lower --lr"):
        finetune(tiny_config(meta_folder, short_data(tmp_path / "data"), tmp_path / "out", **changes))
    assert all(p.isfinite().all() for p in caught_model["model"].parameters() if p.requires_grad)


def test_a_step_lasts_as_long_as_the_gpu_took_whatever_the_host_did_meanwhile():
    log, numbers = StepLog(), torch.zeros(2**28, device="cuda")
    rates = []
    for _ in range(3):
        step = StepFigures(0, 0, [], {}, tokens=100)
        for _ in range(20):
            numbers += 1
        step.send(numbers[0], numbers[1])
        step.read()
        time.sleep(0.5)  # as where the next step is captured first
        log.write([], step, 1)
        log.restart()
        rates.append(log.newest["tokens_per_s"])
    assert min(rates[1:]) > 100 / 0.4


def test_with_loss_scaling_the_norm_that_is_clipped_is_the_gradients_own(meta_folder, tmp_path):
    data, norms = short_data(tmp_path / "data"), []
    for precision in ("bf16", "fp16"):
        changes = {"train.precision": precision, "quantization.method": "nf4", "recipe.lora": True}
        finetune(tiny_config(meta_folder, data, tmp_path / precision, **changes))
        norms.append(read_series(tmp_path / precision, "grad_norm")[1][-1])
    assert norms[1] == pytest.approx(norms[0], rel=0.3)  # not 65,536 times it


@pytest.mark.parametrize("accum_iter", [1, 2])
def test_the_fast_path_learns_what_the_plain_one_does(accum_iter, meta_folder, tmp_path, caplog):
    """Whole runs, with checkpoints and validation; padded rows against shared ones, modules against graphs."""
    curves, data_yaml = [], short_data(tmp_path / "data")
    for fast in (False, True):
        changes = {"train.precision": "bf16", "quantization.method": "nf4", "recipe.lora": True, "fast.enabled": fast}
        changes |= {"train.batch_size": 2, "train.accum_iter": accum_iter, "train.epochs": 4, "data.val_fraction": 0.2}
        finetune(tiny_config(meta_folder, data_yaml, tmp_path / str(fast), **changes))
        curves.append([torch.tensor(read_series(tmp_path / str(fast), name)[1]) for name in ("loss", "val_loss")])
    assert not [record for record in caplog.records if "fast." in record.getMessage()]
    for plain, fast in zip(*curves, strict=True):
        assert len(plain) == len(fast) > 2
        torch.testing.assert_close(fast, plain, rtol=0.01, atol=0.01)


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
