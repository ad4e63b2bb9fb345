"""Save and resume: what a checkpoint holds beside Trainer's files, and how a session is built again from it.

Beside the native adapter and Trainer's (or `Session.save`'s) optimizer, scheduler and random states lie
`rankwise_state.safetensors` (what export folds, and under `method.` the schedule's tensors) and the marker
`rankwise.json`: plan, methods, seeds, versions, step, fingerprints of the base model, the schedule's other values, the
guard's counters, and the list of files.
"""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankwise.adapters.attach import adapted_layers, attach_lora
from rankwise.adapters.checkpoint import WEIGHTS_FILE, load_native, read_safetensors, save_native
from rankwise.adapters.fingerprint import architecture_fingerprint, weights_fingerprint
from rankwise.adapters.refusals import refuse_adapted, refuse_wrapped
from rankwise.adapters.state import STATE_FILE, FoldState
from rankwise.calibration.as_found import random_states_restored
from rankwise.calibration.batches import Loss
from rankwise.calibration.processes import process_index, world_size
from rankwise.errors import CheckpointError
from rankwise.methods.recipe import Recipe, method_from_id
from rankwise.ranks.plan import RankPlan
from rankwise.training.beside import kept_validation, make_schedule, planned_slots, put_offset
from rankwise.training.marker import MARKER, damage, last_complete_checkpoint, read_marker, seal, unseal
from rankwise.training.optimizers import unwrapped
from rankwise.training.session import AdapterSettings, CalibrationSummary, Session

__all__ = [
    "last_complete_checkpoint",
    "read_training_state",
    "resume",
    "schedule_state",
    "seal_checkpoint",
    "set_random_states",
    "write_checkpoint",
]

_OPTIMIZER: Final = "optimizer.pt"
_SCHEDULER: Final = "scheduler.pt"
_LIBRARIES: Final = ("rankwise", "torch", "transformers", "peft", "accelerate", "trl")
_FAULTS_SHOWN: Final = 5
_METHOD: Final = "method."


def resume(
    model: nn.Module,
    checkpoint: str | PathLike[str],
    *,
    validation: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Session:
    """The session that a checkpoint holds, rebuilt on the base model: stored plan, factors, start, schedule, counters.

    Nothing is calibrated or computed again. Afterwards give the trainer `session.model` and call
    `trainer.train(resume_from_checkpoint=checkpoint)`; a bare loop calls `session.restore(checkpoint, optimizer,
    scheduler)`.

    Args:
        model: the same base model that the run was started with, without adapters.
        checkpoint: a `checkpoint-N` folder.
        validation: batches for schedules that score, the run's own.
        loss: the run's own `loss`, if it had one.

    Returns:
        The session at the checkpoint's step. Another thread count than the run's is a note: the numbers then differ in
        the last bits.

    Raises:
        CheckpointError: no marker, missing or damaged files, another base model, a start or a schedule's state that is
            missing or of another plan.
        ConfigError: validation batches that are missing, or that nobody would read.
    """
    refuse_wrapped(model)
    refuse_adapted(model)
    folder = Path(checkpoint)
    marker = read_marker(folder)
    _refuse_damage(folder, marker)
    _check_base(model, marker["base"], folder)
    plan = RankPlan.from_json(json.dumps(marker["plan"]), source=str(folder / MARKER))
    settings = AdapterSettings(**{**marker["adapter"], "modules_to_save": tuple(marker["adapter"]["modules_to_save"])})
    recipe = Recipe(tuple(method_from_id(entry["id"], entry["settings"]) for entry in marker["methods"]))
    kept = FoldState.load(folder / STATE_FILE)
    _check_parts(folder, marker, recipe, plan, kept)
    with random_states_restored():
        scored = kept_validation(recipe, validation)
        peft_model = attach_lora(model, plan, slots=planned_slots(recipe, plan), **settings.arguments())
        load_native(peft_model, folder, settings.adapter_name)
        layers = adapted_layers(peft_model, settings.adapter_name)
        offset = put_offset(peft_model, layers, recipe, kept.offsets)
        schedule = make_schedule(
            recipe, peft_model, layers, marker["seed"], offset=offset, validation=scored, loss=loss
        )
        if schedule is not None:
            schedule.load_state_dict(_schedule_state(folder, marker["schedule"]))
    calibration = marker["calibration"]
    session = Session(
        peft_model,
        plan,
        recipe,
        marker["seed"],
        settings=settings,
        offset=offset,
        schedule=schedule,
        calibration=None
        if calibration is None
        else CalibrationSummary(**{**calibration, "unreached": tuple(calibration.get("unreached", ()))}),
        step=marker["step"],
        notes=_environment_notes(marker),
        base_weights=marker["base"]["weights"],
        told_ranks=marker.get("told_ranks"),
    )
    session.health.load_state_dict(marker["health"])
    return session


def _refuse_damage(folder: Path, marker: Mapping[str, Any]) -> None:
    faults = damage(folder, marker)
    if STATE_FILE not in marker["files"]:
        faults.append(f"{folder / STATE_FILE}: the file is not part of the checkpoint")
    if faults:
        more = f" and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise CheckpointError(
            f"the checkpoint is damaged: {'; '.join(faults[:_FAULTS_SHOWN])}{more}. Go on from an earlier checkpoint"
        )


def _check_parts(folder: Path, marker: Mapping[str, Any], recipe: Recipe, plan: RankPlan, kept: FoldState) -> None:
    """The start that is subtracted and the schedule's state are those of this plan and recipe, and whole."""
    faults = []
    place, offset = recipe.initialize.offset_place, marker.get("offset")
    if (offset["place"] if offset else "none") != place:
        faults.append(f"the start of {recipe.initialize.id} (offset: {place}) is not recorded")
    told = set(offset["layers"]) if offset else set()
    faults += [f"offset.{name}.A and .B are missing" for name in sorted(told - kept.offsets.keys())]
    faults += [f"offset.{name}.A and .B belong to no start" for name in sorted(kept.offsets.keys() - told)]
    ranks = plan.ranks
    for name, pair in kept.offsets.items():
        if ranks.get(name) != len(pair.lora_A):
            faults.append(f"offset.{name}.A has rank {len(pair.lora_A)}, the plan gives the layer {ranks.get(name, 0)}")
    schedule = marker.get("schedule")
    wanted = None if recipe.schedule is None else recipe.schedule.id
    if (schedule["id"] if schedule else None) != wanted:
        faults.append(f"the state of {wanted or 'no schedule'} is not recorded")
    if faults:
        raise CheckpointError(
            f"{folder / STATE_FILE} is not that of this run: {'; '.join(faults[:_FAULTS_SHOWN])}; what is missing "
            "cannot be computed again, so go on from another checkpoint"
        )


def _schedule_state(folder: Path, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What the schedule's `state_dict` returned: values from the marker, tensors from the state file."""
    tensors = _method_tensors(folder / STATE_FILE)
    missing = [name for name in recorded["tensors"] if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{folder / STATE_FILE}: {_METHOD}{missing[0]} is missing ({len(missing)} of {len(recorded['tensors'])} of "
            f"{recorded['id']}'s tensors); go on from another checkpoint"
        )
    return {**recorded["values"], **{name: tensors[name] for name in recorded["tensors"]}}


def schedule_state(folder: Path) -> dict[str, Any]:
    """The schedule's state in a complete checkpoint.

    Raises:
        CheckpointError: it is incomplete, or was made without a schedule.
    """
    recorded = read_marker(folder).get("schedule")
    if recorded is None:
        raise CheckpointError(f"{folder} holds no schedule's state: it was saved by another run")
    return _schedule_state(folder, recorded)


def _method_tensors(path: Path) -> dict[str, Tensor]:
    found = read_safetensors(path)
    return {name.removeprefix(_METHOD): tensor for name, tensor in found.items() if name.startswith(_METHOD)}


def write_checkpoint(session: Session, folder: Path, *, optimizer: Any = None, scheduler: Any = None) -> None:
    """A whole native checkpoint without Trainer: adapter, training state, our state, the marker last."""
    if process_index() == 0:
        unseal(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if optimizer is not None:
            torch.save(unwrapped(optimizer).state_dict(), folder / _OPTIMIZER)
        if scheduler is not None:
            torch.save(scheduler.state_dict(), folder / _SCHEDULER)
    _wait_for_all()
    torch.save(_random_states(), folder / _random_file())
    seal_checkpoint(session, folder)


def seal_checkpoint(session: Session, folder: Path) -> None:
    """Writes the adapter and our state to a checkpoint, and marks it complete once every process is done."""
    state = {} if session.schedule is None else session.schedule.state_dict()  # of sharded factors it may gather
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in state.items() if name not in tensors}
    _wait_for_all()
    if process_index() == 0:
        unseal(folder)
        _write_adapter(session, folder)
        session.fold_state.save(folder / STATE_FILE, method=tensors)
        seal(folder, _content(session, values, tensors))
    _wait_for_all()


def _write_adapter(session: Session, folder: Path) -> None:
    """One writer for every loop: Trainer's own file (PEFT's) also holds embeddings that were resized, never trained."""
    whole = all(
        parameter.numel() and not isinstance(parameter, DTensor)
        for layer in session.layers.values()
        for parameter in (layer.lora_A, layer.lora_B)
    )
    # Of sharded factors this process holds a part: what Trainer gathered stays.
    if whole or not (folder / WEIGHTS_FILE).exists():
        save_native(session.model, folder, session.settings.adapter_name)


def read_training_state(session: Session, folder: Path, optimizer: Any, scheduler: Any = None) -> Mapping[str, Any]:
    """Loads optimizer and scheduler that `write_checkpoint` stored for a bare loop; returns the random states."""
    marker = read_marker(folder)
    stored = RankPlan.from_json(json.dumps(marker["plan"]), source=str(folder / MARKER))
    if stored.hash() != session.plan.hash():
        raise CheckpointError(
            f"{folder} was made with another rank plan than the session's, so that its optimizer state fits other "
            "factors: make the session with rw.resume(model, checkpoint), from the same checkpoint"
        )
    if marker["step"] != session.step:
        raise CheckpointError(
            f"the session is at step {session.step} and {folder} was saved at step {marker['step']}: make the session "
            "with rw.resume(model, checkpoint), from the same checkpoint; restore alone brings no factors back"
        )
    for name, wanted in ((_OPTIMIZER, optimizer), (_SCHEDULER, scheduler), (_random_file(), True)):
        if wanted is not None and not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing: the checkpoint was saved without it; save with "
                "session.save(folder, optimizer=optimizer, scheduler=scheduler)"
            )
    device = next(iter(session.layers.values())).lora_A.device
    unwrapped(optimizer).load_state_dict(torch.load(folder / _OPTIMIZER, map_location=device, weights_only=True))
    if scheduler is not None:
        scheduler.load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))
    states: Mapping[str, Any] = torch.load(folder / _random_file(), weights_only=True)
    return states


def _content(session: Session, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    offset, owner, kept = session.offset, session.recipe.schedule, session.fold_state
    folds = [kind for kind in ("gates", "boosters") if getattr(kept, kind)]
    return {
        "step": session.step,
        "plan": json.loads(session.plan.to_json()),
        "methods": [{"id": method.id, "settings": asdict(method)} for method in session.recipe.methods],
        "adapter": asdict(session.settings),
        "seed": session.seed,
        "base": {"architecture": architecture_fingerprint(session.model), "weights": session.base_weights},
        "calibration": None if session.calibration is None else asdict(session.calibration),
        "offset": None
        if offset is None
        else {"place": offset.place, "layers": sorted(offset.pairs), "cast_errors": offset.cast_errors},
        "schedule": None
        if owner is None
        else {"id": owner.id, "values": dict(values), "tensors": sorted(tensors), "folds": folds},
        "export_budget": session.export_budget,
        "told_ranks": None if owner is None else session.told_ranks,
        "health": session.health.state_dict(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "versions": _versions(),
    }


def _check_base(model: nn.Module, wanted: Mapping[str, str], folder: Path) -> None:
    architecture = architecture_fingerprint(model)
    if architecture != wanted["architecture"]:
        raise CheckpointError(
            f"{folder} was trained on a base model of the architecture {wanted['architecture']}; this one "
            f"({type(model).__name__}) has {architecture}: load the model that the run was started with"
        )
    weights = weights_fingerprint(model)
    if weights != wanted["weights"]:
        raise CheckpointError(
            f"{folder} was trained on a base model with other weights (fingerprint {wanted['weights'][:16]}..., here "
            f"{weights[:16]}...): load the same model, in the same dtype and quantization"
        )


def _environment_notes(marker: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if marker["threads"] != torch.get_num_threads():
        notes.append(
            f"the run used {marker['threads']} threads, this process uses {torch.get_num_threads()}: it goes on, but "
            f"not bit for bit as it would have; set OMP_NUM_THREADS={marker['threads']} for that"
        )
    if marker["processes"] != world_size():
        notes.append(
            f"the run used {marker['processes']} processes, this one {world_size()}: batches are shared differently"
        )
    changed = {n: v for n, v in _versions().items() if marker["versions"].get(n) not in (None, v)}
    if changed:
        told = ", ".join(f"{name} {marker['versions'][name]} -> {new}" for name, new in changed.items())
        notes.append(f"other library versions than the run's: {told}")
    return tuple(notes)


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _random_file() -> str:
    return "rng_state.pth" if world_size() == 1 else f"rng_state_{process_index()}.pth"


def _random_states() -> dict[str, Any]:
    """Tensors and plain values only, so that they load with `weights_only`."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.random.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Puts Python's, numpy's and torch's random states back."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(states["cuda"])


def _wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier()
