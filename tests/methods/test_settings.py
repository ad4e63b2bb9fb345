"""Settings of the methods: everything wrong is told at once, presets mean what they say."""

import dataclasses

import pytest
import torch

from rankwise.errors import ConfigError
from rankwise.methods.gora import GoRA
from rankwise.methods.measure import measure
from rankwise.methods.recipe import method_from_id
from rankwise.ranks.shapes import LayerShape, ScalingRule
from tests.methods.support import budget_of, random

SHAPES = [LayerShape("a", 12, 8), LayerShape("b", 8, 16)]


def test_every_fault_is_told_at_once_with_the_value_and_the_choices() -> None:
    with pytest.raises(ConfigError) as caught:
        GoRA(importance="union_men", gamma=-0.1, temperature=0, min_batches=1, r_max=0, rank_mode="best")  # type: ignore[arg-type]
    faults = caught.value.faults
    assert len(faults) == 6
    assert "'union_men' is not known (did you mean 'union_mean'?); use one of union_mean, union_frob" in faults[0]
    assert "gora.rank_mode: 'best'" in faults[1]
    assert any("gora.gamma: -0.1 is out of range; use a finite number >= 0" in fault for fault in faults)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gamma": float("nan")},
        {"gamma": float("inf")},
        {"gamma": True},
        {"gamma": "0.05"},
        {"stable_gamma": -1},
        {"r_min": -1},
        {"r_min": 2.5},
        {"r_max": True},
        {"min_batches": None},
        {"scale_by_lr": 1},
        {"adaptive_gamma": "yes"},
        {"normalization": None},
        {"phi": "square"},
        {"rounding": "nearest"},
        {"scaling": "none"},
        {"initialization": "pissa"},
        {"convergence_floor": 1e-8},
        {"r_min": 9, "r_max": 4},
        {"adaptive_gamma": True, "scale_by_lr": False},
        {"adaptive_gamma": True, "gamma": 0.0},
    ],
)
def test_a_value_that_makes_no_sense_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"gora.{next(iter(wrong))}"):
        GoRA(**wrong)  # type: ignore[arg-type]


def test_settings_are_keyword_only_and_frozen() -> None:
    with pytest.raises(TypeError):
        GoRA(0.1)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        GoRA().gamma = 0.1  # type: ignore[misc]


def test_the_presets_are_those_of_the_specification() -> None:
    paper, official = method_from_id("gora", preset="paper"), method_from_id("gora", preset="official")
    assert isinstance(paper, GoRA)
    assert isinstance(official, GoRA)
    assert (paper.rank_mode, paper.phi, paper.gamma, paper.importance) == ("paper", "sqrt", 0.05, "union_mean")
    assert (official.rank_mode, official.rounding, official.phi) == ("official", "moderate", "linear")
    assert (official.gamma, official.importance, official.convergence_floor) == (0.05, "union_mean", "absolute")
    assert official.bounds(budget_of(SHAPES, 8)) == paper.bounds(budget_of(SHAPES, 8)) == (4, 32)
    for method in (paper, official):
        assert method.scaling_rule() is ScalingRule.ALPHA_OVER_SQRT_RANK


def test_settings_override_a_preset() -> None:
    method = method_from_id("gora", {"gamma": 0.08}, "official")
    assert isinstance(method, GoRA)
    assert (method.gamma, method.rank_mode) == (0.08, "official")


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({}, ScalingRule.ALPHA_OVER_SQRT_RANK),
        ({"rank_stabilized": False}, ScalingRule.ALPHA_OVER_RANK),
        ({"scaling": "average"}, ScalingRule.ALPHA_OVER_SQRT_R),
        ({"scaling": "average", "rank_stabilized": False}, ScalingRule.ALPHA_OVER_R),
    ],
)
def test_the_four_scaling_modes(settings: dict[str, object], rule: ScalingRule) -> None:
    assert GoRA(**settings).scaling_rule() is rule  # type: ignore[arg-type]


def test_a_request_is_told_apart_by_all_that_changes_its_answer() -> None:
    def identity(method: GoRA, r: int = 8, seed: int = 0, half: bool = False) -> str:
        cast = (lambda factor: factor.bfloat16().float()) if half else (lambda factor: factor)
        return method.request(SHAPES, budget_of(SHAPES, r), seed, dtype_cast=cast).identity

    base = identity(GoRA())
    different = [
        identity(GoRA(importance="grad_mean")),
        identity(GoRA(initialization="orthogonal")),
        identity(GoRA(r_max=9)),
        identity(GoRA(rank_mode="official", r_min=0)),
        identity(GoRA(), r=4),
        identity(GoRA(), seed=1),
        identity(GoRA(), half=True),
        identity(GoRA(adaptive_batches=True)),
        identity(GoRA(adaptive_batches=True, convergence_threshold=0.2)),
    ]
    assert len({base, *different}) == len(different) + 1
    for method in (GoRA(gamma=0.1), GoRA(phi="linear"), GoRA(rank_stabilized=False), GoRA(normalization="softmax")):
        assert identity(method) == base


def test_sampled_rows_are_allowed_where_the_importance_is_a_mean_over_rows() -> None:
    allowed = {
        kind
        for kind in ("union_mean", "grad_mean", "union_2ord_norm", "union_frobenius_norm", "grad_entropy")
        if GoRA(importance=kind).request(SHAPES, budget_of(SHAPES), 0).score_is_row_mean  # type: ignore[arg-type]
    }
    assert allowed == {"union_mean", "grad_mean", "union_2ord_norm"}


@pytest.mark.parametrize("kind", ["union_mean", "grad_mean", "union_2ord_norm"])
def test_the_mean_over_blocks_of_rows_is_the_score_of_all_rows(kind: str) -> None:
    shape = LayerShape("a", 300, 7)
    request = GoRA(importance=kind).request([shape], budget_of([shape]), 0)  # type: ignore[arg-type]
    weight, gradient = random(300, 7), random(300, 7, seed=1)
    assert request.score is not None
    blocked = measure(request, shape, weight, gradient)
    assert blocked.scores is not None
    assert torch.allclose(blocked.scores, request.score(weight, gradient), rtol=1e-6)
    assert request.projection is not None
    assert blocked.projection is not None
    assert torch.allclose(blocked.projection, gradient @ request.projection(shape).mT, atol=1e-6)


def test_calibration_stops_early_only_if_asked() -> None:
    assert GoRA().request(SHAPES, budget_of(SHAPES), 0).stop is None
    stop = GoRA(adaptive_batches=True, min_batches=2).request(SHAPES, budget_of(SHAPES), 0).stop
    assert stop is not None
    steady = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    assert [stop(batch, steady) for batch in (1, 2)] == [False, True]
