"""What an optimizer over pairs refuses: settings, gradients and states that cannot work."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rankwise.errors import ConfigError

__all__ = ["check_gradients", "check_settings", "state_faults"]

_OF_FACTOR_SHAPE = ("exp_avg", "exp_avg_sq", "master")


def check_settings(groups: Sequence[Mapping[str, Any]]) -> None:
    """Passes if learning rates, betas, eps and weight decays are in range.

    Raises:
        ConfigError: every fault.
    """
    faults = []
    for number, group in enumerate(groups):
        rate, betas = group["lr"], group["betas"]
        where = f" of group {number}" if len(groups) > 1 else ""
        kinds = (rate, group["eps"], group["weight_decay"])
        if not all(isinstance(value, int | float | Tensor) for value in kinds) or not isinstance(betas, list | tuple):
            faults.append(
                f"lr, eps, weight_decay and betas{where} must be numbers, and betas two: got {kinds}, {betas!r}"
            )
            continue
        ratio = group.get("lr_ratio", 1.0)
        if not isinstance(ratio, int | float) or not 0 < ratio < float("inf"):
            faults.append(
                f"lr_ratio{where} is {ratio!r}: it must be a finite number above 0 (LoRA+: lora_B's over lora_A's)"
            )
        if "loraplus_lr_ratio" in group:
            faults.append(f"loraplus_lr_ratio{where}: an optimizer over pairs calls it lr_ratio; rename it")
        if not 0 <= float(rate) < float("inf"):
            faults.append(f"lr{where} is {rate!r}: it must be a finite number >= 0")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            faults.append(f"betas{where} are {betas!r}: they must be two numbers in [0, 1)")
        if not 0 <= group["eps"] < float("inf"):
            faults.append(f"eps{where} is {group['eps']!r}: it must be a finite number >= 0")
        if not 0 <= group["weight_decay"] < float("inf"):
            faults.append(f"weight_decay{where} is {group['weight_decay']!r}: it must be a finite number >= 0")
    if faults:
        raise ConfigError(faults)


def check_gradients(groups: Sequence[Mapping[str, Any]], names: Callable[[], Sequence[str]]) -> None:
    """Passes if every factor is still a matrix and every gradient is dense and real.

    Args:
        groups: the optimizer's.
        names: gives a name for each parameter, in order; asked for messages only.

    Raises:
        ConfigError: something replaced the factors (FSDP1, DeepSpeed), or a gradient that cannot be used.
    """
    first = 0
    for number, group in enumerate(groups):
        paired = group["kind"] == "lora_pair"
        decay = float(group["lr"]) * float(group["weight_decay"]) * max(1.0, float(group.get("lr_ratio", 1.0)))
        if paired and decay >= 1:
            raise ConfigError(
                f"lr * weight_decay of group {number} is {decay:g}: it must be below 1, or factors would flip"
            )
        for place, parameter in enumerate(group["params"]):
            grad = parameter.grad
            if paired and parameter.ndim != 2:
                raise ConfigError(
                    f"{_named(names(), first + place)} has the shape {tuple(parameter.shape)} now: something "
                    "replaced the factors by flat shards (DeepSpeed ZeRO, FSDP1), on which pairs cannot be stepped; "
                    "use DDP or FSDP2"
                )
            if grad is not None and (grad.is_sparse or grad.is_complex()):
                raise ConfigError(
                    f"the gradient of {_named(names(), first + place)} is sparse or complex: make it dense and real "
                    "before the step"
                )
        first += len(group["params"])


def _named(names: Sequence[str], place: int) -> str:
    """A parameter's name; groups that something replaced have none."""
    return names[place] if place < len(names) else f"parameter {place}"


def state_faults(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    expected: Mapping[int, Mapping[str, tuple[int, ...]]],
) -> list[str]:
    """Why a state is not of these groups; empty if it fits.

    Args:
        state_dict: what `load_state_dict` was given.
        groups: the optimizer's own.
        names: a name for each parameter, in order.
        expected: by id of a factor, the names and shapes of its state.
    """
    saved = state_dict.get("param_groups", [])
    kinds = [group.get("kind") for group in saved]
    if kinds != [group["kind"] for group in groups]:
        return [f"it has groups of the kinds {kinds}, the optimizer {[group['kind'] for group in groups]}"]
    counts = [(len(a["params"]), len(b["params"])) for a, b in zip(saved, groups, strict=True)]
    if any(a != b for a, b in counts):
        return [f"its groups hold {[a for a, _ in counts]} parameters, the optimizer's {[b for _, b in counts]}"]
    faults = []
    for old, new in zip(saved, groups, strict=True):
        if old.get("names") and new.get("names") and old["names"] != new["names"]:
            first = next((a, b) for a, b in zip(old["names"], new["names"], strict=True) if a != b)
            faults.append(f"it is of the layer {first[0]!r} where the optimizer has {first[1]!r}")
        if old.get("rule") != new.get("rule"):
            faults.append(f"it is {old.get('rule')}'s, and this is {new.get('rule')}")
        else:
            faults += _other_settings(old.get("rule_settings") or {}, new.get("rule_settings") or {})
        pairs = zip(old.get("shapes", ()), new.get("shapes", ()), strict=False)
        faults += [
            f"a pair is {tuple(a[0])} and {tuple(a[1])} there and {tuple(b[0])} and {tuple(b[1])} here"
            for a, b in pairs
            if a != b
        ][:1]
        if "scaling" in new and old.get("scaling") != new["scaling"]:
            faults.append("it was made with other scalings of the layers")
    numbers = [number for group in saved for number in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for number, parameter, name in zip(numbers, parameters, names, strict=True):
        found = state_dict["state"].get(number, {})
        wanted = expected.get(id(parameter))
        if wanted is None:
            wanted = {key: tuple(parameter.shape) for key in found if key in _OF_FACTOR_SHAPE}
        for key, shape in wanted.items():
            if key not in found:
                faults.append(f"{key} of {name} is missing")
            elif tuple(found[key].shape) != shape:
                faults.append(f"{key} of {name} is {tuple(found[key].shape)}, and {shape} is wanted")
    return faults


def _other_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """The settings of a rule that are not what they were; a state under others would go on as another method."""
    return [
        f"{name} was {saved.get(name)!r} there and is {own.get(name)!r} here"
        for name in sorted({*saved, *own})
        if saved.get(name) != own.get(name)
    ]
