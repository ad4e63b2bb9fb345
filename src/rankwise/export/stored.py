"""What a checkpoint folder keeps beside its adapter, and the refusal to go on where that is gone."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from rankwise.adapters.state import STATE_FILE, FoldState
from rankwise.errors import ArtifactError

__all__ = ["stored_state"]

# Written by training/marker.py, a higher layer.
_MARKER, _FORMAT = "rankwise.json", "rankwise-checkpoint"


def stored_state(folder: Path) -> FoldState | None:
    """The state file of an adapter folder, None if it has none and needs none.

    Raises:
        ArtifactError: a checkpoint whose start is subtracted, and the file is missing, incomplete or another
            checkpoint's.
    """
    path, marker = folder / STATE_FILE, _checkpoint_marker(folder)
    if path.is_file():
        _refuse_another(path, marker)
    state = FoldState.load(path) if path.is_file() else None
    missing = [name for name in _layers_with_offset(marker) if state is None or name not in state.offsets]
    if missing:
        lost = f"{STATE_FILE} is missing" if state is None else f"{STATE_FILE} lacks the offset of {missing[0]}"
        raise ArtifactError(
            f"{folder}: {lost}: this checkpoint was trained beside an offset (lora-ga's start), and without it the "
            "adapter would be wrong. Put the run's own file back, or export another checkpoint of the run."
        )
    return state


def _checkpoint_marker(folder: Path) -> Mapping[str, object]:
    """The marker, empty for a folder that is no checkpoint of ours."""
    try:
        content = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and content.get("format") == _FORMAT else {}


def _layers_with_offset(marker: Mapping[str, object]) -> list[str]:
    offset = marker.get("offset")
    return [str(name) for name in offset.get("layers", [])] if isinstance(offset, dict) else []


def _refuse_another(path: Path, marker: Mapping[str, object]) -> None:
    files = marker.get("files")
    listed = files.get(STATE_FILE) if isinstance(files, dict) else None
    wanted = listed.get("sha256") if isinstance(listed, dict) else None
    if wanted is not None and hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
        raise ArtifactError(
            f"{path} is not the file that was written with this checkpoint; put the right one back, or export another "
            "checkpoint of the run."
        )
