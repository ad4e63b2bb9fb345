"""Three memory modes, one answer: projections are exact everywhere, scores exact or estimated with a known error."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankwise.adapters.layers import LinearLayer, view_linear
from rankwise.calibration import memory as memory_module
from rankwise.calibration.collect import collect
from rankwise.calibration.layer_sums import LayerSums, sampled_rows
from rankwise.calibration.memory import free_memory, groups_for, resolve_memory
from rankwise.calibration.sinks import FullSum, LeftProjection, Projection, RowSample
from rankwise.calibration.statistics import StatisticsRequest
from rankwise.errors import CalibrationError, ConfigError
from rankwise.ranks.shapes import LayerShape
from tests.calibration.support import (
    EVERYTHING,
    GRADIENT,
    SCORE,
    label_tokens,
    left,
    reference,
    relative,
    right,
    targets,
    union_mean,
    worst_gradient_error,
)
from tests.support.models import causal_batch, tiny_gpt2, tiny_llama

BATCHES = [causal_batch(seed, masked=seed) for seed in range(3)]


def linear(out_features: int, in_features: int, name: str = "layer") -> LinearLayer:
    layer = view_linear(name, nn.Linear(in_features, out_features, bias=False))
    assert layer is not None
    return layer


@pytest.mark.parametrize("collector", ["outer", "param"])
@pytest.mark.parametrize("memory", ["exact", "sampled", "low"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_projections_are_exact_in_every_mode(build, memory, collector):
    wanted = reference(build(), BATCHES, label_tokens)
    model = build()
    found = collect(model, targets(model), BATCHES, EVERYTHING, memory=memory, collector=collector)
    assert found.memory == memory
    for name, gradient in wanted.items():
        layer = found.layers[name]
        assert relative(layer.projection, gradient @ right(layer.shape).double().T) <= 5e-6
        assert relative(layer.left_projection, left(layer.shape).double() @ gradient) <= 5e-6


@pytest.mark.parametrize("memory", ["exact", "low"])
def test_scores_are_exact_unless_sampled(memory):
    model = tiny_llama()
    wanted = reference(tiny_llama(), BATCHES, label_tokens)
    found = collect(model, targets(model), BATCHES, SCORE, memory=memory)
    for layer in targets(model):
        expected = (layer.weight().double() * wanted[layer.name]).abs().mean()
        assert found.layers[layer.name].scores.item() == pytest.approx(expected.item(), rel=1e-5)
        assert found.layers[layer.name].score_errors is None
    assert found.row_share == 1.0


def test_low_keeps_whole_gradients_and_runs_the_batches_once_a_group():
    model, runs = tiny_llama(), []
    wanted = reference(tiny_llama(), BATCHES, label_tokens)
    model.model.embed_tokens.register_forward_hook(lambda *_: runs.append(1))
    found = collect(model, targets(model), iter(BATCHES), GRADIENT, memory="low")
    assert worst_gradient_error(found, wanted) <= 1e-6
    assert len(runs) == len(groups_for(targets(model))) * len(BATCHES) > len(BATCHES)


def test_projections_alone_are_taken_in_one_pass_even_under_low():
    model, runs = tiny_llama(), []
    model.model.embed_tokens.register_forward_hook(lambda *_: runs.append(1))
    collect(model, targets(model), BATCHES, StatisticsRequest(projection=right), memory="low")
    assert len(runs) == len(BATCHES)


def test_a_full_row_sample_is_exact_with_no_error():
    model = tiny_llama()
    exact = collect(model, targets(model), BATCHES, SCORE, memory="exact")
    sampled = collect(model, targets(model), BATCHES, SCORE, memory="sampled", sample_share=1.0)
    for name, layer in sampled.layers.items():
        assert layer.scores.item() == pytest.approx(exact.layers[name].scores.item(), rel=1e-6)
        assert layer.score_errors.item() == 0.0


def test_a_sampled_score_is_unbiased_and_its_error_is_the_spread_over_samples():
    torch.manual_seed(0)
    layer = linear(64, 16)
    rows = torch.linspace(0.1, 3.0, 64)[:, None]
    gradient = rows * torch.randn(64, 16)
    exact = union_mean(layer.weight(), gradient).item()
    values, errors = [], []
    for seed in range(300):
        sums = LayerSums(layer, SCORE, "sampled", share=0.25, seed=seed, on_cpu=False)
        for sink in sums.sinks:
            sink.add_gradient(gradient, 1.0)
        found = sums.finish(1.0, 1)
        values.append(found.scores.item())
        errors.append(found.score_errors.item())
    spread = torch.tensor(values).std().item()
    assert torch.tensor(values).mean().item() == pytest.approx(exact, abs=4 * spread / 300**0.5)
    assert torch.tensor(errors).square().mean().sqrt().item() == pytest.approx(spread, rel=0.15)


def test_the_error_of_a_sample_is_worked_by_hand():
    # Four of eight rows with row means 1, 1, 3, 3 (W = 1): variance of a row 4/3, / 4 rows, * (1 - 4/8) = 1/6.
    layer = linear(8, 2)
    layer.module.weight.data.fill_(1.0)
    rows = sampled_rows(layer.shape, 0.5, seed=0)
    gradient = torch.zeros(8, 2)
    gradient[rows[:2]], gradient[rows[2:]] = 1.0, 3.0
    sums = LayerSums(layer, SCORE, "sampled", share=0.5, seed=0, on_cpu=False)
    sums.sinks[0].add_gradient(gradient, 1.0)
    found = sums.finish(1.0, 1)
    assert found.scores.item() == pytest.approx(2.0)
    assert found.score_errors.item() == pytest.approx((1 / 6) ** 0.5)


@given(out_features=st.integers(1, 200), share=st.floats(0.001, 1.0), seed=st.integers(0, 2**40))
def test_a_row_sample_has_no_row_twice_and_depends_on_seed_and_layer(out_features, share, seed):
    shape = LayerShape("a.b", out_features, 4)
    rows = sampled_rows(shape, share, seed)
    assert len(rows) == min(out_features, max(2, round(share * out_features)))
    assert len(set(rows.tolist())) == len(rows)
    assert 0 <= rows.min() <= rows.max() < out_features
    assert torch.equal(rows, sampled_rows(shape, share, seed))
    if len(rows) >= 20:
        assert not torch.equal(rows, sampled_rows(LayerShape("a.c", out_features, 4), share, seed))


@settings(deadline=None)
@given(
    tokens=st.integers(1, 5),
    out_features=st.integers(1, 6),
    in_features=st.integers(1, 6),
    weight=st.floats(0.5, 100.0),
    seed=st.integers(0, 2**31),
)
def test_a_sink_sums_the_same_from_factors_as_from_the_gradient(tokens, out_features, in_features, weight, seed):
    rng = torch.Generator().manual_seed(seed)
    output_grad = torch.randn(tokens, out_features, generator=rng)
    inputs = torch.randn(tokens, in_features, generator=rng)
    gradient = output_grad.double().T @ inputs.double()
    columns, rows = torch.randn(2, out_features, generator=rng), torch.randn(3, in_features, generator=rng)
    some = torch.tensor([0, out_features - 1])
    wanted = [gradient, gradient[some], gradient @ rows.double().T, columns.double() @ gradient]

    def sinks() -> list[FullSum | RowSample | Projection | LeftProjection]:
        cpu = torch.device("cpu")
        return [
            FullSum(out_features, in_features, cpu),
            RowSample(some, in_features, cpu),
            Projection(rows, out_features),
            LeftProjection(columns, in_features),
        ]

    for first, second, expected in zip(sinks(), sinks(), wanted, strict=True):
        for _ in range(2):
            first.add_outer(output_grad, inputs, weight)
            second.add_gradient(gradient.float(), weight)
        for sink in (first, second):
            assert torch.allclose(sink.total.double(), 2 * weight * expected, rtol=1e-4, atol=1e-4 * weight)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (GRADIENT, "cannot keep the whole gradient"),
        (replace(SCORE, score_is_row_mean=False), "not a mean over rows"),
    ],
)
def test_sampled_is_refused_where_every_row_is_needed(request_, why):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=why):
        collect(model, targets(model), BATCHES, request_, memory="sampled")


@pytest.mark.parametrize(
    ("free", "request_", "mode"),
    [
        (3.1, SCORE, "exact"),
        (2.9, SCORE, "sampled"),
        (2.9, GRADIENT, "low"),
        (2.9, replace(SCORE, score_is_row_mean=False), "low"),
        (0.0, StatisticsRequest(projection=right), "exact"),
    ],
)
def test_auto_is_exact_in_a_third_of_the_free_memory_else_sampled_else_low(monkeypatch, free, request_, mode):
    model = tiny_llama()
    layers = targets(model)
    copy = sum(4 * layer.shape.out_features * layer.shape.in_features for layer in layers)
    monkeypatch.setattr(memory_module, "free_memory", lambda _: free * copy)
    assert resolve_memory("auto", layers, request_) == (mode, False)


def test_sums_go_to_the_host_when_only_the_host_has_room(monkeypatch):
    with torch.device("meta"):
        layers = [linear(8, 8)]
    monkeypatch.setattr(memory_module, "free_memory", lambda device: 0 if device.type == "meta" else 10**6)
    assert resolve_memory("auto", layers, SCORE) == ("exact", True)


def test_free_memory_is_what_the_host_can_still_give():
    assert 0 < free_memory(torch.device("cpu")) < 2**50


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_groups_cover_every_layer_once_in_order_and_hold_a_quarter_or_one_layer(sizes):
    layers = [linear(size, 3, f"layer{number}") for number, size in enumerate(sizes)]
    groups = groups_for(layers)
    assert [index for group in groups for index in group] == list(range(len(layers)))
    for group in groups:
        assert len(group) == 1 or sum(sizes[index] for index in group) <= sum(sizes) / 4


def test_settings_out_of_range_are_reported_together():
    model = tiny_llama()
    request = StatisticsRequest(projection=right, stop=lambda *_: True)
    with pytest.raises(ConfigError) as caught:
        collect(model, [], BATCHES, request, max_batches=0, sample_share=0.0)
    assert len(caught.value.faults) == 4
    with pytest.raises(ConfigError, match=r"projection has the shape \[2, 7\]; allowed is \[k, 32\]"):
        collect(model, targets(model), BATCHES, StatisticsRequest(projection=lambda _: torch.zeros(2, 7)))


def test_an_importance_that_is_not_finite_names_the_layer():
    model = tiny_llama()
    request = StatisticsRequest(score=lambda *_: torch.tensor([float("nan")]))
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\.self_attn\.q_proj: .* importance is \[nan\]"):
        collect(model, targets(model), BATCHES, request)


def test_processes_on_one_machine_share_its_free_memory(monkeypatch):
    monkeypatch.setattr(memory_module, "_system_free", lambda: 1000)
    monkeypatch.setattr(memory_module, "_container_free", lambda: 2000)
    assert free_memory(torch.device("cpu")) == 1000
    monkeypatch.setattr(memory_module, "world_size", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_memory(torch.device("cpu")) == 125
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == 250
