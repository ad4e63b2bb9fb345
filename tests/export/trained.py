"""Adapters with random factors, as training would leave them: uneven ranks, any scaling rule, any tiny architecture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.adapters.attach import adapted_layers, attach_lora, modules_saved, write_factors
from rankwise.adapters.targets import resolve_targets
from rankwise.export.fold import FoldedAdapter, FoldedLayer
from rankwise.linalg.random import generator
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.shapes import LayerShape, ScalingRule
from tests.support.models import (
    causal_batch,
    classification_batch,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)


@dataclass(frozen=True)
class Architecture:
    build: Callable[[], PreTrainedModel]
    batch: Callable[[], dict[str, Tensor]]
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(tiny_llama, causal_batch, task_type="CAUSAL_LM"),
    "t5": Architecture(tiny_t5, causal_batch, task_type="SEQ_2_SEQ_LM"),
    "bert": Architecture(tiny_bert_classifier, classification_batch, ("classifier", "bert.pooler")),
    "gpt2": Architecture(tiny_gpt2, causal_batch),
}


def trained(
    name: str = "llama",
    *,
    ranks: Sequence[int] = (3, 1, 4, 2, 5, 9, 6),
    rule: ScalingRule = ScalingRule.ALPHA_OVER_SQRT_RANK,
    lora_alpha: float = 12.5,
    exclude: Sequence[str] | None = None,
    size: float = 0.05,
) -> tuple[PeftModel, RankPlan]:
    """A tiny model with factors of `size` on all linear layers; the ranks are cycled over them, 0 included."""
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    targets = resolve_targets(
        model, "all-linear", exclude_modules=exclude, modules_to_save=list(architecture.modules_to_save) or None
    )
    cycled = [min(ranks[i % len(ranks)], shape.max_rank) for i, shape in enumerate(targets.shapes)]
    plan = RankPlan.from_shapes(
        targets.shapes, cycled, r=4, lora_alpha=lora_alpha, scaling_rule=rule, budget=10**9, seed=0
    )
    adapted = attach_lora(
        model, plan, modules_to_save=architecture.modules_to_save or None, task_type=architecture.task_type
    )
    for layer_name, layer in adapted_layers(adapted).items():
        draws = generator(7, "test", layer_name)
        write_factors(layer, layer.lora_A.data, torch.randn(layer.lora_B.shape, generator=draws) * size)
    for tensor_name, tensor in modules_saved(adapted).items():
        tensor.add_(torch.randn(tensor.shape, generator=generator(8, "test", tensor_name)) * 0.1)
    return adapted.eval(), plan


def folded_adapter(ranks: Mapping[str, int], scalings: Mapping[str, float], **fields: object) -> FoldedAdapter:
    """An adapter without a model: layers [6, 5] with these ranks and scalings."""
    layers = {}
    for name, rank in ranks.items():
        draws = generator(3, "folded", name)
        lora_A, lora_B = torch.randn(rank, 5, generator=draws), torch.randn(6, rank, generator=draws)
        layers[name] = FoldedLayer(LayerShape(name, 6, 5), lora_A, lora_B, scalings[name])
    return FoldedAdapter(layers=layers, saved={}, **fields)  # type: ignore[arg-type]


def native_files(folded: FoldedAdapter, **config: object) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The configuration and tensors of unfolded factors; `config` says how they are to be read."""
    tensors = {}
    for name, layer in folded.layers.items():
        if layer.rank:
            tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A
            tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B
    base = {"peft_type": "LORA", "target_modules": sorted({name.rsplit(".", 1)[-1] for name in folded.layers})}
    return base | config, tensors
