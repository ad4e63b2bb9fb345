"""LoRA-GA's start: the acceptance properties of lora_ga.md section 6 that concern lora_A and lora_B."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankwise.adapters.layers import LinearLayer
from rankwise.calibration.statistics import LayerStatistics
from rankwise.errors import CalibrationError, ConfigError
from rankwise.linalg.random import generator, kaiming_uniform
from rankwise.methods.base import Factors, Slot, Start
from rankwise.methods.gradient_sketch import missed_energy
from rankwise.methods.lora_ga import EXACT_UP_TO, LoRAGA, clip_ratio, directions, gain, weight_gain
from rankwise.methods.registry import method_from_id
from rankwise.ranks.shapes import LayerShape
from tests.methods.support import Known, budget_of, known, random, relative

DIRECTIONS = ["ArB2r", "A2rBr", "ArBr", "random"]
SCALES = ["stable", "gd", "unit", "weightS"]


def spectrum(out: int, inputs: int, values: Tensor, seed: int = 0) -> Tensor:
    """A gradient with these singular values, in random directions."""
    count = len(values)
    U = torch.linalg.qr(random(out, count, seed=seed, dtype=torch.float64)).Q
    V = torch.linalg.qr(random(inputs, count, seed=seed + 1, dtype=torch.float64)).Q
    return ((U * values) @ V.mT).float()


def gapped(out: int = 48, inputs: int = 32, ratio: float = 0.6, seed: int = 0) -> Tensor:
    return spectrum(out, inputs, ratio ** torch.arange(min(out, inputs), dtype=torch.float64), seed)


def layer_of(gradient: Tensor, seed: int = 7, name: str = "layers.0.q") -> Known:
    return known(name, random(*gradient.shape, seed=seed), gradient)


def start_of(
    method: LoRAGA, layer: Known, rank: int = 4, *, scaling: float = 4.0, seed: int = 0, gradient: Tensor | None = None
) -> Factors:
    found = layer.gradient if gradient is None else gradient
    budget = budget_of([layer.shape], rank)
    return method.initialize(
        Start(
            layer=layer.layer,
            rank=rank,
            divisor=budget.lora_alpha / scaling,
            budget=budget,
            seed=seed,
            dtype_cast=lambda factor: factor,
            statistics=LayerStatistics(shape=layer.shape, batches=1, gradient=found),
        )
    )


def first_direction(gradient: Tensor, factors: Factors) -> Tensor:
    """M = B B^T G + G A^T A in float64: a step of gradient descent of rate l moves the weight by -l s^2 M."""
    G, A, B = gradient.double(), factors.lora_A.double(), factors.lora_B.double()
    return B @ B.mT @ G + G @ A.mT @ A


def best(gradient: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


# --- one layer, by hand ---------------------------------------------------------------------------------------------


def test_a_diagonal_gradient_worked_out_by_hand():
    """G = diag(4, 3, 2, 1), r = 2: A takes e1, e2 and B takes e3, e4; the gain is 4^(1/4) / sqrt(4) = 0.7071."""
    layer = known("l", torch.eye(4), torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
    factors = start_of(LoRAGA(stable_gamma=4.0), layer, 2, scaling=2.0)
    g = 2.0**-0.5
    assert torch.allclose(factors.lora_A, torch.tensor([[g, 0, 0, 0], [0, g, 0, 0]]), atol=1e-6)
    assert torch.allclose(factors.lora_B, torch.tensor([[0, 0], [0, 0], [g, 0], [0, g]]), atol=1e-6)
    assert torch.allclose(first_direction(layer.gradient, factors), layer.gradient.double() / 2, atol=1e-6)


def test_a_gradient_step_moves_the_weight_by_the_scaled_direction():
    """The identity behind the method: dL = <G, dW>; one SGD step of rate l moves W by -l s^2 M to first order in l."""
    layer, scaling, rate = layer_of(gapped(10, 8)), 3.0, 1e-6
    factors = start_of(LoRAGA(), layer, 2, scaling=scaling)
    A, B, G = factors.lora_A.double(), factors.lora_B.double(), layer.gradient.double()
    stepped_A, stepped_B = A - rate * scaling * B.mT @ G, B - rate * scaling * G @ A.mT
    moved = scaling * (stepped_B @ stepped_A - B @ A)
    assert relative(moved, -rate * scaling**2 * first_direction(layer.gradient, factors)) <= 1e-5


# --- acceptance properties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_and_columns_are_orthogonal_of_norm_out_to_a_quarter_over_root_gamma(direction):
    factors = start_of(LoRAGA(direction=direction), layer_of(gapped()))
    wanted = 0.65804**2 * torch.eye(4)
    assert torch.allclose(factors.lora_A @ factors.lora_A.T, wanted, atol=1e-4)
    assert torch.allclose(factors.lora_B.T @ factors.lora_B, wanted, atol=1e-4)
    assert pytest.approx(0.65804, abs=1e-5) == 48**0.25 / 4


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("out", "inputs"), [(48, 32), (32, 48), (160, 130)])
def test_the_first_direction_is_the_best_approximation_of_rank_2r(direction, out, inputs):
    layer = layer_of(gapped(out, inputs))
    factors = start_of(LoRAGA(direction=direction), layer)
    assert relative(first_direction(layer.gradient, factors), math.sqrt(out) / 16 * best(layer.gradient, 8)) <= 1e-4


def test_a_flat_spectrum_costs_a_percent_at_most():
    values = torch.arange(1, 201, dtype=torch.float64) ** -0.5
    layer = layer_of(spectrum(300, 200, values))
    factors = start_of(LoRAGA(), layer)
    assert relative(first_direction(layer.gradient, factors), math.sqrt(300) / 16 * best(layer.gradient, 8)) <= 1.5e-2


def test_rows_of_a_and_columns_of_b_are_singular_vectors_up_to_sign():
    gradient = gapped(160, 130)
    U, _, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    factors = start_of(LoRAGA(), layer_of(gradient))
    rows = nn.functional.normalize(factors.lora_A.double(), dim=1)
    columns = nn.functional.normalize(factors.lora_B.double(), dim=0)
    assert ((rows @ Vh[:4].mT).diagonal().abs() > 0.999).all()
    assert ((columns.mT @ U[:, 4:8]).diagonal().abs() > 0.999).all()


@settings(max_examples=20)
@given(power=st.integers(-40, 40), direction=st.sampled_from(DIRECTIONS), scale=st.sampled_from(SCALES))
def test_the_size_of_the_gradient_does_not_matter(power, direction, scale):
    layer, method = layer_of(gapped(20, 24)), LoRAGA(direction=direction, scale=scale)
    one, other = start_of(method, layer), start_of(method, layer, gradient=layer.gradient * 2.0**power)
    assert torch.allclose(one.lora_A, other.lora_A, atol=1e-6)
    assert torch.allclose(one.lora_B, other.lora_B, atol=1e-6)
    third = start_of(method, layer, gradient=layer.gradient * 3.7)
    assert relative(third.lora_A.T @ third.lora_A, one.lora_A.T @ one.lora_A) <= 1e-4
    assert relative(third.lora_B @ third.lora_B.T, one.lora_B @ one.lora_B.T) <= 1e-4


@settings(max_examples=40)
@given(
    out=st.integers(2, 14),
    inputs=st.integers(2, 14),
    rank=st.integers(1, 7),
    direction=st.sampled_from(DIRECTIONS),
    scale=st.sampled_from(SCALES),
    gamma=st.floats(0.5, 100),
    scaling=st.floats(0.1, 32),
    seed=st.integers(0, 2**16),
)
def test_the_factors_are_those_of_the_slow_reference(out, inputs, rank, direction, scale, gamma, scaling, seed):
    """Products that no sign can change, against a dense float64 SVD."""
    rank = min(rank, min(out, inputs) // 2)
    G = spectrum(out, inputs, 0.5 ** torch.arange(min(out, inputs), dtype=torch.float64), seed)
    layer = layer_of(G, seed=seed + 5)
    factors = start_of(LoRAGA(direction=direction, scale=scale, stable_gamma=gamma), layer, rank, scaling=scaling)
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    for_A, for_B = directions(direction, rank, generator(0, "lora_ga_direction", layer.shape.name))
    weights = torch.linalg.svdvals(layer.weight.double())[:rank]
    size = {
        "stable": out**0.25 / gamma**0.5,
        "gd": 1 / scaling,
        "unit": 1.0,
        "weightS": float((weights / scaling).sqrt().mean()),
    }[scale]
    assert relative(factors.lora_A.mT @ factors.lora_A, size**2 * Vh[for_A].mT @ Vh[for_A]) <= 1e-3
    assert relative(factors.lora_B @ factors.lora_B.mT, size**2 * U[:, for_B] @ U[:, for_B].mT) <= 1e-3


def test_a_layer_of_too_few_singular_vectors_is_refused_by_name_before_anything_is_computed():
    shapes = [LayerShape("a", 24, 12), LayerShape("b", 100, 100), LayerShape("c", 9, 50)]
    with pytest.raises(ConfigError) as caught:
        LoRAGA().check_ranks(shapes, [8, 8, 5])
    assert len(caught.value.faults) == 2
    assert "layer a (24 x 12) has 12 singular vectors, and rank 8 takes 16: lower r to 6" in caught.value.faults[0]
    assert "on_small: cap" in caught.value.faults[1]
    LoRAGA(on_small="cap").check_ranks(shapes, [8, 8, 5])
    with pytest.raises(ConfigError, match=r"layers\.0\.q"):
        start_of(LoRAGA(), layer_of(gapped(24, 12)), 8)


def test_capped_ranks_start_as_plain_lora_s():
    layer = layer_of(gapped(24, 11))
    factors = start_of(LoRAGA(on_small="cap"), layer, 8)
    five = start_of(LoRAGA(), layer, 5)
    assert torch.equal(factors.lora_A[:5], five.lora_A)
    assert torch.equal(factors.lora_B[:, :5], five.lora_B)
    plain = kaiming_uniform(8, 11, generator(0, "lora_A", layer.shape.name))
    assert torch.equal(factors.lora_A[5:], plain[5:])
    assert not factors.lora_B[:, 5:].any()
    notes = LoRAGA(on_small="cap").start_notes(statistics({"l": layer}), {"l": factors}, 0)
    assert "too few singular vectors for 2r in layer l: the ranks beyond started as plain LoRA" in notes[-1]


def test_a_layer_of_one_feature_has_nothing_to_start_from():
    layer = layer_of(random(6, 1))
    factors = start_of(LoRAGA(on_small="cap"), layer, 1)
    assert not factors.lora_B.any()
    (note,) = LoRAGA(on_small="cap").start_notes(statistics({"l": layer}), {"l": factors}, 0)
    assert "a single singular vector in layer l" in note
    assert "started as plain LoRA, without an offset" in note


def statistics(layers, **changed):
    from tests.methods.support import GradientStatistics

    found = {
        name: LayerStatistics(shape=layer.shape, batches=1, gradient=changed.get(name, layer.gradient))
        for name, layer in layers.items()
    }
    return GradientStatistics(
        layers=found, batches=1, skipped=0, tokens=1.0, loss=1.0, memory="exact", collector="outer"
    )


def test_a_layer_without_gradient_starts_as_plain_lora_with_a_warning():
    layer, other = layer_of(torch.zeros(12, 10)), layer_of(gapped(12, 10))
    factors = start_of(LoRAGA(), layer, 3)
    assert torch.equal(factors.lora_A, kaiming_uniform(3, 10, generator(0, "lora_A", layer.shape.name)))
    assert not factors.lora_B.any()
    start = {"one": factors, "two": start_of(LoRAGA(), other, 3)}
    notes = LoRAGA().start_notes(statistics({"one": layer, "two": other}), start, 0)
    assert "warning: no gradient in layer one: started as plain LoRA, without an offset" in notes[-1]
    assert "two" in notes[1]


@pytest.mark.parametrize("kind", ["gradient", "projection", "left_projection"])
def test_a_gradient_that_is_not_finite_is_an_error_with_the_layer_s_name(kind):
    shape = LayerShape("layers.3.up", 6, 6)
    bad = torch.full((6, 6), torch.nan)
    layer = known(shape.name, random(6, 6), bad)
    start = Start(
        layer=layer.layer,
        rank=2,
        divisor=2.0,
        budget=budget_of([shape], 2),
        seed=0,
        dtype_cast=lambda factor: factor,
        statistics=LayerStatistics(shape=shape, batches=1, **{kind: bad}),
    )
    with pytest.raises(CalibrationError, match=r"layers\.3\.up: the mean gradient is not finite"):
        LoRAGA().initialize(start)
    with pytest.raises(CalibrationError, match="there are none"):
        LoRAGA().initialize(replace(start, statistics=None))


def test_the_factors_are_rounded_to_the_adapter_s_own_dtype():
    layer = layer_of(gapped())
    budget = budget_of([layer.shape], 4)
    factors = LoRAGA().initialize(
        Start(
            layer=layer.layer,
            rank=4,
            divisor=4.0,
            budget=budget,
            seed=0,
            dtype_cast=lambda factor: factor.bfloat16().float(),
            statistics=LayerStatistics(shape=layer.shape, batches=1, gradient=layer.gradient),
        )
    )
    assert all(torch.equal(f, f.bfloat16().float()) for f in (factors.lora_A, factors.lora_B))


def test_the_same_seed_gives_the_same_bits_and_no_global_state_moves():
    layer, before = layer_of(gapped(160, 130)), torch.random.get_rng_state()
    one, two = (start_of(LoRAGA(direction="random", scale="weightS"), layer, seed=3) for _ in range(2))
    assert torch.equal(one.lora_A, two.lora_A)
    assert torch.equal(one.lora_B, two.lora_B)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = start_of(LoRAGA(direction="random"), layer, seed=4)
    assert not torch.equal(other.lora_A, start_of(LoRAGA(direction="random"), layer, seed=3).lora_A)


# --- the pieces -----------------------------------------------------------------------------------------------------


def test_directions_split_the_2r_leading_vectors_as_tabulated():
    source = torch.Generator().manual_seed(0)
    table = {"ArB2r": ([0, 1, 2], [3, 4, 5]), "A2rBr": ([3, 4, 5], [0, 1, 2]), "ArBr": ([1, 3, 5], [0, 2, 4])}
    for direction, wanted in table.items():
        assert tuple(part.tolist() for part in directions(direction, 3, source)) == wanted
    first, second = directions("random", 3, source)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(6))


def test_gains_are_those_of_the_table():
    assert gain("stable", 16, 4.0, 8.0) == 1.0
    assert gain("gd", 16, 4.0, 8.0) == 0.125
    assert gain("unit", 16, 4.0, 8.0) == 1.0
    assert weight_gain(torch.tensor([32.0, 8.0]), 2.0) == 3.0  # mean of 4 and 2


def test_clipping_brings_the_largest_entry_of_the_update_down_to_the_largest_weight():
    layer = layer_of(gapped(20, 16))
    plain = start_of(LoRAGA(stable_gamma=0.1), layer, 3, scaling=30.0)
    clipped = start_of(LoRAGA(stable_gamma=0.1, norm_clip=True), layer, 3, scaling=30.0)
    largest = lambda f: float((30.0 * f.lora_B @ f.lora_A).abs().max())  # noqa: E731
    limit = float(layer.weight.abs().max())
    assert largest(plain) > limit
    assert largest(clipped) == pytest.approx(limit, rel=1e-5)
    root = (limit / largest(plain)) ** 0.5
    assert torch.allclose(clipped.lora_A, root * plain.lora_A, rtol=1e-5)
    assert torch.allclose(clipped.lora_B, root * plain.lora_B, rtol=1e-5)
    small = start_of(LoRAGA(norm_clip=True), layer, 3, scaling=0.01)
    assert torch.equal(small.lora_A, start_of(LoRAGA(), layer, 3, scaling=0.01).lora_A)
    assert clip_ratio(layer.weight, torch.zeros(1, 16), torch.zeros(20, 1), 1.0) == 1.0


def test_a_conv1d_layer_is_seen_as_out_by_in():
    from transformers.pytorch_utils import Conv1D

    with torch.random.fork_rng():
        module = Conv1D(20, 16)
    layer = LinearLayer("l", module, "conv1d", LayerShape("l", 20, 16))
    flat = known("l", layer.weight().contiguous(), gapped(20, 16))
    method = LoRAGA(scale="weightS", norm_clip=True)
    found = start_of(method, Known(layer, flat.weight, flat.gradient), 3)
    wanted = start_of(method, flat, 3)
    assert torch.equal(found.lora_A, wanted.lora_A)
    assert torch.equal(found.lora_B, wanted.lora_B)


# --- settings -------------------------------------------------------------------------------------------------------


def test_it_fills_the_initialize_slot_and_says_where_the_start_is_subtracted():
    assert LoRAGA.slots == frozenset({Slot.INITIALIZE})
    assert [LoRAGA(offset=place).offset_place for place in ("adapter", "base", "none")] == ["adapter", "base", "none"]
    assert LoRAGA.learning_rates[1] <= 2e-4 / 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"direction": "ArB2"}, r"lora-ga\.direction: 'ArB2' is not known \(did you mean 'ArB2r'\?\)"),
        ({"scale": "gd_scale"}, r"lora-ga\.scale: 'gd_scale'.*use one of stable, gd, unit, weightS"),
        ({"stable_gamma": 0.0}, r"lora-ga\.stable_gamma: 0\.0 is out of range"),
        ({"stable_gamma": math.nan}, r"lora-ga\.stable_gamma"),
        ({"norm_clip": 1}, r"lora-ga\.norm_clip: 1 is not a flag"),
        ({"offset": "base_model"}, r"lora-ga\.offset"),
        ({"on_small": "skip"}, r"lora-ga\.on_small: 'skip'.*error, cap"),
        ({"statistics": "full"}, r"lora-ga\.statistics"),
        ({"power_iterations": -1}, r"lora-ga\.power_iterations: -1"),
        ({"variant": "fork"}, r"lora-ga\.variant"),
        ({"variant": "peft", "norm_clip": True}, r"PEFT's variant has no norm clipping"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoRAGA(**settings)


def test_the_official_preset_is_the_authors_setting():
    method = LoRAGA(**LoRAGA.presets["official"])
    assert (method.direction, method.scale, method.stable_gamma, method.offset) == ("ArB2r", "stable", 16.0, "base")
    assert not method.norm_clip


def test_the_id_names_the_method():
    assert method_from_id("lora-ga", {"stable_gamma": 64.0}) == LoRAGA(stable_gamma=64.0)


def test_auto_is_exact_up_to_a_size_and_asks_for_another_request_beyond():
    small, large = [LayerShape("l", 4096, 4096)] * 64, [LayerShape("l", 4096, 4096)] * 65
    assert EXACT_UP_TO == 64 * 4096**2
    budget = budget_of(small, 8)
    assert LoRAGA().request(small, budget, 0).gradient
    assert not LoRAGA().request(large, budget, 0).gradient
    assert LoRAGA(statistics="exact").request(large, budget, 0).gradient
    requests = [
        LoRAGA().request(small, budget, 0),
        LoRAGA(statistics="sketch").request(small, budget, 0),
        LoRAGA(statistics="sketch").request(small, budget, 1),
        LoRAGA(statistics="sketch", power_iterations=2).request(small, budget, 0),
        LoRAGA(statistics="sketch").request(small, budget_of(small, 9), 0),
    ]
    assert len({request.identity for request in requests}) == len(requests)


@settings(max_examples=30)
@given(
    direction=st.sampled_from(DIRECTIONS),
    rank=st.integers(1, 5),
    power=st.floats(-30, 30),
    ratio=st.floats(0.5, 1.0),
    variant=st.sampled_from(["official", "peft"]),
)
def test_the_error_is_that_of_the_dense_difference(direction, rank, power, ratio, variant):
    gradient = gapped(20, 12, ratio=ratio) * 2.0**power
    factors = start_of(LoRAGA(direction=direction, variant=variant), layer_of(gradient), rank)
    missed, whole = missed_energy(gradient, factors)
    unit = Factors(
        nn.functional.normalize(factors.lora_A.double(), dim=1), nn.functional.normalize(factors.lora_B.double(), dim=0)
    )
    wanted = (gradient.double() - first_direction(gradient, unit)).norm() / gradient.double().norm()
    assert (missed / whole) ** 0.5 == pytest.approx(float(wanted), rel=1e-3, abs=2e-3)


def test_a_huge_gradient_is_finite_although_its_norm_is_not():
    layer = layer_of(gapped(12, 10))
    huge = start_of(LoRAGA(), layer, 3, gradient=layer.gradient * 1e25)
    assert torch.allclose(huge.lora_A, start_of(LoRAGA(), layer, 3).lora_A, atol=1e-5)


def test_notes_tell_the_error_in_all_and_by_layer(caplog):
    layers = {f"layers.{k}.q": layer_of(gapped(12, 10, seed=k), name=f"layers.{k}.q") for k in range(2)}
    start = {name: start_of(LoRAGA(), layer, 2) for name, layer in layers.items()}
    with caplog.at_level(logging.INFO, "rankwise"):
        total, by_layer = LoRAGA().start_notes(statistics(layers), start, 0)
    error = (sum(0.6 ** (2 * k) for k in range(4, 10)) / sum(0.6 ** (2 * k) for k in range(10))) ** 0.5
    assert f"relative error of {error:.2f} against the gradient (whole gradients)" in total
    assert by_layer.endswith(f"layers.0.q {error:.2f}, layers.1.q {error:.2f}")
    assert caplog.messages[0].startswith("lora-ga: layers.0.q: relative error 0.")
    many = {f"layers.{k}.{leaf}": layers["layers.0.q"] for k in range(20) for leaf in "qk"}
    started = dict.fromkeys(many, start["layers.0.q"])
    assert "q 0.13 to 0.13, k 0.13 to 0.13 (each layer's is logged)" in LoRAGA().start_notes(
        statistics(many), started, 0
    )[1].replace(f"{error:.2f}", "0.13")
    assert LoRAGA().start_notes(None, start, 0) == ()


def test_peft_s_variant_is_told_no_error_because_its_direction_is_not_that_of_unit_vectors():
    layer, zero, method = layer_of(gapped(12, 10)), layer_of(torch.zeros(12, 10)), LoRAGA(variant="peft")
    start = {"one": start_of(method, layer, 2), "two": start_of(method, zero, 2)}
    (note,) = method.start_notes(statistics({"one": layer, "two": zero}), start, 0)
    assert "no gradient in layer two" in note
