"""Files appear whole or not at all, whatever breaks off their writing."""

from __future__ import annotations

from pathlib import Path

import pytest

from accessory.errors import UserError
from accessory.files import atomic_folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_folder_whose_filling_is_broken_off_never_existed(tmp_path, failure):
    target = tmp_path / "model"
    with pytest.raises(failure), atomic_folder(target) as partial:
        (partial / "weights").write_bytes(b"half")
        raise failure
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_folder_is_replaced_by_a_whole_one_or_not_at_all(tmp_path, failure):
    target = tmp_path / "model"
    with atomic_folder(target) as partial:
        (partial / "weights").write_bytes(b"old")
        (partial / "only in the old").touch()
    with pytest.raises(failure), atomic_folder(target) as partial:
        (partial / "weights").write_bytes(b"half")
        raise failure
    assert content_of(target) == {"weights": b"old", "only in the old": b""}
    with atomic_folder(target) as partial:
        (partial / "weights").write_bytes(b"new")
    assert content_of(target) == {"weights": b"new"} and list(tmp_path.iterdir()) == [target]


def test_what_a_killed_save_left_behind_does_not_reach_the_next_one(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "left behind").touch()
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "weights").write_bytes(b"new")
    assert content_of(tmp_path) == {"model/weights": b"new"}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught, atomic_folder(tmp_path / "file" / "model"):
        pass
    assert str(tmp_path / "file" / "model") in str(caught.value) and "cannot be written" in str(caught.value)
