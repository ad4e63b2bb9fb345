"""When a checkpoint counts: only while its marker, written last, describes exactly the files that are there.

The marker is the checkpoint's `rankwise.json`. It is staged beside its place and renamed in after every other file is
on disk, and it lists them with size and hash: whatever kills a run, a folder without a marker, or with one that does
not fit, is an unfinished checkpoint, and the one before it still counts. A checkpoint is given up in the opposite
order: first the marker, then the files.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from rankwise.errors import CheckpointError

__all__ = [
    "MARKER",
    "checkpoint_step",
    "complete_checkpoints",
    "damage",
    "last_complete_checkpoint",
    "read_marker",
    "rotate",
    "seal",
    "unseal",
]

MARKER: Final = "rankwise.json"
FORMAT: Final = "rankwise-checkpoint"
VERSION: Final = 1
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_CHUNK = 1 << 20


def seal(folder: Path, content: Mapping[str, Any]) -> None:
    """Marks the checkpoint complete: writes every file through to disk, then the marker, at once.

    Args:
        folder: the checkpoint; all its other files are written.
        content: what the marker says beside its format and the list of files; JSON-ready.
    """
    files = {name: _described(folder / name, flush=True) for name in _file_names(folder)}
    body = {"format": FORMAT, "version": VERSION, **content, "files": files}
    staged = folder / f".{MARKER}.part"
    with staged.open("w", encoding="utf-8") as handle:
        json.dump(body, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    staged.replace(folder / MARKER)
    _flush_folder(folder)
    _flush_folder(folder.parent)


def unseal(folder: Path) -> None:
    """Takes the marker away, if there is one: the checkpoint is about to be rewritten or removed."""
    (folder / MARKER).unlink(missing_ok=True)
    if folder.is_dir():
        _flush_folder(folder)


def read_marker(folder: Path) -> dict[str, Any]:
    """What the marker says.

    Raises:
        CheckpointError: no such folder, no marker (the checkpoint was never finished), a damaged one, or one of another
            version.
    """
    path = folder / MARKER
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder: name one of the run's checkpoint-N folders")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: the marker {MARKER} is missing, so the checkpoint was never finished (or is not rankwise's): "
            "continue from an earlier one"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the marker is damaged ({error}): continue from an earlier checkpoint") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the marker of a checkpoint (its format is not {FORMAT!r})")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version {content.get('version')!r}; this rankwise reads version {VERSION}: "
            "continue with the version that wrote it"
        )
    return content


def damage(folder: Path, marker: Mapping[str, Any]) -> list[str]:
    """Every file of the checkpoint that is missing or is not what the marker says; empty if it is whole."""
    faults = []
    for name, wanted in marker.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path}: the file is missing")
        elif path.stat().st_size != wanted["size"]:
            faults.append(f"{path}: {path.stat().st_size} bytes, {wanted['size']} were written")
        elif _described(path) != wanted:
            faults.append(f"{path}: the content is not what was written")
    return faults


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that carry a marker, oldest first, by step."""
    found = [
        path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and (path / MARKER).is_file()
    ]
    return sorted(found, key=checkpoint_step)


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of a run that is complete and undamaged, or None.

    Args:
        folder: the run's output folder, which holds the `checkpoint-N` folders.

    Returns:
        The checkpoint's path. Unfinished and damaged ones are passed over.
    """
    for path in reversed(complete_checkpoints(Path(folder))):
        try:
            if not damage(path, read_marker(path)):
                return path
        except CheckpointError:
            continue
    return None


def checkpoint_step(folder: Path) -> int:
    """N of a `checkpoint-N` folder."""
    match = _CHECKPOINT.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not named checkpoint-N, so its step is unknown")
    return int(match[1])


def rotate(folder: Path, *, keep: int, written: Path, protected: Collection[str] = ()) -> list[Path]:
    """Removes the oldest checkpoints beyond `keep`; call it only after `written` is sealed.

    Args:
        folder: the run's output folder.
        keep: how many to keep, >= 1, `written` among them.
        written: the checkpoint just completed; later ones belong to an abandoned future of the run and are left alone.
        protected: names of checkpoints that must stay (the best one so far, the ends of stages).

    Returns:
        What was removed. Unfinished folders of earlier steps go too: nothing will ever complete them.
    """
    last = checkpoint_step(written)
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _CHECKPOINT.fullmatch(path.name)]
    earlier = sorted((path for path in found if checkpoint_step(path) < last), key=checkpoint_step)
    marked = [path for path in earlier if (path / MARKER).is_file()]
    kept = marked[max(0, len(marked) - (keep - 1)) :]
    removed = [path for path in earlier if path not in kept and path.name not in protected]
    for path in removed:
        unseal(path)
        shutil.rmtree(path)
    return removed


def _file_names(folder: Path) -> list[str]:
    staged = f".{MARKER}.part"
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.as_posix() not in (MARKER, staged))


def _described(path: Path, *, flush: bool = False) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb+" if flush else "rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
        if flush:
            os.fsync(handle.fileno())
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
