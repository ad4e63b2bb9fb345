"""Scores by ablation: the cheap way gives what single passes give, and leaves the model as it was."""

import hashlib
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankwise.adapters.attach import adapter_disabled
from rankwise.adapters.gates import RankGates
from rankwise.calibration.batches import model_loss
from rankwise.methods.ablation import Ablation, Scores, block_list, repeated, token_losses
from tests.methods.perturbed import TARGETS, Adapted, adapted
from tests.support.models import (
    causal_batch,
    classification_batch,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)

RANK = 3
CAUSAL = [causal_batch(0, rows=3), causal_batch(1, rows=2, length=9, masked=4)]
CLASSES = [classification_batch(0), classification_batch(1, rows=3)]

Gated = tuple[Adapted, RankGates, dict[str, list[int]]]


def _gated(model: Any = None, targets: Sequence[str] = TARGETS, spread: float = 0.3) -> Gated:
    """A LoRA with one closed gate in its second layer; the live slots of every layer."""
    one = adapted(model, rank=RANK, targets=targets, spread=spread)
    gates = RankGates(one.model, one.layers, {name: torch.ones(RANK) for name in one.layers})
    gates.write(list(one.layers)[1], torch.tensor([1.0, 0.0, 1.0]))
    slots = {name: [slot for slot in range(RANK) if gates.value(name)[slot]] for name in one.layers}
    return one, gates, slots


def _apart(first: Scores, second: Scores) -> float:
    terms = ((first.drop, second.drop), (first.solo, second.solo))
    found = [float((a[name] - b[name]).abs().max()) for a, b in terms for name in first.slots]
    return max(*found, abs(first.model - second.model), abs(first.base - second.base))


@pytest.mark.parametrize(
    ("build", "targets", "batches", "blocks"),
    [
        (tiny_llama, TARGETS, CAUSAL, 2),
        (tiny_gpt2, ["c_attn", "c_fc"], CAUSAL, 2),
        (tiny_bert_classifier, ["query", "dense"], CLASSES, 2),
        (tiny_t5, ["q", "wi"], [causal_batch(0, rows=3)], 2),
    ],
)
@pytest.mark.parametrize("memory", [1, 400_000])
def test_batched_scoring_from_cached_blocks_equals_single_passes(
    build: Callable[[], Any], targets: list[str], batches: list[Any], blocks: int, memory: int
) -> None:
    one, gates, slots = _gated(build(), targets)
    ablation = Ablation(one.model, one.layers, gates, memory_bytes=memory)
    ablation.prepare(batches[0])
    plain, exact = ablation.plain(batches, slots), ablation.exact(batches, slots)
    assert ablation.blocks == blocks
    assert not ablation.remarks
    assert _apart(plain, exact) < 1e-6
    assert exact.sequences < plain.sequences
    if memory > 1:
        assert exact.passes < plain.passes


def test_both_terms_are_differences_of_the_models_own_losses() -> None:
    one, gates, slots = _gated()
    batch = causal_batch(0, rows=3)
    ablation = Ablation(one.model, one.layers, gates)
    ablation.prepare(batch)
    found = ablation.exact([batch], slots)
    one.model.eval()
    name = list(one.layers)[1]

    def score(masks: dict[str, Tensor]) -> float:
        with torch.no_grad(), gates.sampled(masks):
            return -float(one.model(**batch).loss)

    zeros = {other: torch.zeros(RANK) for other in one.layers}
    with adapter_disabled(one.model), torch.no_grad():
        base = -float(one.model(**batch).loss)
    assert found.base == pytest.approx(base, abs=1e-6)
    assert found.model == pytest.approx(score({}), abs=1e-6)
    without = score({name: torch.tensor([1.0, 0.0, 0.0])})
    alone = score({**zeros, name: torch.tensor([0.0, 0.0, 1.0])})
    assert found.slots[name] == (0, 2)
    assert float(found.drop[name][1]) == pytest.approx(score({}) - without, abs=1e-6)
    assert float(found.solo[name][1]) == pytest.approx(alone - base, abs=1e-6)


def test_labels_weigh_alike_in_whichever_batch_they_are() -> None:
    one, gates, slots = _gated()
    whole = causal_batch(0, rows=5)
    parts = [{key: value[:1] for key, value in whole.items()}, {key: value[1:] for key, value in whole.items()}]
    ablation = Ablation(one.model, one.layers, gates)
    ablation.prepare(whole)
    assert _apart(ablation.exact([whole], slots), ablation.exact(parts, slots)) < 1e-6


def _digest(one: Adapted, gates: RankGates, optimizer: torch.optim.Optimizer) -> str:
    parts: list[Any] = [torch.get_rng_state().tolist(), random.getstate()]
    for name, parameter in one.model.named_parameters():
        gradient = None if parameter.grad is None else parameter.grad.tolist()
        parts.append((name, parameter.tolist(), parameter.requires_grad, gradient))
    parts += [(name, buffer.tolist()) for name, buffer in one.model.named_buffers()]
    parts += [(name, module.training, "forward" in module.__dict__) for name, module in one.model.named_modules()]
    parts += [len(module._forward_hooks) for module in one.model.modules()]
    parts += [one.model.config.use_cache, str(optimizer.state_dict()), sorted(gates.effective())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@pytest.mark.parametrize("score", ["plain", "exact", "taylor"])
def test_scoring_leaves_everything_as_found(score: str) -> None:
    one, gates, slots = _gated(spread=0.1)
    one.model(**CAUSAL[0]).loss.backward()
    optimizer = one.adamw()
    optimizer.step()
    one.model.base_model.model.model.layers[0].eval()
    ablation = Ablation(one.model, one.layers, gates)
    before = _digest(one, gates, optimizer)
    ablation.prepare(CAUSAL[0])
    getattr(ablation, score)(CAUSAL, slots)
    assert _digest(one, gates, optimizer) == before


def test_a_failure_within_a_pass_leaves_everything_as_found_too() -> None:
    one, gates, slots = _gated()
    optimizer = one.adamw()
    ablation = Ablation(one.model, one.layers, gates)
    ablation.prepare(CAUSAL[0])
    before = _digest(one, gates, optimizer)
    with pytest.raises(IndexError):
        ablation.exact([{**CAUSAL[0], "input_ids": CAUSAL[0]["input_ids"] + 1000}], slots)
    assert _digest(one, gates, optimizer) == before


def test_slopes_are_the_derivatives_of_the_score_in_the_gates() -> None:
    one, gates, slots = _gated()
    ablation = Ablation(one.model, one.layers, gates)
    ablation.prepare(CAUSAL[0])
    found = ablation.taylor(CAUSAL, slots)
    name, step = next(iter(one.layers)), 1e-2
    one.model.eval()

    def score(masks: dict[str, Tensor]) -> float:
        with torch.no_grad(), gates.sampled(masks):
            losses = [model_loss(one.model, batch) for batch in CAUSAL]
        return -sum(float(loss) * weight for loss, weight in losses) / sum(weight for _, weight in losses)

    zeros = {other: torch.zeros(RANK) for other in one.layers}
    moved = torch.tensor([step, 0.0, 0.0])
    at_model = (score({name: torch.ones(RANK) + moved}) - score({name: torch.ones(RANK) - moved})) / (2 * step)
    at_base = (score({**zeros, name: moved}) - score({**zeros, name: -moved})) / (2 * step)
    assert float(found.drop[name][0]) == pytest.approx(at_model, abs=2e-4)
    assert float(found.solo[name][0]) == pytest.approx(at_base, abs=2e-4)
    assert (found.model, found.base) == pytest.approx((score({}), score(zeros)), abs=1e-6)


def test_a_loss_of_the_users_own_is_scored_pass_by_pass_and_said() -> None:
    def squared(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        return model(input_ids=batch["input_ids"]).logits.square().mean(), 7.0

    one, gates, slots = _gated()
    ablation = Ablation(one.model, one.layers, gates, loss=squared)
    ablation.prepare(CAUSAL[0])
    assert "no cross-entropy of the logits" in ablation.remarks[0]
    assert ablation.shared == 1
    assert ablation.blocks == 2
    assert _apart(ablation.plain(CAUSAL, slots), ablation.exact(CAUSAL, slots)) < 1e-6


def test_a_loss_of_the_users_own_is_taken_as_it_is_also_where_it_was_cross_entropy_at_first() -> None:
    one, gates, slots = _gated()
    more = 0.0

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        mean, weight = model_loss(model, batch)
        return mean + more * mean**2, weight

    ablation = Ablation(one.model, one.layers, gates, loss=loss)
    ablation.prepare(CAUSAL[0])
    assert ablation.shared == 1
    before = ablation.exact(CAUSAL, slots)
    more = 1.0
    after = ablation.exact(CAUSAL, slots)
    assert after.model < 2 * before.model
    assert _apart(ablation.plain(CAUSAL, slots), after) < 1e-6


@pytest.mark.parametrize("kept", [1, 2])
def test_a_batch_is_cut_to_the_rows_that_memory_allows_with_the_same_scores(kept: int) -> None:
    one, gates, slots = _gated()
    wide = Ablation(one.model, one.layers, gates)
    wide.prepare(CAUSAL[0])
    rows = len(CAUSAL[0]["labels"])
    narrow = Ablation(one.model, one.layers, gates, memory_bytes=wide._bytes(CAUSAL[0]) * kept // rows)
    narrow.prepare(CAUSAL[0])
    assert {len(piece["labels"]) for piece in narrow._pieces(CAUSAL)} <= {1, kept}
    assert _apart(wide.exact(CAUSAL, slots), narrow.exact(CAUSAL, slots)) < 1e-6
    found, expected = narrow.taylor(CAUSAL, slots), wide.taylor(CAUSAL, slots)
    assert _apart(found, expected) < 1e-6


def test_longer_batches_share_fewer_passes() -> None:
    one, gates, _ = _gated()
    ablation = Ablation(one.model, one.layers, gates)
    ablation.prepare(CAUSAL[0])
    longer = {key: torch.cat([value] * 4, dim=1) for key, value in CAUSAL[0].items()}
    assert ablation._shared(longer) == ablation._shared(CAUSAL[0]) // 4


class _Odd(nn.Module):
    """Four linear layers of one class in a list, in an order of their own, with a link past the last."""

    def __init__(self, order: Sequence[int], link: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inputs = nn.Embedding(64, 8)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
            self.head = nn.Linear(8, 64)
        self.order, self.link = order, link

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **others: Any) -> Any:
        hidden = self.inputs(input_ids)
        kept = []
        for index in self.order:
            hidden = hidden + self.layers[index](hidden)
            kept.append(hidden)
        logits = self.head(hidden + kept[0] if self.link else hidden)
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


@pytest.mark.parametrize(
    ("order", "link"), [([0, 1, 2], True), ([2, 1, 0], False), ([0, 1, 2, 0], False), ([0, 1, 2, 0, 1, 2], False)]
)
def test_blocks_that_do_not_follow_one_another_are_found_out_and_said(order: list[int], link: bool) -> None:
    one, gates, slots = _gated(_Odd(order, link), ["layers.0.0", "layers.1.0", "layers.2.0"])
    ablation = Ablation(one.model, one.layers, gates)
    ablation.prepare(CAUSAL[0])
    assert ablation.blocks == 0
    assert "do not simply follow one another" in ablation.remarks[0]
    assert _apart(ablation.plain(CAUSAL[:1], slots), ablation.exact(CAUSAL[:1], slots)) < 1e-6


def test_without_a_list_of_blocks_passes_go_through_the_whole_model() -> None:
    one, gates, slots = _gated(tiny_llama(layers=1))
    ablation = Ablation(one.model, one.layers, gates)
    ablation.prepare(CAUSAL[0])
    assert "no list of equal blocks" in ablation.remarks[0]
    assert _apart(ablation.plain(CAUSAL, slots), ablation.exact(CAUSAL, slots)) < 1e-6


def test_a_layer_without_a_row_a_sample_takes_a_pass_for_each_rank() -> None:
    class Flattened(_Odd):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **others: Any) -> Any:
            hidden = self.inputs(input_ids).flatten(0, 1)
            for layer in self.layers:
                hidden = hidden + layer(hidden)
            logits = self.head(hidden).view(*input_ids.shape, -1)
            loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return SimpleNamespace(logits=logits, loss=loss)

    one, gates, slots = _gated(Flattened([], False), ["layers.0.0", "layers.1.0", "layers.2.0"])
    ablation = Ablation(one.model, one.layers, gates)
    ablation.prepare(CAUSAL[0])
    assert _apart(ablation.plain(CAUSAL[:1], slots), ablation.exact(CAUSAL[:1], slots)) < 1e-6


def test_the_outermost_and_longest_list_of_blocks_is_taken() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.few = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.blocks = nn.ModuleList(Experts() for _ in range(3))

    model = Model()
    everywhere: Any = {
        str(index): SimpleNamespace(module=module)
        for index, module in enumerate(model.modules())
        if isinstance(module, nn.Linear)
    }
    assert block_list(model, everywhere) == tuple(model.blocks)
    assert block_list(model, {}) == ()


def test_a_rank_that_breaks_the_model_alone_shows_in_its_solo_term_only() -> None:
    one, gates, slots = _gated()
    # Into the residual stream: attention kernels of some processors give finite numbers for infinite queries.
    name = next(name for name in one.layers if name.endswith("down_proj"))
    layer = one.layers[name]
    with torch.no_grad():
        layer.lora_A[0] = 1e30
        layer.lora_B[:, 0] = 1e30
        layer.lora_A[1] = 1e30
        layer.lora_B[:, 1] = -1e30
    ablation = Ablation(one.model, one.layers, gates)
    ablation.prepare(CAUSAL[0])
    found = ablation.exact(CAUSAL, slots)
    assert not torch.isfinite(found.solo[name][:2]).any()
    assert torch.isfinite(found.solo[name][2:]).all()


def test_losses_of_masked_labels_are_zero_and_causal_ones_look_one_position_ahead() -> None:
    logits = torch.zeros(1, 3, 2)
    logits[0, 1] = torch.tensor([2.0, 0.0])
    labels = torch.tensor([[1, -100, 0]])
    shifted = token_losses(logits, labels, shifted=True)
    assert shifted[0, 0] == 0
    assert shifted[0, 1] == pytest.approx(-functional.log_softmax(torch.tensor([2.0, 0.0]), 0)[0].item())
    assert token_losses(logits, labels, shifted=False)[0].tolist() == pytest.approx([0.6931472, 0.0, 0.6931472])


def test_a_batch_is_repeated_sample_by_sample_and_what_has_no_rows_stays() -> None:
    batch = {"ids": torch.arange(2), "mask": (torch.arange(4).view(2, 2), torch.zeros(1, 3)), "flag": True}
    found = repeated(batch, 2, 2)
    assert found["ids"].tolist() == [0, 1, 0, 1]
    assert found["mask"][0].tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert found["mask"][1].shape == (1, 3)
    assert found["flag"] is True


def test_scoring_runs_under_the_autocast_of_training() -> None:
    one, gates, slots = _gated()
    seen: list[torch.dtype] = []
    ablation = Ablation(one.model, one.layers, gates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one.model(**CAUSAL[0])
    ablation.prepare(CAUSAL[0])
    handle = one.first.base.module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    ablation.exact(CAUSAL, slots)
    handle.remove()
    assert set(seen) == {torch.bfloat16}
