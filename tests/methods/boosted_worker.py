"""XGBLoRA in one of several gloo processes, under DistributedDataParallel and FSDP2, beside the same run in one."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rankwise.adapters.perturbation import gathered
from rankwise.methods.xgblora import BoostingSchedule, XGBLoRA
from tests.distributed.workers import join_world, leave_world
from tests.methods.boosted import begun
from tests.methods.perturbed import BATCHES, Adapted, adapted

STEPS = 11
METHOD = XGBLoRA(round_steps=3, layers_fraction=0.5)
KINDS = ("ddp", "fsdp2")


def run(one: Adapted, model: Any, schedule: BoostingSchedule, optimizer: Any, rank: int, world: int) -> dict[str, Any]:
    """All rounds on this process's share of the rows; the updates of the boosters, the fresh factors, the ranks."""
    for step in range(1, STEPS + 1):
        batch = {key: value.view(world, 4 // world, -1)[rank] for key, value in BATCHES[step % 4].items()}
        schedule.before_step(step)
        model(**batch).loss.backward()
        schedule.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_step(step)
    schedule.end(STEPS)
    state = schedule.fold_state()
    kept = {f"update.{name}": pair.lora_B @ pair.lora_A for name, pair in state.boosters.items()}
    kept |= {f"A.{name}": gathered(layer.lora_A.detach()).clone() for name, layer in one.layers.items()}
    return kept | {f"rank.{name}": torch.tensor(rank) for name, rank in schedule.live_ranks().items()}


def alone() -> dict[str, Any]:
    one = adapted(rank=1)
    schedule, optimizer = begun(one, METHOD, STEPS, weight_decay=0.1)
    return run(one, one.model, schedule, optimizer, 0, 1)


def together(rank: int, world: int, port: int, folder: str) -> None:
    """Every kind of wrapper in turn."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    join_world(rank, world, port)
    torch.distributed.init_process_group("gloo")
    kept = {}
    for kind in KINDS:
        one = adapted(rank=1)
        model: Any = one.model
        if kind == "ddp":
            model = DistributedDataParallel(one.model)
        else:
            mesh = torch.distributed.init_device_mesh("cpu", (world,))
            for block in one.model.base_model.model.model.layers:
                fully_shard(block, mesh=mesh)
        schedule, optimizer = begun(one, METHOD, STEPS, weight_decay=0.1)
        kept |= {f"{kind}: {key}": value for key, value in run(one, model, schedule, optimizer, rank, world).items()}
    save_file(kept, Path(folder) / f"final-{rank}.safetensors")
    leave_world()
