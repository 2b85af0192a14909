"""The multimodal model: what it computes with and without images, against transformers' own BLIP-2 and LLaMA."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_WORDS, VISION, VOCAB, blip2_weights, image_part_weights, meta_weights
from PIL import Image
from safetensors.torch import save_file

import accessory
from accessory.config import LlamaType
from accessory.data.packing import IMAGE_SLOT, insert_image
from accessory.errors import UserError

torch.manual_seed(0)
IDS = torch.randint(3, VOCAB, (2, 7))
PIXELS = torch.randn(2, 3, 28, 28)


@pytest.fixture(scope="module")
def model(qformer_folder):
    return accessory.load_model(str(qformer_folder))


def features(pixels: torch.Tensor) -> torch.Tensor:
    """Q-Former's output by transformers' whole BLIP-2 model: [n, queries, 48]."""
    from transformers import Blip2Config, Blip2Model, OPTConfig

    text = OPTConfig(vocab_size=8, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1)
    blip2 = Blip2Model(Blip2Config(**VISION, text_config=text)).eval()
    assert not blip2.load_state_dict(blip2_weights(), strict=False).unexpected_keys
    with torch.no_grad():
        found = blip2.get_qformer_features(pixel_values=pixels)
    return found if torch.is_tensor(found) else found.last_hidden_state


def reference_logits(tmp_path, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """transformers' LLaMA on hand-made embeddings: BOS, start, image, end, text; a row of logits a text token."""
    from transformers import LlamaForCausalLM

    base = tmp_path / "meta"
    base.mkdir(exist_ok=True)
    torch.save(meta_weights(), base / "consolidated.00.pth")
    (base / "params.json").write_text(json.dumps({"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
                                                  "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}))  # fmt: skip
    from accessory.export import export_hf

    export_hf(accessory.load_model(str(base)), tmp_path / "plain", torch.float32)
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    w = image_part_weights()
    projected = F.linear(features(pixels), w["qformer_proj.0.weight"], w["qformer_proj.0.bias"])
    projected = F.layer_norm(projected, (64,), w["qformer_proj.1.weight"], w["qformer_proj.1.bias"])
    tags = [w[name].expand(len(ids), 1, 64) for name in ("start_img", "end_img")]
    text = llama.model.embed_tokens(ids)
    embeds = torch.cat((text[:, :1], tags[0], projected, tags[1], text[:, 1:]), dim=1)
    with torch.no_grad():
        return llama(inputs_embeds=embeds).logits[:, IMAGE_WORDS:]


def test_logits_with_images_are_those_of_transformers_blip2_and_llama(model, tmp_path):
    assert (model(IDS, images=PIXELS) - reference_logits(tmp_path, IDS, PIXELS)).abs().max() < 1e-4


def test_logits_have_a_row_for_each_text_token_with_and_without_images(model):
    assert model(IDS, images=PIXELS).shape == model(IDS).shape == (2, 7, VOCAB)
    assert model(IDS).dtype == model(IDS, images=PIXELS).dtype == torch.float32


def test_without_images_it_is_the_language_model(model, qformer_folder):
    alone = accessory.load_model(str(qformer_folder), llama_type="llama_peft")
    assert not hasattr(alone, "qformer")
    assert torch.equal(model(IDS), alone(IDS))


def test_rows_with_and_without_an_image_in_one_call_are_as_apart(model):
    mixed = model(IDS, images=[None, PIXELS[1]])
    assert torch.allclose(mixed[:1], model(IDS[:1]), atol=1e-5)
    assert torch.allclose(mixed[1:], model(IDS[1:], images=PIXELS[1:]), atol=1e-5)
    assert torch.equal(model(IDS, images=[None, None]), model(IDS))


def test_an_image_changes_every_logit_row_after_it(model):
    one, other = model(IDS[:1], images=PIXELS[:1]), model(IDS[:1], images=PIXELS[1:])
    assert ((one - other).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("count", [1, 3])
def test_images_too_few_or_too_many_are_refused_with_both_numbers(model, count):
    with pytest.raises(UserError, match=f"{count} images for 2 rows"):
        model(IDS, images=torch.randn(count, 3, 28, 28))


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ([Image.new("RGB", (28, 28))] * 2, r"an image is Image: .*generate\(\) takes files"),
        (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), "an image is torch.uint8: expected normalised float pixels"),
        ("photo.jpg", "images is a str"),
    ],
    ids=["pictures", "bytes", "a name"],
)
def test_something_else_than_pixels_is_refused_in_a_line(model, images, told):
    with pytest.raises(UserError, match=told):
        model(IDS, images=images)


@pytest.mark.parametrize("picture", [torch.zeros(3, 28, 28), b"photo.jpg", 3])
def test_something_else_than_a_picture_is_refused_in_a_line(model, picture):
    with pytest.raises(UserError, match=r"generate\(\) takes image files or PIL images, found \w+$"):
        model.generate(["a"], images=[picture])


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_an_id_that_the_model_does_not_have_is_refused(model, bad):
    ids = IDS.clone()
    ids[1, 3] = bad
    for images in (None, PIXELS):
        with pytest.raises(UserError, match=f"input_ids from .*{bad}.*: this model has the ids 0 to {VOCAB - 1}"):
            model(ids, images=images)


def test_a_picture_without_pixels_is_refused_in_a_line(model):
    with pytest.raises(UserError, match="has no pixels: 0 x 5"):
        model.generate(["a"], images=[Image.new("RGB", (0, 5))])


def test_an_image_of_another_size_is_refused_with_both_shapes(model):
    with pytest.raises(UserError, match=r"\[3, 30, 30\].*\[3, 28, 28\]"):
        model(IDS, images=torch.randn(2, 3, 30, 30))


def test_a_language_model_refuses_images(meta_folder):
    alone = accessory.load_model(str(meta_folder))
    with pytest.raises(UserError, match="language-only"):
        alone(IDS, images=PIXELS)
    with pytest.raises(UserError, match="language-only"):
        alone.generate(["a"], images=[Image.new("RGB", (8, 8))])


def test_image_features_are_the_same_in_train_and_eval_mode(model):
    before = model.encode_images(PIXELS)
    assert torch.equal(model.train().encode_images(PIXELS), before)
    model.eval()


def test_the_vision_part_does_not_run_without_images(model, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("ran")

    monkeypatch.setattr(type(model.qformer), "forward", refuse)
    model(IDS)
    model.generate(["the text"], max_new_tokens=2)


def test_an_image_is_encoded_once_for_a_whole_answer(model, monkeypatch):
    calls = []
    encode = type(model).encode_images
    monkeypatch.setattr(type(model), "encode_images", lambda self, x: calls.append(len(x)) or encode(self, x))
    model.generate(["the text", "lines"], images=[Image.new("RGB", (9, 9), "red")] * 2, max_new_tokens=5)
    assert calls == [2]


def test_generated_answers_are_the_greedy_ones_of_the_logits(model):
    picture = Image.new("RGB", (40, 20), "blue")
    (answer,) = model.generate(["the text"], images=[picture], max_new_tokens=6)
    from accessory.data.images import load_pixels

    pixels = load_pixels(picture, model.image_transform, 28)[None]
    ids = model.tokenizer.encode("the text", bos=True, eos=False)
    new: list[int] = []
    while len(new) < 6:
        token = int(model(torch.tensor([ids + new]), images=pixels)[0, -1].argmax())
        if token == model.tokenizer.eos_id:
            break
        new.append(token)
    assert answer == model.tokenizer.decode(new)


def test_prompts_with_and_without_images_answer_in_one_batch_as_alone(model, tmp_path):
    Image.new("RGB", (40, 20), "green").save(tmp_path / "a.png")
    prompts, pictures = ["the text", "wrap these lines", "the"], [tmp_path / "a.png", None, str(tmp_path / "a.png")]
    together = model.generate(prompts, images=pictures, max_new_tokens=8)
    alone = [model.generate([p], images=[i], max_new_tokens=8)[0] for p, i in zip(prompts, pictures, strict=True)]
    assert together == alone


@pytest.mark.parametrize("count", [1, 3])
def test_generate_wants_an_image_or_none_for_every_prompt(model, count):
    with pytest.raises(UserError, match=f"{count} images for 2 prompts"):
        model.generate(["a", "b"], images=[None] * count)


def test_an_image_file_that_cannot_be_read_is_named(model, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png"):
        model.generate(["a"], images=[tmp_path / "text.png"])


def test_positions_of_an_image_count_against_the_models_limit(model):
    limit = model.config.max_position_embeddings
    words = "the " * (limit - 30)
    length = len(model.tokenizer.encode(words, bos=True, eos=False))
    with pytest.raises(UserError, match=str(length + IMAGE_WORDS)):
        model.generate([words], images=[Image.new("RGB", (9, 9))], max_new_tokens=limit - length)


def test_slots_are_filled_in_the_order_of_the_images(model):
    row = insert_image(IDS[0].tolist(), IMAGE_WORDS, IMAGE_SLOT)
    embeds = model.embed(torch.tensor([row, row]), PIXELS)
    assert torch.equal(embeds[:, 1 : 1 + IMAGE_WORDS], model.encode_images(PIXELS))
    assert torch.equal(embeds[:, 0], model.model.embed_tokens(IDS[:1, 0]).expand(2, -1))


# --- where the parts come from ---------------------------------------------------------------------------------------


def test_sizes_are_blip2_opts_where_no_folder_says_them():
    from accessory.bases import vision_config

    config = vision_config([], None)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1408, 39)
    assert (config.qformer_config.hidden_size, config.num_query_tokens) == (768, 32)


def opened(base, **settings):
    from accessory.config import ModelConfig
    from accessory.sources import open_sources

    return open_sources(ModelConfig(pretrained_path=[str(base)], **settings))


def test_a_vision_path_without_a_vision_model_is_refused(meta_folder, hf_folder):
    for path, told in ((hf_folder, "is it a BLIP-2 folder"), ("/no/such/folder", "no such folder")):
        with pytest.raises(UserError, match=told):
            opened(meta_folder, vision_path=str(path))


def test_a_vision_path_beside_a_base_with_an_image_part_is_refused(qformer_folder, blip2_folder):
    with pytest.raises(UserError, match=f"{qformer_folder} has an image part"):
        opened(qformer_folder, vision_path=str(blip2_folder))


def test_a_blip2_folder_among_the_pretrained_ones_is_told_where_it_belongs(meta_folder, blip2_folder):
    with pytest.raises(UserError, match=f"is a BLIP-2 folder; name it with model.vision_path={blip2_folder}"):
        accessory.load_model([str(meta_folder), str(blip2_folder)])


def test_a_vision_path_for_a_language_model_is_refused(meta_folder, blip2_folder):
    with pytest.raises(UserError, match="with --llama_type llama_peft: leave one of them out"):
        opened(meta_folder, vision_path=str(blip2_folder), llama_type=LlamaType.llama_peft)


def test_a_vision_model_with_more_layers_than_its_config_says_is_refused(tmp_path, meta_folder, blip2_folder):
    shutil.copytree(blip2_folder, tmp_path / "blip2")
    content = json.loads((tmp_path / "blip2" / "config.json").read_text())
    content["vision_config"]["num_hidden_layers"] = 1
    (tmp_path / "blip2" / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"encoder\.layers\.1\..* has no place in what its config\.json says"):
        opened(meta_folder, vision_path=str(tmp_path / "blip2"))


def test_of_a_repository_on_the_hub_only_the_files_with_the_vision_part_are_fetched(
    tmp_path, meta_folder, blip2_folder, monkeypatch
):
    """Two shards, one with the language model alone; the Hub's client is replaced by one that copies from a folder."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    cache.mkdir()
    shutil.copytree(blip2_folder, hub, ignore=shutil.ignore_patterns("*.safetensors"))
    shards = {"model-1.safetensors": blip2_weights(seed=5), "model-2.safetensors": {"language_model.a": torch.ones(2)}}
    for file, weights in shards.items():
        save_file(weights, hub / file)
    weight_map = {name: file for file, weights in shards.items() for name in weights}
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def snapshot_download(name, allow_patterns):
        assert name == "someone/blip2"
        for file in hub.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (_, fetched) = opened(meta_folder, vision_path="someone/blip2").folders
    assert torch.equal(fetched.tensor("qformer.query_tokens"), blip2_weights(seed=5)["query_tokens"])
    assert not (cache / "model-2.safetensors").exists()


def test_a_name_that_the_hub_does_not_give_is_one_line(meta_folder, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"^model\.vision_path=someone/blip2: .*from the Hub \(no network\)$"):
        opened(meta_folder, vision_path="someone/blip2")


def test_an_exported_model_may_lend_its_vision_part(tmp_path, model, meta_folder):
    from accessory.export import export_hf

    export_hf(model, tmp_path / "out", torch.float32)
    (lent,) = opened(meta_folder, vision_path=str(tmp_path / "out")).folders[1:]
    assert torch.equal(lent.tensor("qformer.query_tokens"), model.qformer.query_tokens)


@pytest.mark.parametrize(
    ("lost", "hint"),
    [("qformer.", "model.vision_path"), ("qformer.query_tokens", "does vision_config.json"), ("start_img", "")],
)
def test_a_part_that_is_missing_is_named_with_a_way_out(tmp_path, qformer_folder, lost, hint):
    shutil.copytree(qformer_folder, tmp_path / "base")
    weights = meta_weights() | image_part_weights()
    left = {f"llma.{name}": tensor for name, tensor in weights.items() if not name.startswith(lost)}
    torch.save(left, tmp_path / "base" / "consolidated.00-of-01.model.pth")
    with pytest.raises(UserError, match=f"missing, the first is {lost}.*{hint}"):
        accessory.load_model(str(tmp_path / "base"))


@pytest.mark.parametrize(
    "content, told",
    [
        ("{}", "no 'vision_config'"),
        ('{"vision_config": {"hidden_size": 33, "num_attention_heads": 2}}', "divisible"),
        ('{"vision_config": {"hidden_size": "big"}}', "hidden_size"),
        ("[]", "expected a JSON object"),
        ('{"vision_config": {"image_size": -28}}', "image_size=-28: must be a whole number above 0"),
        ('{"vision_config": {"image_size": [28, 56]}}', r"image_size=\[28, 56\]"),
        ('{"vision_config": {"patch_size": 0}}', "patch_size=0"),
        ('{"vision_config": {}, "qformer_config": {"use_qformer_text_input": true}}', "use_qformer_text_input"),
    ],
)
def test_a_vision_config_that_cannot_be_is_named(tmp_path, qformer_folder, content, told):
    shutil.copytree(qformer_folder, tmp_path / "base")
    (tmp_path / "base" / "vision_config.json").write_text(content)
    with pytest.raises(UserError, match=rf"vision_config\.json.*{told}"):
        accessory.load_model(str(tmp_path / "base"))


def test_the_image_part_is_whole_in_every_shard_of_a_split_folder(tmp_path, qformer_folder, model):
    from conftest import split_over_shards

    shutil.copytree(qformer_folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.pth"))
    for i, shard in enumerate(split_over_shards(meta_weights(), 2)):
        whole = {f"llma.{k}": v for k, v in (shard | image_part_weights()).items()}
        torch.save({"model": whole}, tmp_path / "base" / f"consolidated.{i:02d}-of-02.model.pth")
    assert torch.equal(accessory.load_model(str(tmp_path / "base"))(IDS, images=PIXELS), model(IDS, images=PIXELS))


def test_an_exported_model_is_multimodal_here_and_a_plain_llama_for_transformers(model, tmp_path):
    from transformers import AutoModelForCausalLM

    from accessory.export import export_hf

    export_hf(model, tmp_path / "out", torch.float32)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").glob("*.safetensors")} == {0o644}
    again = accessory.load_model(str(tmp_path / "out"))
    assert torch.equal(again(IDS, images=PIXELS), model(IDS, images=PIXELS))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(plain(IDS).logits, model(IDS), atol=1e-5)


def test_quantizing_the_vision_part_quantizes_its_linears_and_nothing_else(qformer_folder):
    from accessory.config import QuantizationConfig, QuantMethod
    from accessory.quantization import QuantLinear

    plain = accessory.load_model(str(qformer_folder), quantization="nf4")
    assert not any(isinstance(m, QuantLinear) for m in plain.qformer.modules())
    whole = accessory.load_model(
        str(qformer_folder), quantization=QuantizationConfig(method=QuantMethod.nf4, vision=True)
    )
    linears = [m for m in plain.qformer.modules() if type(m) is torch.nn.Linear]
    packed = [m for m in whole.qformer.modules() if isinstance(m, QuantLinear)]
    assert len(packed) == len(linears) > 20 and isinstance(whole.qformer_proj[0], QuantLinear)
    assert not any(type(m) is torch.nn.Linear for m in whole.qformer.modules())
    exact, near = plain(IDS, images=PIXELS), whole(IDS, images=PIXELS)
    assert not torch.equal(exact, near) and F.cosine_similarity(exact.flatten(), near.flatten(), 0) > 0.95


def test_bf16_computes_in_bf16_throughout(qformer_folder, model):
    half = accessory.load_model(str(qformer_folder), dtype=torch.bfloat16)
    assert half.qformer.query_tokens.dtype == torch.bfloat16
    assert half.encode_images(PIXELS).dtype == torch.bfloat16
    exact, near = model(IDS, images=PIXELS), half(IDS, images=PIXELS)
    assert F.cosine_similarity(exact.flatten(), near.flatten(), 0) > 0.999


def test_a_language_base_with_vision_files_beside_it_is_read(tmp_path, hf_folder):
    """What an export writes: transformers' files and the image part in one more."""
    shutil.copytree(hf_folder, tmp_path / "base")
    save_file(image_part_weights(), tmp_path / "base" / "image_part.safetensors")
    (tmp_path / "base" / "vision_config.json").write_text(json.dumps(VISION))
    assert accessory.load_model(str(tmp_path / "base")).image_words == IMAGE_WORDS
