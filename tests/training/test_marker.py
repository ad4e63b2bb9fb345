"""A checkpoint counts only while its marker fits its files."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import CheckpointError
from rankwise.training.marker import (
    MARKER,
    checkpoint_step,
    complete_checkpoints,
    damage,
    last_complete_checkpoint,
    read_marker,
    rotate,
    seal,
    unseal,
)


def checkpoint(run: Path, step: int, *, sealed: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(step % 200, step % 200 + 40)))
    (folder / "inner" / "state.json").write_text("{}")
    if sealed:
        seal(folder, {"step": step})
    return folder


def test_a_sealed_checkpoint_is_whole_and_says_what_it_was_told(tmp_path: Path):
    folder = checkpoint(tmp_path, 3)
    marker = read_marker(folder)
    assert marker["step"] == 3
    assert sorted(marker["files"]) == ["inner/state.json", "weights.bin"]
    assert damage(folder, marker) == []
    assert not (folder / f".{MARKER}.part").exists()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_changed_bit_missing_file_or_lost_tail_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = checkpoint(tmp_path_factory.mktemp("run"), 3)
    path = folder / data.draw(st.sampled_from(["weights.bin", "inner/state.json"]))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "remove"]))
    if kind == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(bytes(content))
    elif kind == "cut":
        path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content) - 1))]))
    else:
        path.unlink()
    assert len(damage(folder, read_marker(folder))) == 1
    assert last_complete_checkpoint(folder.parent) is None


def test_the_newest_by_number_counts_and_unfinished_or_damaged_ones_do_not(tmp_path: Path):
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 11, sealed=False)
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path)] == [2, 9, 10]
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "weights.bin").write_bytes(b"")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    (tmp_path / "checkpoint-9" / MARKER).write_text('{"format": "other"}')
    assert last_complete_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-2"
    unseal(tmp_path / "checkpoint-2")
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_a_marker_of_another_version_names_it(tmp_path: Path):
    folder = checkpoint(tmp_path, 1)
    path = folder / MARKER
    path.write_text(path.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(CheckpointError, match="version 7; this rankwise reads version 1"):
        read_marker(folder)


@pytest.mark.parametrize(("keep", "left"), [(1, [8, 9]), (2, [6, 8, 9]), (3, [4, 6, 8, 9]), (9, [2, 4, 6, 8, 9])])
def test_rotation_keeps_the_written_one_its_forerunners_and_the_future(tmp_path: Path, keep: int, left: list[int]):
    for step in (2, 4, 6, 8, 9):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 5, sealed=False)
    rotate(tmp_path, keep=keep, written=tmp_path / "checkpoint-8")
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path)] == left
    assert not (tmp_path / "checkpoint-5").exists()


def test_rotation_spares_the_best(tmp_path: Path):
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    removed = rotate(tmp_path, keep=1, written=tmp_path / "checkpoint-6", protected={"checkpoint-2"})
    assert [path.name for path in removed] == ["checkpoint-4"]


def test_names_without_a_step_are_refused_or_ignored(tmp_path: Path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / MARKER).write_text("{}")
    assert complete_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match="not named checkpoint-N"):
        checkpoint_step(tmp_path / "checkpoint-best")
