"""The output folder of a run: who may write into it, and the manifest that says what became of it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rankwise.errors import CheckpointError, OutputError
from rankwise.export.staging import refuse_unwritable
from rankwise.workflows.config import RunConfig

__all__ = ["CALIBRATION_FILE", "Claim", "claim", "read_manifest", "write_atomically", "write_manifest"]

MANIFEST = "rankwise.json"
CALIBRATION_FILE = "calibration.safetensors"

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a run may do with its folder.

    Args:
        folder: the output folder; it may not exist yet.
        checkpoint: where to go on from, or None for a start from step 0.
        previous: the manifest of the unfinished run that goes on, or None.
    """

    folder: Path
    checkpoint: Path | None = None
    previous: Mapping[str, Any] | None = None


def claim(config: RunConfig, resume: bool | Path = False) -> Claim:
    """Decides whether a run starts, goes on or is refused; leaves nothing behind.

    Args:
        config: the run file.
        resume: True insists on going on, a path names the checkpoint.

    Raises:
        OutputError: the folder cannot be written, or holds a finished run, a run of another config, or something that
            is no run.
        CheckpointError: there is nothing to go on from.
    """
    from rankwise.training.state import last_complete_checkpoint

    folder = config.folder
    refuse_unwritable(folder, "output_dir")
    manifest = read_manifest(folder)
    if manifest is None:
        _refuse_strangers(folder)
        if resume:
            raise CheckpointError(f"--resume: {folder} holds no run to go on from; leave it out to start one")
        return Claim(folder=folder)
    if manifest.get("status") == "finished":
        raise OutputError(
            f"output_dir: {folder} holds a finished run; choose another output_dir, or remove the folder to run again"
        )
    if manifest.get("config_hash") != config.hash():
        raise OutputError(
            f"output_dir: {folder} holds an unfinished run of another config ({_differences(manifest, config)}); "
            "choose another output_dir, put the config back, or remove the folder"
        )
    if isinstance(resume, Path):
        return Claim(folder=folder, checkpoint=_named_checkpoint(folder, resume), previous=manifest)
    checkpoint = last_complete_checkpoint(folder)
    if resume and checkpoint is None:
        raise CheckpointError(f"--resume: {folder} holds no complete checkpoint; leave it out to start from step 0")
    return Claim(folder=folder, checkpoint=checkpoint, previous=manifest)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a run's folder, or None if it has none.

    Raises:
        OutputError: there is one, and it cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} cannot be read ({error}); choose another output_dir, or remove the folder"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != "rankwise-run":
        raise OutputError(f"{path} is not the manifest of a run; choose another output_dir")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes rankwise.json; it is never seen half-written."""
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, default=str) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a kill at any moment, finds the old content or the new one."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    with staged.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    staged.replace(path)


def _refuse_strangers(folder: Path) -> None:
    """A folder without a manifest must hold nothing of anybody's."""
    if not folder.is_dir():
        return
    found = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".part"))
    if found:
        shown = ", ".join(found[:_SHOWN]) + (" ..." if len(found) > _SHOWN else "")
        raise OutputError(f"output_dir: {folder} holds files that are no rankwise run ({shown}); choose another folder")


def _named_checkpoint(folder: Path, checkpoint: Path) -> Path:
    if checkpoint.resolve().parent != folder.resolve():
        raise CheckpointError(f"--resume: {checkpoint} is not a checkpoint of {folder}; name one of its checkpoint-N")
    return checkpoint


def _differences(manifest: Mapping[str, Any], config: RunConfig) -> str:
    """The keys in which two resolved configs differ, with both values."""
    before, now = _flat(manifest.get("config", {})), _flat(config.to_dict())
    keys = [key for key in sorted({*before, *now}) if key != "output_dir" and before.get(key) != now.get(key)]
    told = [f"{key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in keys[:_SHOWN]]
    return "; ".join(told) + (" ..." if len(keys) > _SHOWN else "") or "made by another version"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Literal[None] | Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
