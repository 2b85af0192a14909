"""A vision part small enough to learn from nothing on a CPU: a ViT and a Q-Former of BLIP-2's classes, random weights.

Written as a BLIP-2 folder (config.json, model.safetensors with vision_model.*, qformer.*, query_tokens), which is what
`model.vision_path` reads; a real run names a downloaded BLIP-2 there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig

from accessory.files import atomic_folder
from accessory.models.qformer import VisionQFormer

HIDDEN = 192
# 4 x 4 patches, each of two or three of a picture's original 10 x 10 pixels.
VISION = Blip2VisionConfig(
    image_size=56,
    patch_size=14,
    hidden_size=HIDDEN,
    intermediate_size=4 * HIDDEN,
    num_hidden_layers=4,
    num_attention_heads=6,
    initializer_range=HIDDEN**-0.5,
)
QFORMER = Blip2QFormerConfig(
    hidden_size=HIDDEN,
    intermediate_size=4 * HIDDEN,
    num_hidden_layers=2,
    num_attention_heads=6,
    encoder_hidden_size=HIDDEN,
    cross_attention_frequency=1,
    vocab_size=1,  # of the text input, which is not used here
    initializer_range=HIDDEN**-0.5,
)
QUERIES = 3


def make_vision(folder: Path, seed: int) -> int:
    """Write the folder, the same one for the same seed, and return its number of parameters."""
    config = Blip2Config(vision_config=VISION.to_dict(), qformer_config=QFORMER.to_dict(), num_query_tokens=QUERIES)
    torch.manual_seed(seed)
    model = VisionQFormer(config)
    with torch.no_grad():  # zeros in BLIP-2's class: queries that start alike stay alike
        model.query_tokens.normal_()
        model.vision_model.embeddings.position_embedding.normal_()
    with atomic_folder(folder) as partial:
        config.save_pretrained(partial)
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in weights.values())
