"""Which folder each weight of a model comes from, and the place in the model where it goes, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Optional, Union

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm import tqdm

from accessory.bases import Folder
from accessory.errors import UserError
from accessory.models.llama import Llama, RMSNorm
from accessory.models.qformer import QFormerLlama
from accessory.quantization import QuantLinear
from accessory.quantization.packed import Packed
from accessory.shards import OUTPUT, is_image_part
from accessory.tuning.recipe import canonical_name, weight_kind

Place = tuple[tuple[int, ...], Callable[[Union[Tensor, Packed]], None], bool]


def load_weights(
    model: Llama,
    folders: list[Folder],
    device: torch.device,
    dtype: torch.dtype,
    fresh_trainables: bool,
    loaded: Optional[Callable[[str], None]] = None,
) -> None:
    """Stream all folders into `model`, weight by weight; quantized layers quantize each as it arrives, on `device`.

    Later folders win; a diff folder adds to what came before. fresh_trainables: biases, LoRA and a projector that no
    folder holds start with initial values (training), instead of being an error. loaded: told each name that has its
    values.
    """
    places = dict(weight_places(model, device, dtype))
    sources = layered(folders)
    _refuse_unfit(sources, places, tied=model.config.tie_word_embeddings)
    optional = {name for name, (_, _, is_fresh) in places.items() if is_fresh and fresh_trainables}
    fresh_projector = fresh_trainables and _starts_projector(model, sources)
    if fresh_projector:
        optional |= {name for name in places if is_image_part(name) and weight_kind(name) != "vision"}
    _refuse_missing(sorted(places.keys() - sources.keys() - optional), sources, folders)
    # The image part first: small, and where folders disagree that is told before LLaMA is read.
    ordered = sorted((name for name in places if name in sources), key=lambda name: not is_image_part(name))
    for name in tqdm(ordered, desc="loading", unit="tensor", disable=not sys.stderr.isatty(), leave=False):
        shape, store, _ = places[name]
        store(read_tensor(name, sources[name], shape))
        if loaded is not None:
            loaded(name)
    if fresh_projector:
        model.initialize_projector()
    for module in model.modules():  # fresh biases and LoRA, and the rotary frequencies, were made on the CPU
        if not any(t.is_meta for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module._apply(lambda t: t.to(device), recurse=False)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def refuse_unfit_weights(model: Llama, folders: list[Folder]) -> None:
    """Refuse folders that lack a weight of `model`, on the meta device, or hold one that has no place in it."""
    places = dict(weight_places(model, torch.device("meta"), torch.float32))
    sources = layered(folders)
    _refuse_unfit(sources, places, tied=model.config.tie_word_embeddings)
    _refuse_missing(sorted(places.keys() - sources.keys()), sources, folders)


def weight_places(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Place]]:
    """name on disk -> (shape, how to store a tensor there, whether training may start without it).

    What is marked as trainable, and every norm of LLaMA, is fp32; the rest is stored in `dtype`.
    """

    def setter(module: nn.Module, leaf: str, as_dtype: torch.dtype) -> Callable[[Tensor], None]:
        trains = getattr(module, leaf).requires_grad
        as_dtype = torch.float32 if trains else as_dtype

        def store(tensor: Union[Tensor, Packed]) -> None:
            tensor = tensor.dequantize(as_dtype) if isinstance(tensor, Packed) else tensor
            value = tensor.to(device=device, dtype=as_dtype, copy=True).contiguous()  # a file's may be transposed
            setattr(module, leaf, nn.Parameter(value, requires_grad=trains))

        return store

    tied = OUTPUT if model.config.tie_word_embeddings else None
    for path, module in model.named_modules():
        prefix = canonical_name(path + ".").removesuffix(".")
        if isinstance(module, QuantLinear):
            # Quantized on the device that will use it, from the values as stored, so the result does not depend on
            # the compute type.
            def load(weight: Union[Tensor, Packed], layer: QuantLinear = module) -> None:
                (layer.load_packed if isinstance(weight, Packed) else layer.load_weight)(weight.to(device))

            yield f"{prefix}.weight", (module.shape, load, False)
            if module.bias is not None:
                store = lambda t, m=module: m.load_bias(t.to(device))
                yield f"{prefix}.bias", ((module.out_features,), store, not module.bias.is_meta)
        elif isinstance(module, LoraLayer):
            for matrix in ("lora_A", "lora_B"):
                inner = getattr(module, matrix)["default"]
                shape = tuple(inner.weight.shape)
                yield f"{prefix}.{matrix}.weight", (shape, setter(inner, "weight", torch.float32), True)
        else:
            kept = torch.float32 if isinstance(module, RMSNorm) else dtype
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{prefix}.{leaf}" if prefix else leaf
                if parameter.is_meta and name != tied:
                    yield name, (tuple(parameter.shape), setter(module, leaf, kept), False)


def layered(folders: list[Folder]) -> dict[str, list[Folder]]:
    """For each name the folders whose values add up to it: the last plain one, then the diffs after it."""
    found: dict[str, list[Folder]] = {}
    for folder in folders:
        for name in folder.names:
            adds = folder.kind == "accessory_diff" and name in found
            found[name] = [*found[name], folder] if adds else [folder]
    return found


def read_tensor(name: str, folders: list[Folder], shape: Optional[tuple[int, ...]] = None) -> Union[Tensor, Packed]:
    """The tensor of one folder, or the sum of a base's and its diffs', in fp32. shape: what the model wants."""
    tensors = []
    for folder in folders:
        tensor = folder.tensor(name)
        if shape is not None and tuple(tensor.shape) != shape:
            found = list(tensor.shape)
            raise UserError(f"{folder.path}: {name} has shape {found}, the model wants {list(shape)}: another model's?")
        if isinstance(tensor, Packed) and len(folders) > 1:
            raise UserError(
                f"{folders[-1].path}: {name} would be added to a weight that {folder.path} holds in whole numbers; "
                "give the 16-bit base of both"
            )
        tensors.append(tensor)
    return tensors[0] if len(tensors) == 1 else torch.stack([t.float() for t in tensors]).sum(0)


def _starts_projector(model: Llama, sources: dict[str, list[Folder]]) -> bool:
    """Whether the recipe trains a projector of which no folder holds a part."""
    return (
        isinstance(model, QFormerLlama)
        and model.start_img.requires_grad
        and not any(is_image_part(name) and weight_kind(name) != "vision" for name in sources)
    )


def _refuse_missing(missing: list[str], sources: dict[str, list[Folder]], folders: list[Folder]) -> None:
    if not missing:
        return
    where = ", ".join(str(folder.path) for folder in folders)
    lacks_tower, has_tower = (any(name.startswith("qformer.") for name in names) for names in (missing, sources))
    hint = ""
    if lacks_tower and has_tower:
        hint = "; does vision_config.json (BLIP-2 opt-2.7b's sizes where there is none) describe this model?"
    elif lacks_tower:
        hint = "; a BLIP-2 folder that holds the vision part can be named with model.vision_path"
    raise UserError(f"{where}: {len(missing)} weights are missing, the first is {missing[0]}{hint}")


def _refuse_unfit(found: dict[str, list[Folder]], places: dict[str, Place], tied: bool) -> None:
    for name in sorted(found.keys() - places.keys()):
        if not (tied and name == OUTPUT):
            raise UserError(f"{found[name][-1].path}: {name} fits nowhere in this model{_why_unfit(name)}")


def _why_unfit(name: str) -> str:
    if ".lora_" in name:
        return "; it holds LoRA: choose recipe=norm_bias_lora, bias_lora or lora"
    if name.endswith(".bias"):
        return "; it holds biases: choose recipe=norm_bias, norm_bias_lora or bias_lora"
    return " (another architecture or size?)"
