"""Which batches count, how much each counts, and what is said when too few do."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from rankwise.calibration.batches import BatchStore, batch_to, model_weight
from rankwise.calibration.collect import collect
from rankwise.errors import CalibrationError, DataError
from tests.calibration.support import EVERYTHING, GRADIENT, label_tokens, reference, targets, worst_gradient_error
from tests.support.models import (
    causal_batch,
    classification_batch,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)


class Poison(torch.autograd.Function):
    """Leaves the value alone and makes the gradient infinite wherever the flag is set."""

    @staticmethod
    def forward(ctx, value, flag):
        ctx.flag = flag
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad * float("inf") if ctx.flag else grad), None


class Chain(nn.Module):
    """Two linear layers; a batch is (x, poison the gradient in between?)."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.lower, self.upper = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, poison: bool) -> Tensor:
        return self.upper(Poison.apply(self.lower(x).tanh(), poison))


def chain_loss(model: nn.Module, batch: tuple[Tensor, bool]) -> tuple[Tensor, float]:
    return model(*batch).square().mean(), float(len(batch[0]))


def chain_batches(count: int, *, poisoned: tuple[int, ...] = (), infinite: tuple[int, ...] = ()) -> list:
    rng = torch.Generator().manual_seed(3)
    batches = [(torch.randn(2 + number % 2, 4, generator=rng), number in poisoned) for number in range(count)]
    return [(x * float("inf") if number in infinite else x, flag) for number, (x, flag) in enumerate(batches)]


def chain_reference(batches: list) -> dict[str, Tensor]:
    return reference(Chain(), batches, lambda b: float(len(b[0])), loss=lambda m, b: chain_loss(m, b)[0])


@pytest.mark.parametrize("collector", ["outer", "param"])
@pytest.mark.parametrize("memory", ["exact", "low", "sampled"])
@pytest.mark.parametrize("bad", [{"poisoned": (4,)}, {"infinite": (0,)}, {"poisoned": (0,), "infinite": (5,)}])
def test_a_batch_that_is_not_finite_leaves_no_trace(collector, memory, bad):
    batches = chain_batches(20, **bad)
    gone = [number for numbers in bad.values() for number in numbers]
    good = [batch for number, batch in enumerate(batches) if number not in gone]
    model = Chain()
    settings = {"memory": memory, "collector": collector, "loss": chain_loss}
    found = collect(model, targets(model), iter(batches), EVERYTHING, **settings)
    clean = collect(model, targets(model), good, EVERYTHING, **settings)
    assert (found.batches, found.skipped, clean.skipped) == (20 - len(gone), len(gone), 0)
    assert found.loss == clean.loss
    for name, layer in clean.layers.items():
        for kind in ("projection", "left_projection", "scores"):
            assert torch.equal(getattr(found.layers[name], kind), getattr(layer, kind))


@pytest.mark.parametrize("collector", ["outer", "param"])
def test_gradients_of_the_good_batches_are_autograds(collector):
    batches = chain_batches(12, poisoned=(7,))
    wanted = chain_reference([batch for batch in batches if not batch[1]])
    model = Chain()
    found = collect(model, targets(model), batches, GRADIENT, collector=collector, loss=chain_loss)
    assert worst_gradient_error(found, wanted) <= 1e-6
    assert found.layers["upper"].batches == found.layers["lower"].batches == 11


@pytest.mark.parametrize(
    ("bad", "layer"),
    [({"poisoned": (2, 5)}, "lower"), ({"infinite": (1, 3)}, "lower"), ({"poisoned": (0, 1, 2)}, "lower")],
)
def test_more_than_a_tenth_of_bad_batches_is_an_error_that_names_the_first_bad_layer(bad, layer):
    model = Chain()
    count = len(next(iter(bad.values())))
    with pytest.raises(CalibrationError, match=rf"{count} of 12 calibration batches .* first bad layer is {layer}"):
        collect(model, targets(model), chain_batches(12, **bad), GRADIENT, loss=chain_loss)


def test_a_loss_that_alone_is_not_finite_is_told_from_a_bad_layer():
    model = Chain()
    with pytest.raises(CalibrationError, match="every target's values are finite, the loss is not"):
        collect(
            model, targets(model), chain_batches(2), GRADIENT, loss=lambda m, b: (chain_loss(m, b)[0] * math.nan, 1.0)
        )


def test_a_sum_that_overflows_although_each_batch_is_finite_is_an_error():
    model = Chain()
    with pytest.raises(CalibrationError, match="overflows float32 although each batch is finite"):
        collect(model, targets(model), chain_batches(4), GRADIENT, loss=lambda m, b: (chain_loss(m, b)[0] * 1e36, 1e6))


def test_a_loader_shorter_than_asked_for_is_used_as_it_is():
    model, batches = tiny_llama(), [causal_batch(seed) for seed in range(3)]
    found = collect(model, targets(model), batches, GRADIENT, max_batches=64)
    assert found.batches == 3
    limited = collect(model, targets(model), (batch for batch in batches), GRADIENT, max_batches=2)
    assert worst_gradient_error(limited, reference(tiny_llama(), batches[:2], label_tokens)) <= 1e-6


def test_no_batches_at_all_is_an_error():
    model = tiny_llama()
    with pytest.raises(DataError, match="no calibration batches"):
        collect(model, targets(model), [], GRADIENT)


def test_masked_batches_contribute_nothing_and_masked_data_is_an_error():
    model = tiny_llama()
    masked = causal_batch(1, masked=12)
    batches = [causal_batch(0), masked, causal_batch(2, masked=5)]
    found = collect(model, targets(model), batches, GRADIENT)
    assert worst_gradient_error(found, reference(tiny_llama(), [batches[0], batches[2]], label_tokens)) <= 1e-6
    assert (found.batches, found.skipped, found.tokens) == (2, 0, 22.0 + 14.0)
    with pytest.raises(DataError, match="all labels of all 2 calibration batches are masked"):
        collect(model, targets(model), [masked, masked], GRADIENT)


class Experts(nn.Module):
    """`used` serves every batch, `rare` only those that say so, `never` none."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.rare, self.never = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor, rare: bool) -> Tensor:
        hidden = self.used(x)
        return self.rare(hidden) if rare else hidden


@pytest.mark.parametrize("collector", ["outer", "param"])
@pytest.mark.parametrize("memory", ["exact", "low", "sampled"])
def test_a_target_that_the_loss_does_not_reach_is_an_error_or_has_empty_statistics(collector, memory):
    model = Experts()
    layers = targets(model)
    batches = [(torch.ones(2, 3), False), (torch.ones(2, 3), True)]
    settings = {"collector": collector, "memory": memory, "loss": chain_loss}
    with pytest.raises(CalibrationError, match="rare: only 1 of 2 calibration batches reached it"):
        collect(model, layers[:2], batches, EVERYTHING, **settings)
    with pytest.raises(CalibrationError, match="never: only 0 of 2"):
        collect(model, [layers[0], layers[2]], batches, EVERYTHING, **settings)
    found = collect(model, layers, batches, EVERYTHING, on_unused="min", **settings)
    assert [layer.batches for layer in found.layers.values()] == [2, 1, 0]
    never = found.layers["never"]
    assert (never.gradient, never.projection, never.scores, never.score_errors) == (None, None, None, None)
    assert found.layers["rare"].scores is not None


def test_a_batch_that_misses_a_layer_counts_as_zero_in_its_mean():
    model = Experts()
    batches = [(torch.ones(2, 3), False), (torch.ones(6, 3), True)]
    found = collect(model, targets(model), batches, GRADIENT, loss=chain_loss, on_unused="min")
    alone = collect(model, targets(model), batches[1:], GRADIENT, loss=chain_loss, on_unused="min")
    assert torch.allclose(found.layers["rare"].gradient, alone.layers["rare"].gradient * 6 / 8)


@pytest.mark.parametrize("collector", ["outer", "param"])
def test_all_zero_gradients_are_an_error_that_names_the_causes_or_allowed_on_request(collector):
    model = Chain()

    def flat(m: nn.Module, batch: tuple[Tensor, bool]) -> tuple[Tensor, float]:
        return m(*batch).sum() * 0.0, 1.0

    settings = {"collector": collector, "loss": flat}
    with pytest.raises(
        CalibrationError, match=r"labels are masked, the loss is detached from .*enable_input_require_grads"
    ):
        collect(model, targets(model), chain_batches(2), GRADIENT, **settings)
    found = collect(model, targets(model), chain_batches(2), GRADIENT, on_zero="uniform", **settings)
    assert not any(layer.gradient.any() for layer in found.layers.values())


def test_a_detached_loss_is_an_error_that_names_it():
    model = Chain()
    with pytest.raises(CalibrationError, match="the loss is detached from the targets"):
        collect(model, targets(model), chain_batches(2), GRADIENT, loss=lambda m, b: (m(*b).sum().detach(), 1.0))


def test_one_layer_without_gradient_among_others_is_no_error():
    model = Chain()
    model.upper.weight.data.zero_()
    found = collect(model, targets(model), chain_batches(2), GRADIENT, loss=chain_loss)
    assert not found.layers["lower"].gradient.any()
    assert found.layers["upper"].gradient.any()


@pytest.mark.parametrize(
    ("build", "batch", "weight"),
    [
        (tiny_llama, causal_batch(rows=2, length=12, masked=3), 2 * 9.0),
        (tiny_llama, causal_batch(rows=2, length=12, masked=0), 2 * 11.0),
        (tiny_gpt2, causal_batch(rows=3, length=5, masked=1), 3 * 4.0),
        (tiny_t5, causal_batch(rows=2, length=12, masked=3), 2 * 9.0),
        (tiny_bert_classifier, classification_batch(rows=4), 4.0),
        (tiny_bert_classifier, {"labels": torch.tensor([1, -100, 2])}, 2.0),
        (tiny_bert_classifier, {"labels": torch.zeros(5, 3)}, 5.0),
        (tiny_llama, {"input_ids": torch.zeros(7, 2)}, 7.0),
    ],
)
def test_a_batch_weighs_as_many_labels_as_its_loss_averages_over(build, batch, weight):
    assert model_weight(build(), batch) == weight


def test_token_weighting_makes_split_batches_equal_to_the_whole_one():
    model, whole = tiny_llama(), causal_batch(rows=6)
    whole["labels"][0, :9] = -100
    whole["labels"][4, :3] = -100
    parts = [{key: value[start:end] for key, value in whole.items()} for start, end in ((0, 1), (1, 3), (3, 6))]
    wanted = {
        name: layer.gradient.double()
        for name, layer in collect(model, targets(model), [whole], GRADIENT).layers.items()
    }
    found = collect(model, targets(model), parts, GRADIENT)
    assert worst_gradient_error(found, wanted) <= 2e-6


@pytest.mark.parametrize(
    ("batch", "message"),
    [([torch.zeros(1)], "is a list, not a mapping"), ({"input_ids": torch.ones(1, 3).long()}, r"keys \['input_ids'\]")],
)
def test_a_batch_without_a_loss_says_what_it_holds(batch, message):
    model = tiny_llama()
    with pytest.raises(DataError, match=message):
        collect(model, targets(model), [batch], GRADIENT)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: (m(*b), 1.0), r"shape \[2, 2\]; it must be one number"),
        (lambda m, b: (m(*b).sum(), math.nan), "weight of calibration batch 0 is nan"),
        (lambda m, b: (m(*b).sum(), -1.0), "weight of calibration batch 0 is -1.0"),
    ],
)
def test_a_loss_of_the_wrong_kind_is_refused(loss, message):
    model = Chain()
    with pytest.raises(DataError, match=message):
        collect(model, targets(model), chain_batches(1), GRADIENT, loss=loss)


def test_progress_counts_every_reading_of_a_batch():
    model, batches = tiny_llama(), [causal_batch(seed) for seed in range(2)]
    heard: list[tuple[int, int | None]] = []
    collect(model, targets(model), batches, GRADIENT, memory="low", on_batch=lambda *said: heard.append(said))
    passes = len(heard) // 2
    assert heard == [(done, 2 * passes) for done in range(1, 2 * passes + 1)]
    heard.clear()
    collect(model, targets(model), iter(batches), GRADIENT, on_batch=lambda *said: heard.append(said))
    assert heard == [(1, None), (2, None)]


def test_a_store_reads_an_iterator_once_and_gives_the_same_batches_again():
    drawn: list[int] = []

    def source() -> Iterator[int]:
        for number in range(9):
            drawn.append(number)
            yield number

    store = BatchStore(source(), 4)
    first = iter(store)
    assert [next(first), next(first)] == [0, 1]
    assert list(store) == list(store) == [0, 1, 2, 3]
    assert drawn == [0, 1, 2, 3]
    assert (store.total, BatchStore([1, 2, 3], 2).total, BatchStore(range(7), 5).total) == (None, 2, 5)


def test_a_batch_moves_with_all_its_parts():
    moved = batch_to(
        {"a": torch.zeros(1), "b": [torch.zeros(2), "text"], "c": (torch.zeros(3), 4)}, torch.device("meta")
    )
    assert (moved["a"].is_meta, moved["b"][0].is_meta, moved["c"][0].is_meta) == (True, True, True)
    assert (moved["b"][1], moved["c"][1]) == ("text", 4)


@pytest.mark.parametrize("inner", ["module", "_orig_mod"])
def test_a_wrapped_model_is_refused_with_the_way_to_the_one_inside(inner):
    name = "DistributedDataParallel" if inner == "module" else "OptimizedModule"
    wrapper = type(name, (nn.Sequential,), {})(nn.Linear(2, 2))
    with pytest.raises(CalibrationError, match=rf"wrapped in {name}.*model\.{inner}"):
        collect(wrapper, targets(wrapper), [torch.ones(1, 2)], GRADIENT)


def test_a_layer_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(CalibrationError, match="0: its weight is on the meta device"):
        collect(model, targets(model), [torch.ones(1, 2)], GRADIENT, memory="exact")
