"""Candidates for lora_B are compared on a model that is afterwards as it was."""

import pytest
import torch

from rankwise.adapters.attach import adapted_layers
from rankwise.errors import CalibrationError
from rankwise.methods.gora import GoRA
from rankwise.training.attach import attach
from rankwise.training.trial import EVALUATION_BATCHES, TrialLoss, reread
from tests.support.models import causal_batch, tiny_llama

BATCHES = [causal_batch(seed, rows=1 + seed, masked=seed) for seed in range(3)]


def attached():
    return attach(tiny_llama(), "lora", r=2, lora_dropout=0.5, target_modules=["q_proj"]).model


def direct_loss(model: torch.nn.Module) -> float:
    """The mean over label tokens of all batches, token by token, in float64."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for batch in BATCHES:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].double()
            labels = batch["labels"][:, 1:]
            chances = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            total -= float(chances[labels != -100].sum())
            count += int((labels != -100).sum())
    return total / count


def test_the_trial_loss_is_the_mean_over_label_tokens_without_dropout():
    model = attached()
    layers = adapted_layers(model)
    trial = TrialLoss(model, layers, BATCHES)
    model.train()
    assert trial(None) == pytest.approx(direct_loss(tiny_llama()), rel=1e-6)
    candidate = {
        name: torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(1))
        for name, layer in layers.items()
    }
    found = trial(candidate)
    for name, value in candidate.items():
        layers[name].lora_B.data.copy_(value)
    assert found == pytest.approx(direct_loss(model), rel=1e-6)
    assert trial.evaluations == 2


def test_a_trial_leaves_factors_modes_flags_and_randomness_as_they_were():
    model = attached()
    layers = adapted_layers(model)
    model.train()
    next(iter(layers.values())).lora_A.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    trial = TrialLoss(model, layers, BATCHES)
    trial(None), trial({name: layer.lora_B + 1 for name, layer in layers.items()})
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_that_raises_puts_everything_back_too():
    model = attached()
    layers = adapted_layers(model)

    def broken(*_: object) -> tuple[torch.Tensor, float]:
        raise RuntimeError("out of memory")

    model.train()
    before = {name: layer.lora_B.detach().clone() for name, layer in layers.items()}
    with pytest.raises(RuntimeError, match="out of memory"):
        TrialLoss(model, layers, BATCHES, loss=broken)({name: layer.lora_B + 1 for name, layer in layers.items()})
    assert all(torch.equal(layer.lora_B, before[name]) for name, layer in layers.items())
    assert model.training


def test_evaluation_prefers_batches_that_gave_no_gradient():
    assert reread(list(range(10)), 3) == [3, 4, 5, 6]
    assert reread(list(range(10)), 9) == [9]
    assert reread(list(range(10)), 10) == [6, 7, 8, 9]
    assert reread(list(range(2)), None) == [0, 1]
    assert len(reread(list(range(99)), None)) == EVALUATION_BATCHES


def test_nothing_to_evaluate_on_is_an_error():
    model = attached()
    with pytest.raises(CalibrationError, match="no calibration batch"):
        TrialLoss(model, adapted_layers(model), [])
    masked = causal_batch(0, masked=12)
    with pytest.raises(CalibrationError, match="every label of the evaluation batches is masked"):
        TrialLoss(model, adapted_layers(model), [masked])(None)


def test_adaptive_gamma_starts_no_worse_than_the_base_on_its_batches():
    batches = [causal_batch(seed) for seed in range(3)]
    base = sum(float(tiny_llama()(**batch).loss.detach()) for batch in batches)
    session = attach(tiny_llama(), GoRA(adaptive_gamma=True), r=4, calibration=batches)
    session.model.eval()
    start = sum(float(session.model(**batch).loss.detach()) for batch in batches)
    assert start < base
    fixed = attach(tiny_llama(), GoRA(), r=4, calibration=batches)
    name = next(iter(session.layers))
    ratio = session.layers[name].lora_B.detach() / fixed.layers[name].lora_B.detach()
    assert float(ratio.std()) < 1e-4 * float(ratio.mean())
