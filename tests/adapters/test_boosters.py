"""Boosters act exactly where the adapter acts, without dropout, at one shape, and leave nothing behind."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from rankwise.adapters.attach import AdaptedLayer, adapter_disabled
from rankwise.adapters.boosters import Boosters, restart_pair
from rankwise.errors import ModelError
from tests.methods.perturbed import Adapted, adapted
from tests.support.models import causal_batch, tiny_gpt2, tiny_llama

ROWS = causal_batch(5)["input_ids"]
SMALL = adapted(rank=1, targets=["v_proj"])
"""v_proj [16, 32]."""


def drawn(*shape: int, seed: int, size: float = 0.3) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair_for(layer: AdaptedLayer, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    shape = layer.base.shape
    return drawn(rank, shape.in_features, seed=seed), drawn(shape.out_features, rank, seed=seed + 1)


def filled(one: Adapted, rank: int = 2, room: int = 5) -> tuple[Boosters, Mapping[str, tuple[Tensor, Tensor]]]:
    boosters = Boosters(one.layers, dict.fromkeys(one.layers, room))
    pairs = {name: pair_for(layer, rank, 10 * k) for k, (name, layer) in enumerate(one.layers.items())}
    for name, pair in pairs.items():
        boosters.add(name, *pair)
    return boosters, pairs


def logits(one: Adapted) -> Tensor:
    with torch.no_grad():
        found: Tensor = one.model(input_ids=ROWS).logits
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bfloat16"])
def test_the_sum_is_that_of_a_live_pair(kind: str) -> None:
    def made() -> Adapted:
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        base = tiny_gpt2() if kind == "gpt2" else tiny_llama(dtype=dtype)
        one = adapted(base, rank=2, targets=["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "up_proj"])
        one.model.eval()
        return one

    one, live = made(), made()
    _, pairs = filled(one)
    for name, (A, B) in pairs.items():
        live.layers[name].lora_A.data.copy_(A)
        live.layers[name].lora_B.data.copy_(B)
    difference = (logits(one) - logits(live)).abs().max() / logits(live).abs().max()
    assert difference < (2e-2 if kind == "bfloat16" else 1e-6)
    assert (logits(one) - logits(made())).abs().max() > 1e-2


def test_they_act_where_the_adapter_acts_and_nowhere_else() -> None:
    one = adapted(rank=1)
    one.model.eval()
    plain = logits(one)
    boosters, _ = filled(one)
    assert not torch.equal(logits(one), plain)
    with adapter_disabled(one.model):
        assert torch.equal(logits(one), plain)
    one.model.add_adapter("other", one.model.peft_config["default"])
    one.model.set_adapter("other")
    assert torch.equal(logits(one), plain)
    one.model.set_adapter("default")
    assert not torch.equal(logits(one), plain)
    boosters.close()
    boosters.close()
    assert torch.equal(logits(one), plain)


def test_dropout_reaches_the_live_pair_alone() -> None:
    one = adapted(rank=1, dropout=0.5)
    filled(one)
    assert torch.equal(logits(one), logits(one))  # in training mode, lora_B = 0
    one.first.lora_B.data.fill_(0.5)
    assert not torch.equal(logits(one), logits(one))


def test_gradients_flow_through_them_and_not_into_them() -> None:
    one = adapted(rank=1)
    boosters, pairs = filled(one)
    assert not list(boosters.parameters())
    layer, (A, B) = one.first, pairs[one.first.name]
    x = drawn(3, layer.base.shape.in_features, seed=1).requires_grad_()
    module: Any = layer.module
    (gradient,) = torch.autograd.grad(module(x).sum(), x)
    expected = (layer.base.weight() + layer.scaling * B @ A).sum(dim=0)
    torch.testing.assert_close(gradient, expected.expand(3, -1))


def test_under_autocast_they_are_computed_as_the_live_pair_is() -> None:
    one, live = adapted(rank=2), adapted(rank=2)
    _, pairs = filled(one)
    for name, (A, B) in pairs.items():
        live.layers[name].lora_A.data.copy_(A)
        live.layers[name].lora_B.data.copy_(B)
    with torch.autocast("cpu", torch.bfloat16):
        mine, its = logits(one).float(), logits(live).float()
    assert (mine - its).abs().max() / its.abs().max() < 2e-2


def test_what_is_added_comes_back_on_the_cpu() -> None:
    one = adapted(rank=1)
    boosters, pairs = filled(one)
    name = one.first.name
    more = pair_for(one.first, 3, 77)
    boosters.add(name, *more)
    found = boosters.pair(name)
    assert found is not None
    assert torch.equal(found.lora_A, torch.cat([pairs[name][0], more[0]]))
    assert torch.equal(found.lora_B, torch.cat([pairs[name][1], more[1]], dim=1))
    assert (boosters.rank(name), boosters.capacities[name]) == (5, 5)
    assert boosters.memory_bytes == sum(4 * 5 * layer.base.shape.cost for layer in one.layers.values())
    assert not [key for key in one.model.state_dict() if "rows" in key or "columns" in key]


def test_a_layer_without_room_has_no_hook() -> None:
    one = adapted(rank=1)
    boosters = Boosters(one.layers, {one.first.name: 1})
    hooked = [module for module in one.model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert len(hooked) == 2
    other = list(one.layers)[1]
    assert (boosters.rank(other), boosters.pair(other), boosters.pair(one.first.name)) == (0, None, None)
    with pytest.raises(ModelError, match=f"{other}: no room for a pair"):
        boosters.add(other, *pair_for(one.layers[other], 1, 0))
    with pytest.raises(ModelError, match="no room for a pair"):
        boosters.add(one.first.name, torch.zeros(1, 7), torch.zeros(7, 1))
    boosters.add(one.first.name, *pair_for(one.first, 1, 0))
    with pytest.raises(ModelError, match="2 ranks of boosters, and there is room for 1"):
        boosters.add(one.first.name, *pair_for(one.first, 1, 0))


@given(st.lists(st.integers(1, 9), min_size=4, max_size=8), st.integers(0, 1000))
def test_more_ranks_than_a_layer_has_are_held_without_loss(ranks: list[int], seed: int) -> None:
    layer = SMALL.first
    boosters = Boosters(SMALL.layers, {layer.name: sum(ranks)})
    total = torch.zeros(16, 32, dtype=torch.float64)
    for k, rank in enumerate(ranks):
        A, B = pair_for(layer, rank, seed + 2 * k)
        boosters.add(layer.name, A, B)
        total += B.double() @ A.double()
    boosters.close()
    found = boosters.pair(layer.name)
    assert found is not None
    assert len(found.lora_A) == boosters.rank(layer.name) <= 16
    assert boosters.capacities == {layer.name: min(sum(ranks), 16)}
    torch.testing.assert_close(found.lora_B.double() @ found.lora_A.double(), total, rtol=0, atol=1e-5)


def test_nothing_is_compiled_again_when_a_pair_is_added() -> None:
    one = adapted(rank=1, targets=["up_proj", "down_proj"])
    boosters, pairs = filled(one, rank=1)
    counter = CompileCounter()
    module: Any = one.model.base_model.model.model.layers[0].mlp
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    x = drawn(2, 5, 32, seed=3).requires_grad_()
    for _ in range(4):
        assert torch.allclose(compiled(x), module(x), atol=1e-6)
        for name, pair in pairs.items():
            boosters.add(name, *pair)
    assert counter.frame_count == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same_and_holds_no_activation(*, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        one = adapted(rank=2, spread=0.1)
        boosters, _ = filled(one)
        if checkpointing:
            one.model.enable_input_require_grads()
            one.model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
        batch = causal_batch(1)
        one.model(**batch).loss.backward()
        found.append([factor.grad for factor in one.factors])
        assert all(site._seen is None for site in boosters._sites.values())
    for mine, its in zip(*found, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, its)


def test_lora_b_without_its_layer_is_an_error() -> None:
    one = adapted(rank=1)
    filled(one)
    module: Any = one.first.module
    with pytest.raises(ModelError, match="lora_B ran without the layer's lora_dropout"):
        module.lora_B["default"](torch.zeros(1, 1))


def test_a_pair_starts_again_in_place() -> None:
    one = adapted(rank=2, spread=0.5)
    places = (one.first.lora_A.data_ptr(), one.first.lora_B.data_ptr())
    A = drawn(2, 32, seed=4)
    restart_pair(one.first, A)
    assert torch.equal(one.first.lora_A, A)
    assert not one.first.lora_B.any()
    assert places == (one.first.lora_A.data_ptr(), one.first.lora_B.data_ptr())
