"""What a checkpoint folder keeps beside its adapter, and the refusal to go on where that is gone."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from rankwise.adapters.checkpoint import WEIGHTS_FILE
from rankwise.adapters.state import STATE_FILE, FoldState
from rankwise.errors import ArtifactError

__all__ = ["is_checkpoint", "refuse_unfinished", "stored_budget", "stored_cast_errors", "stored_state", "what_to_fold"]

# Written by training/marker.py and workflows/run_folder.py, higher layers.
_MARKER, _FORMAT, _RUN_FORMAT = "rankwise.json", "rankwise-checkpoint", "rankwise-run"
_TRAINER_STATE = "trainer_state.json"
_KINDS = {"gates": "gates", "offsets": "an offset", "boosters": "boosters"}


def refuse_unfinished(folder: Path) -> tuple[str, ...]:
    """Refuses a checkpoint that rankwise began and never finished; a note where nobody can tell whose it is.

    A folder called checkpoint-N, or with a trainer_state.json, is a checkpoint. With a marker it is finished, and its
    factors must be those that the marker lists. Without one it is refused on any sign of rankwise: a state file in it,
    a rankwise.json in the folder above, either of them in another checkpoint beside it. Two are let through. With no
    sign it may be a stock PEFT run's, and is exported as the plain adapter that it says it is: wrong only for a method
    with state of its own whose run lost every trace, and LoRA-GA's saves leave the state file even then. Under another
    name, a state file means a plain `save_pretrained` of a whole adapter, which the state completes.

    Returns:
        Notes for the report.

    Raises:
        ArtifactError: unfinished.
    """
    marker = _json(folder / _MARKER)
    if marker.get("format") == _FORMAT:
        _refuse_another(folder / WEIGHTS_FILE, marker)
    numbered = re.fullmatch(r"checkpoint-\d+", folder.resolve().name) is not None
    plain = not numbered and not (folder / _TRAINER_STATE).is_file()
    if plain or marker.get("format") in (_FORMAT, _RUN_FORMAT):
        return ()
    own = (folder / STATE_FILE).is_file()
    if own and not numbered:
        return ()
    above = folder.resolve().parent
    others = [path for path in above.glob("checkpoint-*") if path.name != folder.resolve().name]
    signs = [place / _MARKER for place in (folder, above, *others)] + [other / STATE_FILE for other in others]
    if own or any(sign.is_file() for sign in signs):
        raise ArtifactError(
            f"{folder}: an unfinished checkpoint: its marker {_MARKER} is missing or damaged, so that what lies here "
            "may be half of two steps, or lack what the method keeps beside the adapter. Export an earlier checkpoint "
            "of the run, or save once more (session.save, or session.callback() given to the trainer)."
        )
    return (
        f"{folder.name} has no marker of rankwise; it is taken for a stock PEFT run's and exported as it is. If "
        "rankwise wrote it, it was never finished: export an earlier checkpoint.",
    )


def what_to_fold(folder: Path) -> tuple[str, ...]:
    """What a folder's factors need folded in before anybody may serve them: "an offset", "gates", "boosters".

    Raises:
        ArtifactError: a damaged state file.
    """
    path = folder / STATE_FILE
    state = FoldState.load(path) if path.is_file() else FoldState()
    marker = _checkpoint_marker(folder)
    found = {key for key in _KINDS if getattr(state, key)} | _folded_kinds(marker)
    if _layers_with_offset(marker):
        found.add("offsets")
    return tuple(words for key, words in _KINDS.items() if key in found)


def stored_cast_errors(folder: Path) -> dict[str, float]:
    """By layer, how far rounding moved the base weight in training (`LiveOffset.cast_errors`); empty without a marker.

    Raises:
        ArtifactError: not numbers.
    """
    offset = _checkpoint_marker(folder).get("offset")
    errors = offset.get("cast_errors", {}) if isinstance(offset, dict) else {}
    if not isinstance(errors, dict) or not all(isinstance(e, float) and math.isfinite(e) for e in errors.values()):
        raise ArtifactError(f"{folder / _MARKER}: offset.cast_errors are no numbers; export another checkpoint.")
    return errors


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds the marker of a finished checkpoint."""
    return bool(_checkpoint_marker(folder))


def stored_budget(folder: Path) -> int | None:
    """The most parameters that the method of a checkpoint lets an export have; None for all, and without a marker.

    Raises:
        ArtifactError: no number.
    """
    budget = _checkpoint_marker(folder).get("export_budget")
    if budget is None or (isinstance(budget, int) and budget >= 0):
        return budget
    raise ArtifactError(f"{folder / _MARKER}: export_budget is {budget!r}, no number; export another checkpoint.")


def stored_state(folder: Path) -> FoldState | None:
    """The state file of an adapter folder, None if it has none and needs none.

    Raises:
        ArtifactError: a checkpoint whose start is subtracted, or which trained beside gates or boosters, and the file
            is missing, incomplete or another checkpoint's.
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
    if state is None and (kinds := _folded_kinds(marker)):
        raise ArtifactError(
            f"{folder}: {STATE_FILE} is missing: this checkpoint was trained beside {' and '.join(sorted(kinds))}, and "
            "without them the adapter would be wrong. Put the run's own file back, or export another checkpoint of "
            "the run."
        )
    return state


def _checkpoint_marker(folder: Path) -> Mapping[str, object]:
    """The marker, empty for a folder that is no checkpoint of ours."""
    content = _json(folder / _MARKER)
    return content if content.get("format") == _FORMAT else {}


def _json(path: Path) -> Mapping[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _layers_with_offset(marker: Mapping[str, object]) -> list[str]:
    offset = marker.get("offset")
    return [str(name) for name in offset.get("layers", [])] if isinstance(offset, dict) else []


def _folded_kinds(marker: Mapping[str, object]) -> set[str]:
    """What the schedule kept beside the factors, by the keys of `_KINDS`."""
    schedule = marker.get("schedule")
    kinds = schedule.get("folds", []) if isinstance(schedule, dict) else []
    return {str(kind) for kind in kinds} & _KINDS.keys() if isinstance(kinds, list) else set()


def _refuse_another(path: Path, marker: Mapping[str, object]) -> None:
    files = marker.get("files")
    listed = files.get(path.name) if isinstance(files, dict) else None
    wanted = listed.get("sha256") if isinstance(listed, dict) else None
    if wanted is not None and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
        raise ArtifactError(
            f"{path} is not the file that was written with this checkpoint; put the right one back, or export another "
            "checkpoint of the run."
        )
