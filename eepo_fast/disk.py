"""What the commands that write have in common: one at a time in a folder, and one line where the disk refuses.

A lock is `flock`'s on a file, which the kernel releases however its holder ends; the file names the holder. Over NFS
Linux makes a lock of the server's of it. Where a file system knows none, the file's own word counts on the same host.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eepo_fast.types import UserError

LOCK = ".lock"
HELD = (errno.EWOULDBLOCK, errno.EACCES)
UNKNOWN = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # the file system has no locks
ELSEWHERE = "mend that, or choose another place"
NAMING_S = 2.0  # how long a holder may take to write its name
DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG,
    errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ESTALE,
)  # fmt: skip


class InUse(UserError):
    """Another process is at work there."""


def disk_error(error: BaseException) -> str | None:
    """Returns what the disk has refused, in a few words; None where the error is another. safetensors has errors of its
    own, which hold the system's as text."""
    if isinstance(error, OSError):
        if error.errno not in DISK:
            return None
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    if type(error).__name__ == "SafetensorError" and "os error" in str(error):
        return str(error).rpartition("I/O error: ")[2]
    return None


@contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """Makes one line of what the disk refuses inside: `what` cannot be written, why, and the remedy."""
    try:
        yield
    except Exception as error:
        reason = disk_error(error)
        if reason is None and isinstance(error, OSError):
            reason = str(error.strerror or error)
        if reason is None:
            raise
        raise UserError(f"{what} cannot be written: {reason}; {remedy}") from None


def make_folder(folder: Path) -> list[Path]:
    """Makes a folder with its parents; returns those that were not there, the innermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_if_empty(folders: list[Path]) -> None:
    """Removes folders, the innermost first, until one of them holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def locked(file: Path, what: str, remedy: str, *, keep: bool = False) -> Iterator[int]:
    """Holds the lock `file`, and yields its descriptor; UserError, in which `what` is in use, where another process
    does. Folders are made for it; those that are still empty at the end go with it. keep: the file stays, for a process
    that was given the descriptor may outlive this one."""
    with writing(what, ELSEWHERE):
        made = make_folder(file.parent)
    descriptor = None
    try:
        with writing(what, ELSEWHERE):
            descriptor = _take(file, what, remedy, made)
        close_in_child = _closer(descriptor)
        yield descriptor
    finally:
        if descriptor is not None:
            close_in_child.clear()
            if not keep:  # while it is still held: who opened it meanwhile sees that it is another file now
                with suppress(OSError):
                    file.unlink()
            os.close(descriptor)
        remove_if_empty(made)


def _closer(descriptor: int) -> list[int]:
    """Closes the descriptor in forked children: a worker that outlives this process must not hold its lock. Returns a
    list that is to be cleared when the descriptor is closed."""
    held = [descriptor]

    def close() -> None:
        for number in held:
            with suppress(OSError):
                os.close(number)

    os.register_at_fork(after_in_child=close)
    return held


def _take(file: Path, what: str, remedy: str, made: list[Path]) -> int:
    """Returns the descriptor of the lock, once it is held and the file of that name is the one that is held. made: gets
    folders that were made."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # another one was refused, and has removed the folder that it had made
            made[:] = make_folder(file.parent) or made
            continue
        try:
            _lock(descriptor, file, what, remedy)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), file.stat()):
                    _sign(descriptor, file)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder was ending, and has removed it


def _sign(descriptor: int, file: Path) -> None:
    me = {"process": os.getpid(), "host": socket.gethostname(), "time": time.time()}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
    except OSError:  # a full disk: then nothing can be written here at all
        with suppress(OSError):
            file.unlink()
        raise


def _lock(descriptor: int, file: Path, what: str, remedy: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (*HELD, *UNKNOWN):
            raise
        if error.errno in UNKNOWN and not _lives(_holder(file)):
            return
        raise InUse(f"{what}: in use by {_named(file)}; {remedy}") from None


def _holder(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(file: Path) -> str:
    """Returns who holds a lock. It is waited for a moment where it has not written its name yet."""
    deadline = time.monotonic() + NAMING_S
    while not (holder := _holder(file)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if not holder:
        return "another process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(holder.get("time", 0))))
    return f"process {holder.get('process')} on host {holder.get('host')} since {since}"


def _lives(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("process"), int):
        return False
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return holder["process"] != os.getpid()
