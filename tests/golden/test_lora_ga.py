"""LoRA-GA against the numbers of its official code, one test a case that the manifest names (lora_ga.md section 8)."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rankwise.adapters.attach import adapted_layers
from rankwise.adapters.offset import LiveOffset
from rankwise.adapters.state import FactorPair
from rankwise.calibration.statistics import LayerStatistics
from rankwise.errors import ConfigError
from rankwise.methods.base import Budget, Factors, Start
from rankwise.methods.lora_ga import LoRAGA
from rankwise.ranks.shapes import LayerShape, ScalingRule
from tests.golden.manifest import (
    assert_declared,
    file_cases,
    golden_folder,
    load_tensors,
    relative_error,
)
from tests.methods.support import known

FOLDER = golden_folder()
CASES = file_cases(FOLDER, "loraga", "cases")


def scaling_of(arguments: dict[str, Any]) -> float:
    rule = ScalingRule.ALPHA_OVER_SQRT_RANK if arguments["rs"] else ScalingRule.ALPHA_OVER_RANK
    return rule.scaling(arguments["alpha"], arguments["r"], arguments["r"])


def started(arguments: dict[str, Any], tensors: dict[str, Tensor], **settings: Any) -> Factors:
    """Our factors for the case's weight and gradient."""
    shape = LayerShape("golden", arguments["o"], arguments["i"])
    layer = known(shape.name, tensors["W"], tensors["G"])
    method = LoRAGA(
        direction=arguments["direction"], scale=arguments["scale"], stable_gamma=arguments["gamma"], **settings
    )
    return method.initialize(
        Start(
            layer=layer.layer,
            rank=arguments["r"],
            divisor=arguments["alpha"] / scaling_of(arguments),
            budget=Budget(r=arguments["r"], lora_alpha=arguments["alpha"], parameters=arguments["r"] * shape.cost),
            seed=0,
            dtype_cast=lambda factor: factor,
            statistics=LayerStatistics(shape=shape, batches=1, gradient=tensors["G"]),
        )
    )


def gram(factors: Factors) -> tuple[Tensor, Tensor]:
    """A^T A and B B^T, which no sign of a singular pair can change."""
    A, B = factors.lora_A.double(), factors.lora_B.double()
    return A.mT @ A, B @ B.mT


def first_direction(gradient: Tensor, factors: Factors) -> Tensor:
    rows, columns = gram(factors)
    return columns @ gradient.double() + gradient.double() @ rows


def unclipped(factors: Factors, weight: Tensor, scaling: float, norm: float) -> Factors:
    """The factors before clipping, which is checked to have brought the update's largest entry to W's."""
    largest = (scaling * factors.lora_B.double() @ factors.lora_A.double()).abs().max()
    assert largest <= weight.double().abs().max() * (1 + 1e-5)
    root = float(factors.lora_A.double().norm(dim=1).mean()) / norm
    if root < 1 - 1e-6:
        assert float(largest) == pytest.approx(float(weight.abs().max()), rel=1e-5)
    return Factors(factors.lora_A / root, factors.lora_B / root)


@pytest.mark.parametrize("case", CASES)
def test_the_start_equals_the_official_code(case: dict[str, Any]) -> None:
    tensors, arguments = load_tensors(FOLDER, case["file"]), case["args"]
    assert_declared(tensors, case["tensors"])
    assert list(tensors["W"].shape) == list(tensors["G"].shape) == [arguments["o"], arguments["i"]]
    scaling = scaling_of(arguments)
    assert scaling == pytest.approx(tensors["scaling"].item(), rel=1e-12)
    assert scaling == pytest.approx(case["scaling"], rel=1e-12)
    if 2 * arguments["r"] > min(arguments["o"], arguments["i"]):  # both codes raise: a record of the inputs only
        assert case["info"]["official"]["error"]
        with pytest.raises(ConfigError, match="golden"):
            started(arguments, tensors)
        return
    clip = bool(arguments.get("norm_clip"))
    found = started(arguments, tensors, norm_clip=clip)
    official = Factors(tensors["official_A"].float(), tensors["official_B"].float())
    if clip:
        norm = arguments["o"] ** 0.25 / arguments["gamma"] ** 0.5
        found, official = (unclipped(one, tensors["W"], scaling, norm) for one in (found, official))
    bound = 1e-3 if arguments["scale"] == "weightS" else 1e-4
    # A direction drawn at random picks other vectors: only what it leaves alone is compared.
    if arguments["direction"] != "random":
        for ours, theirs in zip(gram(found), gram(official), strict=True):
            assert relative_error(ours, theirs) <= bound
    assert relative_error(found.lora_A.norm(dim=1), official.lora_A.norm(dim=1)) <= bound
    assert relative_error(found.lora_B.norm(dim=0), official.lora_B.norm(dim=0)) <= bound
    G = tensors["G"]
    assert relative_error(first_direction(G, found), first_direction(G, official)) <= bound
    if arguments["scale"] == "stable":
        U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
        assert relative_error(S, tensors["S_exact"]) <= 1e-5
        kept = 2 * arguments["r"]
        best = math.sqrt(arguments["o"]) / arguments["gamma"] * (U[:, :kept] * S[:kept]) @ Vh[:kept]
        assert relative_error(first_direction(G, found), best) <= 1e-4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("source", ["official", "peft"])
def test_the_moved_weight_equals_the_official_code_s(case: dict[str, Any], source: str) -> None:
    """W - s B0 A0 from the recorded factors, by the offset that training uses."""
    tensors, arguments = load_tensors(FOLDER, case["file"]), case["args"]
    if "error" in case["info"][source]:
        return
    W, A, B = tensors["W"], tensors[f"{source}_A"], tensors[f"{source}_B"]
    assert relative_error(B.double() @ A.double(), tensors[f"{source}_BA"]) <= 1e-5
    with torch.random.fork_rng():
        base = nn.Sequential(nn.Linear(arguments["i"], arguments["o"], bias=False)).to(W.dtype)
    base[0].weight.data = W.clone()
    model = get_peft_model(
        base,
        LoraConfig(r=arguments["r"], lora_alpha=arguments["alpha"], use_rslora=arguments["rs"], target_modules=["0"]),
    )
    layers = adapted_layers(model)
    offset = LiveOffset(model, layers, {"0": FactorPair(A.float(), B.float())}, "base")
    moved, wanted = layers["0"].base.weight(), tensors[f"{source}_W_new"].float()
    assert (moved - wanted).abs().max() <= (2e-3 if arguments.get("bf16") else 1e-6)
    offset.close()
    assert torch.equal(layers["0"].base.module.weight, W)


@pytest.mark.parametrize("case", CASES)
def test_peft_s_own_variant_equals_peft(case: dict[str, Any]) -> None:
    tensors, arguments = load_tensors(FOLDER, case["file"]), case["args"]
    if "error" in case["info"]["peft"] or arguments["direction"] == "random":
        return
    found = started(arguments, tensors, variant="peft")
    recorded = Factors(tensors["peft_A"].float(), tensors["peft_B"].float())
    # PEFT rounds the factors to the base's dtype, and its largest singular value of W comes from a randomized SVD.
    bound = 1e-2 if arguments.get("bf16") else 5e-3 if arguments["scale"] == "weightS" else 1e-4
    for ours, theirs in zip(gram(found), gram(recorded), strict=True):
        assert relative_error(ours, theirs) <= bound
