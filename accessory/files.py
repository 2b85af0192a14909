"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Optional, TextIO

from accessory.errors import UserError

LOCK_FILE = ".lock"


def check_writable(folder: Path, flag: str) -> None:
    """Refuse a folder, which need not be there, that nothing can be written into; leaves nothing behind. flag: what
    named it, and its value."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # nameless: other ranks do the same
            pass
    except OSError as error:
        raise UserError(f"{flag}: cannot be written ({error.strerror})") from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `target`, or the folder that it is a link to, in one step, or never
    existed."""
    target = target.resolve()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                fsync(path)
        fsync(partial)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        fsync(target.parent)
    except Exception as error:  # tokenizers raises no other
        shutil.rmtree(partial, ignore_errors=True)
        raise disk_error(error, target) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def sole_user(folder: Path, flag: str, patience: float = 10) -> Iterator[None]:
    """Refuse where another process is at work in `folder`, on any machine that sees it; one that is just ending is
    waited for. flag: what named the folder.

    The lock is POSIX's: the system takes it back when this process dies, and its own children do not inherit it.
    """
    path, deadline = folder / LOCK_FILE, time.monotonic() + patience
    while (file := _locked(path)) is None:
        if time.monotonic() > deadline:
            who = path.read_text().strip() if path.is_file() else ""
            raise UserError(
                f"{flag} {folder}: {who or 'another process'} is at work in it; let it end, or choose another"
            )
        time.sleep(0.2)
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> Optional[TextIO]:
    """The file, locked and with the name of this process in it, or None where another has the lock."""
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino != path.stat().st_ino:  # who had the lock removed this one
            raise FileNotFoundError
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN) or isinstance(error, FileNotFoundError):
            file.close()
            return None
        # a file system without locks
    with contextlib.suppress(OSError):  # a full disk is told where it matters
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path to write; the file there becomes `target` in one step, or never existed."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        yield partial
        fsync(partial)
        os.replace(partial, target)
        fsync(target.parent)
    except Exception as error:
        raise disk_error(error, target) from error
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """What was being written in `folder` when a process was killed."""
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(source: Path, target: Path) -> None:
    """One file under two names, held by the disk once; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        with atomic_file(target) as partial:
            shutil.copyfile(source, partial)


def disk_error(error: Exception, target: Path) -> Exception:
    """What a failed write means for the user; the error itself where it means a bug of ours."""
    number, message = getattr(error, "errno", None), str(error)
    # torch.save reports a full disk as a RuntimeError about its stream.
    if isinstance(error, RuntimeError) and ("unexpected pos" in message or "iostream" in message):
        number = errno.ENOSPC
    for folder in reversed(target.parents):  # a folder within one that is being filled is not known outside
        if folder.name.startswith(".") and folder.name.endswith(".partial"):
            target = folder.with_name(folder.name.removeprefix(".").removesuffix(".partial"))
            break
    if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in message:
        free = shutil.disk_usage(target.parent).free / 2**20
        return UserError(
            f"no space left for {target} ({free:.0f} MiB free); nothing was overwritten; free some and rerun"
        )
    if number in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EFBIG):
        return UserError(f"{target} cannot be written: {os.strerror(number)}")
    return error
