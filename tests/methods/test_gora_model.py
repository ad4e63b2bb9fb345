"""GoRA on a model: the acceptance properties of gora.md section 6 that need calibration, an adapter or an export."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from rankwise.adapters.fingerprint import weights_fingerprint
from rankwise.adapters.targets import resolve_targets
from rankwise.calibration.collect import collect
from rankwise.methods.gora import GoRA
from rankwise.ranks.shapes import uniform_budget
from rankwise.training.attach import Calibration, attach
from tests.methods.support import budget_of
from tests.support.models import causal_batch, tiny_llama

BATCHES = [causal_batch(seed) for seed in range(4)]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**BATCHES[0]).logits


def exact_loss(model: nn.Module) -> Tensor:
    """The loss of the first batch in float64 throughout (transformers' own rounds the logits to float32)."""
    labels = BATCHES[0]["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(model(**BATCHES[0]).logits[:, :-1].flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("seed", range(5))
def test_property_5_all_layers_together_change_the_loss_as_the_first_order_says(seed: int) -> None:
    model = tiny_llama(seed).double()
    gradients: dict[str, Tensor] = {}
    loss = exact_loss(model)
    loss.backward()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert module.weight.grad is not None
            gradients[name] = module.weight.grad.clone()
    model.zero_grad()
    session = attach(model, GoRA(gamma=1e-4), r=4, calibration=BATCHES[:1], seed=seed)
    assert set(session.layers) == set(gradients)
    predicted = sum(
        (gradients[name] * layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())).sum().item()
        for name, layer in session.layers.items()
    )
    for layer in session.layers.values():
        layer.module.double()
    changed = exact_loss(session.model).item() - loss.item()
    assert predicted < 0
    assert changed == pytest.approx(predicted, rel=0.01)


def test_property_7_no_step_starts_as_the_base_bit_for_bit() -> None:
    model = tiny_llama()
    before = logits(model)
    session = attach(model, GoRA(gamma=0.0), r=4, calibration=BATCHES)
    assert torch.equal(logits(session.model), before)


@pytest.mark.parametrize("count", [1, 4])
def test_property_14_every_target_sees_every_batch_the_first_layer_too(count: int) -> None:
    model = tiny_llama()
    layers = resolve_targets(model, "all-linear").layers
    shapes = [layer.shape for layer in layers]
    request = GoRA().request(shapes, budget_of(shapes, 4), 0)
    statistics = collect(model, layers, BATCHES[:count], request)
    assert statistics.batches == count
    assert {found.batches for found in statistics.layers.values()} == {count}
    for found in statistics.layers.values():
        assert found.projection is not None
        assert found.projection.any(), found.shape.name
        assert found.scores is not None
        assert found.scores.item() > 0


def test_property_15_the_export_reproduces_the_logits_on_an_untouched_base(tmp_path: Path) -> None:
    model = tiny_llama()
    weights = weights_fingerprint(model)
    session = attach(model, GoRA(), r=4, calibration=BATCHES)
    assert len(set(session.plan.ranks.values())) > 1
    for layer in session.layers.values():
        assert layer.scaling == pytest.approx(16 / math.sqrt(layer.rank), rel=1e-12)
    expected = logits(session.model)
    assert (expected - logits(tiny_llama())).abs().max() > 1e-4
    session.save(tmp_path / "native")
    session.export(tmp_path / "adapter")
    assert weights_fingerprint(session.model) == weights
    for folder in ("native", "adapter"):
        fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path / folder).eval()
        assert (logits(fresh) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("settings", [{"scaling": "average"}, {"rank_stabilized": False}, {"rank_mode": "official"}])
def test_every_mode_starts_with_the_step_it_promises(settings: dict[str, object]) -> None:
    """The update of each layer follows from its gradient whatever the scaling mode and the ranks."""
    model = tiny_llama()
    layers = resolve_targets(model, "all-linear").layers
    shapes = [layer.shape for layer in layers]
    keep = GoRA(initialization="grad_svd").request(shapes, budget_of(shapes, 4), 0)
    gradients = {name: found.gradient for name, found in collect(model, layers, BATCHES, keep).layers.items()}
    session = attach(model, GoRA(**settings), r=4, calibration=BATCHES)  # type: ignore[arg-type]
    for name, layer in session.layers.items():
        gradient = gradients[name]
        assert gradient is not None
        A = layer.lora_A.detach().double()
        step = -0.05 * math.sqrt(A.shape[1] / layer.rank) * gradient.double() @ torch.linalg.pinv(A) @ A
        found = layer.scaling * layer.lora_B.detach().double() @ A
        assert (found - step).norm() <= 1e-5 * step.norm(), name


def test_all_three_memory_modes_give_the_same_start_and_exact_modes_the_same_ranks() -> None:
    sessions = {
        memory: attach(tiny_llama(), GoRA(), r=4, calibration=Calibration(batches=BATCHES, memory=memory))
        for memory in ("exact", "low", "sampled")
    }
    assert sessions["exact"].plan.ranks == sessions["low"].plan.ranks
    budget = uniform_budget([layer.shape for layer in sessions["exact"].plan.layers], 4)
    assert sessions["sampled"].plan.parameters <= budget


def test_a_dropped_layer_gets_no_adapter() -> None:
    session = attach(tiny_llama(), GoRA(r_min=0), r=1, calibration=BATCHES)
    dropped = [name for name, rank in session.plan.ranks.items() if rank == 0]
    assert dropped
    assert set(session.layers) == set(session.plan.ranks) - set(dropped)


def test_adaptive_batches_stop_before_the_end_and_the_rest_is_not_read() -> None:
    read = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for seed in range(30):
            read.append(seed)
            yield causal_batch(seed % 2)

    model = tiny_llama()
    layers = resolve_targets(model, "all-linear").layers
    shapes = [layer.shape for layer in layers]
    method = GoRA(adaptive_batches=True, min_batches=3, convergence_threshold=0.2)
    statistics = collect(model, layers, batches(), method.request(shapes, budget_of(shapes, 4), 0))
    assert 3 <= statistics.batches < 30
    assert len(read) <= statistics.batches + 1


def test_adaptive_gamma_never_starts_above_the_loss_of_the_base() -> None:
    model = tiny_llama()
    with torch.no_grad():
        base = sum(model(**batch).loss.item() for batch in BATCHES[:1])
    session = attach(model, GoRA(adaptive_gamma=True), r=4, calibration=BATCHES[:1])
    with torch.no_grad():
        start = sum(session.model(**batch).loss.item() for batch in BATCHES[:1])
    assert start < base
