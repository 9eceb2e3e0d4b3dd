"""Atomic file writes, SHA-256 of a file, and the cache folder of the package."""

import hashlib
import os
import secrets
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


def check_writable(path: Path) -> None:
    """Raise InputError, before the work, unless `write_file` can write `path`."""
    place = path if os.path.lexists(path) else next(p for p in path.absolute().parents if os.path.lexists(p))
    if not (os.access(place, os.W_OK) and (place.is_file() if place == path else place.is_dir())):
        raise InputError(f"cannot write {path}: give the name of a file in a folder that is yours")


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader finds the complete old or the complete new one. Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
