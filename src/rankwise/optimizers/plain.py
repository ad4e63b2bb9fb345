"""AdamW for what is no pair, beside the pairs in the same optimizer."""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from rankwise.optimizers.stacks import computing_type, needs_master

__all__ = ["descend_plain", "step_plain"]

_FUSED = ("cpu", "cuda")


@torch.no_grad()
def step_plain(group: Mapping[str, Any], state: MutableMapping[Tensor, Any]) -> None:
    """One step of torch's AdamW over the parameters of a group that have a gradient; others stay.

    Moments are float32 (float64 for float64 parameters); 16-bit parameters have a float32 master in their state.

    Args:
        group: `params`, `lr`, `betas`, `eps`, `weight_decay`, `maximize`.
        state: the optimizer's state by parameter.
    """
    chosen = [parameter for parameter in group["params"] if parameter.grad is not None]
    if not chosen:
        return
    for parameter in chosen:
        if not state[parameter]:
            state[parameter] = _fresh(parameter)
    adamw(
        [state[parameter].get("master", parameter) for parameter in chosen],
        [parameter.grad.to(computing_type(parameter)) for parameter in chosen],
        [state[parameter]["exp_avg"] for parameter in chosen],
        [state[parameter]["exp_avg_sq"] for parameter in chosen],
        [],
        [state[parameter]["step"] for parameter in chosen],
        fused=all(p.device.type in _FUSED and not isinstance(p, DTensor) for p in chosen),
        foreach=False,
        amsgrad=False,
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        lr=float(group["lr"]),
        weight_decay=float(group["weight_decay"]),
        eps=float(group["eps"]),
        maximize=bool(group["maximize"]),
    )
    for parameter in chosen:
        if "master" in state[parameter]:
            parameter.copy_(state[parameter]["master"])


@torch.no_grad()
def descend_plain(group: Mapping[str, Any]) -> None:
    """One step of gradient descent with decoupled weight decay: p <- (1 - lr wd) p - lr grad.

    Args:
        group: `params`, `lr`, `weight_decay`, `maximize`.
    """
    rate = float(group["lr"])
    for parameter in group["params"]:
        if parameter.grad is not None:
            parameter.mul_(1 - rate * float(group["weight_decay"]))
            parameter.add_(parameter.grad, alpha=rate if group["maximize"] else -rate)


def _fresh(parameter: Tensor) -> dict[str, Tensor]:
    dtype = computing_type(parameter)
    moment = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    fresh = {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": moment,
        "exp_avg_sq": torch.zeros_like(moment),
    }
    if needs_master(parameter) and not isinstance(parameter, DTensor):
        fresh["master"] = parameter.detach().to(dtype)
    return fresh
