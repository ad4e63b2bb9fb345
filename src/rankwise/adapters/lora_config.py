"""The LoraConfig that gives every layer the plan's rank and scaling, and which existing configs are plain LoRA."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from peft import LoraConfig

from rankwise.adapters.layers import LinearLayer
from rankwise.errors import RecipeError
from rankwise.ranks.plan import RankPlan

__all__ = ["check_plain_lora_config", "native_config"]


def native_config(
    plan: RankPlan,
    layers: Sequence[LinearLayer],
    module_names: Sequence[str],
    *,
    slots: Mapping[str, int] | None = None,
    lora_dropout: float = 0.0,
    modules_to_save: Sequence[str] | None = None,
    task_type: str | None = None,
) -> LoraConfig:
    """A stock LoraConfig under which PEFT builds the plan's ranks and scalings: the form of training checkpoints.

    Args:
        plan: ranks, alpha and scaling rule.
        layers: the layers of rank >= 1, by full name; the others get no adapter.
        module_names: the names of all modules of the base model.
        slots: by layer, how many rows lora_A gets; by default its rank.
        lora_dropout: dropout before lora_A, in [0, 1).
        modules_to_save: modules trained in full.
        task_type: PEFT's task type, for example `"CAUSAL_LM"`.

    Returns:
        Patterns are anchored full names; a layer that follows the defaults needs none. Where the scaling is not alpha
        over PEFT's divisor of the slots, an `alpha_pattern` undoes the division (specs/gora.md, section 3.9).
    """
    rule = plan.scaling_rule
    built = plan.ranks if slots is None else slots
    sizes = {layer.name: built[layer.name] for layer in layers}
    uneven = {name: size for name, size in sizes.items() if size != plan.r}
    alphas = {}
    for name, size in sizes.items():
        divisor, scaling = math.sqrt(size) if rule.rank_stabilized else float(size), plan.scaling(name)
        if scaling != plan.lora_alpha / divisor:
            alphas[anchored(name)] = scaling * divisor
    return LoraConfig(
        r=plan.r,
        lora_alpha=cast(int, _integral(plan.lora_alpha)),  # PEFT annotates int and computes with any number
        use_rslora=rule.rank_stabilized,
        rank_pattern={anchored(name): size for name, size in uneven.items()},
        alpha_pattern=alphas,
        target_modules=_exact_targets(list(sizes), module_names),
        lora_dropout=lora_dropout,
        modules_to_save=list(modules_to_save) if modules_to_save else None,
        task_type=task_type,
        fan_in_fan_out=all(layer.kind == "conv1d" for layer in layers),
        bias="none",
        init_lora_weights=True,
    )


def anchored(name: str) -> str:
    """The pattern for this full name alone: PEFT takes a bare name for an ending, and its dots for wildcards."""
    return "^" + re.escape(name)


def _integral(alpha: float) -> float:
    """An integer where the value is one: some servers cannot parse `16.0` in a config file."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _exact_targets(names: list[str], module_names: Sequence[str]) -> list[str] | str:
    """Full names; as one regular expression where a full name is also the ending of another module's name."""
    endings = tuple(f".{name}" for name in names)
    wanted = set(names)
    if any(other not in wanted and other.endswith(endings) for other in module_names):
        return "|".join(re.escape(name) for name in names)
    return names


_Test = Callable[[Any], bool]
_BASE_MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")

_REFUSED: Mapping[str, tuple[_Test, str]] = {
    "use_dora": (bool, "DoRA rescales the merged weight, so its update is not scaling * lora_B @ lora_A"),
    "lora_bias": (bool, "a bias on lora_B is not part of a plain adapter and servers drop it"),
    "bias": (lambda value: value not in (None, "none"), "trained biases of the base model are dropped by servers"),
    "use_qalora": (bool, "QALoRA pools the input before lora_A"),
    "use_bdlora": (bool, "BD-LoRA's factors are block-diagonal"),
    "kasa_config": (bool, "KaSA changes the base weights"),
    "velora_config": (bool, "VeLoRA compresses activations"),
    "monteclora_config": (bool, "MonteCLoRA samples its weights"),
    "arrow_config": (bool, "Arrow routes between adapters"),
    "alora_invocation_tokens": (bool, "Activated LoRA is switched on by tokens"),
    "target_parameters": (bool, "stacked expert weights have no agreed serving format"),
    "trainable_token_indices": (bool, "trained token embeddings are not part of a plain adapter"),
    "layer_replication": (bool, "replicated layers change the base model"),
    "megatron_config": (bool, "Megatron's parallel layers are not supported"),
    "init_lora_weights": (
        lambda value: isinstance(value, str) and value.lower().startswith(_BASE_MOVING),
        "this initialization moves the base weights, so the adapter alone is not the update; convert it with PEFT's "
        "`path_initial_model_for_weight_conversion` first",
    ),
}


def check_plain_lora_config(config: Mapping[str, Any]) -> None:
    """Passes if the settings of an adapter mean exactly W + scaling * lora_B @ lora_A on linear layers.

    Args:
        config: the content of `adapter_config.json`, or `LoraConfig.to_dict()`.

    Raises:
        RecipeError: every setting that means something else, with the reason and what is allowed.
    """
    faults = []
    peft_type = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if peft_type != "LORA":
        faults.append(f"peft_type is {peft_type!r}: only 'LORA' adapters can be used")
    for key, (refused, reason) in _REFUSED.items():
        if refused(config.get(key)):
            allowed = {"bias": "'none'", "init_lora_weights": "true"}.get(key, "false or null")
            faults.append(f"{key} is {config[key]!r}: {reason}; allowed: {allowed}")
    if faults:
        raise RecipeError(faults)
