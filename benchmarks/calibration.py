"""What gradient statistics cost beside a plain PEFT LoRA pass over the same batches: time, memory, and sampling error.

The model is "8 x 768" of benchmarks/models.py with all 56 linears as targets and 8 micro-batches of 2 x 128 tokens,
float32, one thread. The pass (ratio 1) is forward and backward of stock PEFT LoRA, r = 8 on all linears. A calibration
is the whole `collect` call: hooks, passes, sums, importance, projections, everything put back.

Time: every round runs each arm once, in changing order; the ratio is the median over rounds of arm / pass, in CPU time
of the process (a busy neighbor disturbs it less than wall time, which is kept beside it) with lowest and highest round.
Its floor is the frozen pass without sums plus the multiplications that the statistics need, at the rate at which plain
matrix products of the same sizes ran in the same rounds.
Memory: torch's profiler records each allocation and release of the CPU allocator; the peak is the highest running sum
above what was live before (weights of base and adapter), over three micro-batches. "Above the pass" is the difference
to the pass's own peak, in float32 copies of all target weights; "above the frozen pass" the difference to forward and
backward of the bare base, which holds neither the linears' inputs nor lora_A's and lora_B's gradients. BLAS scratch
space is outside the allocator and not counted. Its floor is the sums and projection matrices that must be kept.
Sampling: from one exact gradient, 20 row samples a share; ranks are GoRA's on its defaults.

    OMP_NUM_THREADS=1 python -m benchmarks.calibration [--rounds 7] [--only time memory sampling] [--output FILE]
"""

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.models import causal_batches, llama_8x768
from benchmarks.reports import measure_parts, on_one_thread, spread, write_report
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rankwise.adapters.layers import LinearLayer, view_linear
from rankwise.calibration.collect import collect
from rankwise.calibration.layer_sums import LayerSums
from rankwise.calibration.memory import groups_for
from rankwise.calibration.statistics import GradientStatistics, LayerStatistics, StatisticsRequest
from rankwise.linalg.random import generator
from rankwise.methods.base import Budget
from rankwise.methods.gora import GoRA
from rankwise.ranks.shapes import LayerShape, uniform_budget

Arm = Callable[[], object]

BATCHES, ROWS, LENGTH, RANK, PROJECTED = 8, 2, 128, 8, 32
PASS, PRODUCTS = "plain LoRA pass", "matrix products of one micro-batch's full gradients"
LIMITS = {
    "exact": {"time": 1.36},
    "sampled 1/4": {"time": 1.10, "copies": 0.32},
    "sampled 1/16": {"copies": 0.12},
    "low": {"copies": 0.25},
}


def projection(shape: LayerShape) -> Tensor:
    """32 rows, GoRA's r_max at r = 8, drawn as lora_A is."""
    bound = shape.in_features**-0.5
    rows = torch.empty(PROJECTED, shape.in_features)
    return rows.uniform_(-bound, bound, generator=generator(0, "lora_A", shape.name))


def union_mean(weight: Tensor, gradient: Tensor) -> Tensor:
    """GoRA's importance, mean |W * G|."""
    return (weight * gradient).abs().mean(dtype=torch.float64)[None]


REQUEST = StatisticsRequest(projection=projection, score=union_mean, score_is_row_mean=True)


def targets_of(model: torch.nn.Module) -> list[LinearLayer]:
    views = ((name, view_linear(name, module)) for name, module in model.named_modules())
    return [view for name, view in views if view is not None and name != "lm_head"]


def arms(count: int) -> dict[str, Arm]:
    """Every arm over `count` micro-batches; all share one base model but for the PEFT adapter, which owns a copy."""
    model = llama_8x768()
    layers = targets_of(model)
    shapes = [layer.shape for layer in layers]
    batches = causal_batches(model, count, rows=ROWS, length=LENGTH)
    adapted = get_peft_model(llama_8x768(), LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert sum(hasattr(module, "lora_A") for module in adapted.modules()) == len(layers)
    model.requires_grad_(False)

    def passes(of: torch.nn.Module) -> None:
        of.zero_grad(set_to_none=True)
        for batch in batches:
            of(**batch).loss.backward()

    def frozen() -> None:
        handle = model.model.embed_tokens.register_forward_hook(lambda *given: given[2].requires_grad_())
        passes(model)
        handle.remove()

    def autograd() -> None:
        for layer in layers:
            layer.module.weight.requires_grad_(True)
        passes(model)
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)

    def lora_ga() -> None:
        names = sorted({layer.name.rsplit(".", 1)[1] for layer in layers})
        config = LoraConfig(
            r=RANK,
            target_modules=names,
            init_lora_weights="lora_ga",
            lora_ga_config=LoraGAConfig(),
            task_type="CAUSAL_LM",
        )
        preprocess_loraga(model, config, lambda: passes(model))
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False).eval()
        for layer in layers:
            del layer.module._peft_loraga_grad

    def ours(**settings: Any) -> Arm:
        return lambda: collect(model, layers, batches, REQUEST, **settings)

    factors = [(torch.randn(ROWS * LENGTH, s.out_features), torch.randn(ROWS * LENGTH, s.in_features)) for s in shapes]

    def products() -> None:
        for output_grad, inputs in factors:
            torch.mm(output_grad.T, inputs)

    return {
        PASS: lambda: passes(adapted),
        "frozen pass, no sums": frozen,
        "autograd, full gradients": autograd,
        "PEFT LoRA-GA preprocessing": lora_ga,
        "exact": ours(memory="exact"),
        "exact, collector param": ours(memory="exact", collector="param"),
        "sampled 1/4": ours(memory="sampled", sample_share=1 / 4),
        "sampled 1/16": ours(memory="sampled", sample_share=1 / 16),
        "low": ours(memory="low"),
        PRODUCTS: products,
    }


def measure_time(rounds: int) -> dict[str, dict[str, Any]]:
    running = arms(BATCHES)
    names = list(running)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in (PASS, "exact", "sampled 1/4"):  # warms caches and allocators up
        running[name]()
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            running[name]()
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    found = {}
    for name in names:
        entry: dict[str, Any] = {}
        for index, clock in enumerate(("cpu", "wall")):
            taken = [both[index] for both in seconds[name]]
            ratios = [one / both[index] for one, both in zip(taken, seconds[PASS], strict=True)]
            entry[f"{clock}_seconds"] = spread(taken)
            entry[f"{clock}_ratio"] = spread(ratios)
        found[name] = entry
    return found


def measure_memory(copy: int) -> dict[str, dict[str, float]]:
    running = arms(3)
    peaks = {name: _peak(arm) for name, arm in running.items()}
    return {
        name: {
            "peak_bytes": peak,
            "copies_above_pass": round((peak - peaks[PASS]) / copy, 4),
            "copies_above_frozen_pass": round((peak - peaks["frozen pass, no sums"]) / copy, 4),
        }
        for name, peak in peaks.items()
    }


def _peak(arm: Arm) -> int:
    gc.collect()
    with warnings.catch_warnings(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        arm()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = highest = 0
    for _, size in changes:
        live += size
        highest = max(highest, live)
    return highest


def measure_sampling(draws: int = 20) -> dict[str, Any]:
    """How far sampled importances and ranks are from the exact ones, on this model's real gradients."""
    model = llama_8x768()
    layers = targets_of(model)
    batches = causal_batches(model, BATCHES, rows=ROWS, length=LENGTH)
    exact = collect(model, layers, batches, replace(REQUEST, gradient=True), memory="exact")
    exact_ranks = _ranks(layers, exact)
    found: dict[str, Any] = {"draws": draws, "exact_rank_bounds": [min(exact_ranks), max(exact_ranks)]}
    for parts in (4, 8, 16):
        errors, deviations, differences = [], [], []
        for seed in range(draws):
            sampled = {layer.name: _sampled(layer, exact.layers[layer.name], 1 / parts, seed) for layer in layers}
            for name, one in sampled.items():
                truth = exact.layers[name].scores.item()
                errors.append(abs(one.scores.item() - truth) / truth)
                deviations.append((one.scores.item() - truth) / one.score_errors.item())
            ranks = _ranks(layers, replace(exact, layers=sampled))
            differences += [abs(a - b) for a, b in zip(ranks, exact_ranks, strict=True)]
        found[f"1/{parts}"] = {
            "mean_relative_importance_error": round(statistics.mean(errors), 4),
            "mean_rank_difference": round(statistics.mean(differences), 4),
            "worst_rank_difference": max(differences),
            "error_in_standard_errors_rms": round(statistics.mean(d * d for d in deviations) ** 0.5, 3),
        }
    return found


def _sampled(layer: LinearLayer, exact: LayerStatistics, share: float, seed: int) -> LayerStatistics:
    request = StatisticsRequest(score=union_mean, score_is_row_mean=True)
    sums = LayerSums(layer, request, "sampled", share=share, seed=seed, on_cpu=False)
    sums.sinks[0].add_gradient(exact.gradient, 1.0)
    return sums.finish(1.0, exact.batches)


def _ranks(layers: list[LinearLayer], found: GradientStatistics) -> tuple[int, ...]:
    shapes = [layer.shape for layer in layers]
    budget = Budget(r=RANK, lora_alpha=16.0, parameters=uniform_budget(shapes, RANK))
    return GoRA().allocate(shapes, budget, found).ranks


def counts(layers: list[LinearLayer], vocabulary: int, hidden: int) -> dict[str, Any]:
    """Multiplications of a micro-batch and copies kept; the pass's include the adapter and the head, not attention."""
    dense = sum(_size(layer) for layer in layers)
    ends = sum(layer.shape.out_features + layer.shape.in_features for layer in layers)
    first = [
        layer for layer in layers if ".layers.0." in layer.name and layer.name[-6:] in ("q_proj", "k_proj", "v_proj")
    ]
    operations = 2 * ROWS * LENGTH / 1e9  # two a multiplication, for each weight and token
    # Backward reaches neither the embedding nor the inputs of the first layer's query, key and value.
    frozen = operations * (2 * dense + 2 * vocabulary * hidden - sum(map(_size, first)))
    groups = groups_for(layers)
    return {
        "target_parameters": dense,
        "low_passes": len(groups),
        "pass_gflop": {"frozen pass, no sums": frozen, PASS: frozen + operations * 3 * RANK * ends},
        "extra_gflop": {
            "exact": operations * dense,
            **{f"sampled 1/{parts}": operations * (dense / parts + PROJECTED * ends) for parts in (4, 16)},
        },
        "copies_kept": {
            "exact": 1.0,
            **{f"sampled 1/{parts}": 1 / parts + PROJECTED * ends / dense for parts in (4, 16)},
            "low": max(sum(_size(layers[index]) for index in group) for group in groups) / dense,
        },
    }


def _size(layer: LinearLayer) -> int:
    return layer.shape.out_features * layer.shape.in_features


def verdicts(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each limit beside its figure and its floor."""
    found: dict[str, dict[str, Any]] = {}
    for arm, limits in LIMITS.items():
        if "time" in limits and "time" in report:
            figure = report["time"][arm]["cpu_ratio"]["median"]
            found[f"{arm}, time"] = {"figure": figure, "limit": limits["time"], "floor": _time_floor(report, arm)}
        if "copies" in limits and "memory" in report:
            figure, kept = report["memory"][arm]["copies_above_pass"], report["counts"]["copies_kept"][arm]
            found[f"{arm}, copies above the pass"] = {
                "figure": figure,
                "limit": limits["copies"],
                "kept": round(kept, 4),
            }
    return {name: {**entry, "held": entry["figure"] <= entry["limit"]} for name, entry in found.items()}


def _time_floor(report: Mapping[str, Any], arm: str) -> float:
    seconds = {name: entry["cpu_seconds"]["median"] for name, entry in report["time"].items()}
    per_gflop = seconds[PRODUCTS] / report["counts"]["extra_gflop"]["exact"]
    least = seconds["frozen pass, no sums"] + BATCHES * report["counts"]["extra_gflop"][arm] * per_gflop
    return round(least / seconds[PASS], 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--only", nargs="+", choices=["time", "memory", "sampling"], default=["time", "memory", "sampling"]
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/calibration.json"))
    options = parser.parse_args()
    on_one_thread(parser)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)  # PEFT's LoRA-GA
    model = llama_8x768()
    layers = targets_of(model)
    report: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    report["what"] = __doc__.split("\n\n")[0] if __doc__ else ""
    report["counts"] = counts(layers, model.config.vocab_size, model.config.hidden_size)
    report["settings"] = {"batches": BATCHES, "rows": ROWS, "length": LENGTH, "r": RANK, "projected_rows": PROJECTED}
    copy = 4 * report["counts"]["target_parameters"]
    del model
    measured = {
        "sampling": measure_sampling,
        "memory": lambda: measure_memory(copy),
        "time": lambda: measure_time(options.rounds),
    }
    measure_parts(report, measured, options.only, options.rounds)
    report["limits"] = verdicts(report)
    write_report(options.output, report)
    print(json.dumps({key: report[key] for key in ("counts", "limits")}, indent=1))


if __name__ == "__main__":
    main()
