"""A folder is written beside its destination, made durable and only then put in place; what was there is never lost."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rankwise.errors import OutputError

__all__ = [
    "keep_as",
    "put_in_place",
    "refuse_existing",
    "refuse_unwritable",
    "staged_folder",
    "sync_folder",
    "write_extra_files",
]

ExtraFiles = Mapping[str, str | bytes | Path]

_LAST = ("adapter_config.json", "config.json")
"""Loaders look for these first: they come last, so that a half-placed adapter is not taken for a whole one."""


def refuse_unwritable(folder: Path, key: str = "") -> None:
    """Passes if the folder can be written into, or made; found out before hours of work, and nothing is left there.

    Args:
        folder: may not exist yet.
        key: begins the message: the setting that names the folder.

    Raises:
        OutputError: names the folder that stands in the way and the reason.
    """
    shown = f"{key}: {folder}" if key else str(folder)
    nearest = folder = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        reason = "is a file; name a folder" if nearest == folder else f"cannot be made: {nearest} is not a folder"
        raise OutputError(f"{shown} {reason}.")
    try:
        # Only trying tells: permissions say nothing of a read-only or a virtual file system, least of all to root.
        Path(tempfile.mkdtemp(prefix=".rankwise-", suffix=".part", dir=nearest)).rmdir()
    except OSError as error:
        raise OutputError(
            f"{shown} cannot be written: a folder in {nearest} cannot be made ({error.strerror}). Name another place."
        ) from error


def refuse_existing(destination: Path, names: list[str], *, overwrite: bool) -> None:
    """Raises if the destination cannot be written, or holds one of the files to be written and may not be overwritten.

    Raises:
        OutputError: names what is there.
    """
    refuse_unwritable(destination)
    refuse_unwritable(destination.absolute().parent)  # the stage is made here
    found = [name for name in names if (destination / name).exists()]
    if found and not overwrite:
        raise OutputError(
            f"{destination} already holds {', '.join(found)}. Name another folder, or replace them with --overwrite "
            "(overwrite=True)."
        )


@contextmanager
def staged_folder(destination: Path) -> Iterator[Path]:
    """A new folder beside the destination, removed afterwards if it is still there.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        stage = _new_folder(destination, "staged")
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{destination} cannot be written: {error}. Name another place.") from error
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _new_folder(destination: Path, purpose: str) -> Path:
    for attempt in range(1000):
        candidate = destination.parent / f".{destination.name}.{purpose}-{os.getpid()}-{attempt}"
        with contextlib.suppress(FileExistsError):
            candidate.mkdir()
            return candidate
    raise OutputError(f"{destination.parent}: too many folders .{destination.name}.{purpose}-*; remove them.")


def write_extra_files(stage: Path, extra_files: ExtraFiles | None) -> None:
    """Writes texts and bytes and copies files into the staged folder, under relative names.

    Raises:
        OutputError: a name that would leave the folder or replace one of the adapter's own files.
    """
    for name, content in (extra_files or {}).items():
        path = stage / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.exists():
            raise OutputError(
                f"extra file {name!r}: a relative name that is not one of the adapter's own files is allowed."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Every file and folder inside reaches the disk before this returns."""
    for path in [*folder.rglob("*"), folder]:
        sync_entry(path)


def put_in_place(stage: Path, destination: Path) -> None:
    """The staged folder becomes the destination, or its files replace the destination's one by one.

    If anything fails on the way, every file that was there before is there again.
    """
    if not destination.exists():
        stage.rename(destination)
        sync_entry(destination.parent)
        return
    files = [path.relative_to(stage) for path in stage.rglob("*") if path.is_file()]
    names = sorted(files, key=lambda name: (name.name in _LAST, str(name)))
    old = _new_folder(destination, "replaced")
    try:
        for name in names:
            _back_up(destination / name, old / name)
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).replace(destination / name)
        sync_entry(destination)
    except BaseException:
        for name in names:
            _restore(old / name, destination / name, fresh=not (stage / name).exists())
        shutil.rmtree(old)
        raise
    shutil.rmtree(old)


def _back_up(path: Path, copy: Path) -> None:
    if not path.exists():
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        copy.hardlink_to(path)
    except OSError:  # a file system without hard links
        shutil.copy2(path, copy)


def _restore(copy: Path, path: Path, *, fresh: bool) -> None:
    if copy.exists():
        copy.replace(path)
    elif fresh:
        path.unlink(missing_ok=True)


def keep_as(stage: Path, folder: Path) -> None:
    """The staged folder is kept under this name, in place of an earlier one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(stage, folder)


def sync_entry(path: Path) -> None:
    """The content of a file, or the names in a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
