"""Files that a command writes: whole or not at all, and checked before the work whose result they are to hold.

And where this package keeps its own, and the hash of one.
"""

import hashlib
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from equivision_timm.arguments import InputError

__all__ = ["cache_folder", "check_writable", "file_sha256", "sync_folder", "write_file"]


def cache_folder() -> Path:
    """`equivision_timm` in the user's cache folder: $XDG_CACHE_HOME where that is an absolute path, else ~/.cache.

    Raises:
        FileNotFoundError: this user has no home folder.
    """
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache_home):
        cache_home = os.path.expanduser("~/.cache")
    if not os.path.isabs(cache_home):
        home = os.environ.get("HOME")
        raise FileNotFoundError(f"this user has no home folder, HOME is {home!r}: name one, or set XDG_CACHE_HOME")
    return Path(cache_home, "equivision_timm")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits; read piece by piece, so that it may be of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def check_writable(path: Path, make_folders: bool = False) -> None:
    """Find out whether `write_file` will succeed; nothing stays behind.

    Args:
        path: the file to be written.
        make_folders: the folders above it will be made; otherwise they must exist.

    Raises:
        InputError: a folder or a device of this name, a write-protected file or folder, a name that is too long.
    """
    try:
        folder, names = _target(path).parent, [path.name]
        while make_folders and not os.path.lexists(folder):
            folder, names = folder.parent, [folder.name, *names]
        with tempfile.TemporaryFile(dir=folder):  # without a name where the system can: a kill leaves nothing behind
            pass
        for place in (*(folder / name for name in names), path):
            with suppress(FileNotFoundError):  # other errors count: a name that is too long, a loop of links
                os.stat(place)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}: use a folder that exists and is yours") from error
    if not path.exists():
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file")
    if not path.is_file():
        raise InputError(f"{path} is a device or the like: give the name of an ordinary file")
    if not os.access(path, os.W_OK):
        raise InputError(f"{path} is write-protected: give another name, or make it writable")


def write_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename it: under the name is always the whole old file or the whole new one.

    Folders that are missing above it are made. A symbolic link stays one.

    Raises:
        OSError: no space, no permission, ...; the old file is untouched.
    """
    target = _target(path)
    partial = _beside(target.parent)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, partial)
        os.replace(partial, target)
        sync_folder(target.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; a file that was there is unchanged") from error
    finally:
        partial.unlink(missing_ok=True)


def _target(path: Path) -> Path:
    """The file itself, where `path` is a symbolic link."""
    return Path(os.path.realpath(path))


def _beside(folder: Path) -> Path:
    """A name that no other process uses."""
    return folder / f".{secrets.token_hex(8)}.part"


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut; only POSIX can open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
