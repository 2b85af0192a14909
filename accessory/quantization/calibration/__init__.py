"""Calibration data: exactly `nsamples` rows of exactly `seqlen` tokens, the same for the same seed.

sources.py opens what `calib.dataset` names, samples.py makes text of it, rows.py joins and cuts the samples of each
entry; here each entry gives its share.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from accessory.config import ImageTransform
from accessory.data.images import ImageInput, ImageProblem, load_pixels
from accessory.errors import UserError
from accessory.models.tokenizer import Tokenizer
from accessory.quantization.calibration.rows import Cutter, Row, SourceReport
from accessory.quantization.calibration.samples import Samples
from accessory.quantization.calibration.sources import Request, parse_dataset
from accessory.quantize_options import CalibrationConfig


@dataclass(frozen=True)
class CalibrationData:
    """rows: int64 [nsamples, seqlen], IMAGE_SLOT where an image stands; images: the files of each row, in order."""

    rows: Tensor
    images: list[list[str]]
    image: Optional[ImageInput]
    transform: ImageTransform
    fingerprint: str
    """16 hex digits, of the ids, the images' contents and how they become pixels."""
    report: list[SourceReport]

    def pixels(self, row: int) -> Optional[Tensor]:
        """The images of a row as the model takes them: float32 [k, 3, p, p]; None where it has none."""
        if not self.images[row]:
            return None
        return torch.stack([self._load(path) for path in self.images[row]])

    def _load(self, path: str) -> Tensor:
        try:
            return load_pixels(path, self.transform, self.image.size)
        except ImageProblem as problem:
            raise UserError(f"image {path}: {problem}, and it could be read when calibration began") from None


def read_calibration(
    config: CalibrationConfig,
    tokenizer: Tokenizer,
    nsamples: int,
    seqlen: int,
    seed: int,
    image: Optional[ImageInput] = None,
    transform: ImageTransform = ImageTransform.resized_center_crop,
) -> CalibrationData:
    """Exactly `nsamples` rows of exactly `seqlen` tokens out of config.dataset (config.allow_fewer: at most so many);
    the same for the same seed.

    image: how the model takes images; None: it takes none, and samples that have one are refused. transform: a
    deterministic one (model.image_transform). UserError: a file that cannot be used, or too little in them.
    """
    requests = parse_dataset(config)
    _check_shares(requests, nsamples)
    cutters = []
    for number, request in enumerate(requests):
        samples = Samples(request, config, tokenizer, takes_images=image is not None)
        cutters.append(Cutter(samples, config, tokenizer, seqlen, image, np.random.default_rng((seed, number))))
    rows = _collect(cutters, nsamples, config.allow_fewer)
    contents = {path: digest for cutter in cutters for path, digest in cutter.contents.items()}
    return CalibrationData(
        rows=torch.tensor([row.ids for row in rows]),
        images=[row.images for row in rows],
        image=image,
        transform=transform,
        fingerprint=_fingerprint(rows, contents, image, transform),
        report=[cutter.report for cutter in cutters],
    )


def _check_shares(requests: list[Request], nsamples: int) -> None:
    asked = sum(request.num or 0 for request in requests)
    free = [request.path for request in requests if request.num is None]
    if asked > nsamples or (asked < nsamples and not free):
        rest = "" if asked > nsamples else ", or leave num out where the rest is to come from"
        raise UserError(
            f"calib.dataset asks for {asked:,} rows (num), calib.nsamples={nsamples}: set calib.nsamples={asked}{rest}"
        )
    if nsamples - asked < len(free):
        raise UserError(
            f"calib.nsamples={nsamples}: leaves no row for {free[-1]}; set calib.nsamples={asked + len(free)} or more"
        )


def _fingerprint(
    rows: list[Row], contents: dict[str, str], image: Optional[ImageInput], transform: ImageTransform
) -> str:
    digest = hashlib.sha256(str((len(rows), image, transform.value)).encode())
    for row in rows:
        digest.update(np.array(row.ids, dtype="<i8").tobytes())
        digest.update("".join(contents[path] for path in row.images).encode())
    return digest.hexdigest()[:16]


def _collect(cutters: list[Cutter], nsamples: int, allow_fewer: bool) -> list[Row]:
    """The entries with a number give so many rows; the others take turns until there are enough."""
    groups = [([cutter], cutter.samples.request.num) for cutter in cutters if cutter.samples.request.num is not None]
    free = [cutter for cutter in cutters if cutter.samples.request.num is None]
    groups.append((free, nsamples - sum(share for _, share in groups)))
    rows: list[Row] = []
    with tqdm(total=nsamples, desc="calibration", unit="row", disable=not sys.stderr.isatty(), leave=False) as bar:
        for group, share in groups:
            before = len(rows)
            for row in itertools.islice(_in_turns(group), share):
                rows.append(row)
                bar.update()
            found = len(rows) - before
            if found < share and not (found and allow_fewer):
                setting = f"calib.nsamples={len(rows)}" if group is free else f"num={found}"
                raise _too_little(group, found, share, setting)
    return rows


def _in_turns(cutters: list[Cutter]) -> Iterator[Row]:
    turns = deque(cutter.rows() for cutter in cutters)
    while turns:
        row = next(turns[0], None)
        if row is None:
            turns.popleft()
        else:
            yield row
            turns.rotate(-1)


def _too_little(cutters: list[Cutter], found: int, wanted: int, setting: str) -> UserError:
    concat, seqlen = all(cutter.concat for cutter in cutters), cutters[0].seqlen
    what = f"rows of {seqlen:,} tokens" if concat else f"samples of at least {seqlen:,} tokens"
    remedies = [] if concat else ["join samples with calib.concat=true"]
    if any(cutter.report.too_long for cutter in cutters):
        remedies.append("cut long texts with calib.skip_long=false")
    if found:
        remedies.append(f"set {setting}")
    remedies += ["set a smaller calib.seqlen", "name more data"]
    files = "; ".join(cutter.report.line() for cutter in cutters)
    return UserError(f"calib.dataset: {found:,} of {wanted:,} {what} ({files}): {', or '.join(remedies)}")
