"""LoRA-GA's statistics and start against PEFT 0.21's `preprocess_loraga` and init, and how good the sketch is.

Model: the 8 x 768 Llama of the documents, its 56 linear layers but the head, r = 8, micro-batches of 2 x 128 tokens,
float32, one thread. Time: 8 micro-batches, calibration and attach together; arms interleaved and rotated in one
process; process CPU time and wall time (the machine may be shared); ratios of a round to PEFT's arm of the same round.
Memory: 3 micro-batches, the highest sum of live allocations of torch while the arm runs, above that of a plain LoRA
pass, in float32 copies of the targets (gradients hold one). Floors: the multiplications that the arm cannot do without,
at the rate of this machine's own products, and the sums and projection matrices that it must keep. Quality: the
first-step direction B B^T G + G A^T A from this model's gradients, and on spectra of a 768 x 2,048 gradient, against
the best of rank 2r; the sketch's own estimate of its error beside the true one.

    OMP_NUM_THREADS=1 python -m benchmarks.lora_ga [--rounds 7] [--only time memory quality] [--output FILE]
"""

import argparse
import gc
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks.calibration import _peak, targets_of
from benchmarks.models import causal_batches, llama_8x768
from benchmarks.reports import measure_parts, on_one_thread, spread, write_report
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from rankwise.adapters.layers import LinearLayer
from rankwise.calibration.collect import collect
from rankwise.calibration.statistics import GradientStatistics, LayerStatistics, StatisticsRequest
from rankwise.linalg.random import generator
from rankwise.methods.base import Budget, Factors, Start
from rankwise.methods.gradient_sketch import HELD_OUT, Sketch
from rankwise.methods.lora_ga import LoRAGA
from rankwise.ranks.shapes import LayerShape, uniform_budget
from rankwise.training.attach import Calibration, attach

Arm = Callable[[], object]

BATCHES, ROWS, LENGTH, RANK, ALPHA = 8, 2, 128, 8, 16
PASS, PEFT = "plain LoRA pass", "PEFT LoRA-GA"
OURS = {
    "exact": LoRAGA(statistics="exact"),
    "sketch, one pass": LoRAGA(statistics="sketch", power_iterations=0),
    "sketch, two passes": LoRAGA(statistics="sketch", power_iterations=1),
    "sketch, four passes": LoRAGA(statistics="sketch", power_iterations=3),
}
LIMITS = {"exact": {"time": 1.0}, "sketch, one pass": {"time": 0.8, "copies": 0.25}}
SPECTRA: Mapping[str, Callable[[Tensor], Tensor]] = {
    "0.9^k": lambda k: 0.9**k,
    "1/k": lambda k: 1 / k,
    "1/sqrt(k)": lambda k: k**-0.5,
}


def peft_lora_ga(model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]) -> nn.Module:
    """PEFT's own route, statistics and init; it rewrites the base weights, which the caller puts back."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=names,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
        task_type="CAUSAL_LM",
    )

    def train_step() -> None:
        model.zero_grad(set_to_none=True)
        for batch in batches:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, train_step)
    return get_peft_model(model, config)


def arms(count: int) -> tuple[dict[str, Arm], Callable[[], None]]:
    """Every arm over `count` micro-batches on one base model, and what puts the model back after an arm."""
    model = llama_8x768().requires_grad_(False)
    layers = targets_of(model)
    batches = causal_batches(model, count, rows=ROWS, length=LENGTH)
    adapted = get_peft_model(llama_8x768(), LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = sorted({layer.name.rsplit(".", 1)[1] for layer in layers})
    weights = [layer.module.weight.detach().clone() for layer in layers]
    adapters: list[nn.Module] = []

    def plain() -> None:
        adapted.zero_grad(set_to_none=True)
        for batch in batches:
            adapted(**batch).loss.backward()

    def ours(method: LoRAGA) -> Arm:
        def arm() -> None:
            session = attach(model, method, r=RANK, lora_alpha=ALPHA, calibration=Calibration(batches=batches), seed=0)
            session.close()
            adapters.append(session.model)

        return arm

    def put_back() -> None:
        while adapters:
            adapters.pop().unload()
        for layer, weight in zip(layers, weights, strict=True):
            layer.module.weight.data.copy_(weight)
        model.requires_grad_(False).eval()

    return {
        PASS: plain,
        PEFT: lambda: adapters.append(peft_lora_ga(model, batches, names)),
        **{name: ours(method) for name, method in OURS.items()},
    }, put_back


def measure_time(rounds: int) -> dict[str, dict[str, Any]]:
    running, put_back = arms(BATCHES)
    names = list(running)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in (PASS, PEFT, "sketch, one pass"):  # warms caches and allocators up
        running[name]()
        put_back()
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            running[name]()
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
            put_back()
    found = {}
    for name in names:
        entry: dict[str, Any] = {}
        for index, clock in enumerate(("cpu", "wall")):
            taken = [both[index] for both in seconds[name]]
            entry[f"{clock}_seconds"] = spread(taken)
            for other, key in ((PEFT, "to_peft"), (PASS, "to_pass")):
                ratios = [one / both[index] for one, both in zip(taken, seconds[other], strict=True)]
                entry[f"{clock}_{key}"] = spread(ratios)
        found[name] = entry
    found["products"] = {"cpu_seconds": spread(products_seconds(rounds))}
    return found


def products_seconds(rounds: int) -> list[float]:
    """CPU time of one micro-batch's full gradients, gY.T @ X of every layer: this machine's own rate of products."""
    shapes = [layer.shape for layer in targets_of(llama_8x768())]
    factors = [(torch.randn(ROWS * LENGTH, s.out_features), torch.randn(ROWS * LENGTH, s.in_features)) for s in shapes]
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        for output_grad, inputs in factors:
            torch.mm(output_grad.T, inputs)
        taken.append(time.process_time() - started)
    return taken


def measure_memory(copy: int) -> dict[str, dict[str, float]]:
    running, put_back = arms(3)
    peaks = {}
    for name, arm in running.items():
        peaks[name] = _peak(arm)
        put_back()
    return {
        name: {"peak_bytes": peak, "copies_above_pass": round((peak - peaks[PASS]) / copy, 4)}
        for name, peak in peaks.items()
    }


def measure_quality() -> dict[str, Any]:
    return {"spectra": {name: _on_spectrum(values) for name, values in SPECTRA.items()}, "model": _on_model()}


def _on_spectrum(values: Callable[[Tensor], Tensor], rows: int = 768, columns: int = 2048) -> dict[str, Any]:
    """Errors of the first-step direction from a gradient of known spectrum: against the best of rank 2r, and own."""
    source = generator(0, "spectrum")
    U = torch.linalg.qr(torch.randn(rows, rows, generator=source)).Q
    V = torch.linalg.qr(torch.randn(columns, rows, generator=source)).Q
    singular = values(torch.arange(1, rows + 1.0))
    G, kept = (U * singular) @ V.T, 2 * RANK
    best = (U[:, :kept] * singular[:kept]) @ V[:, :kept].T
    shape, found = LayerShape("layer", rows, columns), {}
    for name, method in OURS.items():
        errors = [_errors(G, best, method, shape, seed) for seed in range(5)]
        found[name] = {key: round(statistics.mean(error[key] for error in errors), 4) for key in errors[0]}
    found["best of rank 2r, against G"] = round(float((G - best).norm() / G.norm()), 4)
    return found


def _errors(G: Tensor, best: Tensor, method: LoRAGA, shape: LayerShape, seed: int) -> dict[str, float]:
    budget = Budget(r=RANK, lora_alpha=ALPHA, parameters=uniform_budget([shape], RANK))
    found = _answered(method.request([shape], budget, seed), shape, G)
    layer = LinearLayer(shape.name, nn.Linear(1, 1), "linear", shape)
    start = method.initialize(
        Start(
            layer=layer,
            rank=RANK,
            divisor=float(RANK),
            budget=budget,
            seed=seed,
            dtype_cast=lambda factor: factor,
            statistics=found,
        )
    )
    return _against(G, best, found, start, method, seed)


def _against(
    G: Tensor, best: Tensor, found: LayerStatistics, start: Factors, method: LoRAGA, seed: int
) -> dict[str, float]:
    A, B = nn.functional.normalize(start.lora_A, dim=1), nn.functional.normalize(start.lora_B, dim=0)
    M = B @ (B.T @ G) + (G @ A.T) @ A
    told = {
        "against_best": float((M - best).norm() / best.norm()),
        "against_G": float((M - G).norm() / G.norm()),
    }
    if found.gradient is None:
        missed, whole = Sketch(method.power_iterations, seed).missed_energy(found, start)
        told["own_estimate_against_G"] = (missed / whole) ** 0.5
    return told


def _answered(request: StatisticsRequest, shape: LayerShape, G: Tensor) -> LayerStatistics:
    """What calibration would find, follow-up readings included."""

    def reading(asked: StatisticsRequest) -> GradientStatistics:
        layer = LayerStatistics(
            shape=shape,
            batches=1,
            gradient=G if asked.gradient else None,
            projection=None if asked.projection is None else G @ asked.projection(shape).T,
            left_projection=None if asked.left_projection is None else asked.left_projection(shape) @ G,
        )
        return GradientStatistics(
            layers={shape.name: layer}, batches=1, skipped=0, tokens=1.0, loss=0.0, memory="exact", collector="outer"
        )

    statistics_found = reading(request)
    for follow_up in request.follow_ups:
        statistics_found = statistics_found.updated(reading(follow_up(statistics_found)))
    return statistics_found.layers[shape.name]


def _on_model() -> dict[str, Any]:
    """The same on this model's own gradients, over all layers together."""
    model = llama_8x768().requires_grad_(False)
    layers = targets_of(model)
    batches = causal_batches(model, BATCHES, rows=ROWS, length=LENGTH)
    exact = collect(model, layers, batches, StatisticsRequest(gradient=True))
    gradients = {name: layer.gradient for name, layer in exact.layers.items()}
    best = {}
    for name, G in gradients.items():
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        best[name] = (U[:, : 2 * RANK] * S[: 2 * RANK]) @ Vh[: 2 * RANK]
    total = sum(float(G.square().sum()) for G in gradients.values())
    kept = sum(float(b.square().sum()) for b in best.values())
    found: dict[str, Any] = {"best of rank 2r, against G": round(math.sqrt(1 - kept / total), 4)}
    for name, method in OURS.items():
        session = attach(model, method, r=RANK, lora_alpha=ALPHA, calibration=Calibration(batches=batches), seed=0)
        sums = [0.0, 0.0]
        for layer_name, layer in session.layers.items():
            G = gradients[layer_name]
            A = nn.functional.normalize(layer.lora_A.detach(), dim=1)
            B = nn.functional.normalize(layer.lora_B.detach(), dim=0)
            M = B @ (B.T @ G) + (G @ A.T) @ A
            sums[0] += float((M - best[layer_name]).square().sum())
            sums[1] += float((M - G).square().sum())
        found[name] = {
            "against_best": round(math.sqrt(sums[0] / kept), 4),
            "against_G": round(math.sqrt(sums[1] / total), 4),
            "told": next(note for note in session.notes if "relative error" in note),
        }
        session.close()
        session.model.unload()
        model.requires_grad_(False)
    return found


def counts(layers: list[LinearLayer], vocabulary: int, hidden: int) -> dict[str, Any]:
    """Multiplications of a micro-batch and copies kept; attention's own products are not counted."""
    dense = sum(layer.shape.out_features * layer.shape.in_features for layer in layers)
    ends = sum(layer.shape.out_features + layer.shape.in_features for layer in layers)
    operations = 2 * ROWS * LENGTH / 1e9
    # Backward to the input of the first layer: forward and input gradients of every target and of the head.
    frozen = operations * (2 * dense + 2 * vocabulary * hidden)
    one_pass = 2 * RANK + 8 + HELD_OUT + 2 * (2 * RANK + 8) + 1 + HELD_OUT
    return {
        "target_parameters": dense,
        "products_a_layer": {"right": 2 * RANK + 8 + HELD_OUT, "left, one pass": 2 * (2 * RANK + 8) + 1 + HELD_OUT},
        "gflop_a_micro_batch": {
            "frozen pass": frozen,
            "whole gradients": operations * dense,
            "sketch, one pass": operations * one_pass * ends,
        },
        "copies_kept": {"exact": 1.0, "sketch, one pass": one_pass * ends / dense},
    }


def verdicts(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each limit beside its figure and its floor."""
    found: dict[str, dict[str, Any]] = {}
    for arm, limits in LIMITS.items():
        if "time" in limits and "time" in report:
            figure = report["time"][arm]["cpu_to_peft"]
            entry = {"figure": figure["median"], "low": figure["low"], "high": figure["high"], "limit": limits["time"]}
            found[f"{arm}, time to PEFT's"] = {**entry, "floor": _time_floor(report, arm)}
        if "copies" in limits and "memory" in report:
            figure, kept = report["memory"][arm]["copies_above_pass"], report["counts"]["copies_kept"][arm]
            entry = {"figure": figure, "limit": limits["copies"], "kept": round(kept, 4)}
            found[f"{arm}, copies above the pass"] = {**entry, "PEFT": report["memory"][PEFT]["copies_above_pass"]}
    return {name: {**entry, "held": entry["figure"] <= entry["limit"]} for name, entry in found.items()}


def _time_floor(report: Mapping[str, Any], arm: str) -> float:
    """The pass and the arm's own products at this machine's rate of products, over PEFT's whole arm."""
    gflop = report["counts"]["gflop_a_micro_batch"]
    rate = report["time"]["products"]["cpu_seconds"]["median"] / gflop["whole gradients"]
    own = gflop["whole gradients"] if arm == "exact" else gflop["sketch, one pass"]
    least = BATCHES * (gflop["frozen pass"] + own) * rate
    return round(least / report["time"][PEFT]["cpu_seconds"]["median"], 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parts = ["time", "memory", "quality"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/lora_ga.json"))
    options = parser.parse_args()
    on_one_thread(parser)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)  # PEFT's LoRA-GA
    model = llama_8x768()
    layers = targets_of(model)
    report: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    report["what"] = __doc__.split("\n\n")[0] if __doc__ else ""
    report["counts"] = counts(layers, model.config.vocab_size, model.config.hidden_size)
    report["settings"] = {"batches": BATCHES, "rows": ROWS, "length": LENGTH, "r": RANK, "lora_alpha": ALPHA}
    copy = 4 * report["counts"]["target_parameters"]
    del model
    measured = {
        "quality": measure_quality,
        "memory": lambda: measure_memory(copy),
        "time": lambda: measure_time(options.rounds),
    }
    measure_parts(report, measured, options.only, options.rounds)
    report["limits"] = verdicts(report)
    write_report(options.output, report)
    print(json.dumps({key: report[key] for key in ("counts", "limits")}, indent=1))


if __name__ == "__main__":
    main()
