"""SoRA against the numbers of its official code, every case that the manifest names (sora.md section 8)."""

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.methods.sora import gate_adam, l1_gradient, official_threshold, soft_threshold, threshold_path
from tests.golden.manifest import case_parameters, golden_folder, load_tensors, read_manifest, relative_error

FOLDER = golden_folder()
MANIFEST = read_manifest(FOLDER, "sora") or {}


def cases(prefix: str) -> list[Any]:
    found = ((name, {"name": name, **case}) for name, case in MANIFEST.get("cases", {}).items())
    return case_parameters(FOLDER, "sora", prefix, [(n, case) for n, case in found if n.startswith(prefix)])


def tensors_of(case: dict[str, Any]) -> dict[str, Tensor]:
    assert hashlib.sha256((FOLDER / case["file"]).read_bytes()).hexdigest() == case["sha256"]
    found = load_tensors(FOLDER, case["file"])
    assert {name: list(tensor.shape) for name, tensor in found.items()} == case["tensors"]
    return found


def test_every_case_has_a_kind_that_is_tested() -> None:
    kinds = ("prox_", "adamw_", "layer_", "l1_loss", "schedule_phase_lr0")
    assert all(name.startswith(kinds) for name in MANIFEST.get("cases", {}))


@pytest.mark.parametrize("case", cases("prox_"))
def test_the_official_map_is_exact(case: dict[str, Any]) -> None:
    tensors = tensors_of(case)
    found = official_threshold(tensors["p_in"], case["params"]["lambda"])
    assert torch.equal(found, tensors["p_out"])
    if "soft_threshold_true" in tensors:
        soft = soft_threshold(tensors["p_in"], case["params"]["lambda"])
        assert torch.equal(soft, tensors["soft_threshold_true"])


def walked(
    tensors: dict[str, Tensor], rates: list[float], thresholds: list[float], **settings: Any
) -> dict[str, Tensor]:
    """The official optimizer's walk with ours: p [T+1, ...], exp_avg and exp_avg_sq [T, ...]."""
    p = tensors["p"][0].clone()
    first, second = torch.zeros_like(p), torch.zeros_like(p)
    path, firsts, seconds = [p.clone()], [], []
    for step, (grad, lr, xi) in enumerate(zip(tensors["grads"], rates, thresholds, strict=True), 1):
        gate_adam(p, grad, first, second, step=step, lr=lr, **settings)
        if xi > 0:
            p = official_threshold(p, xi)
        path.append(p.clone()), firsts.append(first.clone()), seconds.append(second.clone())
    return {"p": torch.stack(path), "exp_avg": torch.stack(firsts), "exp_avg_sq": torch.stack(seconds)}


@pytest.mark.parametrize("case", cases("adamw_"))
def test_trajectories_agree_to_1e_7(case: dict[str, Any]) -> None:
    tensors, params = tensors_of(case), case["params"]
    steps = len(tensors["grads"])
    xi = params["lambda"] * (params["lr"] if "mul_lr" in case["name"] else 1.0)
    found = walked(
        tensors,
        [params["lr"]] * steps,
        [xi] * steps,
        betas=tuple(params["betas"]),
        eps=params["eps"],
        weight_decay=params["weight_decay"],
        bias_correction=params["correct_bias"],
    )
    for name, value in found.items():
        assert (value - tensors[name]).abs().max() <= 1e-7, name


@pytest.mark.parametrize("case", cases("schedule_phase_lr0"))
def test_the_phase_after_an_exhausted_schedule_moves_by_the_threshold_alone(case: dict[str, Any]) -> None:
    tensors, params = tensors_of(case), case["params"]
    values = threshold_path("linear", *params["lambda_linear"][:2], params["lambda_linear"][2])
    advances = params["step_lambda_before_steps"]
    thresholds = [values[sum(step >= at for at in advances)] for step in range(len(tensors["grads"]))]
    found = walked(
        tensors,
        tensors["lr"].tolist(),
        thresholds,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.0,
        bias_correction=True,
    )
    assert (found["p"] - tensors["p"]).abs().max() <= 1e-7


@pytest.mark.parametrize("case", cases("l1_loss"))
def test_the_l1_term_and_its_gradient(case: dict[str, Any]) -> None:
    tensors, params = tensors_of(case), case["params"]
    gates = {side: tensors[f"gate_{side}"] for side in ("a", "b")}
    entries = sum(gate.numel() for gate in gates.values())
    for side, gate in gates.items():
        assert relative_error(l1_gradient(gate, params["sparse_lambda"], entries), tensors[f"grad_{side}"]) <= 1e-7
    term = params["sparse_lambda"] * sum(gate.abs().sum() for gate in gates.values()) / entries
    assert abs(float(params["task_loss"] + term - tensors["loss"])) <= 1e-6


@pytest.mark.parametrize("case", cases("layer_"))
def test_a_gated_layer_computes_and_differentiates_as_theirs(case: dict[str, Any]) -> None:
    tensors, params = tensors_of(case), case["params"]
    A, B = (nn.Parameter(tensors[name].clone()) for name in ("A", "B"))
    gate, x = nn.Parameter(tensors["gate"].flatten().clone()), tensors["x"].clone().requires_grad_()
    y = params["scaling"] * ((x @ A.T) * gate) @ B.T
    y.backward(tensors["upstream"])
    found = {"y": y.detach(), "grad_A": A.grad, "grad_B": B.grad, "grad_x": x.grad, "grad_gate": gate.grad[None]}
    for name, value in found.items():
        assert relative_error(value, tensors[name]) <= 1e-6, name
    zero = tensors["gate"].flatten() == 0
    assert zero.any()
    assert not A.grad[zero].any()
    assert not B.grad[:, zero].any()
    assert gate.grad[zero].all()


@pytest.mark.parametrize(("key", "values"), sorted(MANIFEST.get("lambda_schedules", {}).items()))
def test_threshold_paths_agree_to_1e_12(key: str, values: list[float]) -> None:
    kind, first, last, count = key.rsplit("_", 3)
    found = threshold_path(kind, float(first), float(last), int(count))  # type: ignore[arg-type]
    whole = [*found, *[found[-1]] * (len(values) - len(found))]
    assert whole == pytest.approx(values, abs=1e-12)
