"""Tensor files: what is written is read back, equal samples give equal bytes, and what is wrong is named."""

import json
from pathlib import Path

import pytest
import torch

from sidestep.errors import DataError, RunError
from sidestep.preprocess.tensors import Sample, read_metadata, read_sample, sample_frames, sample_paths, write_sample


def make_sample(*, frames: int = 6, rows: int = 4, dtype: torch.dtype = torch.float32, **metadata: object) -> Sample:
    generator = torch.Generator().manual_seed(3)
    return Sample(
        torch.randn(frames, 64, generator=generator).to(dtype),
        torch.randn(rows, 40, generator=generator).to(dtype),
        torch.cat([torch.randn(frames, 64, generator=generator), torch.ones(frames, 64)], dim=-1).to(dtype),
        {"filename": "song.wav", "preprocess_mode": "lora", **metadata},
    )


def official_content(*, frames: int = 6, rows: int = 5, valid: tuple[int, ...] = (0, 1, 3)) -> dict:
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[list(valid)] = True
    return {
        "target_latents": torch.full((frames, 64), 0.5),
        "attention_mask": torch.ones(frames),
        "encoder_hidden_states": torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, 40).contiguous(),
        "encoder_attention_mask": mask,
        "context_latents": torch.ones(frames, 128),
        "metadata": {"filename": "song.wav", "preprocess_mode": "lora"},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    sample = make_sample(dtype=dtype, caption="été", bpm=120)
    write_sample(tmp_path / "a.pt", sample)
    back = read_sample(tmp_path / "a.pt")
    assert torch.equal(back.target_latents, sample.target_latents)
    assert torch.equal(back.encoder_hidden_states, sample.encoder_hidden_states)
    assert torch.equal(back.context_latents, sample.context_latents)
    assert back.metadata == {**sample.metadata, "format_version": 2}
    assert back.target_latents.dtype == dtype
    assert sample_frames(tmp_path / "a.pt") == 6
    assert read_metadata(tmp_path / "a.pt")["bpm"] == 120


def test_equal_samples_give_equal_bytes_whatever_the_name_and_the_strides(tmp_path: Path) -> None:
    sample = make_sample(caption="song.wav")
    text = "".join(["song", ".wav"])
    view = Sample(
        torch.cat([sample.target_latents, sample.target_latents])[:6],
        sample.encoder_hidden_states.T.contiguous().T,
        sample.context_latents,
        {"filename": text, "preprocess_mode": "lora", "caption": text},
    )
    write_sample(tmp_path / "a.pt", sample)
    write_sample(tmp_path / "another name.pt", view)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "another name.pt").read_bytes()


def test_the_file_has_the_keys_the_official_tools_read(tmp_path: Path) -> None:
    write_sample(tmp_path / "a.pt", make_sample())
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert {key: tuple(value.shape) for key, value in content.items() if key != "metadata"} == {
        "target_latents": (6, 64),
        "attention_mask": (6,),
        "encoder_hidden_states": (4, 40),
        "encoder_attention_mask": (4,),
        "context_latents": (6, 128),
    }
    assert bool(content["encoder_attention_mask"].all())
    assert bool((content["attention_mask"] == 1).all())


def test_padding_rows_of_official_files_are_left_out(tmp_path: Path) -> None:
    torch.save(official_content(), tmp_path / "a.pt")
    assert read_sample(tmp_path / "a.pt").encoder_hidden_states[:, 0].tolist() == [0.0, 1.0, 3.0]


def test_lokr_mode_is_refused_unless_asked_for(tmp_path: Path) -> None:
    content = official_content()
    content["metadata"]["preprocess_mode"] = "lokr"
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"a\.pt was made in lokr mode"):
        read_sample(tmp_path / "a.pt")
    assert read_sample(tmp_path / "a.pt", allow_cover_context=True).target_latents.shape == (6, 64)


@pytest.mark.parametrize(("version", "age"), [(1, "an older"), (3, "a newer"), ("x", "a newer")])
def test_other_format_versions_are_refused(tmp_path: Path, version: object, age: str) -> None:
    content = official_content()
    content["metadata"]["format_version"] = version
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DataError, match=rf"a\.pt was made by {age} Side-Step \(format {version}, this is 2\)"):
        read_sample(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"context_latents": torch.ones(6, 65)}, r"context_latents is torch.float32 \(6, 65\)"),
        ({"context_latents": torch.ones(5, 128)}, "context_latents"),
        ({"target_latents": torch.ones(6, 32)}, "target_latents"),
        ({"target_latents": torch.ones(())}, "target_latents"),
        ({"target_latents": torch.ones(6, 64, dtype=torch.int32)}, "target_latents"),
        ({"target_latents": torch.full((6, 64), torch.nan)}, "target_latents holds numbers that are not finite"),
        ({"encoder_hidden_states": torch.full((5, 40), torch.inf)}, "not finite"),
        ({"encoder_attention_mask": torch.ones(4)}, "mask"),
        ({"encoder_attention_mask": torch.zeros(5)}, "encoder_hidden_states"),
        ({"context_latents": None}, "lacks context_latents"),
        ({"metadata": None}, "lacks metadata"),
    ],
)
def test_a_misshapen_file_is_named(tmp_path: Path, change: dict, words: str) -> None:
    torch.save(official_content() | change, tmp_path / "bad.pt")
    with pytest.raises(DataError, match=words) as caught:
        read_sample(tmp_path / "bad.pt")
    assert "bad.pt" in caught.value.message
    assert caught.value.hint


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    write_sample(tmp_path / "whole.pt", make_sample())
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    (tmp_path / "short.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-30])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"metadata": Path("x")}, tmp_path / "objects.pt")
    said = {
        "cut.pt": "cannot be read: it is cut off or damaged.",
        "short.pt": "cannot be read: it is cut off or damaged.",
        "text.pt": "is not a tensor file.",
        "empty.pt": "is not a tensor file.",
        "list.pt": "is not a tensor file.",
        "objects.pt": "cannot be read: it holds something else than tensors and plain values.",
        "missing.pt": "cannot be read: it is not there.",
    }
    for name, words in said.items():
        for read in (read_sample, read_metadata, sample_frames):
            with pytest.raises(DataError) as caught:
                read(tmp_path / name)
            assert caught.value.message == f"{name} {words}"


def test_latents_without_frames_have_no_length(tmp_path: Path) -> None:
    torch.save(official_content() | {"target_latents": torch.ones(())}, tmp_path / "bad.pt")
    with pytest.raises(DataError, match=r"bad\.pt is damaged"):
        sample_frames(tmp_path / "bad.pt")


def test_a_sample_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    sample = make_sample()
    sample.target_latents[2, 5] = torch.nan
    with pytest.raises(DataError, match="target_latents holds numbers that are not finite"):
        write_sample(tmp_path / "a.pt", sample)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.pt").mkdir()
    (tmp_path / "a.pt" / "inside").touch()
    with pytest.raises(RunError, match="cannot be written"):
        write_sample(tmp_path / "a.pt", make_sample())
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_without_a_manifest_every_pt_file_is_listed(tmp_path: Path) -> None:
    for name in ("b.pt", "a.pt", "c.tmp.pt", ".hidden.pt", "notes.txt", "d.pt.writing"):
        (tmp_path / name).touch()
    assert sample_paths(tmp_path) == [tmp_path / "a.pt", tmp_path / "b.pt"]


def test_a_manifest_decides_what_is_listed_and_in_which_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.pt", "b.pt", "sub/c.pt"):
        (tmp_path / name).touch()
    (tmp_path / "manifest.json").write_text(json.dumps({"samples": ["sub\\c.pt", "./a.pt"]}))
    assert sample_paths(tmp_path) == [tmp_path / "sub" / "c.pt", tmp_path / "a.pt"]


def test_entries_relative_to_the_current_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tensors"
    folder.mkdir()
    (folder / "a.pt").touch()
    (folder / "manifest.json").write_text(json.dumps({"samples": ["./tensors/a.pt"]}))
    monkeypatch.chdir(tmp_path)
    assert sample_paths(folder) == [folder / "a.pt"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"samples": ["gone.pt"]}', r"lists gone\.pt, which is not there"),
        ('{"samples": ["../a.pt"]}', "outside the folder"),
        ('{"samples": ["/etc/passwd"]}', "outside the folder"),
        ('{"samples": "a.pt"}', 'no list of file names under "samples"'),
        ('{"samples": [3]}', 'no list of file names under "samples"'),
        ("[]", 'no list of file names under "samples"'),
        ("{", "cannot be read"),
        ('{"samples": []}', "no tensor files"),
    ],
)
def test_a_wrong_manifest_is_an_error(tmp_path: Path, content: str, words: str) -> None:
    folder = tmp_path / "tensors"
    folder.mkdir()
    (tmp_path / "a.pt").touch()
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=words):
        sample_paths(folder)


def test_an_empty_or_missing_or_unfinished_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tensor files"):
        sample_paths(tmp_path)
    with pytest.raises(DataError, match="There is no folder"):
        sample_paths(tmp_path / "nowhere")
    (tmp_path / "a.pt").touch()
    (tmp_path / ".pass1").mkdir()
    assert sample_paths(tmp_path) == [tmp_path / "a.pt"]
    (tmp_path / ".pass1" / "a.audio").touch()
    with pytest.raises(DataError, match="interrupted"):
        sample_paths(tmp_path)
