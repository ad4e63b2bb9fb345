"""What a GGPO and an MGPO step cost beside a plain LoRA step: at most 1.5 and 1.10 times as much.

Each arm trains a model of its own with equal weights: forward, backward, clipping, fused AdamW, and what its schedule
does around them. Arms take turns step by step, the order rotating; a ratio is an arm's processor time over the plain
step's of the same round, and the median and quartiles over the rounds are told. Beside them stand the bare draws (one
weight's worth of normal values for every adapted layer) and the floors: the operations and bytes that a method cannot
do without, at the rate that plain products, draws and sums reach in the same rounds. Run with OMP_NUM_THREADS=1:

    python -m benchmarks.perturbation [--rounds 30] [--out benchmarks/results/perturbation.json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.models import causal_batches, llama_8x768
from benchmarks.reports import circumstances, write_report

from rankwise.adapters import perturbation
from rankwise.linalg.normal import NormalStream
from rankwise.methods.ggpo import GGPO, MGPO
from rankwise.methods.schedule import Scene
from rankwise.training.attach import attach

LIMITS = {"mgpo": 1.10, "ggpo": 1.5}
RANK = 8
TOKENS = 2 * 128


def training_step(method: Any, *, second_product: bool = False, kept_bytes: int | None = None) -> Callable[[int], Any]:
    """A step of the benchmark model.

    `second_product` makes base layers look like packed ones to the schedule; `kept_bytes` bounds what of W + E is kept
    from the forward to the backward pass.
    """
    base = llama_8x768()
    batches = causal_batches(base, 8)
    session = attach(base, "lora", r=RANK)
    session.model.train()
    trainable = [parameter for parameter in session.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    schedule = None
    if method is not None:
        if second_product:
            for layer in session.layers.values():
                layer.base.module.forward = layer.base.module.forward
        schedule = method.make_schedule(Scene(model=session.model, layers=session.layers, seed=0))
        schedule.begin(optimizer, 1000)

    usual = perturbation._KEPT_BYTES

    def step(number: int) -> Any:
        perturbation._KEPT_BYTES = usual if kept_bytes is None else kept_bytes
        if schedule is not None:
            schedule.before_step(number)
        session.model(**batches[number % len(batches)]).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        if schedule is not None:
            schedule.before_optimizer_step(number)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.after_step(number)
        return schedule

    return step


def shapes() -> list[tuple[int, int]]:
    """[out, in] of the 56 adapted layers."""
    per_block = [(768, 768)] * 2 + [(256, 768)] * 2 + [(2048, 768)] * 2 + [(768, 2048)]
    return per_block * 8


def parts() -> dict[str, Callable[[int], None]]:
    """The bare pieces of a step, over all adapted layers."""
    buffer = torch.empty(2048 * 768)
    weights = [torch.randn(shape) for shape in shapes()]
    tokens = {size: torch.randn(TOKENS, size) for size in (256, 768, 2048)}
    thin = {size: torch.randn(2 * RANK, size) for size in (256, 768, 2048)}
    source = torch.Generator()

    def torch_draws(number: int) -> None:
        for index, (rows, columns) in enumerate(shapes()):
            source.manual_seed(1000 * number + index)
            buffer[: rows * columns].normal_(generator=source)

    def draws(number: int) -> None:
        for index, (rows, columns) in enumerate(shapes()):
            stream = NormalStream(1000 * number + index, torch.device("cpu"))
            for start in range(0, rows * columns, 2**16):
                stream.fill(buffer[start : min(start + 2**16, rows * columns)])

    def sums(number: int) -> None:
        for weight in weights:
            target = buffer[: weight.numel()].view_as(weight)
            torch.addcmul(weight, target, weight[:, :1], out=target)

    def products(number: int) -> None:
        for weight in weights:
            torch.mm(tokens[weight.shape[1]], weight.T)

    def thin_products(number: int) -> None:
        for rows, columns in shapes():
            torch.mm(torch.mm(tokens[columns], thin[columns].T), thin[rows])

    return {
        "torch normal_": torch_draws,
        "draws": draws,
        "sums": sums,
        "products": products,
        "thin products": thin_products,
    }


def timed(work: Callable[[int], Any], number: int) -> float:
    begun = time.process_time()
    work(number)
    return time.process_time() - begun


def summary(values: list[float], digits: int = 3) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {
        "median": round(middle, digits),
        "lower_quartile": round(low, digits),
        "upper_quartile": round(high, digits),
    }


def measure(rounds: int) -> dict[str, Any]:
    works: dict[str, Callable[[int], Any]] = {
        "plain": training_step(None),
        "mgpo": training_step(MGPO()),
        "ggpo": training_step(GGPO()),
        "ggpo, nothing kept": training_step(GGPO(), kept_bytes=0),
        "ggpo, second product": training_step(GGPO(), second_product=True),
        **parts(),
    }
    spent: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(1, rounds + 4):
        turn = number % len(names)
        found = {name: timed(works[name], number) for name in names[turn:] + names[:turn]}
        if number > 3:  # memory is touched for the first time, and MGPO has no momentum yet
            for name, seconds in found.items():
                spent[name].append(seconds)
    ratios = {name: [a / b for a, b in zip(values, spent["plain"], strict=True)] for name, values in spent.items()}
    figures = {name: works[name](rounds + 4).figures() for name in ("mgpo", "ggpo")}
    return {
        "seconds": {name: summary(values, 4) for name, values in spent.items()},
        "ratio": {name: summary(values) for name, values in ratios.items() if name != "plain"},
        "ratio_of_sums": {name: round(sum(v) / sum(spent["plain"]), 3) for name, v in spent.items() if name != "plain"},
        "floors": floors({name: statistics.median(values) for name, values in spent.items()}),
        "figures_of_the_last_step": figures,
        "rounds": rounds,
    }


def floors(seconds: dict[str, float]) -> dict[str, Any]:
    """What the two methods add at least, counted, and as a ratio at the rates of this machine."""
    values = sum(rows * columns for rows, columns in shapes())
    sides = sum(rows + columns for rows, columns in shapes())
    rate = 2 * TOKENS * values / seconds["products"]
    thin = 2 * 2 * TOKENS * 2 * RANK * sides  # two products of rank 2 r, forward and backward
    norms = 2 * RANK * values  # W A^T
    drawn = 2 * seconds["draws"] + 2 * seconds["sums"] + norms / rate
    return {
        "plain": {
            "gigaflops_of_base_products": round(2 * 2 * TOKENS * values / 1e9, 1),
            "rate_gigaflops": round(rate / 1e9, 1),
        },
        "mgpo": {
            "gigaflops": round(thin / 1e9, 2),
            "ratio_at_the_rate_of_products": round(1 + thin / rate / seconds["plain"], 3),
            "ratio_at_the_rate_of_thin_products": round(1 + 2 * seconds["thin products"] / seconds["plain"], 3),
        },
        "ggpo": {
            "values_drawn": 2 * values,
            "gigabytes_of_sums": round(2 * 3 * 4 * values / 1e9, 2),
            "gigaflops_of_norms": round(norms / 1e9, 2),
            "ratio": round(1 + drawn / seconds["plain"], 3),
            "note": "two draws and sums W + E, W A^T once; what is kept for the backward pass (up to 128 MiB) saves "
            "a part of the second draw, so that a step can be below",
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/perturbation.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(options.rounds)
    report = {
        "benchmark": "perturbation",
        "model": "8 x 768 Llama, float32, micro-batch 2 x 128, all-linear (56 layers), r = 8",
        "limits": LIMITS,
        **results,
        "passed": {name: results["ratio"][name]["median"] <= limit for name, limit in LIMITS.items()},
        "clock": "processor time, which other work on the machine disturbs less than wall time",
        **circumstances("numpy"),
    }
    write_report(options.out, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
