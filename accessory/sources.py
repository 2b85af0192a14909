"""The folders that a model is made of: opened, checked against each other, and not yet read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Optional

import torch
from transformers import Blip2Config, LlamaConfig

from accessory.bases import (
    FROZEN_FILE,
    META_FILE,
    TRAINABLE_FILE,
    Folder,
    attach,
    fingerprint,
    identity,
    image_fingerprint,
    model_config,
    open_folder,
    vision_config,
)
from accessory.blip2 import open_vision
from accessory.config import ImageTransform, LlamaType, ModelConfig
from accessory.data.images import deterministic
from accessory.errors import UserError
from accessory.files import sha256
from accessory.models import describe_vision
from accessory.models.qformer import VisionQFormer
from accessory.models.tokenizer import Tokenizer, check_vocabulary, find_tokenizer
from accessory.shards import is_image_part

CHECKSUMS = {"sha256": TRAINABLE_FILE, "frozen_sha256": FROZEN_FILE}  # by key of meta.json


@dataclass(frozen=True)
class Sources:
    """The opened folders of a model and what they say; no weight has been read yet. vision: sizes of the image part,
    None for a language-only model."""

    folders: list[Folder]
    tokenizer: Optional[Tokenizer]
    architecture: LlamaConfig
    vision: Optional[Blip2Config]
    base: dict[str, str]

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this model from every other."""
        found = {
            "base": self.base["fingerprint"],
            "starts_from": [identity(folder) for folder in self.folders[1:]],
            "architecture": hashlib.sha256(self.architecture.to_json_string().encode()).hexdigest()[:16],
            "tokenizer": self.tokenizer.fingerprint(),
        }
        if self.vision is not None:
            sizes = hashlib.sha256(describe_vision(self.vision).encode()).hexdigest()[:16]
            found |= {"image_part": self.base.get("image_part"), "image_sizes": sizes}
        return found

    @property
    def image_transform(self) -> ImageTransform:
        """How answers see an image: as the last folder that says so was trained."""
        stated = next((f.meta["image_transform"] for f in reversed(self.folders) if "image_transform" in f.meta), None)
        return deterministic(ImageTransform(stated or ImageTransform.random_resized_crop))

    @property
    def llama_type(self) -> LlamaType:
        return LlamaType.llama_peft if self.vision is None else LlamaType.llama_qformerv2_peft


def open_sources(config: ModelConfig) -> Sources:
    """Open and check everything about a model that is cheap to check."""
    folders = open_folders(config.pretrained_path)
    tokenizer = _tokenizer(config, folders)
    vision = None
    if _takes_images(config, folders):
        folders, vision = _with_vision(config, folders)
    else:
        folders = [folder.only(lambda name: not is_image_part(name)) for folder in folders]
    architecture = model_config(folders, config.llama_config)
    if tokenizer is not None:
        check_vocabulary(tokenizer, architecture.vocab_size)
    for folder in folders:
        attach(folder, architecture)
    base = {"path": str(folders[0].path.resolve()), **_check_pairing(folders, vision is not None)}
    return Sources(folders, tokenizer, architecture, vision, base)


def open_folders(paths: list[str]) -> list[Folder]:
    """Open every folder of --pretrained_path, base first; refuse an order or a pairing that cannot be meant."""
    if not paths:
        raise UserError("--pretrained_path is empty: name the base's folder, then the trainables'")
    folders = [open_folder(path) for path in paths]
    if not folders[0].is_base:
        later = next((folder.path for folder in folders[1:] if folder.is_base), None)
        recorded = folders[0].meta.get("base", {})
        hint = recorded.get("path", "its base") if isinstance(recorded, dict) else "its base"
        raise UserError(
            f"--pretrained_path: {folders[0].path} holds trainables only, it cannot come first; give the base first: "
            f"--pretrained_path {later or hint} {folders[0].path}"
        )
    if (later := next((folder.path for folder in folders[1:] if folder.packed), None)) is not None:
        raise UserError(f"--pretrained_path: {later} is a base in whole numbers; it can only come first")
    return folders


def _tokenizer(config: ModelConfig, folders: list[Folder]) -> Optional[Tokenizer]:
    if config.tokenizer_path is not None:
        return Tokenizer(config.tokenizer_path)
    for folder in reversed(folders):
        if (found := find_tokenizer(folder.path)) is not None:
            return Tokenizer(found)
    return None


def _takes_images(config: ModelConfig, folders: list[Folder]) -> bool:
    """Whether the multimodal model is meant: as the user says, else as the folders do."""
    is_language = config.llama_type is not None and config.llama_type != LlamaType.llama_qformerv2_peft
    if is_language or not config.visual:
        if config.vision_path is not None:
            flag = f"--llama_type {config.llama_type.value}" if is_language else "--no_visual"
            raise UserError(f"model.vision_path={config.vision_path} with {flag}: leave one of them out")
        return False
    if config.llama_type is not None:
        return True
    stated = next((f.meta["llama_type"] for f in reversed(folders) if "llama_type" in f.meta), None)
    return (
        stated == LlamaType.llama_qformerv2_peft or config.vision_path is not None or any(f.has_images for f in folders)
    )


def _with_vision(config: ModelConfig, folders: list[Folder]) -> tuple[list[Folder], Blip2Config]:
    """The folders with the one of model.vision_path, behind the base so that trainables win; and the sizes."""
    if config.vision_path is None:
        return folders, vision_config(folders, config.vision_config)
    if (own := next((folder.path for folder in folders if folder.has_images), None)) is not None:
        raise UserError(
            f"model.vision_path={config.vision_path}: {own} has an image part, which belongs to its own vision model; "
            "leave model.vision_path out"
        )
    opened = open_vision(config.vision_path)
    sizes = vision_config([folders[0], opened, *folders[1:]], config.vision_config)
    with torch.device("meta"):
        wanted = {f"qformer.{name}" for name in VisionQFormer(sizes).state_dict()}
    if beyond := sorted(name for name in opened.names - wanted if ".encoder." in name):
        raise UserError(
            f"model.vision_path={config.vision_path}: {beyond[0]} has no place in what its config.json says"
        )
    # Outside the encoders the file may hold more, for other uses of BLIP-2.
    return [folders[0], opened.only(wanted.__contains__), *folders[1:]], sizes


def _check_pairing(folders: list[Folder], takes_images: bool) -> dict[str, Optional[str]]:
    """Trainables belong to the base they were trained on. Returns what identifies the base: fingerprint, and of a
    multimodal model image_part (None: the base has none)."""
    found: dict[str, Optional[str]] = {"fingerprint": fingerprint(folders[0])}
    if takes_images:
        found["image_part"] = image_fingerprint(folders[0])
    for folder in folders[1:]:
        if folder.kind == "trainable":
            _check_base(folder, folders[0], found)
            for key, file in CHECKSUMS.items():
                stated = folder.meta.get(key)
                if stated and (not (folder.path / file).is_file() or stated != sha256(folder.path / file)):
                    raise UserError(
                        f"{folder.path / file}: its checksum is not the one in {META_FILE}; it is damaged or missing"
                    )
    return found


def _check_base(folder: Folder, base: Folder, found: dict[str, Optional[str]]) -> None:
    trained_on = folder.meta.get("base", {})
    for key, now in found.items():
        before = trained_on.get(key)
        says_nothing = not trained_on or (key == "image_part" and key not in trained_on)  # trained without images
        if before != now and not says_nothing:
            raise UserError(
                f"{folder.path} was trained on {trained_on.get('path')} ({key} {before}), not on {base.path} "
                f"({key} {now}); give that base"
            )
