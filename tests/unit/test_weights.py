"""Headers of a checkpoint's files, and what is said where they cannot be read."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from sidestep.errors import ModelError
from sidestep.model.weights import read_header, read_json


@pytest.mark.parametrize("read", [read_header, read_json])
def test_a_file_of_another_user_need_not_be_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
):
    def refuse(path: Path, *words: object, **options: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "part").write_bytes(b"")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match=r"part may not be read: Permission denied\.") as caught:
        read(tmp_path / "part")
    assert "again" not in caught.value.hint


@pytest.mark.parametrize("read", [read_header, read_json])
def test_a_damaged_file_is_to_be_downloaded_again(tmp_path: Path, read: Callable[[Path], object]):
    (tmp_path / "part").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError) as caught:
        read(tmp_path / "part")
    assert "Download this checkpoint again" in caught.value.hint
