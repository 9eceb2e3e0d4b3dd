"""Atomic writes, checks before the work, and figures that draw text as it stands."""

import os
import stat
import threading
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from equivision_timm.cli.figures import FORMATS, check_figure_file, figure_bytes, plain_text
from equivision_timm.errors import InputError
from equivision_timm.files import check_writable, write_file


def test_mode_link_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    check_writable(path, make_folders=True)
    assert list(tmp_path.iterdir()) == []
    write_file(path, b"first")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    check_writable(tmp_path / "link")
    write_file(tmp_path / "link", b"second")
    assert (tmp_path / "link").is_symlink()
    assert path.read_bytes() == b"second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_many_writers_leave_one_complete_file(tmp_path: Path) -> None:
    contents = [bytes([i]) * 100_000 for i in range(16)]
    threads = [threading.Thread(target=write_file, args=(tmp_path / "file", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() in contents


def test_paths_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "file/x", "loop", "pipe", "file/new/new"):
        with pytest.raises(InputError):
            check_writable(tmp_path / name, make_folders=True)
    with pytest.raises(InputError, match="missing"):
        check_writable(tmp_path / "missing" / "file")
    check_writable(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    for name in ("file", "new"):
        with pytest.raises(InputError):
            check_writable(tmp_path / name)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_file(tmp_path / "file", b"content")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_all_picture_formats_are_written(tmp_path: Path) -> None:
    for ending in (*FORMATS, ".PNG"):
        path = tmp_path / f"figure{ending}"
        check_figure_file(path)
        assert len(figure_bytes(Figure(figsize=(1, 1)), path.suffix, dpi=50)) > 50


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
