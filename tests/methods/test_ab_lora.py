"""AB-LoRA: scores by hand, the rules that move ranks, and the rounds of a run; A-1 to A-11 and A-13 of the spec."""

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankwise.errors import CheckpointError, ConfigError, HealthError
from rankwise.methods import ab_lora
from rankwise.methods.ab_lora import (
    ABLoRA,
    ABLoRASchedule,
    distribute,
    epoch_rounds,
    importance,
    layer_kinds,
    lowest,
    queue,
    scaled_rounds,
)
from rankwise.methods.base import Budget
from rankwise.methods.schedule import Schedule
from rankwise.ranks.shapes import LayerShape
from tests.methods.perturbed import BATCHES, TARGETS, adapted, train
from tests.methods.slotted import VALIDATION, Slotted, run, slotted
from tests.support.models import causal_batch, tiny_gpt2

INF = math.inf


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- equations ----------------------------------------------------------------------------------------------------


def test_importance_is_what_a_rank_loses_when_off_and_wins_alone() -> None:
    # S(M) = -2, S(M without r) = -2.5, S(M_r) = -3, S(base) = -3.2: IS = -2 + 2.5 - 3 = -2.5 = 0.7 + S(base).
    drop, solo = _numbers(-2.0 - -2.5), _numbers(-3.0 - -3.2)
    assert float(importance(drop, solo)) - 3.2 == pytest.approx(-2.5)
    assert float(importance(drop, solo, w_drop=2, w_solo=0.5)) == pytest.approx(1.1)


def test_terms_that_are_not_finite_become_infinite_scores_and_never_nan() -> None:
    drop = _numbers(0.0, math.nan, 0.0, INF, -INF, 0.0)
    solo = _numbers(0.0, 0.0, math.nan, math.nan, 0.0, INF)
    assert importance(drop, solo).tolist() == [0.0, INF, -INF, INF, INF, -INF]
    assert importance(drop, solo, w_drop=0).tolist() == [0.0, INF, -INF, INF, INF, -INF]


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=20))
def test_the_order_does_not_depend_on_the_constants_left_out(terms: list[tuple[float, float]]) -> None:
    drop, solo = _numbers(*(d for d, _ in terms)), _numbers(*(s for _, s in terms))
    score_model, score_base = -1.25, -3.5
    without, alone = score_model - drop, score_base + solo
    full = score_model - without + alone  # eq. 6
    cs = -without + alone
    assert torch.allclose(importance(drop, solo) + score_base, full, atol=1e-12)
    assert torch.allclose(full - cs, torch.full_like(full, score_model), atol=1e-12)


def test_the_lowest_scores_go_first_and_ties_by_layer_then_slot() -> None:
    scores = {"b": _numbers(1.0, 0.0), "a": _numbers(0.0, 2.0, 0.0)}
    slots = {"b": (0, 3), "a": (1, 2, 5)}
    assert lowest(scores, slots, 3) == (("b", 3), ("a", 1), ("a", 5))


def test_one_rank_always_stays_and_a_floor_is_kept_in_every_layer() -> None:
    scores = {"a": _numbers(0.0, 1.0), "b": _numbers(5.0, 6.0)}
    slots = {"a": (0, 1), "b": (0, 1)}
    assert len(lowest(scores, slots, 9)) == 3
    assert lowest(scores, slots, 2, min_rank=1) == (("a", 0), ("b", 0))
    assert lowest(scores, slots, 9, min_rank=2) == ()


def test_infinite_scores_are_sorted_like_numbers() -> None:
    scores = {"a": _numbers(INF, -5.0), "b": _numbers(-INF, 0.0)}
    assert lowest(scores, {"a": (0, 1), "b": (0, 1)}, 2) == (("b", 0), ("a", 1))


def test_layers_that_lost_nothing_queue_by_mean_score_and_empty_ones_come_last() -> None:
    scores = {
        "pruned": _numbers(9.0),
        "low": _numbers(0.0, 1.0),
        "empty": _numbers(),
        "high": _numbers(1.0, 2.0),
        "same": _numbers(0.5),
        "bad": _numbers(INF, -INF),
    }
    assert queue(scores, ["pruned"]) == ("high", "low", "same", "empty", "bad")


def test_new_ranks_are_shared_out_as_evenly_as_possible_with_the_rest_for_the_best() -> None:
    assert distribute(8, [9] * 3, [0] * 3, 0) == (3, 3, 2)  # the paper's example
    assert distribute(7, [9] * 20, [0] * 20, 0) == (1,) * 7 + (0,) * 13


@given(st.integers(0, 40), st.integers(1, 12))
def test_with_room_enough_sharing_out_is_divmod(count: int, layers: int) -> None:
    base, extra = divmod(count, layers)
    wanted = tuple(base + (i < extra) for i in range(layers))
    assert distribute(count, [count] * layers, [0] * layers, 0) == wanted


@given(st.integers(0, 20), st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=8), st.integers(0, 60))
def test_room_and_free_parameters_are_never_exceeded_nor_left_where_something_fits(
    count: int, layers: list[tuple[int, int]], free: int
) -> None:
    rooms, costs = [room for room, _ in layers], [cost for _, cost in layers]
    given_ranks = distribute(count, rooms, costs, free)
    left = free - sum(n * cost for n, cost in zip(given_ranks, costs, strict=True))
    assert left >= 0
    assert sum(given_ranks) <= count
    assert all(n <= room for n, room in zip(given_ranks, rooms, strict=True))
    if sum(given_ranks) < count:
        assert all(n == room or cost > left for n, room, cost in zip(given_ranks, rooms, costs, strict=True))


def test_a_full_layer_passes_its_share_to_the_next_best() -> None:
    assert distribute(3, [0, 1, 9], [0] * 3, 0) == (0, 1, 2)


def test_a_layer_whose_rank_does_not_fit_is_passed_over() -> None:
    assert distribute(2, [9, 9, 9], [10, 4, 4], 9) == (0, 1, 1)


def test_layers_of_one_place_in_different_blocks_are_one_kind() -> None:
    llama = [f"model.layers.{i}.{name}" for i in range(12) for name in ("q_proj", "k_proj", "mlp.up_proj")]
    assert layer_kinds(llama) == 3
    bert = [f"encoder.layer.{i}.{name}.dense" for i in (0, 1) for name in ("attention.output", "output")]
    assert layer_kinds([*bert, "pooler.dense"]) == 3
    assert layer_kinds(["0.linear1", "1.linear1", "1.linear2"]) == 2


def test_rounds_scale_with_the_run_and_leave_it_steps() -> None:
    assert scaled_rounds(240, 8) == (40, 50, 60, 70, 80, 90, 100, 110)
    assert scaled_rounds(100, 8) == (17, 21, 25, 29, 33, 37, 42, 46)
    assert scaled_rounds(10, 8) == (2, 3, 4)  # duplicates dropped


@given(st.integers(2, 10**6), st.integers(1, 8))
def test_the_default_rounds_fit_every_run_of_two_steps_or_more(max_steps: int, rounds: int) -> None:
    steps = scaled_rounds(max_steps, rounds)
    assert steps[0] == math.ceil(max_steps / 6)
    assert list(steps) == sorted(set(steps))
    assert steps[-1] < max_steps


def test_the_papers_epochs_become_whole_steps() -> None:
    assert epoch_rounds(100, 8, 1.0, 0.25) == (100, 125, 150, 175, 200, 225, 250, 275)
    assert epoch_rounds(2, 4, 1.0, 0.25) == (2, 3, 4)


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rounds": -1}, "whole number >= 0"),
        ({"rounds": 21}, "use at most 20"),
        ({"budget": "rank"}, "did you mean 'ranks'"),
        ({"score": "screen"}, "did you mean 'screened'"),
        ({"score": "screened", "min_rank": 1}, "use exact with min_rank"),
        ({"prune_per_round": 1, "prune_fraction": 0.1}, "leave one out"),
        ({"prune_fraction": 0.5}, "below 0.5"),
        ({"w_drop": 0, "w_solo": 0}, "leave no score"),
        ({"warmup_epochs": 1.0}, "go together"),
        ({"warmup_epochs": -1.0, "round_epochs": 0.25}, "finite number >= 0"),
        ({"warmup_epochs": 1.0, "round_epochs": 0.0}, "leaves new ranks untrained"),
        ({"sequences": 0}, "whole number >= 1"),
        ({"redraw": 1}, "not a flag"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ABLoRA(**settings)


def test_the_number_of_ranks_a_round_is_that_of_kinds_or_as_asked_and_below_half() -> None:
    names = [f"model.layers.{i}.{name}" for i in range(4) for name in "qkvogud"]
    assert ABLoRA().prunes(names, 224) == 7
    assert ABLoRA().prunes(names, 56) == 3
    assert ABLoRA(prune_per_round=5).prunes(names, 224) == 5
    assert ABLoRA(prune_fraction=0.1).prunes(names, 224) == 22
    with pytest.raises(ConfigError, match="28 of 56 ranks"):
        ABLoRA(prune_per_round=28).prunes(names, 56)


def test_runs_too_short_are_refused_with_the_steps_that_they_need() -> None:
    with pytest.raises(ConfigError, match="at least 2 steps"):
        ABLoRA().round_steps(1)
    paper = ABLoRA(**ABLoRA.presets["paper"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"ab-lora\.epoch_steps"):
        paper.round_steps(1000)
    with pytest.raises(ConfigError, match="take 300 steps of the run's 299"):
        ABLoRA(warmup_epochs=1, round_epochs=0.25, epoch_steps=100).round_steps(299)
    assert ABLoRA(warmup_epochs=1, round_epochs=0.25, epoch_steps=100).round_steps(300)[-1] == 275


def test_slots_grow_by_one_a_round_and_never_beyond_a_layers_size() -> None:
    shapes = [LayerShape("wide", 64, 32), LayerShape("thin", 9, 64)]
    ranks = {"wide": 8, "thin": 8}
    assert ABLoRA().capacity(shapes, ranks) == {"wide": 16, "thin": 9}
    assert ABLoRA(growth=2).capacity(shapes, ranks) == {"wide": 10, "thin": 9}
    for neutral in (ABLoRA(rounds=0), ABLoRA(prune_per_round=0), ABLoRA(prune_fraction=0.0)):
        assert neutral.capacity(shapes, ranks) == ranks


def test_notes_tell_the_cost_and_what_is_approximate() -> None:
    ranks, budget = {"a": 8, "b": 8}, Budget(r=8, lora_alpha=16, parameters=1000)
    assert "1,024 sequences" in " ".join(ABLoRA().notes(ranks, budget))
    assert "approximation" in " ".join(ABLoRA(score="taylor").notes(ranks, budget))
    assert "may drift" in " ".join(ABLoRA(budget="ranks").notes(ranks, budget))
    assert ABLoRA(rounds=0).notes(ranks, budget) == ("ab-lora: no rank is ever switched off, so this is plain LoRA",)


# --- masks and slots ----------------------------------------------------------------------------------------------


def _begun(one: Slotted, max_steps: int = 24) -> tuple[ABLoRASchedule, torch.optim.AdamW]:
    schedule, optimizer = one.schedule(), one.adamw()
    schedule.begin(optimizer, max_steps)
    return schedule, optimizer


def test_the_schedule_follows_the_protocol_and_starts_with_empty_slots_masked() -> None:
    one = slotted(ABLoRA(), rank=3)
    schedule = one.schedule()
    assert isinstance(schedule, Schedule)
    assert schedule.live_ranks() == dict.fromkeys(one.layers, 3)
    gates = schedule.fold_state().gates
    assert {name: gate.tolist() for name, gate in gates.items()} == {
        name: [1.0] * 3 + [0.0] * (layer.rank - 3) for name, layer in one.layers.items()
    }
    schedule.close()
    schedule.close()
    assert not any(module._forward_hooks for module in one.model.modules())


def test_a_closed_gate_equals_the_layer_without_that_row_and_column() -> None:
    """A-1."""
    one = slotted(ABLoRA(), spread=0.3)
    schedule = one.schedule()
    layer = next(iter(one.layers.values()))
    schedule._switch(layer.name, [1], on=False)
    gated = one.logits()
    schedule.close()
    kept = [slot for slot in range(layer.rank) if slot != 1]
    with torch.no_grad():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A[kept], layer.lora_B[:, kept]
    assert torch.allclose(gated, one.logits(), atol=1e-6)


def test_a_round_scores_by_three_explicit_passes_a_rank() -> None:
    """A-4 on the schedule: both terms of an event against losses taken by hand."""
    one = slotted(ABLoRA(prune_per_round=1), spread=0.3)
    schedule, _ = _begun(one)
    name = list(one.layers)[2]
    masks = {other: schedule._gates.value(other).clone() for other in one.layers}
    zeros = {other: torch.zeros_like(mask) for other, mask in masks.items()}
    (batch,) = VALIDATION
    one.model.eval()

    def score(gates: Mapping[str, Tensor]) -> float:
        with torch.no_grad(), schedule._gates.sampled(gates):
            return -float(one.model(**batch).loss)

    off, on = masks[name].clone(), zeros[name].clone()
    off[1], on[1] = 0, 1
    full = score({}) - score({name: off}) + score({**zeros, name: on})
    schedule.after_step(4)
    event = schedule.events()[0]
    told = event.layers[name]
    assert event.figures["score_base"] == pytest.approx(score(zeros), abs=1e-6)
    assert told["importance"][1] + event.figures["score_base"] == pytest.approx(full, abs=2e-6)
    assert told["importance"][1] == pytest.approx(told["drop"][1] + told["solo"][1])


def test_ranks_are_taken_and_given_as_the_rules_say() -> None:
    one = slotted(ABLoRA(budget="ranks", prune_per_round=3), spread=0.3)
    schedule, optimizer = _begun(one)
    before = schedule.live_ranks()
    run(one, schedule, optimizer, range(1, 5))
    (event,) = schedule.events()
    scores = {name: _numbers(*told["importance"]) for name, told in event.layers.items()}
    slots = {name: told["slots"] for name, told in event.layers.items()}
    lost = lowest(scores, slots, 3)
    assert [(name, slot) for name, told in event.layers.items() for slot in told["pruned"]] == sorted(
        lost, key=lambda rank: list(one.layers).index(rank[0])
    )
    order = queue(scores, [name for name, _ in lost])
    assert [name for name, told in event.layers.items() if told["added"]] == sorted(
        order[:3], key=list(one.layers).index
    )
    changed = {name: before[name] - sum(name == other for other, _ in lost) + (name in order[:3]) for name in before}
    assert schedule.live_ranks() == changed
    assert event.ranks == {name: rank for name, rank in changed.items() if rank != before[name]}
    assert event.kind == "reallocate"
    assert event.step == 4
    json.dumps([event.figures, event.layers], allow_nan=False)


@pytest.mark.parametrize("prunes", [1, 5, 9])
def test_the_number_of_ranks_is_kept_under_budget_ranks(prunes: int) -> None:
    """A-2 and A-6."""
    one = slotted(ABLoRA(budget="ranks", prune_per_round=prunes, rounds=4, growth=20), spread=0.3)
    schedule, optimizer = _begun(one, max_steps=24)
    run(one, schedule, optimizer, range(1, 9))
    events = schedule.events()
    assert len(events) == 4
    total = 3 * len(one.layers)
    for event in events:
        losers = [name for name, told in event.layers.items() if told["pruned"]]
        winners = [name for name, told in event.layers.items() if told["added"]]
        assert event.figures["pruned"] == prunes
        assert not set(losers) & set(winners)
        assert event.figures["added"] == (prunes if winners else 0)
        total += 0 if winners else -prunes
        assert event.figures["live_ranks"] == total


def test_live_parameters_never_exceed_the_start_and_what_stays_free_is_carried_over() -> None:
    """A-2 under the default budget."""
    one = slotted(ABLoRA(prune_per_round=3, rounds=4), spread=0.3)
    schedule, optimizer = _begun(one)
    start = sum(3 * layer.base.shape.cost for layer in one.layers.values())
    run(one, schedule, optimizer, range(1, 9))
    for event in schedule.events():
        live = event.figures["live_parameters"]
        assert live <= start
        assert event.figures["free_parameters"] == start - live
        assert event.figures["added"] <= 3
    costs = {name: layer.base.shape.cost for name, layer in one.layers.items()}
    assert sum(rank * costs[name] for name, rank in schedule.live_ranks().items()) == live


def test_when_every_layer_lost_a_rank_none_is_added() -> None:
    one = slotted(ABLoRA(budget="ranks", prune_per_round=8), rank=3, spread=0.3)
    schedule, _ = _begun(one)
    assert schedule._grow({name: _numbers(1.0) for name in one.layers}, {name: [0] for name in one.layers}) == {}


def test_new_ranks_leave_the_function_as_pruning_left_it() -> None:
    """A-3: fresh rows stand beside zero columns, and empty slots are filled from the first."""
    one = slotted(ABLoRA(budget="ranks", prune_per_round=4), spread=0.3)
    schedule, optimizer = _begun(one)
    run(one, schedule, optimizer, range(1, 4))
    before: list[Tensor] = []
    grow = schedule._grow

    def watched(*arguments: Any) -> Any:
        before.append(one.logits())
        return grow(*arguments)

    schedule._grow = watched  # type: ignore[method-assign]
    schedule.after_step(4)
    assert torch.equal(one.logits(), before[0])
    (event,) = schedule.events()
    for name, told in event.layers.items():
        layer = one.layers[name]
        assert told["added"] in ([], [3])
        for slot in told["added"]:
            assert layer.lora_A[slot].all()
            assert float(layer.lora_A[slot].detach().abs().max()) <= 1 / math.sqrt(layer.base.shape.in_features)
            assert not layer.lora_B[:, slot].any()
            assert not optimizer.state[layer.lora_A]["exp_avg_sq"][slot].any()


def test_pruned_and_empty_slots_have_no_gradient_and_stay_at_zero() -> None:
    """A-10."""
    one = slotted(ABLoRA(prune_per_round=4), spread=0.3)
    schedule, optimizer = _begun(one)
    run(one, schedule, optimizer, range(1, 7))
    one.model(**BATCHES[0]).loss.backward()
    dead = {name: gate == 0 for name, gate in schedule.fold_state().gates.items()}
    assert any(told["pruned"] for event in schedule.events() for told in event.layers.values())
    for name, layer in one.layers.items():
        assert layer.lora_A.grad is not None
        assert layer.lora_B.grad is not None
        assert not layer.lora_A.grad[dead[name]].any()
        assert not layer.lora_B.grad[:, dead[name]].any()
        assert not layer.lora_A[dead[name]].any()
        assert not layer.lora_B[:, dead[name]].any()
        assert not optimizer.state[layer.lora_A]["exp_avg"][dead[name]].any()
        assert layer.lora_A[~dead[name]].any(dim=1).all()


def test_folded_factors_compute_what_the_gated_model_computes() -> None:
    """A-9, without the file."""
    one = slotted(ABLoRA(prune_per_round=4, rounds=3), spread=0.3)
    schedule, optimizer = _begun(one)
    run(one, schedule, optimizer, range(1, 8))
    gated, gates = one.logits(), schedule.fold_state().gates
    schedule.close()
    assert torch.equal(gated, one.logits())  # pruned slots are zeros: the file is right without the gates too
    for name, layer in one.layers.items():
        kept = gates[name] != 0
        layer.lora_A.data, layer.lora_B.data = layer.lora_A[kept].detach(), layer.lora_B[:, kept].detach()
    assert torch.allclose(gated, one.logits(), atol=1e-5)


@pytest.mark.parametrize("method", [ABLoRA(rounds=0), ABLoRA(prune_per_round=0)])
def test_without_a_round_or_a_rank_to_prune_it_is_plain_lora_bit_by_bit(method: ABLoRA) -> None:
    """A-7."""
    one, plain = slotted(method), adapted()
    schedule, optimizer = _begun(one)
    run(one, schedule, optimizer, range(1, 8))
    schedule.end(7)
    train(plain, None, torch.optim.AdamW(plain.factors, lr=1e-2, weight_decay=0.1), range(1, 8))
    assert schedule.events() == ()
    assert schedule.fault() is None
    for name, layer in one.layers.items():
        assert torch.equal(layer.lora_A, plain.layers[name].lora_A)
        assert torch.equal(layer.lora_B, plain.layers[name].lora_B)


# --- rounds in a run ----------------------------------------------------------------------------------------------


def _state(one: Slotted, schedule: ABLoRASchedule, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    saved = {
        "factors": [factor.detach().clone() for factor in one.factors],
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }
    json.dumps({key: value for key, value in saved["schedule"].items() if not isinstance(value, Tensor)})
    return {key: _copied(value) for key, value in saved.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize("stop", [5, 6, 9])
def test_a_run_that_goes_on_from_a_checkpoint_makes_the_same_bits(stop: int) -> None:
    """A-13: between rounds, and behind the last."""
    method = ABLoRA(prune_per_round=3, rounds=4)
    whole = slotted(method)
    schedule, optimizer = _begun(whole, max_steps=24)
    run(whole, schedule, optimizer, range(1, stop + 1))
    saved = _state(whole, schedule, optimizer)
    run(whole, schedule, optimizer, range(stop + 1, 11))

    other = slotted(method)
    with torch.no_grad():
        for factor, value in zip(other.factors, saved["factors"], strict=True):
            factor.copy_(value)
    resumed, moved = other.schedule(), other.adamw()
    resumed.load_state_dict(saved["schedule"])
    moved.load_state_dict(saved["optimizer"])
    resumed.begin(moved, 24)
    run(other, resumed, moved, range(stop + 1, 11))
    assert resumed.live_ranks() == schedule.live_ranks()
    assert all(torch.equal(a, b) for a, b in zip(whole.factors, other.factors, strict=True))
    assert list(resumed.events()) == [event for event in schedule.events() if event.step > stop]


def test_a_state_of_another_method_or_plan_is_refused() -> None:
    schedule = slotted(ABLoRA()).schedule()
    with pytest.raises(CheckpointError, match="of 'sora'"):
        schedule.load_state_dict({"method": "sora"})
    state = schedule.state_dict()
    name = next(key for key in state if key.startswith("mask."))
    with pytest.raises(CheckpointError, match=r"next is missing"):
        schedule.load_state_dict({key: value for key, value in state.items() if key != "next"})
    with pytest.raises(CheckpointError, match="of 2 slots"):
        schedule.load_state_dict({**state, name: torch.ones(2)})
    with pytest.raises(CheckpointError, match="other belongs to no layer"):
        schedule.load_state_dict({**state, "other": 1})


def test_a_resumed_run_that_ends_before_its_rounds_is_refused() -> None:
    one = slotted(ABLoRA())
    schedule, _ = _begun(one, max_steps=240)
    state = schedule.state_dict()
    remade = slotted(ABLoRA())
    other = remade.schedule()
    other.load_state_dict(state)
    with pytest.raises(ConfigError, match="resume with at least 111 steps"):
        other.begin(remade.adamw(), 100)


def test_the_global_random_state_does_not_enter_and_is_not_moved() -> None:
    outcomes = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            one = slotted(ABLoRA(prune_per_round=3), spread=0.3)
            schedule, optimizer = _begun(one)
            before = torch.get_rng_state()
            run(one, schedule, optimizer, range(1, 6))
            assert torch.equal(torch.get_rng_state(), before)
            outcomes.append([factor.detach().clone() for factor in one.factors])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_a_round_leaves_modes_flags_and_untouched_layers_as_found() -> None:
    """A-8 on the schedule."""
    one = slotted(ABLoRA(prune_per_round=1), spread=0.3, dropout=0.1)
    schedule, optimizer = _begun(one)
    run(one, schedule, optimizer, range(1, 4))
    modes = [module.training for module in one.model.modules()]
    flags = [parameter.requires_grad for parameter in one.model.parameters()]
    factors = {
        name: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for name, layer in one.layers.items()
    }
    schedule.after_step(4)
    (event,) = schedule.events()
    assert [module.training for module in one.model.modules()] == modes
    assert [parameter.requires_grad for parameter in one.model.parameters()] == flags
    for name, layer in one.layers.items():
        if name not in event.ranks:
            assert torch.equal(layer.lora_A, factors[name][0])
            assert torch.equal(layer.lora_B, factors[name][1])


def test_exact_and_plain_scores_prune_the_same_ranks_up_to_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """A-11."""
    chosen = []
    for way in ("exact", "plain"):
        one = slotted(ABLoRA(prune_per_round=4), spread=0.3)
        schedule, optimizer = _begun(one)
        if way == "plain":
            monkeypatch.setattr(schedule._ablation, "exact", schedule._ablation.plain)
        run(one, schedule, optimizer, range(1, 5))
        (event,) = schedule.events()
        scores = sorted(
            (value, name, slot)
            for name, told in event.layers.items()
            for value, slot in zip(told["importance"], told["slots"], strict=True)
        )
        chosen.append(scores)
    assert all(a[0] == pytest.approx(b[0], abs=1e-6) for a, b in zip(*chosen, strict=True))
    decided = chosen[0][3][0]
    clear = [{(n, s) for v, n, s in found[:4] if v < decided - 1e-6} for found in chosen]
    assert clear[0] == clear[1]


def test_a_round_without_a_finite_loss_is_skipped_and_two_in_a_row_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    one = slotted(ABLoRA(prune_per_round=3), spread=0.3)
    schedule, _ = _begun(one)
    exact = schedule._ablation.exact

    def broken(*arguments: Any) -> Any:
        found = exact(*arguments)
        object.__setattr__(found, "model", math.nan)
        return found

    ranks = schedule.live_ranks()
    with monkeypatch.context() as patch:
        patch.setattr(schedule._ablation, "exact", broken)
        schedule.after_step(4)
        assert schedule.live_ranks() == ranks
        assert schedule.events()[0].kind == "skip"
        assert "could score" in str(schedule.fault())
    schedule.after_step(5)
    assert schedule.fault() is None
    assert schedule.events()[0].kind == "reallocate"
    monkeypatch.setattr(schedule._ablation, "exact", broken)
    schedule.after_step(6)
    with pytest.raises(HealthError, match="2 rounds in a row"):
        schedule.after_step(7)


def test_a_rank_that_breaks_the_model_alone_is_pruned_first(monkeypatch: pytest.MonkeyPatch) -> None:
    one = slotted(ABLoRA(prune_per_round=1), spread=0.3)
    schedule, _ = _begun(one)
    exact, names = schedule._ablation.exact, list(one.layers)

    def broken(*arguments: Any) -> Any:
        found = exact(*arguments)
        found.solo[names[3]][2] = math.nan
        found.drop[names[0]][0] = math.nan
        return found

    monkeypatch.setattr(schedule._ablation, "exact", broken)
    schedule.after_step(4)
    (event,) = schedule.events()
    assert event.layers[names[3]]["pruned"] == [2]
    assert event.layers[names[3]]["solo"][2] is None
    assert event.layers[names[0]]["added"] == [3]  # a layer with a rank that bears load is the best
    json.dumps([event.figures, event.layers], allow_nan=False)


def test_ranks_that_change_no_loss_are_a_fault_of_the_run() -> None:
    one = slotted(ABLoRA())  # lora_B is zero and is never trained
    schedule, _ = _begun(one)
    for step in range(1, 13):
        schedule.after_step(step)
    fault = schedule.fault()
    assert fault is not None
    assert "changed no validation loss" in fault.message


def test_a_run_that_stops_early_says_which_rounds_are_missing() -> None:
    one = slotted(ABLoRA(prune_per_round=3), spread=0.3)
    schedule, optimizer = _begun(one)
    run(one, schedule, optimizer, range(1, 7))
    schedule.end(6)
    *_, last = schedule.events()
    assert last.kind == "unfinished"
    assert "before 5 of its rounds" in last.reason
    assert schedule.fault() is None
    assert schedule.figures()["ab-lora_rounds"] == 3


def test_taylor_rounds_move_ranks_by_two_backward_passes() -> None:
    one = slotted(ABLoRA(prune_per_round=3, score="taylor"), spread=0.3)
    schedule, optimizer = _begun(one)
    run(one, schedule, optimizer, range(1, 5))
    (event,) = schedule.events()
    assert event.figures["passes"] == 2  # at the model and at the base model
    assert event.figures["pruned"] == 3
    assert all(parameter.grad is None for parameter in one.model.parameters())


def test_a_redrawn_batch_is_another_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[bool, list[int]] = {}
    for redraw in (False, True):
        one = slotted(ABLoRA(prune_per_round=3, redraw=redraw, sequences=2), spread=0.3)
        schedule, optimizer = _begun(one)
        exact, kept = schedule._ablation.exact, seen.setdefault(redraw, [])

        def noting(batches: Any, slots: Any, exact: Any = exact, kept: Any = kept) -> Any:
            kept.append(int(batches[0]["input_ids"].sum()))
            return exact(batches, slots)

        monkeypatch.setattr(schedule._ablation, "exact", noting)
        run(one, schedule, optimizer, range(1, 7))
    assert len(set(seen[False])) == 1
    assert seen[True][0] != seen[True][1]
    assert seen[True][0] == seen[True][2]


def test_scoring_takes_as_many_sequences_as_asked() -> None:
    one = slotted(ABLoRA(prune_per_round=1, sequences=5), spread=0.3)
    schedule = one.schedule([causal_batch(0, rows=4), causal_batch(1, rows=4), causal_batch(2, rows=4)])
    assert [[len(batch["labels"]) for batch in group] for group in schedule._groups] == [[4, 1], [3, 2]]


def test_validation_without_labels_is_refused_before_training() -> None:
    one = slotted(ABLoRA())
    bare = {"input_ids": BATCHES[0]["input_ids"]}
    masked = {**bare, "labels": torch.full_like(bare["input_ids"], -100)}
    with pytest.raises(ConfigError, match="pass validation=batches"):
        one.schedule([])
    with pytest.raises(ConfigError, match="has none: add labels"):
        one.schedule([bare])
    with pytest.raises(ConfigError, match=r"all 1 validation batches are masked"):
        one.schedule([masked])
    assert one.schedule([masked, BATCHES[0]])._groups[0][0]["labels"] is not masked["labels"]


def test_optimizers_whose_memory_of_a_rank_cannot_be_emptied_are_refused() -> None:
    one = slotted(ABLoRA())
    schedule = one.schedule()
    with pytest.raises(ConfigError, match="not in SGD"):
        schedule.begin(torch.optim.SGD(one.factors, lr=0.1), 24)
    with pytest.raises(ConfigError, match="does not hold the layer's"):
        schedule.begin(torch.optim.AdamW(one.factors[:2]), 24)


def test_what_will_happen_is_told_beforehand_and_what_is_not_saved_afterwards() -> None:
    one = slotted(ABLoRA(), base=tiny_gpt2(), targets=["c_attn", "c_fc"])
    schedule = one.schedule()
    assert "8 rounds, after steps 4, 5, 6, 7, 8, 9, 10, 11 of 24; each scores 12 ranks" in schedule.outlook(24)[0]
    schedule.begin(one.adamw(), 24)
    (told,) = schedule.remarks()
    assert told == "ab-lora: ranks are scored on 4 validation sequences, all there are, in place of 32"
    assert schedule.memory_bytes() > 0


def test_layers_of_another_order_get_the_same_new_rows() -> None:
    rows = []
    for targets in (TARGETS, TARGETS[::-1]):
        one = slotted(ABLoRA(), targets=targets)
        schedule = one.schedule()
        rows.append({name: schedule._fresh_row(name, 4) for name in one.layers})
    assert all(torch.equal(rows[0][name], rows[1][name]) for name in rows[0])
    assert len({float(row.sum()) for row in rows[0].values()}) == len(rows[0])
    assert ab_lora.ABLoRA.needs_validation
