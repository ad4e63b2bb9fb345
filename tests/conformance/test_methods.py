"""What every method of the registry keeps, one table for all; a new method joins by entering METHODS."""

import dataclasses

import pytest
import torch

from rankwise.errors import RecipeError
from rankwise.methods.base import Method, Slot
from rankwise.methods.gora import GoRA
from rankwise.methods.lora import LoRA
from rankwise.methods.recipe import METHODS, Recipe, method_from_id
from rankwise.methods.rora import RoRA
from rankwise.training.attach import attach
from rankwise.training.session import Session
from tests.support.models import causal_batch, tiny_llama

BATCHES = [causal_batch(seed) for seed in range(2)]
NEUTRAL: dict[str, Method] = {
    "lora": LoRA(),
    "gora": GoRA(gamma=0.0, r_min=4, r_max=4, rank_stabilized=False),
}
"""Settings under which a method is exactly plain LoRA; RoRA is so at rank 1 only."""

every_method = pytest.mark.parametrize("method_id", sorted(METHODS))


def attached(methods: object, *, r: int = 4, seed: int = 0) -> Session:
    return attach(tiny_llama(), methods, r=r, calibration=BATCHES, seed=seed)  # type: ignore[arg-type]


def trajectory(session: Session) -> list[torch.Tensor]:
    parameters = [p for layer in session.layers.values() for p in (layer.lora_A, layer.lora_B)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for batch in BATCHES:
        loss = session.model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(parameter.detach() for parameter in parameters)]


@every_method
def test_a_method_is_a_frozen_keyword_only_dataclass_with_a_source(method_id: str) -> None:
    kind = METHODS[method_id]
    method = kind()
    assert dataclasses.is_dataclass(method)
    assert all(entry.kw_only for entry in dataclasses.fields(kind))
    assert hash(method) == hash(kind())
    assert method == kind()
    assert kind.id == method_id
    assert kind.source.startswith("arXiv:")
    assert kind.title
    assert kind.__doc__


@every_method
def test_recommended_learning_rates_rise(method_id: str) -> None:
    low, default, high = METHODS[method_id].learning_rates
    assert 0 < low < default < high < 1


@every_method
def test_every_preset_can_be_built(method_id: str) -> None:
    for preset in METHODS[method_id].presets:
        assert isinstance(method_from_id(method_id, preset=preset), METHODS[method_id])


@every_method
def test_a_slot_is_declared_if_and_only_if_it_is_filled(method_id: str) -> None:
    kind = METHODS[method_id]
    filled = {
        slot
        for slot, function in (
            (Slot.ALLOCATE, "allocate"),
            (Slot.INITIALIZE, "initialize"),
            (Slot.SCALE, "scaling_rule"),
        )
        if getattr(kind, function) is not getattr(Method, function)
    }
    if kind is LoRA:  # what unfilled slots behave as: it can answer for all three and owns none
        assert filled == {Slot.ALLOCATE, Slot.INITIALIZE, Slot.SCALE}
        assert not kind.slots
    else:
        assert filled == kind.slots & {Slot.ALLOCATE, Slot.INITIALIZE, Slot.SCALE}
        for slot, call in (
            (Slot.ALLOCATE, lambda: kind().allocate([], None, None)),  # type: ignore[arg-type]
            (Slot.INITIALIZE, lambda: kind().initialize(None)),  # type: ignore[arg-type]
            (Slot.SCALE, lambda: kind().scaling_rule()),
        ):
            if slot not in kind.slots:
                with pytest.raises(NotImplementedError, match=f"{method_id} does not fill the {slot} slot"):
                    call()


@every_method
def test_a_method_composes_with_every_method_or_says_why_not(method_id: str) -> None:
    for other in METHODS:
        if other == method_id or "lora" in (other, method_id) or METHODS[other].slots & METHODS[method_id].slots:
            with pytest.raises(RecipeError, match="method: "):
                Recipe.of([method_id, other])
        else:
            assert Recipe.of([method_id, other]).ids == (method_id, other)


@every_method
def test_the_budget_holds_and_the_base_is_not_written(method_id: str) -> None:
    model = tiny_llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    session = attach(model, method_id, r=4, calibration=BATCHES)
    assert session.plan.parameters <= session.plan.budget
    assert session.plan.methods == (method_id,)
    base = session.model.get_base_model()
    after = {name.replace(".base_layer", ""): parameter for name, parameter in base.named_parameters()}
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter), name


@every_method
def test_the_same_seed_gives_the_same_bits_and_the_global_stream_is_left_alone(method_id: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = attached(method_id, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = attached(method_id, seed=3)
    assert first.plan.hash() == second.plan.hash()
    for mine, again in zip(first.layers.values(), second.layers.values(), strict=True):
        assert torch.equal(mine.lora_A, again.lora_A)
        assert torch.equal(mine.lora_B, again.lora_B)


@pytest.mark.parametrize("method_id", sorted(NEUTRAL))
def test_the_neutral_setting_trains_exactly_as_plain_lora(method_id: str) -> None:
    reference, neutral = trajectory(attached("lora")), trajectory(attached(NEUTRAL[method_id]))
    for plain, found in zip(reference, neutral, strict=True):
        assert torch.equal(plain, found)


def test_rora_at_rank_one_trains_exactly_as_plain_lora() -> None:
    reference, neutral = trajectory(attached("lora", r=1)), trajectory(attached(RoRA(), r=1))
    for plain, found in zip(reference, neutral, strict=True):
        assert torch.equal(plain, found)


def test_every_method_is_covered_by_a_neutral_setting() -> None:
    assert set(METHODS) == set(NEUTRAL) | {"rora"}
