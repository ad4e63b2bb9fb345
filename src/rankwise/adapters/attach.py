"""A plan becomes a stock PEFT model: ranks and scalings as planned, base weights and global randomness untouched."""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rankwise.adapters.layers import LinearLayer, view_linear
from rankwise.adapters.lora_config import native_config
from rankwise.adapters.refusals import refuse_adapted, refuse_wrapped
from rankwise.adapters.targets import HEAD_NAMES, check_patterns, checked_views, is_saved
from rankwise.errors import ConfigError, ModelError, PlanError
from rankwise.linalg.random import generator, kaiming_uniform
from rankwise.ranks.plan import RankPlan

__all__ = [
    "AdaptedLayer",
    "adapted_layers",
    "adapter_disabled",
    "adapter_tensors",
    "attach_lora",
    "in_slots",
    "modules_saved",
    "peft_model_of",
    "write_factors",
]

_TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedLayer:
    """One layer with an adapter: the view of its base, and its live factors.

    Args:
        name: the full dotted name, relative to the base model.
        base: the frozen linear layer underneath.
        module: PEFT's layer around it.
        adapter_name: which adapter of the module this is.
    """

    name: str
    base: LinearLayer
    module: LoraLayer
    adapter_name: str

    @property
    def lora_A(self) -> nn.Parameter:  # noqa: N802
        """[rank, in]."""
        parameter = self.module.lora_A[self.adapter_name].weight
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def lora_B(self) -> nn.Parameter:  # noqa: N802
        """[out, rank]."""
        parameter = self.module.lora_B[self.adapter_name].weight
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def scaling(self) -> float:
        """The multiplier that PEFT really applies."""
        return float(self.module.scaling[self.adapter_name])

    @property
    def rank(self) -> int:
        """The number of rows of lora_A."""
        return int(self.module.r[self.adapter_name])


def attach_lora(
    model: nn.Module,
    plan: RankPlan,
    *,
    slots: Mapping[str, int] | None = None,
    lora_dropout: float = 0.0,
    modules_to_save: Sequence[str] | None = None,
    task_type: str | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Puts a LoRA of the plan's ranks and scalings on the model: Kaiming lora_A from the plan's seed, zero lora_B.

    The base weights are not written; the base parameters are frozen, as PEFT does; a layer of rank 0 gets no adapter.
    Factors are float32 also on a 16-bit base. The model stays in the training or evaluation mode it was in. Slots
    beyond a layer's rank are empty: zero rows of lora_A, and columns of lora_B that nothing reaches.

    Args:
        model: the base model, without adapters.
        plan: made for this model.
        slots: by layer, how many rows lora_A gets, at least the layer's rank; by default the plan's ranks.
        lora_dropout: dropout on the input of lora_A, in [0, 1).
        modules_to_save: names of modules that are trained in full.
        task_type: PEFT's task type (`"CAUSAL_LM"`, `"SEQ_CLS"`, ...); classification tasks also train their head.
        adapter_name: PEFT's name of the adapter.

    Returns:
        The stock PEFT model around `model`.

    Raises:
        ModelError: the model is wrapped (torch.compile, data parallelism, ...) or already carries an adapter.
        PlanError: the plan is for another model, has no live rank, or names a layer that is trained in full.
        TargetError: the plan names a layer that cannot be adapted, or modules_to_save names nothing.
        ConfigError: a setting out of range.
    """
    refuse_wrapped(model)
    refuse_adapted(model)
    _check_settings(lora_dropout, task_type, adapter_name)
    modules = {name: module for name, module in model.named_modules() if name}
    check_patterns(modules, None, modules_to_save)
    built = plan.ranks if slots is None else dict(slots)
    layers = _planned_layers(model, modules, plan)
    _refuse_saved(layers, [*(modules_to_save or ()), *(HEAD_NAMES if task_type in _HEAD_TASKS else ())])
    config = native_config(
        plan,
        layers,
        list(modules),
        slots=built,
        lora_dropout=lora_dropout,
        modules_to_save=modules_to_save,
        task_type=task_type,
    )
    peft_model = _build(model, config, adapter_name)
    adapted = adapted_layers(peft_model, adapter_name)
    _assert_as_planned(adapted, plan, built)
    for name, layer in adapted.items():
        rank = plan.ranks[name]
        drawn = kaiming_uniform(rank, layer.base.shape.in_features, generator(plan.seed, "lora_A", name))
        write_factors(layer, *in_slots(layer, drawn, layer.lora_B.detach()[:, :rank]))
    return peft_model


def adapted_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, AdaptedLayer]:
    """Every layer with this adapter, by full name relative to the base model, in the base model's order.

    Raises:
        ModelError: the model is not a PEFT model with an adapter of this name.
    """
    peft_model = peft_model_of(model, adapter_name)
    layers = {}
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            base = view_linear(name, module.get_base_layer())
            if base is None:
                kind = type(module.get_base_layer()).__name__
                raise ModelError(f"{name}: the adapter lies on a {kind}; only linear layers are supported")
            layers[name] = AdaptedLayer(name, base, module, adapter_name)
    return layers


def in_slots(
    layer: AdaptedLayer, lora_A: Float[Tensor, "rank in"], lora_B: Float[Tensor, "out rank"]
) -> tuple[Float[Tensor, "slots in"], Float[Tensor, "out slots"]]:
    """Factors of a rank up to the layer's, with zero rows and columns for the slots that stay empty."""
    empty = layer.rank - len(lora_A)
    return nn.functional.pad(lora_A, (0, 0, 0, empty)), nn.functional.pad(lora_B, (0, empty))


def write_factors(layer: AdaptedLayer, lora_A: Float[Tensor, "rank in"], lora_B: Float[Tensor, "out rank"]) -> None:
    """Copies the factors into the layer, rounded to its storage dtype.

    Raises:
        ModelError: a shape that is not the layer's, or a value that is not finite (also after rounding).
    """
    rounded = [
        (target, _fitted(layer.name, label, target, value))
        for label, target, value in (("lora_A", layer.lora_A, lora_A), ("lora_B", layer.lora_B, lora_B))
    ]
    with torch.no_grad():
        for target, value in rounded:
            target.copy_(value)


def _fitted(name: str, label: str, target: Tensor, value: Tensor) -> Tensor:
    if value.shape != target.shape:
        raise ModelError(f"{name}: {label} has shape {tuple(value.shape)}, the adapter holds {tuple(target.shape)}")
    rounded = value.detach().to(target.dtype)
    finite = torch.isfinite(rounded)
    if not bool(finite.all()):
        raise ModelError(
            f"{name}: {int((~finite).sum())} of {finite.numel()} values for {label} are NaN or infinite in "
            f"{target.dtype}: check the base weights and the calibration batches for NaN"
        )
    return rounded


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """The model computes as the base model inside; every parameter's requires_grad is as before afterwards.

    PEFT's own context would switch the gradients of all factors on when it ends, also those that were frozen.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    context: AbstractContextManager[None] = peft_model_of(model).disable_adapter()
    try:
        with context:
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def modules_saved(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The tensors of `modules_to_save`, by name relative to the base model; detached, not copied."""
    tensors = adapter_tensors(peft_model_of(model, adapter_name), adapter_name)
    saved = {name: tensor for name, tensor in tensors.items() if not re.search(r"\.lora_[AB]\.", name)}
    return {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}


def adapter_tensors(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """What a PEFT file of this adapter holds, by the file's names: detached, not copied."""
    # The explicit state dict keeps PEFT from warning of empty tensors, which save_native refuses.
    tensors = get_peft_model_state_dict(
        model, state_dict=model.state_dict(), adapter_name=adapter_name, save_embedding_layers=False
    )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def peft_model_of(model: nn.Module, adapter_name: str | None = None) -> PeftModel:
    """The model itself, known to be a PEFT model (with this adapter).

    Raises:
        ModelError: it is not.
    """
    if not isinstance(model, PeftModel):
        raise ModelError(
            f"the model is a {type(model).__name__}, not a PEFT model: attach an adapter first, and unwrap the model "
            "from DistributedDataParallel or torch.compile"
        )
    if adapter_name is not None and adapter_name not in model.peft_config:
        raise ModelError(f"the model has no adapter {adapter_name!r}; it has: {', '.join(model.peft_config)}")
    return model


def _check_settings(lora_dropout: float, task_type: str | None, adapter_name: str) -> None:
    faults = []
    if not 0 <= lora_dropout < 1:
        faults.append(f"lora_dropout is {lora_dropout}: it must be at least 0 and below 1")
    if task_type is not None and task_type not in _TASK_TYPES:
        faults.append(f"task_type is {task_type!r}: allowed are null, {', '.join(_TASK_TYPES)}")
    if not re.fullmatch(r"\w[\w-]*", adapter_name) or adapter_name in "lora_":
        faults.append(
            f"adapter_name is {adapter_name!r}: use letters, digits, _ and -, and no part of 'lora_' (PEFT's prefix)"
        )
    if faults:
        raise ConfigError(faults)


def _planned_layers(model: nn.Module, modules: dict[str, nn.Module], plan: RankPlan) -> tuple[LinearLayer, ...]:
    """The layers of rank >= 1, in the model's order, checked against the model."""
    planned = plan.ranks
    views = [view for name, module in modules.items() if (view := view_linear(name, module)) is not None]
    known = [view.shape for view in views if view.name in planned]
    plan.validate_for(known or [view.shape for view in views])
    live = {name: module for name, module in modules.items() if planned.get(name)}
    if not live:
        raise PlanError(f"all {len(planned)} layers of the plan have rank 0: give at least one layer a rank >= 1")
    return checked_views(model, live)


def _refuse_saved(layers: Sequence[LinearLayer], saved: Sequence[str]) -> None:
    both = [layer.name for layer in layers if is_saved(layer.name, saved)]
    if both:
        raise PlanError(
            f"{both[0]} has a rank in the plan and is trained in full (modules_to_save and task heads: "
            f"{', '.join(saved)}): set its rank to 0 or take it out of modules_to_save"
        )


def _build(model: nn.Module, config: LoraConfig, adapter_name: str) -> PeftModel:
    """get_peft_model without its side effects: the global random state and the mode of the modules stay."""
    training = model.training
    default = torch.get_default_device()
    devices = [] if default.type == "cpu" else [default.index or 0]
    kind = "cuda" if default.type == "cpu" else default.type
    with warnings.catch_warnings(), torch.random.fork_rng(devices=devices, device_type=kind):
        # PEFT 0.21 reads an attribute that transformers 5.23 deprecates, and warns of each layer kind in a mixed model.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    assert isinstance(peft_model, PeftModel)
    # New modules start in training mode: dropout would act in a model that is evaluated.
    for layer in adapted_layers(peft_model, adapter_name).values():
        cast(nn.Module, layer.module).train(layer.base.module.training)
    peft_model.training = peft_model.base_model.training = training
    return peft_model


def _assert_as_planned(adapted: dict[str, AdaptedLayer], plan: RankPlan, slots: Mapping[str, int]) -> None:
    planned = {name: size for name, size in slots.items() if size}
    faults = [f"{name}: PEFT built an adapter that is not in the plan" for name in adapted.keys() - planned.keys()]
    for name, rank in planned.items():
        layer = adapted.get(name)
        if layer is None:
            faults.append(f"{name}: PEFT built no adapter, the plan gives it rank {rank}")
        elif layer.rank != rank or layer.lora_A.shape[0] != rank:
            faults.append(f"{name}: PEFT built rank {layer.rank}, the plan says {rank}")
        elif not math.isclose(layer.scaling, plan.scaling(name), rel_tol=1e-12):
            faults.append(f"{name}: PEFT applies a scaling of {layer.scaling}, the plan says {plan.scaling(name)}")
    if faults:
        raise PlanError(faults)
