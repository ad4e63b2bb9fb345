"""What each of several gloo processes does; the same code runs alone with a world of one."""

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file

from tests.training.jobs import Job, Rows, factors, new_session, rate_of, trainer_arguments

STEPS = 6
POISONED_STEP = 3


def join_world(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def leave_world() -> NoReturn:
    """Ends the process, the last line of a worker.

    What DDP's reducer holds of a gloo group is freed while Python's lock is held, and the group's own thread may be
    waiting for that lock (torch 2.13): a worker that returned would now and then hang in freeing its locals.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


def accelerate_loop(rank: int, world: int, port: int, folder: str, *recipes: str) -> None:
    """Each recipe from shared calibration, then a bare loop in which the last process meets a NaN once."""
    from accelerate import Accelerator
    from transformers import TrainingArguments

    join_world(rank, world, port)
    kept: dict[str, torch.Tensor] = {}
    hashes = []
    for recipe in recipes:
        job = Job(folder=folder, method=recipe, dropout=0.0, steps=STEPS)
        args = TrainingArguments(**{**trainer_arguments(job), "output_dir": folder})
        accelerator = Accelerator(cpu=True)  # after the arguments: making those resets accelerate's state
        session = new_session(job)
        kept |= {f"{recipe}: start.{name}": value for name, value in factors(session).items()}
        _poisoned_loop(session, accelerator, args, rank, world)
        kept |= {f"{recipe}: {name}": value for name, value in factors(session).items()}
        for name, layer in session.layers.items():
            kept[f"{recipe}: update.{name}"] = (layer.scaling * layer.lora_B @ layer.lora_A).detach()
        hashes.append(session.plan.hash())
        session.close()
    save_file(kept, Path(folder) / f"final-{rank}.safetensors")
    (Path(folder) / f"plan-{rank}").write_text("\n".join(hashes))
    leave_world()


def _poisoned_loop(session: Any, accelerator: Any, args: Any, rank: int, world: int) -> None:
    optimizer, scheduler = session.optimizers(args, STEPS)
    model, optimizer = accelerator.prepare(session.model, optimizer)
    model.train()
    session.begin(optimizer, STEPS)
    poisoned = next(iter(session.layers.values()))
    tokens = Rows(rows=4 * STEPS).tokens.reshape(STEPS, 4, -1)
    for step in range(1, STEPS + 1):
        mine = tokens[step - 1].reshape(world, 4 // world, -1)[rank]
        session.before_step(step)
        handle = poisoned.lora_A.register_hook(lambda gradient: gradient * float("nan"))
        if step != POISONED_STEP or rank != world - 1:
            handle.remove()
        accelerator.backward(model(input_ids=mine, labels=mine).loss)
        handle.remove()
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
        session.before_optimizer_step(step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        session.after_step(step)
    session.end(STEPS)
    assert session.health.gradients.skipped()[poisoned.name] == 1


def trainer(rank: int, world: int, port: int, folder: str) -> None:
    """Trainer under DDP on the global batches of one process, with checkpoints; resumed if there is one."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from rankwise.training.state import last_complete_checkpoint, resume
    from tests.support.models import tiny_llama

    join_world(rank, world, port)
    job = Job(folder=folder, dropout=0.0, steps=STEPS, save_steps=2, keep=2)
    args = TrainingArguments(
        **{
            **trainer_arguments(job),
            "per_device_train_batch_size": 4 // world,
            "gradient_accumulation_steps": 1,
            "ddp_find_unused_parameters": False,
        }
    )
    checkpoint = last_complete_checkpoint(folder)
    session = new_session(job) if checkpoint is None else resume(tiny_llama(), checkpoint)
    made = Trainer(
        session.model,
        args,
        train_dataset=Rows(rows=24),
        optimizers=session.optimizers(args, STEPS),
        callbacks=[session.callback()],
    )
    made.remove_callback(PrinterCallback)
    made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _keep(session, folder, rank, {})
    leave_world()


def _keep(session: Any, folder: str, rank: int, more: dict[str, torch.Tensor]) -> None:
    save_file({**factors(session), **more}, Path(folder) / f"final-{rank}.safetensors")
    (Path(folder) / f"plan-{rank}").write_text(session.plan.hash())


def fsdp2_loop(rank: int, world: int, port: int, folder: str, *recipes: str) -> None:
    """A loop over parameters that FSDP2 shards; the last process's loss is NaN once, so that every pair sits out."""
    join_world(rank, world, port)
    torch.distributed.init_process_group("gloo")
    kept: dict[str, torch.Tensor] = {}
    for recipe in recipes:
        kept |= {f"{recipe}: {name}": value for name, value in _sharded_loop(recipe, folder, rank, world).items()}
    save_file(kept, Path(folder) / f"final-{rank}.safetensors")
    leave_world()


def _sharded_loop(recipe: str, folder: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    from types import SimpleNamespace

    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    job = Job(folder=folder, method=recipe, dropout=0.0)
    session = new_session(job)
    for block in session.model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(session.model, mesh=mesh)
    session.model.train()
    args = SimpleNamespace(learning_rate=rate_of(job), lr_scheduler_type="constant")
    optimizer, scheduler = session.optimizers(args, STEPS)
    session.begin(optimizer, STEPS)
    tokens = Rows(rows=4 * STEPS).tokens.reshape(STEPS, 4, -1)
    for step in range(1, STEPS + 1):
        mine = tokens[step - 1].reshape(world, 4 // world, -1)[rank]
        session.before_step(step)
        loss = session.model(input_ids=mine, labels=mine).loss
        (loss * float("nan") if step == POISONED_STEP and rank == world - 1 else loss).backward()
        session.before_optimizer_step(step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        session.after_step(step)
    session.end(STEPS)
    assert session.health.status == "passed"
    assert set(session.health.gradients.skipped().values()) == {1}
    kept = {}
    for name, layer in session.layers.items():
        for side, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            kept[f"{name}.{side}"] = whole.detach().contiguous()
        kept[f"update.{name}"] = layer.scaling * kept[f"{name}.B"] @ kept[f"{name}.A"]
    for name, pair in session.fold_state.boosters.items():
        kept[f"{name}.boosters.A"], kept[f"{name}.boosters.B"] = pair.lora_A, pair.lora_B
    session.close()
    return kept


def export(rank: int, world: int, port: int, folder: str) -> None:
    """Every process exports into one folder: once it is right, once the layout is unknown and once it is there."""
    from rankwise.errors import ConfigError, OutputError

    join_world(rank, world, port)
    torch.distributed.init_process_group("gloo")
    session = new_session(Job(folder=folder, dropout=0.0))
    report = session.export(Path(folder) / "adapter", batch={"input_ids": Rows(rows=1).tokens})
    found = [str(report.logit_error is not None and report.logit_error <= 1e-5)]
    for options, kind in (({"layout": "unheard-of"}, ConfigError), ({}, OutputError)):
        try:
            session.export(Path(folder) / "adapter", **options)
        except kind as error:
            found.append(str(error))
    (Path(folder) / f"verdict-{rank}").write_text("\n".join(found))
    leave_world()


def resets(rank: int, world: int, port: int, folder: str) -> None:
    """BeamLoRA in a bare loop under DDP; what each reset decided and what it left, then one over scores that differ."""
    from accelerate import Accelerator
    from transformers import TrainingArguments

    from rankwise.errors import CalibrationError

    join_world(rank, world, port)
    job = Job(folder=folder, method="beamlora", dropout=0.0, steps=12, learning_rate=2e-2)
    args = TrainingArguments(**{**trainer_arguments(job), "output_dir": folder})
    accelerator = Accelerator(cpu=True)
    session = new_session(job)
    optimizer, scheduler = session.optimizers(args, job.steps)
    model, optimizer = accelerator.prepare(session.model, optimizer)
    model.train()
    session.begin(optimizer, job.steps)
    tokens = Rows(rows=4 * job.steps).tokens.reshape(job.steps, 4, -1)
    kept: dict[str, torch.Tensor] = {}
    told: list[Any] = []
    for step in range(1, job.steps + 1):
        mine = tokens[step - 1].reshape(world, 4 // world, -1)[rank]
        session.before_step(step)
        accelerator.backward(model(input_ids=mine, labels=mine).loss)
        session.before_optimizer_step(step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        session.after_step(step)
        if changes := session.drain_changes():
            told += changes
            kept |= {f"{step}: {name}": value.clone() for name, value in factors(session).items()}
    session.end(job.steps)
    schedule: Any = session.schedule
    if rank:
        name = next(iter(session.layers))
        schedule.gates.write(name, schedule.gates.value(name).detach() + torch.tensor([0.01, 0.0, 0.0, 0.0]))
    try:
        schedule._reset(job.steps, 0.5)
    except CalibrationError as error:
        told.append(str(error))
    save_file(kept, Path(folder) / f"final-{rank}.safetensors")
    (Path(folder) / f"told-{rank}.json").write_text(json.dumps(told))
    leave_world()
