"""Private directories named after their owning process, so that leftovers of a killed process can be found and removed.

    gkd-weights-4242.918273.5f0c9a12-8c1d40aa           PREFIX-PID.START.PLACE-RANDOM
                process id, its start time (clock ticks since boot), hash of boot id and PID namespace

A kill -9 runs no clean-up, so every new directory first removes those with the same prefix whose owner is gone. Those
of other users stay, and those from another PLACE: another container or machine that shares the file system, whose
processes cannot be seen here.

`open_private` opens a file by a name that another process sent; it accepts names, not paths. The directory and the file
must have the form above, must not be links, must belong to this user, and must be closed to all others.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from typing import Final

SHM_ROOT: Final = "/dev/shm"
_OWNED: Final = re.compile(r"(gkd-[a-z]{1,16})-(\d{1,10})\.(\d{1,20})\.([0-9a-f]{8})-[0-9a-f]{8}")
_FILE: Final = re.compile(r"[a-z]{1,16}[0-9]{0,12}(?:\.[a-z]{1,16})?")


def owner() -> str:
    """An identifier of this process that is unique on this machine since boot."""
    return f"{os.getpid()}.{_started(os.getpid())}.{_place()}"


def private_directory(prefix: str, root: str) -> str:
    """Create a directory with mode 0700, named after this process; leftovers with the same prefix are removed first."""
    remove_leftovers(prefix, root)
    path = os.path.join(root, f"{prefix}-{owner()}-{secrets.token_hex(4)}")
    assert _OWNED.fullmatch(os.path.basename(path)), path
    os.mkdir(path, 0o700)
    return path


def remove_leftovers(prefix: str, root: str) -> None:
    """Remove this user's files and directories whose owner has ended."""
    with contextlib.suppress(OSError):
        for name in os.listdir(root):
            found = _OWNED.fullmatch(name)
            if found and found[1] == prefix and not _is_alive(found):
                path = Path(root, name)
                with contextlib.suppress(OSError):
                    if path.lstat().st_uid != os.getuid():
                        continue
                    if stat.S_ISDIR(path.lstat().st_mode):
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()


def open_private(name: str, root: str = SHM_ROOT) -> int:
    """A descriptor of DIRECTORY/FILE below the root, for reading. Raises PermissionError for a name of another form and
    for anything that others can access, OSError for a missing file."""
    directory, _, file = name.partition("/") if isinstance(name, str) else ("", "", "")
    if not (_OWNED.fullmatch(directory) and _FILE.fullmatch(file)):
        raise PermissionError("not the name of a file of a pusher")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    at = os.open(os.path.join(root, directory), flags | os.O_DIRECTORY)
    try:
        _check_own(at, directory, is_directory=True)
        descriptor = os.open(file, flags | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
    try:
        _check_own(descriptor, name, is_directory=False)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_own(descriptor: int, name: str, *, is_directory: bool) -> None:
    found = os.fstat(descriptor)
    right_kind = stat.S_ISDIR(found.st_mode) if is_directory else stat.S_ISREG(found.st_mode) and found.st_nlink == 1
    if not right_kind or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{name} is not this user's alone")


def _is_alive(found: re.Match[str]) -> bool:
    """Whether the owner in a name may still run; one in another place may."""
    if found[4] != _place():
        return True
    try:
        return _started(int(found[2])) == found[3]
    except (OSError, IndexError):
        return False


def _place() -> str:
    """Where a process id is unique: this machine since boot, in this PID namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return hashlib.blake2b(f"{boot} {namespace}".encode(), digest_size=4).hexdigest()


def _started(pid: int) -> str:
    """The start time of a process, in clock ticks since boot: field 22 of /proc/PID/stat, the 20th after the name."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[19]
