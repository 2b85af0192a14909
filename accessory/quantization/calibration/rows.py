"""The samples of one entry of `calib.dataset` -> rows of exactly `seqlen` tokens.

Samples are taken in a shuffled order, joined, and cut; what a row has no room for opens the next. An image's positions
stay together: a row opens with a sample that has one while there are any, more samples follow, its last text is cut,
and an image that does not fit waits for the next row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Optional

import numpy as np

from accessory.config import BadImages
from accessory.data.images import ImageInput, check_images
from accessory.data.packing import IMAGE_SLOT, insert_image
from accessory.data.prompts import encode
from accessory.errors import UserError
from accessory.models.tokenizer import Tokenizer
from accessory.quantization.calibration.samples import Sample, Samples
from accessory.quantize_options import CalibrationConfig


@dataclass
class SourceReport:
    """What became of the samples of one entry of calib.dataset; those that were not needed were not read."""

    name: str
    samples: int
    read: int = 0
    rows: int = 0
    images: int = 0
    too_long: int = 0
    unreadable: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Tokens of samples, where only long ones can be used."""

    def line(self) -> str:
        text = f"{self.name}: {self.rows:,} rows from {self.read:,} of {self.samples:,} samples"
        if self.images:
            text += f" with {self.images:,} images"
        if self.too_long:
            text += f", {self.too_long:,} left out: longer than a row"
        if self.unreadable:
            text += f", {len(self.unreadable):,} left out: image unreadable ({self.unreadable[0]})"
        if self.lengths:
            median, most = sorted(self.lengths)[len(self.lengths) // 2], max(self.lengths)
            text += f"; samples have {median:,} tokens (median) and at most {most:,}"
        return text


@dataclass(frozen=True)
class Row:
    """ids: seqlen tokens; images: the files of the images in them, in order."""

    ids: list[int]
    images: list[str]


@dataclass(frozen=True)
class _Piece:
    """A sample as tokens. image: its file, whose slots stand behind ids[0]; place: in the shuffled order."""

    ids: list[int]
    image: str
    place: int
    where: str


class _Pieces:
    """An iterator of pieces with a look at the next one."""

    def __init__(self, pieces: Iterator[_Piece]):
        self._pieces, self._head = pieces, None

    def peek(self) -> Optional[_Piece]:
        if self._head is None:
            self._head = next(self._pieces, None)
        return self._head

    def pop(self) -> Optional[_Piece]:
        head, self._head = self.peek(), None
        return head


class Cutter:
    """Rows out of `samples`. contents: digest of each image in them, by path; report: what became of the samples."""

    def __init__(
        self,
        samples: Samples,
        config: CalibrationConfig,
        tokenizer: Tokenizer,
        seqlen: int,
        image: Optional[ImageInput],
        rng: np.random.Generator,
    ):
        self.samples, self.config, self.tokenizer, self.seqlen, self.image = samples, config, tokenizer, seqlen, image
        self.concat = samples.request.concat or samples.request.whole
        self.report = SourceReport(samples.name, len(samples))
        self.contents: dict[str, str] = {}
        self._order = rng.permutation(len(samples))
        self._rng = rng

    def rows(self) -> Iterator[Row]:
        """All rows that there are, made as they are asked for."""
        if self.samples.request.whole:
            rows = self._cut_documents()
        else:
            rows = self._join() if self.concat else self._cut_long()
        for row in rows:
            self.report.rows += 1
            self.report.images += len(row.images)
            yield row

    def _cut_documents(self) -> Iterator[Row]:
        """Windows of the documents, in any order."""
        pieces = self._read(np.arange(len(self.samples)))
        ids = np.concatenate([np.array(piece.ids, dtype=np.int64) for piece in pieces] or [np.empty(0, np.int64)])
        windows = ids[: len(ids) // self.seqlen * self.seqlen].reshape(-1, self.seqlen)
        for number in self._rng.permutation(len(windows)):
            yield Row(windows[number].tolist(), [])

    def _cut_long(self) -> Iterator[Row]:
        """A row from each sample that is long enough."""
        for piece in self._read(np.arange(len(self.samples))):
            self.report.lengths.append(len(piece.ids))
            if len(piece.ids) >= self.seqlen:
                yield Row(piece.ids[: self.seqlen], [piece.image] if piece.image else [])

    def _join(self) -> Iterator[Row]:
        shown = np.zeros(len(self._order), dtype=bool)
        if self.image is not None:
            shown[:] = [self.samples.has_image(index) for index in self._order]
        images, texts = (_Pieces(self._read(np.flatnonzero(kind))) for kind in (shown, ~shown))
        rest: list[int] = []  # of a text that the row before had no room for
        while True:
            ids, paths = [], []
            while room := self.seqlen - len(ids):
                if rest and (ids or images.peek() is None):
                    taken, rest = rest[:room], rest[room:]
                elif (piece := self._next(images, texts, room, is_first=not ids)) is None:
                    return
                else:
                    taken = piece.ids[:room]
                    paths += [piece.image] if piece.image else []
                    rest = rest if piece.image else piece.ids[room:]
                ids += taken
            yield Row(ids, paths)

    def _next(self, images: _Pieces, texts: _Pieces, room: int, is_first: bool) -> Optional[_Piece]:
        """In the shuffled order, but that a row opens with an image, and one that does not fit waits."""
        image, text = images.peek(), texts.peek()
        if image is not None and (is_first or text is None or image.place < text.place) and room > self.image.words:
            return images.pop()
        if text is not None:
            return texts.pop()
        return None if image is None else self._text_of(image, room)

    def _text_of(self, piece: _Piece, room: int) -> _Piece:
        """For the end of a row that no image fits into, where there are no texts: that of the sample that waits."""
        words = self.image.words
        if len(piece.ids) == 1 + words:
            raise UserError(
                f"{piece.where}: an image without text, and the last {room} of {self.seqlen:,} tokens of a row are too "
                f"few for another: choose a multiple of {1 + words} for calib.seqlen, or add texts"
            )
        return replace(piece, ids=(piece.ids[:1] + piece.ids[1 + words :])[:room], image="")

    def _read(self, places: np.ndarray) -> Iterator[_Piece]:
        """The usable ones of the samples at these places of the order."""
        for place in places:
            sample = self.samples.read(int(self._order[place]))
            self.report.read += 1
            if sample is None:
                continue
            ids, _ = encode(sample.example, self.tokenizer)
            if sample.image:
                if not self._is_readable(sample):
                    continue
                ids = insert_image(ids, self.image.words, IMAGE_SLOT)
            elif self._is_too_long(ids):
                self.report.too_long += 1
                continue
            yield _Piece(ids, sample.image, int(place), sample.where)

    def _is_too_long(self, ids: list[int]) -> bool:
        return self.config.skip_long and not self.samples.request.whole and len(ids) > self.seqlen

    def _is_readable(self, sample: Sample) -> bool:
        if self.seqlen < self.image.words + 2:
            raise UserError(
                f"calib.seqlen={self.seqlen}: an image takes {self.image.words} positions behind BOS, so a row "
                f"has no room for that of {sample.where}; set a larger one"
            )
        if sample.image in self.contents:
            return True
        check = check_images([sample.image])
        if not check.problems:
            self.contents[sample.image] = check.digest
            return True
        problem = check.problems[sample.image]
        if self.config.bad_images is BadImages.stop:
            raise UserError(
                f"{sample.where}: image {sample.image}: {problem}; mend it (is calib.image_root right?), or leave such "
                "samples out with calib.bad_images=skip"
            )
        self.report.unreadable.append(f"{sample.where}: {sample.image}: {problem}")
        return False
