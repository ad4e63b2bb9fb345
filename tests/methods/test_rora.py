"""RoRA: the acceptance properties R1 to R6 of rora.md section 6 (R7 forbids a test)."""

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from rankwise.adapters.attach import adapted_layers, attach_lora, write_factors
from rankwise.adapters.checkpoint import save_native
from rankwise.export.write import export_adapter
from rankwise.linalg.random import kaiming_uniform
from rankwise.methods.base import Budget
from rankwise.methods.rora import RoRA, equivalent_alpha
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.shapes import LayerShape
from tests.support.models import causal_batch, tiny_llama

RANKS = (4, 8, 16, 32, 64, 128)
UNEVEN = (1, 3, 5, 7)


def planned(model: nn.Module, ranks: tuple[int, ...] = UNEVEN) -> RankPlan:
    """Uneven ranks on q_proj and v_proj of the two layers."""
    names = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    sizes = [model.get_submodule(name).weight.shape for name in names]
    shapes = [LayerShape(name, *size) for name, size in zip(names, sizes, strict=True)]
    return RankPlan.from_shapes(
        shapes, ranks, r=8, lora_alpha=16, scaling_rule=RoRA().scaling_rule(), methods=("rora",)
    )


def attached(ranks: tuple[int, ...] = UNEVEN) -> PeftModel:
    """A RoRA model with a random, non-zero update."""
    model = tiny_llama()
    peft_model = attach_lora(model, planned(model, ranks))
    for seed, layer in enumerate(adapted_layers(peft_model).values()):
        lora_B = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(seed))
        write_factors(layer, layer.lora_A.data, 0.1 * lora_B)
    return peft_model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**causal_batch(3)).logits


def test_r1_the_scaling_is_alpha_over_the_root_of_each_layers_own_rank() -> None:
    layers = adapted_layers(attached())
    assert {layer.rank for layer in layers.values()} == set(UNEVEN)
    for layer in layers.values():
        assert layer.scaling == 16 / math.sqrt(layer.rank)


def gradient_norms(rank: int, rank_stabilized: bool) -> tuple[float, float]:
    """Mean over 3 starts: the norm of dL/dB at B = 0, and of dL/dA after 10 Adam steps (in = out = 512, batch 256)."""
    scaling = 16 / math.sqrt(rank) if rank_stabilized else 16 / rank
    at_start, later = [], []
    for seed in range(3):
        source = torch.Generator().manual_seed(seed)
        inputs, targets = torch.randn(256, 512, generator=source), torch.randn(256, 512, generator=source)
        lora_A = kaiming_uniform(rank, 512, source).requires_grad_()
        lora_B = torch.zeros(512, rank, requires_grad=True)
        optimizer = torch.optim.Adam([lora_A, lora_B], lr=1e-4)
        for step in range(11):
            optimizer.zero_grad()
            (scaling * (inputs @ lora_A.mT) @ lora_B.mT - targets).square().mean().backward()
            assert lora_A.grad is not None
            assert lora_B.grad is not None
            if step == 0:
                at_start.append(lora_B.grad.norm().item())
            if step == 10:
                later.append(lora_A.grad.norm().item())
            optimizer.step()
    return sum(at_start) / 3, sum(later) / 3


@pytest.fixture(scope="module")
def norms() -> dict[bool, list[tuple[float, float]]]:
    return {stabilized: [gradient_norms(rank, stabilized) for rank in RANKS] for stabilized in (True, False)}


def test_r2_the_gradient_of_b_keeps_its_norm_over_ranks_and_plain_lora_does_not(
    norms: dict[bool, list[tuple[float, float]]],
) -> None:
    stabilized, plain = ([start for start, _ in norms[kind]] for kind in (True, False))
    assert max(stabilized) / min(stabilized) <= 1.10
    assert max(plain) / min(plain) >= 4
    steps = [math.log2(n) for n in RANKS]
    middle = sum(steps) / len(steps)
    slope = sum((x - middle) * math.log2(y) for x, y in zip(steps, plain, strict=True)) / sum(
        (x - middle) ** 2 for x in steps
    )
    assert slope == pytest.approx(-0.5, abs=0.05)


def test_r3_the_gradient_of_a_keeps_its_norm_after_ten_adam_steps(
    norms: dict[bool, list[tuple[float, float]]],
) -> None:
    stabilized, plain = ([later for _, later in norms[kind]] for kind in (True, False))
    assert max(stabilized) / min(stabilized) <= 1.2
    assert max(plain) / min(plain) >= 4


def trained(model: PeftModel) -> list[torch.Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for seed in range(4):
        loss = model(**causal_batch(seed)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(parameter.detach() for parameter in parameters)]


def test_r4_training_is_bit_for_bit_that_of_peft_with_use_rslora() -> None:
    ours = tiny_llama()
    peft_ours = attach_lora(ours, planned(ours, (8, 8, 8, 8)))
    with torch.random.fork_rng(devices=[]):
        theirs = get_peft_model(
            tiny_llama(), LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "v_proj"])
        ).eval()
    for name, layer in adapted_layers(theirs).items():
        layer.lora_A.data.copy_(adapted_layers(peft_ours)[name].lora_A.data)
    pairs = list(zip(trained(peft_ours), trained(theirs), strict=True))
    assert len(pairs) == 4 + 8
    for mine, reference in pairs:
        assert torch.equal(mine, reference)


def test_r5_the_native_checkpoint_reloads_bit_for_bit(tmp_path: Path) -> None:
    model = attached()
    save_native(model, tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_r5_the_uniform_export_reloads_to_float_rounding(tmp_path: Path) -> None:
    model = attached()
    export_adapter(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    assert not again.peft_config["default"].use_rslora
    expected = logits(model)
    assert (logits(again) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_r5_the_plain_form_with_the_equivalent_alpha_computes_the_same() -> None:
    model = attached((8, 8, 8, 8))
    plain = get_peft_model(
        tiny_llama(), LoraConfig(r=8, lora_alpha=equivalent_alpha(16, 8), target_modules=["q_proj", "v_proj"])
    ).eval()
    for name, layer in adapted_layers(plain).items():
        write_factors(layer, adapted_layers(model)[name].lora_A.data, adapted_layers(model)[name].lora_B.data)
    expected = logits(model)
    assert (logits(plain) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_r6_merging_adds_the_scaled_product() -> None:
    model = attached()
    for layer in adapted_layers(model).values():
        expected = 16 / math.sqrt(layer.rank) * layer.lora_B.double() @ layer.lora_A.double()
        found = layer.module.get_delta_weight("default").double()
        assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_the_equivalent_alpha_is_printed_for_every_live_rank() -> None:
    budget = Budget(r=8, lora_alpha=16, parameters=1)
    (note,) = RoRA().notes({"a": 16, "b": 8, "c": 0, "d": 16}, budget)
    assert note.endswith("rank 8: 45.2548, rank 16: 64")
    assert "lora_alpha 16" in note


def test_an_alpha_that_is_not_the_papers_is_told_and_kept() -> None:
    notes = RoRA().notes({"a": 4}, Budget(r=4, lora_alpha=32, parameters=1))
    assert "lora_alpha is 32; the paper keeps 16" in notes[1]


@pytest.mark.parametrize(("lora_alpha", "rank", "plain"), [(16, 16, 64.0), (16, 1, 16.0), (8, 4, 16.0)])
def test_the_equivalent_alpha_by_hand(lora_alpha: float, rank: int, plain: float) -> None:
    assert equivalent_alpha(lora_alpha, rank) == plain
    assert plain / rank == lora_alpha / math.sqrt(rank)
