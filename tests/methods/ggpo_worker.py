"""GGPO and MGPO in one of several gloo processes, under FSDP2, beside the same run in one process without it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rankwise.adapters.perturbation import gathered
from rankwise.errors import ModelError
from rankwise.methods.ggpo import GGPO, MGPO
from tests.distributed.workers import join_world, leave_world
from tests.methods.perturbed import BATCHES, Adapted, adapted
from tests.support.models import tiny_gpt2, tiny_llama

STEPS = 4
RUNS: dict[str, Any] = {
    "ggpo": (GGPO(sigma=0.2, beta=5.0), "llama"),
    "mgpo": (MGPO(rho=0.5), "llama"),
    "mgpo own": (MGPO(rho=0.5, own_momentum="always"), "llama"),
    "ggpo conv1d": (GGPO(sigma=0.2), "gpt2"),
    "lora": (GGPO(sigma=0.0), "llama"),
}


def prepared(name: str) -> tuple[Adapted, Any, list[Any]]:
    """The adapted model, its schedule, and the blocks that FSDP2 would shard."""
    method, kind = RUNS[name]
    if kind == "gpt2":
        one = adapted(tiny_gpt2(), targets=["c_attn", "c_fc"])
        blocks = list(one.model.base_model.model.transformer.h)
    else:
        one = adapted(tiny_llama())
        blocks = list(one.model.base_model.model.model.layers)
    return one, one.schedule(method), blocks


def run(one: Adapted, schedule: Any, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Four steps on this process's share of the rows, without clipping; the factors of the end, whole."""
    optimizer = torch.optim.AdamW(one.factors, lr=1e-2)
    schedule.begin(optimizer, STEPS)
    for step in range(1, STEPS + 1):
        batch = {key: value.view(world, 4 // world, -1)[rank] for key, value in BATCHES[step % 4].items()}
        schedule.before_step(step)
        one.model(**batch).loss.backward()
        schedule.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_step(step)
    kept = {}
    for name, layer in one.layers.items():
        kept[f"{name}.A"], kept[f"{name}.B"] = (
            gathered(factor.detach()).clone() for factor in (layer.lora_A, layer.lora_B)
        )
    return kept | {name: value for name, value in schedule.state_dict().items() if isinstance(value, torch.Tensor)}


def sharded(rank: int, world: int, port: int, folder: str) -> None:
    """Every run with the model's blocks sharded; at last, a model that was sharded before the schedule was made."""
    from torch.distributed.fsdp import fully_shard

    join_world(rank, world, port)
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    kept = {}
    for name in RUNS:
        one, schedule, blocks = prepared(name)
        for block in blocks:
            fully_shard(block, mesh=mesh)
        kept |= {f"{name}: {key}": value for key, value in run(one, schedule, rank, world).items()}
    try:
        one.schedule(GGPO())
    except ModelError as error:
        (Path(folder) / f"refused-{rank}").write_text(str(error))
    save_file(kept, Path(folder) / f"final-{rank}.safetensors")
    leave_world()
