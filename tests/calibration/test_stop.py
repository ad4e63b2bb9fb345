"""Adaptive N: the predicate sees the scores of the running mean after every batch, in order, in every memory mode."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rankwise.calibration.collect import collect
from tests.calibration.support import EVERYTHING, label_tokens, reference, relative, right, targets
from tests.calibration.test_batches import Chain, chain_batches, chain_loss
from tests.support.models import causal_batch, tiny_llama

BATCHES = [causal_batch(seed, masked=seed) for seed in range(6)]


class StopAt:
    """Says stop at a count, and remembers what it was told."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.heard: list[tuple[int, dict[str, Tensor]]] = []

    def __call__(self, batches: int, scores: Mapping[str, Tensor]) -> bool:
        self.heard.append((batches, dict(scores)))
        return batches >= self.count


@pytest.mark.parametrize("memory", ["exact", "low"])
def test_the_predicate_sees_the_importance_of_each_running_mean(memory):
    model, stop = tiny_llama(), StopAt(4)
    found = collect(model, targets(model), iter(BATCHES), replace(EVERYTHING, stop=stop), memory=memory)
    assert found.batches == 4
    assert [count for count, _ in stop.heard] == [1, 2, 3, 4]
    for count, scores in stop.heard:
        wanted = reference(tiny_llama(), BATCHES[:count], label_tokens)
        for layer in targets(model):
            expected = (layer.weight().double() * wanted[layer.name]).abs().mean()
            assert scores[layer.name].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("memory", ["exact", "low", "sampled"])
def test_the_statistics_are_those_of_the_batches_up_to_the_stop(memory):
    model = tiny_llama()
    found = collect(model, targets(model), BATCHES, replace(EVERYTHING, stop=StopAt(2)), memory=memory)
    wanted = reference(tiny_llama(), BATCHES[:2], label_tokens)
    assert found.tokens == label_tokens(BATCHES[0]) + label_tokens(BATCHES[1])
    for name, gradient in wanted.items():
        layer = found.layers[name]
        assert relative(layer.projection, gradient @ right(layer.shape).double().T) <= 5e-6


@pytest.mark.parametrize("memory", ["exact", "low"])
def test_a_predicate_that_never_stops_uses_every_batch_and_is_asked_once_for_each(memory):
    model, stop = tiny_llama(), StopAt(99)
    heard: list[tuple[int, int | None]] = []
    settings = {"memory": memory, "on_batch": lambda *said: heard.append(said)}
    assert collect(model, targets(model), BATCHES, replace(EVERYTHING, stop=stop), **settings).batches == 6
    assert [count for count, _ in stop.heard] == list(range(1, 7))
    assert all(len(scores) == len(targets(model)) for _, scores in stop.heard)
    assert heard == [(done, len(heard)) for done in range(1, len(heard) + 1)]


@pytest.mark.parametrize("memory", ["exact", "sampled", "low"])
def test_a_bad_batch_on_the_way_is_never_shown_and_no_count_asked_about_twice(memory):
    model, stop = Chain(), StopAt(14)
    batches = chain_batches(20, poisoned=(3,))
    found = collect(model, targets(model), batches, replace(EVERYTHING, stop=stop), memory=memory, loss=chain_loss)
    assert [count for count, _ in stop.heard] == list(range(1, 15))
    assert all(torch.isfinite(score).all() for _, scores in stop.heard for score in scores.values())
    assert (found.batches, found.skipped) == (14, 1)
