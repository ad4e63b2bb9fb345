"""A non-finite gradient of one pair: that pair leaves the step as it entered it, the others train without it."""

import copy
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rankwise.methods.lora_pro import LoRAProOptimizer
from rankwise.methods.lora_rite import LoRARITEOptimizer
from rankwise.training.gradients import GradientFilter
from tests.support.models import causal_batch, tiny_llama
from tests.training.jobs import Job, new_session

ARGS = SimpleNamespace(learning_rate=1e-2, weight_decay=0.1, lr_scheduler_type="constant")


def pairs(count: int = 3) -> dict[str, list[torch.nn.Parameter]]:
    drawn = torch.Generator().manual_seed(0)
    return {
        f"layer{i}": [
            torch.nn.Parameter(torch.randn(2, 5, generator=drawn)),
            torch.nn.Parameter(torch.randn(4, 2, generator=drawn)),
        ]
        for i in range(count)
    }


def loss_of(units: dict[str, list[torch.nn.Parameter]], bad: str | None = None, value: float = float("nan")) -> Tensor:
    total = torch.zeros(())
    for name, (lora_A, lora_B) in units.items():
        term = ((lora_B @ lora_A) ** 2).sum()
        total = total + (term * value if name == bad else term)
    return total


def fused_adamw(units: dict[str, list[torch.nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for unit in units.values() for p in unit], lr=0.1, weight_decay=0.1, fused=True)


def over_pairs(make: Callable[..., torch.optim.Optimizer], **options: object) -> Callable[..., torch.optim.Optimizer]:
    def build(units: dict[str, list[torch.nn.Parameter]]) -> torch.optim.Optimizer:
        group = {"kind": "lora_pair", "params": [p for unit in units.values() for p in unit]}
        return make([{**group, "scaling": [2.0] * len(units)}], lr=0.01, weight_decay=0.1, **options)

    return build


def trained(
    steps: list[str | None],
    *,
    leave_out: bool = False,
    value: float = float("nan"),
    build: Callable[..., torch.optim.Optimizer] = fused_adamw,
):
    """Factors and optimizer state after the steps; in each, the named pair has a non-finite gradient.

    With `leave_out` the reference is computed without a filter: the bad pair simply has no gradient in that step.
    """
    units = pairs()
    parameters = [parameter for unit in units.values() for parameter in unit]
    optimizer = build(units)
    found = None
    if not leave_out:
        found = GradientFilter(units)
        found.install(optimizer)
    for bad in steps:
        if leave_out:
            loss_of(units).backward()
            for parameter in units[bad] if bad else []:
                parameter.grad.zero_()  # it adds nothing to the norm of the others
        else:
            loss_of(units, bad, value).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for parameter in units[bad] if bad and leave_out else []:
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    return units, state, found


@pytest.mark.parametrize(
    "build",
    [
        over_pairs(LoRARITEOptimizer),
        over_pairs(LoRARITEOptimizer, clip_unmagnified_grad=0.0, update_skipping=0.0),
        over_pairs(LoRAProOptimizer),
        over_pairs(LoRAProOptimizer, mode="full"),
        over_pairs(LoRAProOptimizer, mode="sgd"),
    ],
    ids=["rite", "rite unclipped", "pro", "pro full", "pro sgd"],
)
def test_under_an_optimizer_over_pairs_the_bad_pair_sits_the_step_out_too(
    build: Callable[..., torch.optim.Optimizer],
):
    steps = [None, "layer0", None, "layer2", "layer0"]
    ours, our_state, found = trained(steps, build=build)
    wanted, wanted_state, _ = trained(steps, leave_out=True, build=build)
    assert [n for n in wanted if not all(map(torch.equal, ours[n], wanted[n]))] == []
    for one, other in zip(our_state, wanted_state, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert found is not None
    assert found.skipped() == {"layer0": 2, "layer1": 0, "layer2": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@settings(max_examples=15, deadline=None)
@given(steps=st.lists(st.sampled_from([None, None, "layer0", "layer2"]), min_size=1, max_size=5))
def test_the_bad_pair_and_its_state_sit_the_step_out(value: float, steps: list[str | None]):
    ours, our_state, found = trained(steps, value=value)
    wanted, wanted_state, _ = trained(steps, leave_out=True)
    for name in wanted:
        for one, other in zip(ours[name], wanted[name], strict=True):
            assert torch.equal(one, other)
    for one, other in zip(our_state, wanted_state, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert found is not None
    assert found.skipped() == {name: steps.count(name) for name in wanted}
    assert found.steps == len(steps)


def test_without_bad_gradients_the_filter_changes_no_bit():
    ours, state, found = trained([None] * 4)
    wanted, wanted_state, _ = trained([None] * 4, leave_out=True)
    assert all(torch.equal(a, b) for n in wanted for a, b in zip(ours[n], wanted[n], strict=True))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(state, wanted_state, strict=True) for k in b)
    assert set(found.skipped().values()) == {0}
    assert all(found.exercised().values())


class Operations(TorchDispatchMode):
    """Counts what would be launched on an accelerator; views launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations_of_a_step(count: int) -> Counter[str]:
    units = pairs(count)
    parameters = [parameter for unit in units.values() for parameter in unit]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    found = GradientFilter(units)
    found.install(optimizer)
    loss_of(units).backward()
    with Operations() as seen:
        found.check()
        optimizer.step()
    return seen.counts


def test_a_step_launches_as_much_for_many_pairs_as_for_few_and_reads_one_flag():
    few, many = operations_of_a_step(2), operations_of_a_step(60)
    # On the CPU the fused AdamW fills its state one by one in its first step: that is not the filter's.
    made = {"aten.zeros_like.default", "aten.empty_like.default", "aten.zero_.default", "aten.zeros.default"}
    assert {k: v for k, v in few.items() if k not in made} == {k: v for k, v in many.items() if k not in made}
    assert many["aten._local_scalar_dense.default"] == 1


def test_a_step_at_learning_rate_zero_exercises_nothing():
    units = pairs(1)
    optimizer = torch.optim.AdamW([p for unit in units.values() for p in unit], lr=0.0)
    found = GradientFilter(units)
    found.install(optimizer)
    loss_of(units).backward()
    optimizer.step()
    assert found.exercised() == {"layer0": False}
    assert found.steps == 1


def test_a_nan_in_an_early_micro_batch_is_not_forgotten():
    units = pairs(2)
    optimizer = torch.optim.AdamW([p for unit in units.values() for p in unit], lr=0.1)
    found = GradientFilter(units)
    found.install(optimizer)
    before = copy.deepcopy(units)
    loss_of(units, "layer1").backward()
    loss_of(units).backward()
    optimizer.step()
    assert found.skipped() == {"layer0": 0, "layer1": 1}
    assert all(torch.equal(a, b) for a, b in zip(units["layer1"], before["layer1"], strict=True))
    assert not torch.equal(units["layer0"][0], before["layer0"][0])


def test_a_loop_that_accelerate_knows_nothing_of_is_looked_at_before_the_step():
    units = pairs(2)
    optimizer = torch.optim.AdamW([p for unit in units.values() for p in unit], lr=0.1)
    found = GradientFilter(units)
    found.install(optimizer)
    GradientState()._set_sync_gradients(False)
    try:
        loss_of(units, "layer1").backward()
        optimizer.step()
    finally:
        GradientState()._set_sync_gradients(True)
    assert found.skipped() == {"layer0": 0, "layer1": 1}
    assert found.exercised() == {"layer0": True, "layer1": False}


def test_a_loss_scaler_sees_its_infinities():
    units = pairs(2)
    optimizer = torch.optim.AdamW([p for unit in units.values() for p in unit], lr=0.1)
    found = GradientFilter(units)
    found.protecting = False
    found.install(optimizer)
    loss_of(units, "layer1", float("inf")).backward()
    assert not torch.isfinite(units["layer1"][0].grad).all()
    optimizer.zero_grad()
    loss_of(units).backward()
    optimizer.step()
    assert found.exercised() == {"layer0": True, "layer1": True}


def test_counters_survive_a_save():
    _, _, found = trained([None, "layer1", None])
    other = GradientFilter(pairs())
    other.load_state_dict(found.state_dict())
    assert other.state_dict() == found.state_dict()


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_every_kind_of_checkpointing_is_watched(checkpointing: dict[str, bool] | None):
    session = new_session(Job(folder="", dropout=0.0))
    if checkpointing is not None:
        session.model.base_model.model.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpointing)
        session.model.enable_input_require_grads()
    session.model.train()
    optimizer, _ = session.optimizers(ARGS, 3)
    session.begin(optimizer, 3)
    bad = next(iter(session.layers))
    handle = session.layers[bad].lora_A.register_hook(lambda gradient: gradient * float("nan"))
    before = session.layers[bad].lora_B.detach().clone()
    looks: list[int] = []
    look = session.health.gradients.check
    session.health.gradients.check = lambda: (looks.append(1), look())[1]  # type: ignore[method-assign]
    session.model(**causal_batch(0)).loss.backward()
    assert len(looks) == 1
    norm = torch.nn.utils.clip_grad_norm_([p for p in session.model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    handle.remove()
    assert torch.isfinite(norm)
    assert torch.equal(session.layers[bad].lora_B, before)
    skipped = session.health.gradients.skipped()
    assert skipped.pop(bad) == 1
    assert set(skipped.values()) == {0}
    session.close()


def test_a_backward_pass_that_failed_does_not_hide_the_next_one():
    session = new_session(Job(folder="", dropout=0.0))
    optimizer, _ = session.optimizers(ARGS, 3)
    session.begin(optimizer, 3)
    layer = next(iter(session.layers.values()))

    def fail(gradient: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    handle = layer.lora_A.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.model(**causal_batch(0)).loss.backward()
    handle.remove()
    session.model.zero_grad()
    layer.lora_A.register_hook(lambda gradient: gradient * float("nan"))
    session.model(**causal_batch(0)).loss.backward()
    assert torch.isfinite(layer.lora_A.grad).all()


def test_modules_to_save_stand_or_fall_together():
    from rankwise.training.attach import attach

    session = attach(tiny_llama(), "lora", r=2, modules_to_save=["lm_head"])
    assert session.health.gradients.names[-1] == "modules_to_save"
    optimizer, _ = session.optimizers(ARGS, 3)
    session.begin(optimizer, 3)
    head = next(p for n, p in session.model.named_parameters() if "modules_to_save" in n)
    before = head.detach().clone()
    head.register_hook(lambda gradient: gradient / 0)
    session.model(**causal_batch(0)).loss.backward()
    optimizer.step()
    assert torch.equal(head, before)
    assert session.health.gradients.skipped()["modules_to_save"] == 1
