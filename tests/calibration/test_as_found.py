"""Calibration hands the model back bit for bit as it found it."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rankwise.calibration.as_found import left_as_found, seeded_for_batch
from rankwise.calibration.collect import collect
from tests.calibration.support import EVERYTHING, GRADIENT, reference, targets, worst_gradient_error
from tests.support.models import causal_batch, tiny_bert_classifier, tiny_llama

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything that calibration might leave behind, as comparable values."""
    return {
        "parameters": [
            (id(p), p._version, p.requires_grad, None if p.grad is None else (id(p.grad), p.grad.tolist()))
            for p in model.parameters()
        ],
        "bits": [(name, tensor.detach().clone().view(-1).tolist()) for name, tensor in model.state_dict().items()],
        "buffers": [(name, id(buffer), buffer.tolist()) for name, buffer in model.named_buffers()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, hooks)) for module in model.modules() for hooks in HOOKS],
        "parameter hooks": [
            (len(p._backward_hooks or ()), len(getattr(p, "_post_accumulate_grad_hooks", None) or ()))
            for p in model.parameters()
        ],
        "checkpointing": [
            (getattr(m, "gradient_checkpointing", None), m.__dict__.get("_gradient_checkpointing_func"))
            for m in model.modules()
        ],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "use_cache": getattr(model.config, "use_cache", None),
        "random": (torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]),
    }


def unusual_llama(checkpointing: str | None) -> nn.Module:
    """A model in a state that defaults would not restore: mixed flags, mixed modes, gradients of its own."""
    model = tiny_llama()
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 == 0)
        if number % 2:
            parameter.grad = torch.full_like(parameter, float(number))
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    return model


@pytest.mark.parametrize("collector", ["outer", "param"])
@pytest.mark.parametrize("checkpointing", [None, "non-reentrant", "reentrant"])
@pytest.mark.parametrize(("memory", "train_mode"), [("exact", True), ("sampled", False), ("low", False)])
def test_nothing_of_the_model_or_the_random_states_changes(collector, checkpointing, memory, train_mode):
    model = unusual_llama(checkpointing)
    before = state_of(model)
    collect(
        model,
        targets(model),
        [causal_batch(seed) for seed in range(2)],
        EVERYTHING,
        memory=memory,
        collector=collector,
        train_mode=train_mode,
    )
    assert state_of(model) == before


@pytest.mark.parametrize("collector", ["outer", "param"])
@pytest.mark.parametrize("where", ["loss", "backward", "score", "progress"])
def test_nothing_changes_when_something_fails_half_way(collector, where):
    class TrapError(Exception):
        pass

    class Trap(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            raise TrapError

    def spring(*_: object) -> Tensor:
        raise TrapError

    def loss(m: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        random.random()
        torch.rand(1)
        np.random.random()
        value = m(**batch).loss
        if where == "loss":
            raise TrapError
        return (Trap.apply(value) if where == "backward" else value), 1.0

    model = unusual_llama("non-reentrant")
    request = replace(EVERYTHING, score=spring) if where == "score" else EVERYTHING
    before = state_of(model)
    with pytest.raises(TrapError):
        collect(
            model,
            targets(model),
            [causal_batch()],
            request,
            collector=collector,
            loss=loss,
            on_batch=spring if where == "progress" else None,
        )
    assert state_of(model) == before


def test_running_statistics_of_buffers_are_put_back():
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = None
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    model = Normalized()
    before = [(id(buffer), buffer.clone()) for buffer in model.buffers()]
    batches = [torch.randn(6, 4) * 5]
    collect(model, targets(model), batches, GRADIENT, train_mode=True, loss=lambda m, b: (m(b).square().mean(), 6.0))
    for (identity, value), buffer in zip(before, model.buffers(), strict=True):
        assert id(buffer) == identity
        assert torch.equal(buffer, value)


def test_a_loader_that_shuffles_starts_training_with_the_batches_that_calibration_saw():
    rows = [causal_batch(seed, rows=1) for seed in range(6)]
    loader = torch.utils.data.DataLoader(
        rows,
        batch_size=2,
        shuffle=True,
        collate_fn=lambda part: {k: torch.cat([row[k] for row in part]) for k in part[0]},
    )
    model = tiny_llama()
    seen: list[Tensor] = []

    def loss(m: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        seen.append(batch["input_ids"])
        return m(**batch).loss, 1.0

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        collect(model, targets(model), loader, GRADIENT, max_batches=2, loss=loss)
        training = [batch["input_ids"] for batch in loader]
    assert len(seen) == 2
    assert all(torch.equal(first, second) for first, second in zip(seen, training, strict=False))


def test_dropout_is_off_unless_asked_for_and_depends_on_the_seed_alone():
    def with_dropout() -> nn.Module:
        model = tiny_bert_classifier()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        return model

    batch = {**causal_batch(rows=4), "labels": torch.tensor([0, 1, 2, 0])}
    plain = reference(with_dropout(), [batch], lambda _: 1.0)
    model = with_dropout()

    def taken(**settings: object) -> dict[str, Tensor]:
        found = collect(model, targets(model), [batch], GRADIENT, **settings)
        return {name: layer.gradient for name, layer in found.layers.items()}

    off = collect(model, targets(model), [batch], GRADIENT)
    assert worst_gradient_error(off, plain) <= 1e-6
    first, again, other = taken(train_mode=True), taken(train_mode=True), taken(train_mode=True, seed=1)
    name = next(iter(first))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.allclose(first[name], off.layers[name].gradient)
    assert not torch.allclose(first[name], other[name])


def test_checkpointing_saves_activations_in_evaluation_mode_without_switching_dropout_on():
    model = tiny_llama()
    model.activation_checkpointing_enable({"use_reentrant": False})
    runs: list[tuple[str, bool]] = []
    for name, module in model.named_modules():
        if name.endswith(("layers.0", "mlp")):
            module.register_forward_pre_hook(lambda m, _, name=name: runs.append((name, m.training)))
    layer = model.model.layers[0]
    inside: list[bool] = []
    layer.self_attn.register_forward_pre_hook(lambda *_: inside.append(layer.training))
    collect(model, targets(model), [causal_batch()], GRADIENT)
    assert runs.count(("model.layers.0.mlp", False)) == 2  # forward, and once more in the backward pass
    assert inside == [False, False]


def test_every_batch_has_its_own_draws_whatever_came_before():
    with seeded_for_batch(0, 3):
        first = torch.rand(2)
    torch.rand(7)
    with seeded_for_batch(0, 3):
        assert torch.equal(first, torch.rand(2))
    with seeded_for_batch(0, 4):
        assert not torch.equal(first, torch.rand(2))


def test_no_key_value_cache_is_built():
    model = tiny_llama()
    model.config.use_cache = True
    with left_as_found(model, train_mode=False):
        assert model(**causal_batch()).past_key_values is None
    assert model.config.use_cache is True
