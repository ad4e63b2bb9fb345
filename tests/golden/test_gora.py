"""GoRA against the numbers of its official code, one test a case that the manifest names (gora.md section 8)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise.calibration.statistics import GradientStatistics, LayerStatistics
from rankwise.errors import ConfigError
from rankwise.methods.base import Budget
from rankwise.methods.gora import GoRA, descent_direction, gain, official_ranks
from rankwise.methods.importance import has_converged, importance_of, softmax_shares, sum_shares
from rankwise.ranks.shapes import LayerShape, uniform_budget
from tests.golden.manifest import (
    assert_declared,
    case_parameters,
    file_cases,
    golden_folder,
    load_tensors,
    own_stream,
    read_manifest,
    relative_error,
)

FOLDER = golden_folder()
MANIFEST = read_manifest(FOLDER, "gora") or {}
CONVERGENCE = MANIFEST.get("convergence") or {}
SETTLED = [
    (f"convergence_factor_{factor}", {"factor": factor, "settled": settled, "threshold": CONVERGENCE["threshold"]})
    for factor, settled in CONVERGENCE.get("factor_and_result", [])
]


def shapes_of(case: dict[str, Any]) -> list[LayerShape]:
    return [LayerShape(name, *case["shapes_out_in"][name]) for name in case["layer_order"]]


def method_of(arguments: dict[str, Any]) -> GoRA:
    """The official argument names as our settings; the code clamps only if both bounds are set and not 0."""
    clamped = arguments["gora_min_rank"] and arguments["gora_max_rank"]
    return GoRA(
        rank_mode="official",
        importance=arguments["gora_importance_type"],
        scale_importance=arguments["gora_scale_importance"],
        normalization="softmax" if arguments["gora_softmax_importance"] else "sum",
        temperature=arguments["gora_temperature"],
        phi=arguments["gora_features_func"] or "linear",
        rounding=arguments["gora_allocate_stretagy"],
        r_min=arguments["gora_min_rank"] if clamped else 0,
        r_max=arguments["gora_max_rank"] or None,
    )


def assert_allocation_integrity(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    shapes = shapes_of(case)
    for shape in shapes:
        for kind in "WG":
            tensor = tensors[f"{kind}.{shape.name}"]
            assert list(tensor.shape) == [shape.out_features, shape.in_features]
            assert tensor.dtype.is_floating_point
    if case["error"] is None:
        assert tensors["importance"].shape[0] == tensors["ranks"].shape[0] == len(shapes)
        assert tensors["importance"].dtype == tensors["ranks"].dtype == torch.float64
        assert case["total_budget"] == uniform_budget(shapes, case["args"]["lora_rank"])
        spent = sum(rank * shape.cost for rank, shape in zip(tensors["ranks"].tolist(), shapes, strict=True))
        assert case["actual_trainable"] == spent


def measured(case: dict[str, Any], method: GoRA, tensors: dict[str, Tensor]) -> Tensor:
    """float64 [layers, c]; the randomized kinds draw from the stream that the official run drew from."""
    stream = own_stream(case.get("svd_rng_seed", 0))
    kept = method.r_max or 4 * case["args"]["lora_rank"]
    rows = [
        importance_of(method.importance, tensors[f"W.{name}"], tensors[f"G.{name}"], kept, stream)
        for name in case["layer_order"]
    ]
    return torch.stack(rows)


def statistics_of(shapes: list[LayerShape], scores: Tensor, tensors: dict[str, Tensor]) -> GradientStatistics:
    layers = {
        shape.name: LayerStatistics(shape=shape, batches=1, scores=row, gradient=tensors[f"G.{shape.name}"].float())
        for shape, row in zip(shapes, scores, strict=True)
    }
    return GradientStatistics(
        layers=layers, batches=1, skipped=0, tokens=1.0, loss=1.0, memory="exact", collector="outer"
    )


@pytest.mark.parametrize("case", file_cases(FOLDER, "gora", "allocation"))
def test_allocation_equals_the_official_code(case: dict[str, Any]) -> None:
    tensors = load_tensors(FOLDER, case["file"])
    assert_allocation_integrity(case, tensors)
    if case["error"] is not None:  # the official code raised: a record, nothing to compare
        return
    shapes, arguments, method = shapes_of(case), case["args"], method_of(case["args"])
    scores = measured(case, method, tensors)
    budget = Budget(r=arguments["lora_rank"], lora_alpha=16, parameters=uniform_budget(shapes, arguments["lora_rank"]))
    statistics = statistics_of(shapes, scores, tensors)
    bound, allowed = (1e-3, 1.0) if case["randomized"] else (1e-5, 0.0)

    importance = scores.sqrt() if method.scale_importance else scores
    reference = tensors["importance"].reshape(len(shapes), -1)
    for column, expected in zip(importance.unbind(1), reference.unbind(1), strict=True):
        assert relative_error(column, expected) <= bound
        assert (column[expected == 0].abs() <= 1e-12).all()

    columns = importance.float().unbind(1)  # the official code normalizes in float32
    normalized = [
        softmax_shares(column, method.temperature) if method.normalization == "softmax" else sum_shares(column)
        for column in columns
    ]
    shares = torch.stack(normalized).mean(dim=0)
    assert relative_error(shares, tensors["normalized_importance"]) <= bound

    ranks = official_ranks(
        shares.tolist(),
        shapes,
        budget.r,
        phi=method.phi,
        rounding=method.rounding,
        r_min=arguments["gora_min_rank"] or 0,
        r_max=arguments["gora_max_rank"] or 0,
    )
    expected_ranks = tensors["ranks"].tolist()
    assert max(abs(rank - wanted) for rank, wanted in zip(ranks, expected_ranks, strict=True)) <= allowed

    planned = method.allocate(shapes, budget, statistics).ranks
    sized = [min(int(wanted), shape.max_rank) for wanted, shape in zip(expected_ranks, shapes, strict=True)]
    assert max(abs(rank - wanted) for rank, wanted in zip(planned, sized, strict=True)) <= allowed


@pytest.mark.parametrize("case", file_cases(FOLDER, "gora", "init"))
def test_initialization_equals_the_official_code_with_the_right_sign(case: dict[str, Any]) -> None:
    tensors = load_tensors(FOLDER, case["file"])
    assert_declared(tensors, case["tensors"])
    fields = case["case"]
    shape = LayerShape(fields["name"], fields["o"], fields["i"])
    lora_A, gradient = tensors["A"].float(), tensors["G"].float()
    assert list(gradient.shape) == [shape.out_features, shape.in_features]
    assert list(lora_A.shape) == [fields["r"], shape.in_features]

    rule = GoRA(rank_stabilized=fields["rs"], scaling="dynamic" if fields["dyn"] else "average").scaling_rule()
    divisor = rule.divisor(fields["r"], fields["avg"])
    assert divisor == pytest.approx(tensors["scale_rank"].item(), rel=1e-12)
    assert rule.scaling(fields["alpha"], fields["r"], fields["avg"]) == pytest.approx(
        tensors["scaling"].item(), rel=1e-12
    )
    factor = (
        gain(fields["lr"], shape.in_features, fields["r"], divisor, fields["alpha"])
        if fields["by_lr"]
        else fields["sg"] / fields["alpha"]
    )
    projected = LayerStatistics(shape=shape, batches=1, projection=gradient @ lora_A.mT)
    whole = LayerStatistics(shape=shape, batches=1, gradient=gradient)
    if fields["r"] > shape.in_features:  # kept as a record: A A^T is singular
        for found in (projected, whole):
            with pytest.raises(ConfigError, match=shape.name):
                descent_direction(found, lora_A)
        return
    # The official pinv is ill-conditioned where A is square.
    bound = 1e-3 if fields["r"] == shape.in_features else 1e-5
    reference = tensors.get("B_pre", -tensors["B_head"])
    for found in (projected, whole):
        lora_B = factor * descent_direction(found, lora_A)
        assert relative_error(lora_B, reference) <= bound
        assert relative_error(tensors["scaling"].item() * lora_B @ lora_A, -tensors["delta_head"]) <= bound


@pytest.mark.parametrize("case", case_parameters(FOLDER, "gora", "convergence", SETTLED))
def test_calibration_settles_where_the_official_code_says_so(case: dict[str, Any]) -> None:
    previous = torch.tensor([[0.5], [2.0], [3e-3]], dtype=torch.float64)
    assert has_converged(previous, previous * case["factor"], case["threshold"], 1e-8) is case["settled"]
