"""Headers of a checkpoint's files, and what is said where they cannot be read."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from safetensors.numpy import save_file

from sidestep.errors import ModelError
from sidestep.model.checkpoint import encoder_fingerprint, find_checkpoint
from sidestep.model.weights import read_header, read_json
from tests.unit.test_checkpoint import TENSORS, make_model


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


DECODER, ENCODER = "decoder.layers.0.self_attn.q_proj.weight", "encoder.text_projector.weight"


def quantised(root: Path, name: str) -> None:
    """Make a model with one tensor in 8 bits."""
    folder = make_model(root, "acestep-v15-base")
    save_file({**TENSORS, name: TENSORS[name].astype(np.int8)}, folder / "model.safetensors")


def test_a_quantised_decoder_is_refused_where_it_is_found(tmp_path: Path):
    quantised(tmp_path, DECODER)
    with pytest.raises(ModelError, match=rf"model\.safetensors is quantised: {DECODER} is I8\.") as caught:
        find_checkpoint(tmp_path, "base")
    assert "unquantised" in caught.value.hint


def test_a_quantised_encoder_is_refused_where_it_is_told_from_others(tmp_path: Path):
    quantised(tmp_path, ENCODER)
    checkpoint = find_checkpoint(tmp_path, "base")
    with pytest.raises(ModelError, match=f"is quantised: {ENCODER} is I8"):
        encoder_fingerprint(checkpoint)
