"""What each of several gloo processes does with a pair optimizer; the same code runs alone with a world of one."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from rankwise.errors import ConfigError
from tests.distributed.workers import join_world, leave_world
from tests.optimizers.support import MAKERS
from tests.support.models import causal_batch, tiny_llama

STEPS = 5
ROWS = 4
KINDS = ("rite", "pro-efficient", "pro-full")


def adapted(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A tiny Llama with a stock adapter whose B is not zero; the same in every process."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])).to(dtype)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            stream = torch.Generator().manual_seed(number)
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=stream))
    return model.train()


def shares(step: int, world: int) -> list[dict[str, Tensor]]:
    """The batch of this one of two processes, or both for one that does the work of two."""
    batch = causal_batch(step, rows=ROWS)
    halves = [{key: value[k : k + ROWS // 2] for key, value in batch.items()} for k in (0, ROWS // 2)]
    return halves if world == 1 else [halves[torch.distributed.get_rank()]]


def kept(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            found[name] = whole.detach().clone().contiguous()
    return found


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, world: int) -> None:
    """Forward, backward and step; alone, the gradients of both halves are averaged by hand."""
    mine = shares(step, world)
    for batch in mine:
        (model(**batch).loss / len(mine)).backward()
    optimizer.step()
    optimizer.zero_grad()


def ddp(kind: str, world: int) -> dict[str, Tensor]:
    """The factors after a run under DDP, or alone."""
    model = adapted()
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = MAKERS[kind](model, lr=1e-2, weight_decay=0.01)
    for step in range(STEPS):
        step_once(wrapped, optimizer, step, world)
    return kept(model)


def fsdp2(kind: str, world: int) -> dict[str, Tensor]:
    """The factors after a run on sharded pairs, or alone; half-way the state goes into another optimizer."""
    model = adapted(torch.float32)
    if world > 1:
        mesh = torch.distributed.init_device_mesh("cpu", (world,))
        for block in model.base_model.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = MAKERS[kind](model, lr=1e-2)
    for step in range(STEPS):
        if step == STEPS // 2:
            saved = optimizer.state_dict()
            optimizer = MAKERS[kind](model, lr=1e-2)
            optimizer.load_state_dict(saved)
        step_once(model, optimizer, step, world)
    return kept(model)


def fsdp1(kind: str, original_names: bool) -> str:
    """What is said of the flat shards that FSDP1 leaves."""
    model: Any = adapted(torch.float32)
    if not original_names:
        model.requires_grad_(True)  # flattening without the original names asks for one setting of all
    wrapped = FullyShardedDataParallel(model, use_orig_params=original_names, device_id=torch.device("cpu"))
    try:
        MAKERS[kind](wrapped, lr=1e-2)
    except ConfigError as error:
        return str(error).replace("\n", " ")
    return "accepted"


def everything(rank: int, world: int, port: int, folder: str) -> None:
    """All of the above for every kind, in one process of several."""
    join_world(rank, world, port)
    torch.distributed.init_process_group("gloo")
    found: dict[str, Tensor] = {}
    for kind in KINDS:
        for work in (ddp, fsdp2):
            found |= {f"{work.__name__}.{kind}.{name}": value for name, value in work(kind, world).items()}
    save_file(found, Path(folder) / f"final-{rank}.safetensors")
    said = [fsdp1(kind, original_names) for kind in KINDS for original_names in (True, False)]
    (Path(folder) / f"said-{rank}").write_text("\n".join(said))
    leave_world()
