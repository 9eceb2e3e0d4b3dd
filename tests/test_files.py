"""Atomic writes, checks before the work, and figures that draw text as it stands."""

import os
import resource
import threading
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from equivision_timm.cli.figures import figure_bytes, plain_text
from equivision_timm.errors import InputError
from equivision_timm.files import check_writable, write_file


def test_many_writers_leave_one_complete_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "file"
    check_writable(file)
    assert list(tmp_path.iterdir()) == []
    contents = [bytes([i]) * 100_000 for i in range(16)]
    threads = [threading.Thread(target=write_file, args=(file, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(file.parent.iterdir()) == [file]
    assert file.read_bytes() in contents
    check_writable(file)


def test_paths_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("folder", "file/x", "loop", "file/new/new"):
        with pytest.raises(InputError, match="file"):
            check_writable(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    for name in ("file", "new"):
        with pytest.raises(InputError, match=name):
            check_writable(tmp_path / name)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """Files can grow to a thousand bytes only: like a full disk."""
    (tmp_path / "file").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_file(tmp_path / "file", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_text_is_not_a_formula() -> None:
    def drawn(text: str) -> bytes:
        figure = Figure(figsize=(3, 1))
        figure.suptitle(text)
        return figure_bytes(figure, ".png", dpi=50)

    with pytest.raises(ValueError, match="nosuch"):
        drawn(r"$\nosuch$")  # control
    formula = drawn("$a_b$")
    with plain_text():
        assert drawn(r"$\nosuch$")
        assert drawn("$a_b$") != formula
