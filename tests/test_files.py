"""Files appear whole or not at all, whatever breaks off their writing."""

from __future__ import annotations

import os
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from ranks import process_context

from accessory.errors import UserError
from accessory.files import LOCK_FILE, atomic_folder, sole_user


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_folder_whose_filling_is_broken_off_never_existed(tmp_path, failure):
    target = tmp_path / "model"
    with pytest.raises(failure), atomic_folder(target) as partial:
        (partial / "weights").write_bytes(b"half")
        raise failure
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    with atomic_folder(tmp_path / "link") as partial:
        (partial / "weights").write_bytes(b"whole")
    assert content_of(tmp_path / "disk" / "model") == {"weights": b"whole"} and (tmp_path / "link").is_symlink()


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


def at_work(folder: Path, told: Connection) -> None:
    with sole_user(folder, "--output_dir"):
        told.send(os.getpid())
        time.sleep(60)


def test_a_second_process_is_refused_and_one_after_a_killed_one_is_not(tmp_path):
    ear, mouth = process_context().Pipe(duplex=False)
    first = process_context().Process(target=at_work, args=(tmp_path, mouth))
    first.start()
    pid = ear.recv()
    refusal = pytest.raises(UserError, match=rf"--output_dir {tmp_path}: process {pid} on .* is at work in it")
    with refusal, sole_user(tmp_path, "--output_dir", patience=0.3):
        pass
    first.kill()
    first.join()
    with sole_user(tmp_path, "--output_dir", patience=0.3):
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on")
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_process_that_is_ending_is_waited_for(tmp_path):
    ear, mouth = process_context().Pipe(duplex=False)
    first = process_context().Process(target=at_work, args=(tmp_path, mouth))
    first.start()
    ear.recv()
    threading.Timer(0.5, first.kill).start()
    with sole_user(tmp_path, "--output_dir", patience=20):
        pass
    first.join()


def test_a_full_disk_is_told_whatever_library_met_it(tmp_path):
    """tokenizers raises a bare Exception."""
    with pytest.raises(UserError, match=r"no space left for .*model"), atomic_folder(tmp_path / "model"):
        raise Exception("No space left on device (os error 28)")
