"""What vision model and Q-Former take while images are encoded."""

from __future__ import annotations

from accessory.models.llama import Llama
from accessory.models.qformer import QFormerLlama
from accessory.quantization import QuantLinear


def image_part(model: Llama, images: int, itemsize: int) -> tuple[int, int]:
    """(kept for backward, needed while images are encoded) by vision model and Q-Former. Frozen they keep nothing;
    where they train, in fp32, a layer keeps about eight times its width and twice its MLP's for each position."""
    if not isinstance(model, QFormerLlama) or images == 0:
        return 0, 0
    vision, qformer = model.vision_config.vision_config, model.vision_config.qformer_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    trains = model.qformer.query_tokens.requires_grad
    itemsize = 4 if trains else itemsize
    passing = images * patches * (4 * vision.hidden_size + 2 * vision.intermediate_size) * itemsize
    if any(isinstance(module, QuantLinear) for module in model.qformer.modules()):
        passing += vision.hidden_size * vision.intermediate_size * itemsize
    sizes = ((vision, patches), (qformer, model.vision_config.num_query_tokens))
    kept = sum(
        images * count * part.num_hidden_layers * (8 * part.hidden_size + 2 * part.intermediate_size) * itemsize
        for part, count in sizes
    )
    return (kept if trains else 0), passing + (kept if trains else 0)
