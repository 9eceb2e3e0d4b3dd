"""Atomic file writes, SHA-256 of a file, and the cache folder of the package."""

import hashlib
import os
import secrets
import shutil
from pathlib import Path

from equivision_timm.errors import InputError

__all__ = ["cache_folder", "check_writable", "file_sha256", "write_file"]


def cache_folder() -> Path:
    """`equivision_timm` in the user's cache folder: $XDG_CACHE_HOME if that is an absolute path, else ~/.cache."""
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache_home) if os.path.isabs(cache_home) else Path.home() / ".cache") / "equivision_timm"


def file_sha256(path: str | Path) -> str:
    """SHA-256 of the contents of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def check_writable(path: Path, make_folders: bool = False) -> None:
    """Raise InputError, before the work, unless `write_file` can write `path`; `make_folders`: also missing ones."""
    folder = path.absolute().parent
    while make_folders and not os.path.lexists(folder):
        folder = folder.parent
    is_new = not os.path.lexists(path)
    if not (os.access(folder, os.W_OK) and folder.is_dir() if is_new else os.access(path, os.W_OK) and path.is_file()):
        raise InputError(f"cannot write {path}: give the name of a file in a folder that exists and is yours")


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader finds the complete old file or the complete new one, also after an OSError.

    Missing folders above it are made; a symbolic link stays a link.
    """
    target = Path(os.path.realpath(path))
    partial = target.parent / f".{secrets.token_hex(8)}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, partial)
        os.replace(partial, target)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; the old file, if any, is unchanged") from error
    finally:
        partial.unlink(missing_ok=True)
