"""Further readings of the batches: each projects on what the one before it found."""

from dataclasses import replace

import pytest
import torch

from rankwise.calibration.cache import load_statistics, save_statistics, statistics_fingerprint
from rankwise.calibration.collect import collect
from rankwise.calibration.statistics import StatisticsRequest
from rankwise.errors import ConfigError
from tests.calibration.support import (
    FOLLOWED,
    GRADIENT,
    SCORE,
    label_tokens,
    left,
    range_from_left,
    reference,
    relative,
    right,
    targets,
)
from tests.calibration.test_as_found import state_of
from tests.calibration.test_batches import Experts, chain_loss
from tests.support.models import causal_batch, tiny_llama

BATCHES = [causal_batch(seed, masked=3 * seed) for seed in range(3)]


@pytest.mark.parametrize("collector", ["outer", "param"])
@pytest.mark.parametrize("memory", ["auto", "exact", "sampled", "low"])
def test_each_reading_is_a_product_with_the_same_gradient(collector, memory):
    wanted = reference(tiny_llama(), BATCHES, label_tokens)
    model = tiny_llama()
    before = state_of(model)
    found = collect(model, targets(model), BATCHES, FOLLOWED, collector=collector, memory=memory)
    assert state_of(model) == before
    for name, G in wanted.items():
        layer = found.layers[name]
        first = G @ right(layer.shape).double().T
        basis = torch.linalg.qr(first).Q
        rows = torch.linalg.qr((basis.mT @ G).mT).Q
        # Bases of one range differ by a rotation, which no product with its own transpose shows.
        assert relative(layer.left_projection.T @ layer.left_projection, G.mT @ basis @ basis.mT @ G) <= 1e-4
        assert relative(layer.projection @ layer.projection.T, G @ rows @ rows.mT @ G.mT) <= 1e-4
    assert (found.batches, found.skipped) == (3, 0)


def test_what_a_later_reading_does_not_ask_for_stays():
    model, seen = tiny_llama(), []

    def follow_up(statistics):
        seen.append({name: layer.projection.clone() for name, layer in statistics.layers.items()})
        return range_from_left(statistics)

    request = StatisticsRequest(projection=right, left_projection=left, follow_ups=(follow_up,))
    found = collect(model, targets(model), BATCHES, request)
    once = collect(model, targets(model), BATCHES, replace(request, follow_ups=()))
    for name, layer in found.layers.items():
        assert torch.equal(layer.projection, once.layers[name].projection)
        assert torch.equal(layer.projection, seen[0][name])
        assert not torch.equal(layer.left_projection, once.layers[name].left_projection)


def test_progress_counts_every_reading():
    model, heard = tiny_llama(), []
    collect(model, targets(model), BATCHES, FOLLOWED, on_batch=lambda *said: heard.append(said))
    assert heard == [(done, 9) for done in range(1, 10)]


def test_bad_batches_are_skipped_in_every_reading():
    model = tiny_llama()
    batches = [causal_batch(seed) for seed in range(12)]

    def loss(m, batch):
        value = m(**batch).loss
        return (
            value * float("nan") if torch.equal(batch["input_ids"], batches[5]["input_ids"]) else value
        ), label_tokens(batch)

    found = collect(model, targets(model), batches, FOLLOWED, loss=loss)
    others = collect(model, targets(model), batches[:5] + batches[6:], FOLLOWED)
    assert (found.batches, found.skipped) == (11, 1)
    for name, layer in found.layers.items():
        assert torch.equal(layer.projection, others.layers[name].projection)


def test_layers_that_no_batch_reached_stay_without_tensors():
    model = Experts()
    found = collect(model, targets(model), [(torch.ones(2, 3), True)], FOLLOWED, on_unused="min", loss=chain_loss)
    unreached = [layer for layer in found.layers.values() if layer.batches == 0]
    assert unreached
    assert all(layer.projection is None and layer.left_projection is None for layer in unreached)


class Repacked(torch.nn.Linear):
    """Moves its weight to another address at the first evaluation, as bitsandbytes' 4-bit layers do on a CPU."""

    moved = False

    def forward(self, x):
        if not self.moved:
            self.moved, self.weight.data = True, self.weight.data.clone()
        return super().forward(x)


def test_layers_whose_weight_moves_are_found_again():
    def toy(kind):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return torch.nn.Sequential(kind(6, 6), torch.nn.Tanh(), kind(6, 6), torch.nn.Tanh(), kind(6, 6))

    def loss(model, batch):
        return model(batch).square().mean(), 1.0

    batches = [torch.randn(4, 6, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    found, wanted = (
        collect(model, targets(model), batches, FOLLOWED, loss=loss) for model in map(toy, (Repacked, torch.nn.Linear))
    )
    for name, layer in wanted.layers.items():
        assert torch.equal(found.layers[name].projection, layer.projection)


def test_readings_after_the_first_are_for_projections_alone():
    model = tiny_llama()
    for request in (replace(GRADIENT, follow_ups=(range_from_left,)), replace(SCORE, follow_ups=(range_from_left,))):
        with pytest.raises(ConfigError, match="follow-up readings are for projections"):
            collect(model, targets(model), BATCHES, request)
    greedy = StatisticsRequest(projection=right, follow_ups=(lambda _: GRADIENT,))
    with pytest.raises(ConfigError, match="a follow-up reading asks for more than projections"):
        collect(model, targets(model), BATCHES, greedy)


def test_the_cache_tells_them_apart_and_keeps_them_whole(tmp_path):
    model = tiny_llama()
    layers = targets(model)
    prints = {
        statistics_fingerprint(model, layers, BATCHES, replace(FOLLOWED, follow_ups=FOLLOWED.follow_ups[:count]))
        for count in range(3)
    }
    assert len(prints) == 3
    taken = collect(model, layers, BATCHES, FOLLOWED)
    save_statistics(tmp_path / "cache.safetensors", taken, "x")
    found = load_statistics(tmp_path / "cache.safetensors", "x")
    for name, layer in taken.layers.items():
        assert torch.equal(found.layers[name].projection, layer.projection)
        assert torch.equal(found.layers[name].left_projection, layer.left_projection)
