"""What a multimodal model of others is calibrated on: rows of text, and of images where each takes the same number of
positions, as in LLaVA 1.5. Images go behind BOS, as in our own models."""

from __future__ import annotations

from pathlib import Path
from typing import Union

import torch
from torch import Tensor, nn

from accessory.data.images import ImageInput
from accessory.errors import UserError, first_line
from accessory.models.tokenizer import Tokenizer
from accessory.quantization.calibration import read_calibration
from accessory.quantization.calibration.sources import open_parts, parse_dataset
from accessory.quantization.job.plan import CHECK_ROWS, CHECK_TOKENS
from accessory.quantize_options import Method, QuantizeConfig


def image_id_of(model: nn.Module) -> int:
    """The token at an image's positions; -1: unknown."""
    for name in ("image_token_id", "image_token_index"):
        if (number := getattr(model.config, name, None)) is not None:
            return number
    return -1


def calibration_rows(model: nn.Module, source: Path, config: QuantizeConfig) -> tuple[Tensor, list[list[str]], str]:
    """ids, the images of each row, and the calibration data's fingerprint ("": random ids)."""
    calib, text_config = config.calib, model.config.get_text_config()
    if config.method is not Method.autoround:
        generator = torch.Generator().manual_seed(config.seed)
        ids = torch.randint(text_config.vocab_size, (CHECK_ROWS, CHECK_TOKENS), generator=generator)
        return ids.masked_fill(ids == image_id_of(model), 0), [[], []], ""
    longest = getattr(text_config, "max_position_embeddings", 2048)
    seqlen = calib.seqlen if calib.seqlen is not None else min(2048, longest)
    if seqlen > longest:
        raise UserError(f"--seqlen {seqlen}: this model has {longest} positions")
    image = _image_input(model, source)
    if isinstance(image, str):
        _refuse_images(config, image)
    taken = image if isinstance(image, ImageInput) else None
    data = read_calibration(calib, Tokenizer(source), calib.nsamples, seqlen, config.seed, taken)
    if (data.rows == image_id_of(model)).any():
        raise UserError(f"{calib.dataset}: text holds the token that marks an image; take it out, or name the images")
    without = sum(not images for images in data.images)
    if config.vision and without:
        raise UserError(
            f"vision=true: {without} of {len(data.images)} rows hold no image to calibrate the vision blocks on; name "
            "image-text data (--dataset, --image_folder) or set a smaller --nsamples; method=rtn needs none"
        )
    return data.rows, data.images, data.fingerprint


def _image_input(model: nn.Module, source: Path) -> Union[ImageInput, str]:
    """How the model takes images, found by showing its processor two; or why rows with images cannot be made."""
    from PIL import Image
    from transformers import AutoProcessor

    shown = [Image.new("RGB", size) for size in ((64, 64), (96, 48))]
    try:
        processor = AutoProcessor.from_pretrained(source, local_files_only=True)
    except Exception as error:  # processors are of many kinds, and raise as many
        raise UserError(f"{source}: its processor cannot be read ({first_line(error)})") from None
    if not hasattr(processor, "tokenizer"):
        raise UserError(f"{source}: a tokenizer without a processor; processor_config.json or the like is missing")
    try:
        found = [processor(text=processor.image_token, images=image, return_tensors="pt") for image in shown]
    except Exception as error:
        return f"its processor refuses a plain image ({first_line(error)})"
    if more := sorted(set(found[0]) - {"input_ids", "attention_mask", "pixel_values"}):
        return f"images come with {', '.join(more)}"
    words = {int((one["input_ids"] == image_id_of(model)).sum()) for one in found}
    if len(words) > 1:
        return "the positions that an image takes depend on its size"
    return ImageInput(found[0]["pixel_values"].shape[-1], words.pop())


def _refuse_images(config: QuantizeConfig, reason: str) -> None:
    for request in parse_dataset(config.calib):
        for part in open_parts(request, config.calib.image_root):
            if config.vision or any(part.has_image(i) for i in range(len(part.items))):
                raise UserError(f"{request.path}: {reason}: calibrate this model on text, without vision=true")
