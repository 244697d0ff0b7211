"""Files that are seen whole or not at all, and locks that no forked child keeps."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from aimscale.harness.run.files import atomic_dir, atomic_write, write_json, write_text
from aimscale.harness.run.lock import locked


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder/value.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(ZeroDivisionError), atomic_write(path) as partial:
        assert partial.write_text("half") / 0
    with atomic_write(path) as partial:
        partial.write_text("half")
        assert path.read_text() == '{\n "a": 1\n}\n'
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"), atomic_write(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [each.name for each in path.parent.iterdir()] == ["value.json"]
    write_text(path, "new", durable=False)
    assert path.read_text() == "new"


def test_a_folder_may_be_renamed_as_soon_as_its_last_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a checkpoint is by the first rank, which waits for the parts of the others."""
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        found = real(self, target)
        (tmp_path / "writing").rename(tmp_path / "published")
        return found

    monkeypatch.setattr(Path, "replace", replace)
    write_json(tmp_path / "writing/part.json", {"a": 1})
    assert (tmp_path / "published/part.json").read_text() == '{\n "a": 1\n}\n'


def test_a_lock_excludes_and_ends_with_its_block_although_a_child_was_forked_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with locked(path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        with locked(path, wait=False) as mine:
            assert not mine
    try:
        with locked(path, wait=False) as mine:
            assert mine
    finally:
        child.kill()
        child.join()


def test_a_folder_appears_whole_and_what_a_dead_process_left_of_it_goes(tmp_path: Path) -> None:
    left = tmp_path / ".writing-out"
    left.mkdir()
    (left / "half").touch()
    with pytest.raises(RuntimeError), atomic_dir(tmp_path / "out"):
        raise RuntimeError
    with atomic_dir(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]
