"""What every method of the registry keeps, one table for all; a new method joins by entering METHODS."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from rankwise.adapters.fingerprint import weights_fingerprint
from rankwise.errors import RecipeError
from rankwise.export.fold import fold
from rankwise.methods.ab_lora import ABLoRA
from rankwise.methods.base import Method, Slot
from rankwise.methods.beamlora import BeamLoRA
from rankwise.methods.ggpo import GGPO, MGPO
from rankwise.methods.gora import GoRA
from rankwise.methods.lora import LoRA
from rankwise.methods.recipe import METHODS, Recipe, method_from_id
from rankwise.methods.rora import RoRA
from rankwise.methods.sora import SoRA
from rankwise.methods.xgblora import XGBLoRA
from rankwise.training.attach import attach
from rankwise.training.session import Session
from tests.support.models import causal_batch, tiny_llama

BATCHES = [causal_batch(seed) for seed in range(2)]
NEUTRAL: dict[str, Method] = {
    "lora": LoRA(),
    "gora": GoRA(gamma=0.0, r_min=4, r_max=4, rank_stabilized=False),
    "ggpo": GGPO(sigma=0.0),
    "mgpo": MGPO(rho=0.0),
    "ab-lora": ABLoRA(rounds=0),
    "sora": SoRA(train_gates=False, gate_init="ones", threshold=0.0),
    "beamlora": BeamLoRA(train_scores=False, cumsum_threshold=1.0),
    "xgblora": XGBLoRA(rounds=1, layers_fraction=1.0, booster_rank=4, booster_alpha=16),
}
"""Settings under which a method is exactly plain LoRA; RoRA is so at rank 1 only."""

NEVER_NEUTRAL = {
    "lora-ga": "lora_A and lora_B are singular vectors of the gradient at every setting, so that lora_B is never zero: "
    "step 0 computes plain LoRA's function, and the first step already moves both factors",
    "lora-pro": "the moments are those of adjusted gradients at every setting: (1/s^2) S_B^-1 gA is gA only where "
    "lora_B^T lora_B is the identity over s^2, and lora_B starts at zero",
    "lora-rite": "both factors move along their preconditioned gradients in a basis of their own at every setting: no "
    "value of a decay, eps or limit turns the rank x rank root of the second moment into AdamW's element-wise one",
}
"""Methods that are plain LoRA under no setting, and why."""

SHORTEST = 4
"""Steps of the shortest run in which every schedule acts under its defaults; a shorter one may be refused."""

every_method = pytest.mark.parametrize("method_id", sorted(METHODS))


def attached(methods: object, *, r: int = 4, seed: int = 0, model: PreTrainedModel | None = None) -> Session:
    recipe = Recipe.of(methods)  # type: ignore[arg-type]
    scores = recipe.schedule is not None and recipe.schedule.needs_validation
    validation = BATCHES if scores else None
    return attach(model or tiny_llama(), recipe, r=r, calibration=BATCHES, seed=seed, validation=validation)


def trajectory(session: Session, steps: int = 2) -> list[torch.Tensor]:
    """Losses of a few steps and the factors that they leave, folded; made as any loop makes them."""
    optimizer, _ = session.optimizers(SimpleNamespace(learning_rate=1e-2, lr_scheduler_type="constant"), steps)
    session.model.train()
    session.begin(optimizer, steps)
    losses = []
    for step in range(1, steps + 1):
        session.before_step(step)
        loss = session.model(**BATCHES[step % len(BATCHES)]).loss
        loss.backward()
        session.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
        session.after_step(step)
        losses.append(loss.detach())
    session.end(steps)
    folded = fold(session.model, session.fold_state)
    session.close()
    return [*losses, *(p for layer in folded.layers.values() for p in (layer.lora_A, layer.lora_B))]


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


def test_the_documentation_names_the_same_learning_rates() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to-choose.md").read_text()
    told = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].startswith("`") and cells[1] in ("AdamW", "its own"):
            for name in cells[0].replace("`", "").split(", "):
                told[name] = (cells[1] == "AdamW", *map(float, cells[2:]))
    assert told == {name: (Slot.OPTIMIZE not in kind.slots, *kind.learning_rates) for name, kind in METHODS.items()}


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
            (Slot.OPTIMIZE, "make_optimizer"),
            (Slot.SCHEDULE, "make_schedule"),
        )
        if getattr(kind, function) is not getattr(Method, function)
    }
    if kind is LoRA:  # what unfilled slots behave as: it can answer for all three and owns none
        assert filled == {Slot.ALLOCATE, Slot.INITIALIZE, Slot.SCALE}
        assert not kind.slots
    else:
        assert filled == kind.slots
        for slot, call in (
            (Slot.ALLOCATE, lambda: kind().allocate([], None, None)),  # type: ignore[arg-type]
            (Slot.INITIALIZE, lambda: kind().initialize(None)),  # type: ignore[arg-type]
            (Slot.SCALE, lambda: kind().scaling_rule()),
            (Slot.OPTIMIZE, lambda: kind().make_optimizer([], lr=1.0)),
            (Slot.SCHEDULE, lambda: kind().make_schedule(None)),  # type: ignore[arg-type]
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
            continue
        fault = None
        try:
            assert Recipe.of([method_id, other]).ids == (method_id, other)
        except RecipeError as error:
            fault = str(error)
        assert fault is None or {method_id, other} <= set(fault.replace(",", " ").replace("'", " ").split())


@every_method
def test_the_budget_holds_and_the_base_is_not_written(method_id: str) -> None:
    model = tiny_llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    session = attached(method_id, model=model)
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
    reference, neutral = trajectory(attached("lora"), 20), trajectory(attached(NEUTRAL[method_id]), 20)
    for plain, found in zip(reference, neutral, strict=True):
        assert torch.equal(plain, found)


def test_rora_at_rank_one_trains_exactly_as_plain_lora() -> None:
    reference, neutral = trajectory(attached("lora", r=1)), trajectory(attached(RoRA(), r=1))
    for plain, found in zip(reference, neutral, strict=True):
        assert torch.equal(plain, found)


@pytest.mark.parametrize("method_id", sorted(NEVER_NEUTRAL))
def test_a_method_without_a_neutral_setting_starts_as_the_base_model_and_moves_otherwise(method_id: str) -> None:
    base = tiny_llama()(**BATCHES[0]).logits
    session = attached(method_id)
    assert torch.allclose(session.model(**BATCHES[0]).logits, base, atol=1e-5)
    plain, found = trajectory(attached("lora")), trajectory(session)
    assert torch.allclose(plain[0], found[0], atol=1e-6)
    assert not torch.equal(plain[-1], found[-1])


@every_method
def test_a_few_steps_train_leave_the_base_alone_and_close_leaves_no_hook(method_id: str) -> None:
    session = attached(method_id)
    before = weights_fingerprint(session.model)
    hooked = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in session.model.modules()]
    trajectory(session, SHORTEST)
    assert session.health.status == "passed"
    assert weights_fingerprint(session.model) == before
    after = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in session.model.modules()]
    assert sum(after) == 0 <= sum(hooked)
    assert not any("forward" in vars(module) for module in session.model.modules())


def test_every_method_has_a_neutral_setting_or_a_reason_why_not() -> None:
    assert set(METHODS) == set(NEUTRAL) | {"rora"} | set(NEVER_NEUTRAL)
    assert all(NEVER_NEUTRAL.values())
