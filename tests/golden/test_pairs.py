"""LoRA-Pro and LoRA-RITE against the numbers of their official codes, one test a case that a manifest names.

Each case judges two things: the slow references of tests/methods/reference_pairs.py, and the product's optimizers. A
case is run by its fields (lora_pro.md and lora_rite.md section 8); a note that begins with DO NOT MATCH marks a defect
of the official code, which both must not reproduce.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise.methods.lora_pro import LoRAProOptimizer
from rankwise.methods.lora_rite import LoRARITEOptimizer
from tests.golden.manifest import (
    assert_declared,
    case_parameters,
    golden_folder,
    load_tensors,
    read_manifest,
    relative_error,
)
from tests.methods.reference_pairs import PlainAdamW, ProPair, Rite, RitePair

FOLDER = golden_folder()
MODES = {"sgd": "sgd", "adamw_efficient": "efficient", "adamw_full": "full", "head_deepspeed": "full"}

Factors = list[tuple[Tensor, Tensor]]
"""A and B of each pair."""

Walk = tuple[Callable[[Sequence[tuple[Tensor, Tensor]]], Factors], Factors]
"""A step that takes (gA, gB) of each pair and returns the factors after it; the start."""


def cases(family: str) -> list[Any]:
    manifest = read_manifest(FOLDER, family) or {}
    found = (
        (case["case"], case | {"file": case.get("file", manifest.get("file"))}) for case in manifest.get("cases", [])
    )
    return case_parameters(FOLDER, family, "trajectory", found)


def not_to_be_matched(case: dict[str, Any]) -> bool:
    return bool(case["note"].startswith("DO NOT MATCH")) or case.get("mode") == "head_deepspeed"


def declared(case: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, list[int]]]:
    """What the fields say of every tensor under the case's name: dtype and shape of each declared key."""
    dtype = f"torch.{case['dtype']}"
    return {f"{case['case']}.{key}": (dtype, list(shapes[key])) for key in case["keys"]}


def pair_shapes(out_features: int, in_features: int, rank: int, steps: int, prefix: str = "") -> dict[str, Any]:
    shapes = {
        "A": (steps + 1, rank, in_features),
        "B": (steps + 1, out_features, rank),
        "grad_A": (steps, rank, in_features),
        "grad_B": (steps, out_features, rank),
        "product": (steps + 1, out_features, in_features),
        "G": (steps, out_features, in_features),
        "target": (out_features, in_features),
        "W0": (steps + 1, out_features, in_features),
    }
    return {prefix + key: shape for key, shape in shapes.items()}


def own_tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    name = case["case"] + "."
    return {key: value for key, value in load_tensors(FOLDER, case["file"]).items() if key.startswith(name)}


def gradients_of(case: dict[str, Any], tensors: dict[str, Tensor], prefix: str, step: int, pair: tuple[Tensor, Tensor]):
    """The gradients that the case feeds, and those that its problem gives at the judged point; they must agree."""
    fed = tensors[f"{prefix}grad_A"][step], tensors[f"{prefix}grad_B"][step]
    A, B = (factor.double() for factor in pair)
    s = case["scaling"]
    G = tensors[f"{prefix}G"][step] if case["problem"] == "sequence" else s * B @ A - tensors[f"{prefix}target"]
    bound = max(case["rtol"], 1e-5 if case["dtype"] == "float32" else 0.0)
    if not not_to_be_matched(case):
        assert relative_error(fed[0], s * B.mT @ G.double()) <= 10 * bound
        assert relative_error(fed[1], s * G.double() @ A.mT) <= 10 * bound
    return fed


def worst_error(case: dict[str, Any], tensors: dict[str, Tensor], walk: Walk, prefixes: Sequence[str]) -> float:
    """Steps along the case's gradients; the largest relative error of A, B and s B A over all steps and pairs."""
    step, factors = walk
    worst = 0.0
    for number in range(case["steps"]):
        fed = [gradients_of(case, tensors, p, number, pair) for p, pair in zip(prefixes, factors, strict=True)]
        factors = step(fed)
        for prefix, (A, B) in zip(prefixes, factors, strict=True):
            product = case["scaling"] * B.double() @ A.double()
            for key, found in (("A", A), ("B", B), ("product", product)):
                worst = max(worst, relative_error(found, tensors[prefix + key][number + 1]))
    return worst


def verdict(case: dict[str, Any], worst: float) -> None:
    assert (worst > case["rtol"]) if not_to_be_matched(case) else (worst <= case["rtol"]), f"{worst:.2e}"


def parameters_from(starts: Factors) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(factor.clone()) for pair in starts for factor in pair]


def product_walk(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> Walk:
    def factors() -> Factors:
        return [(A.detach(), B.detach()) for A, B in zip(parameters[::2], parameters[1::2], strict=True)]

    def step(fed: Sequence[tuple[Tensor, Tensor]]) -> Factors:
        for parameter, gradient in zip(parameters, (g for both in fed for g in both), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        return factors()

    return step, factors()


# LoRA-Pro.


def lora_pro_tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    tensors = own_tensors(case)
    shapes = pair_shapes(case["out"], case["in"], case["r"], case["steps"])
    if case["head"]:
        head = tensors[f"{case['case']}.head"].shape[1:]
        shapes |= {"head": (case["steps"] + 1, *head), "head_grad": (case["steps"], *head)}
    assert_declared(tensors, declared(case, shapes))
    return tensors


@pytest.mark.parametrize("case", cases("lorapro"))
def test_the_reference_of_lora_pro_equals_the_official_code(case: dict[str, Any]) -> None:
    tensors, prefix = lora_pro_tensors(case), case["case"] + "."
    pair = ProPair(
        tensors[prefix + "A"][0],
        tensors[prefix + "B"][0],
        scaling=case["scaling"],
        lr=case["lr"],
        mode=MODES[case["mode"]],
        x_mode=case["X_mode"],
        betas=tuple(case["betas"]),
        eps=case["eps"],
        weight_decay=case["weight_decay"],
        delta=case["delta"],
    )

    def step(fed: Sequence[tuple[Tensor, Tensor]]) -> Factors:
        pair.step(*fed[0])
        return [(pair.A, pair.B)]

    verdict(case, worst_error(case, tensors, (step, [(pair.A, pair.B)]), [prefix]))
    if case["head"]:
        head = PlainAdamW(
            tensors[prefix + "head"][0], case["lr"], tuple(case["betas"]), case["eps"], case["weight_decay"]
        )
        for number in range(case["steps"]):
            head.step(tensors[prefix + "head_grad"][number])
            assert relative_error(head.value, tensors[prefix + "head"][number + 1]) <= case["rtol"]


@pytest.mark.parametrize("case", cases("lorapro"))
def test_lora_pro_equals_the_official_code(case: dict[str, Any]) -> None:
    tensors, prefix = lora_pro_tensors(case), case["case"] + "."
    parameters = parameters_from([(tensors[prefix + "A"][0], tensors[prefix + "B"][0])])
    groups: list[dict[str, Any]] = [{"params": parameters, "kind": "lora_pair", "scaling": [case["scaling"]]}]
    head = torch.nn.Parameter(tensors[prefix + "head"][0].clone()) if case["head"] else None
    if head is not None:
        groups.append({"params": [head], "kind": "plain"})
    optimizer = LoRAProOptimizer(
        groups,
        lr=case["lr"],
        mode=MODES[case["mode"]],
        x_mode=case["X_mode"],
        betas=tuple(case["betas"]),
        eps=case["eps"],
        weight_decay=case["weight_decay"],
        delta=case["delta"],
    )
    step, start = product_walk(optimizer, parameters)
    number = 0

    def with_head(fed: Sequence[tuple[Tensor, Tensor]]) -> Factors:
        nonlocal number
        if head is not None:
            head.grad = tensors[prefix + "head_grad"][number].clone()
        factors = step(fed)
        number += 1
        if head is not None:
            assert relative_error(head.detach(), tensors[prefix + "head"][number]) <= case["rtol"]
        return factors

    verdict(case, worst_error(case, tensors, (with_head, start), [prefix]))


# LoRA-RITE.


def lora_rite_tensors(case: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    tensors, shapes = own_tensors(case), {}
    for number, pair in enumerate(case["pairs"]):
        shapes |= pair_shapes(pair["out"], pair["in"], pair["r"], case["steps"], f"p{number}.")
    assert_declared(tensors, declared(case, shapes))
    return tensors, [f"{case['case']}.p{number}." for number in range(len(case["pairs"]))]


@pytest.mark.parametrize("case", cases("rite"))
def test_the_reference_of_lora_rite_equals_the_official_code(case: dict[str, Any]) -> None:
    tensors, prefixes = lora_rite_tensors(case)
    rite = Rite(
        [RitePair(tensors[prefix + "A"][0], tensors[prefix + "B"][0]) for prefix in prefixes],
        lr=case["lr"],
        betas=tuple(case["betas"]),
        eps=case["eps"],
        clip=case["clip_unmagnified_grad"],
        skip=case["update_skipping"],
        cap=case["update_capping"],
        weight_decay=case["weight_decay"],
        escape=case["apply_escape"],
        balance=case["balance_param"],
    )

    def step(fed: Sequence[tuple[Tensor, Tensor]]) -> Factors:
        rite.step(fed)
        return [(pair.A, pair.B) for pair in rite.pairs]

    start = [(pair.A, pair.B) for pair in rite.pairs]
    verdict(case, worst_error(case, tensors, (step, start), prefixes))


@pytest.mark.parametrize("case", cases("rite"))
def test_lora_rite_equals_the_official_code(case: dict[str, Any]) -> None:
    tensors, prefixes = lora_rite_tensors(case)
    parameters = parameters_from([(tensors[prefix + "A"][0], tensors[prefix + "B"][0]) for prefix in prefixes])
    optimizer = LoRARITEOptimizer(
        [{"params": parameters, "kind": "lora_pair", "scaling": [case["scaling"]] * len(prefixes)}],
        lr=case["lr"],
        betas=tuple(case["betas"]),
        eps=case["eps"],
        weight_decay=case["weight_decay"],
        clip_unmagnified_grad=case["clip_unmagnified_grad"],
        update_skipping=case["update_skipping"],
        update_capping=case["update_capping"],
        apply_escape=case["apply_escape"],
        balance_param=case["balance_param"],
    )
    verdict(case, worst_error(case, tensors, product_walk(optimizer, parameters), prefixes))


def transformed_twins() -> list[Any]:
    """Cases that start the same problem from (R A, B R^-1): their notes say that the products must coincide."""
    found = {case["case"]: case for case in (read_manifest(FOLDER, "rite") or {}).get("cases", [])}
    twins = []
    for name, case in found.items():
        words = case["note"].replace(",", " ").split()
        twins += [(name, (case, found[word])) for word in words if word in found and "coincide" in case["note"]]
    return case_parameters(FOLDER, "rite", "twins", twins)


@pytest.mark.parametrize("twins", transformed_twins())
def test_products_of_transformed_starts_coincide(twins: tuple[dict[str, Any], dict[str, Any]]) -> None:
    products = []
    for case in twins:
        case = case | {"file": case.get("file", (read_manifest(FOLDER, "rite") or {}).get("file"))}
        tensors, (prefix,) = lora_rite_tensors(case)
        parameters = parameters_from([(tensors[prefix + "A"][0], tensors[prefix + "B"][0])])
        optimizer = LoRARITEOptimizer(
            [{"params": parameters, "kind": "lora_pair", "scaling": [case["scaling"]]}],
            lr=case["lr"],
            weight_decay=case["weight_decay"],
        )
        step, _ = product_walk(optimizer, parameters)
        for number in range(case["steps"]):
            ((A, B),) = step([(tensors[prefix + "grad_A"][number], tensors[prefix + "grad_B"][number])])
        products.append(case["scaling"] * B @ A)
    assert relative_error(products[1], products[0]) < 1e-12
