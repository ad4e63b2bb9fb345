"""Screened scores: the race drops only what is decided, and ends at the exact scores where nothing is."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankwise.adapters.gates import RankGates
from rankwise.methods.ab_lora import ABLoRA, importance, lowest
from rankwise.methods.ablation import Ablation, Scores
from rankwise.methods.screening import half_widths, screened, undecided
from tests.methods.perturbed import Adapted, adapted, train
from tests.methods.slotted import run, slotted
from tests.support.models import causal_batch

RANK = 3


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_intervals_that_do_not_meet_the_last_place_are_decided() -> None:
    estimates, widths = _numbers(0.0, 1.0, 1.1, 5.0), _numbers(0.1, 0.2, 0.2, 0.1)
    assert undecided(estimates, widths, 2).tolist() == [False, True, True, False]
    assert undecided(estimates, widths, 3).tolist() == [False] * 4
    assert undecided(estimates, torch.zeros(4, dtype=torch.float64), 2).tolist() == [False] * 4


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 4)), min_size=2, max_size=5),
    st.integers(1, 4),
    st.data(),
)
def test_what_is_decided_holds_wherever_the_values_lie_in_their_intervals(
    intervals: list[tuple[int, int]], count: int, data: st.DataObject
) -> None:
    estimates, widths = _numbers(*(e for e, _ in intervals)), _numbers(*(w for _, w in intervals))
    open_ = undecided(estimates, widths, count)

    def among(values: Tensor) -> list[tuple[bool, bool]]:
        """For each: surely among the lowest, and possibly, whatever the order of ties."""
        return [(int((values <= own).sum()) - 1 < count, int((values < own).sum()) < count) for own in values]

    draws = [[data.draw(st.floats(e - w, e + w)) for e, w in intervals] for _ in range(3)]
    seen = [among(_numbers(*draw)) for draw in draws]
    for index, undecided_here in enumerate(open_.tolist()):
        if not undecided_here and widths[index] > 0:
            sure = any(found[index][0] for found in seen)
            never = any(not found[index][1] for found in seen)
            assert not (sure and never)


def test_the_interval_is_a_t_interval_for_a_sum_and_a_point_once_all_is_seen() -> None:
    spread, seen = _numbers(2.0, 2.0), torch.tensor([4, 16])
    found = half_widths(spread, seen, 16)
    assert found[0] == pytest.approx(5.840909 * 16 * 2.0 / 2 * math.sqrt(1 - 4 / 16), rel=1e-5)
    assert found[1] == 0


def _trained(rows: int, steps: int = 3) -> tuple[Adapted, Ablation, dict[str, tuple[int, ...]], list[Any]]:
    one = adapted(rank=RANK, spread=0.1)
    gates = RankGates(one.model, one.layers, {name: torch.ones(RANK) for name in one.layers})
    train(one, None, one.adamw(), range(steps))
    batches = [causal_batch(7, rows=rows // 2), causal_batch(8, rows=rows - rows // 2, masked=3)]
    ablation = Ablation(one.model, one.layers, gates)
    ablation.prepare(batches[0])
    return one, ablation, {name: tuple(range(RANK)) for name in one.layers}, batches


def _screened(ablation: Ablation, batches: list[Any], slots: Mapping[str, tuple[int, ...]], count: int) -> Scores:
    def losers(values: Mapping[str, Tensor]) -> list[str]:
        return [name for name, _ in lowest(values, slots, count)]

    return screened(ablation, batches, slots, score=importance, count=count, lowest=losers)


def _values(scores: Scores) -> dict[str, Tensor]:
    return {name: importance(scores.drop[name], scores.solo[name]) for name in scores.slots}


@pytest.mark.parametrize("count", [1, 4])
def test_screening_finds_the_lowest_ranks_up_to_near_ties_with_fewer_sequences(count: int) -> None:
    _, ablation, slots, batches = _trained(32)
    exact, found = ablation.exact(batches, slots), _screened(ablation, batches, slots, count)
    wanted, taken = (set(lowest(_values(scores), slots, count)) for scores in (exact, found))
    values = {(name, slot): float(_values(exact)[name][slot]) for name in slots for slot in slots[name]}
    last = max(values[rank] for rank in wanted)
    spread = max(values.values()) - min(values.values())
    assert all(values[rank] - last < 0.02 * spread for rank in taken)
    assert found.model == pytest.approx(exact.model, abs=1e-6)
    assert found.base == pytest.approx(exact.base, abs=1e-6)
    assert found.sequences < exact.sequences


def test_what_is_scored_on_the_whole_batch_is_exact() -> None:
    _, ablation, slots, batches = _trained(8)
    exact = ablation.exact(batches, slots)

    def all_open(*arguments: Any) -> Tensor:
        return torch.ones(len(arguments[0]), dtype=torch.bool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankwise.methods.screening.undecided", all_open)
        found = _screened(ablation, batches, slots, 2)
    for name in slots:
        assert torch.allclose(found.drop[name], exact.drop[name], atol=1e-9)
        assert torch.allclose(found.solo[name], exact.solo[name], atol=1e-9)


def test_few_rows_or_a_loss_without_rows_are_scored_exactly() -> None:
    _, ablation, slots, batches = _trained(6)
    exact, found = ablation.exact(batches, slots), _screened(ablation, batches, slots, 2)
    assert all(torch.equal(found.drop[name], exact.drop[name]) for name in slots)
    assert found.sequences == exact.sequences


def test_rounds_with_screened_scores_move_ranks() -> None:
    one = slotted(ABLoRA(prune_per_round=3, score="screened"), spread=0.3)
    schedule, optimizer = one.schedule([causal_batch(9, rows=16)]), one.adamw()
    schedule.begin(optimizer, 24)
    run(one, schedule, optimizer, range(1, 5))
    (event,) = schedule.events()
    assert event.figures["pruned"] == 3
    assert all(torch.isfinite(_numbers(*told["importance"])).all() for told in event.layers.values())
