"""Runs of the quality benchmark, one JSON each (`run`), and the tables of docs/benchmark.md from them (`summary`)."""

import argparse
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.arms import ARMS, Arm, Started
from benchmarks.quality.bfloat16 import bfloat16_products
from benchmarks.quality.records import Record, environment, load_all, pack, save
from benchmarks.quality.schedule import best_rate, grid_left, seeds_left
from benchmarks.quality.setting import Bench, evaluate, load_bench, train
from peft.tuners.lora import LoraLayer
from torch import nn


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="the runs that are not there yet, one after another; stop it at any time")
    run.add_argument("--only", nargs="+", choices=[arm.name for arm in ARMS], help="these arms only")
    run.add_argument("--seeds", type=int, default=3, help="seeds at the best learning rate (default 3)")
    run.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    verbs.add_parser("summary", help="write the tables of docs/benchmark.md from the runs that are there")
    given = parser.parse_args(arguments)
    if given.verb == "run":
        run_all([arm for arm in ARMS if not given.only or arm.name in given.only], given.seeds, given.minutes)
    else:
        from benchmarks.quality.summary import write

        print(write())


def run_all(arms: Sequence[Arm], seeds: int, minutes: float) -> None:
    # PEFT 0.21 reads an attribute that transformers 5.23 deprecates.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    bfloat16_products()
    bench = load_bench()
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        chosen = _next(arms, load_all(), range(seeds))
        if chosen is None:
            print("every run is there")
            return
        arm, rate, seed = chosen
        earlier = [record for record in load_all() if record.key[0] == arm.name and record.key[2] == seed]
        data = one_run(arm, bench, rate, seed, earlier)
        path = save(data)
        tested = "" if data["test"] is None else f", test {data['test']['accuracy']:.2%} / {data['test']['nll']:.3f}"
        print(
            f"{path.name}: validation {data['validation']['accuracy']:.1%} / {data['validation']['nll']:.3f}{tested}, "
            f"{sum(data['seconds'].values()):.0f} s",
            flush=True,
        )


def _next(arms: Sequence[Arm], records: Sequence[Record], seeds: Sequence[int]) -> tuple[Arm, float, int] | None:
    """Breadth first, so that an early stop leaves a whole if rough table: every arm once, the grids, seed by seed."""
    tried = Counter(record.key[0] for record in records if record.key[2] == 0)
    grids = [(tried[arm.name], index, grid_left(arm, records)) for index, arm in enumerate(arms)]
    open_grids = sorted((count, index, rate) for count, index, rate in grids if rate is not None)
    if open_grids:
        _, index, rate = open_grids[0]
        return arms[index], rate, 0
    for seed in seeds:
        for arm in arms:
            best = best_rate(arm, records)
            if best is not None and seed in seeds_left(arm, records, [seed]):
                return arm, best, seed
    return None


def one_run(arm: Arm, bench: Bench, rate: float, seed: int, earlier: Sequence[Record]) -> dict[str, Any]:
    """Trains and scores one arm; the test rows only where the learning rate may be the one that is reported."""
    clock = [time.perf_counter()]
    started = arm.start(arm, bench, seed)
    clock.append(time.perf_counter())
    losses = train(started.model, bench, rate, seed, started.session, arm.steps)
    clock.append(time.perf_counter())
    changes = [] if started.session is None else list(started.session.drain_changes())
    model, served = _served(started, bench) if changes else (started.model, {})
    validation = pack(evaluate(model, bench.validation, None, bench), rows=False)
    found = Record({"validation": validation}).choice
    promising = all(found < record.choice for record in earlier if record.key[1] != rate)
    test = pack(evaluate(model, bench.test, bench.test_order, bench), rows=True) if promising else None
    clock.append(time.perf_counter())
    plan = started.plan
    return {
        "format": "rankwise-quality-run",
        "version": 1,
        "arm": arm.name,
        "learning_rate": rate,
        "seed": seed,
        "r": arm.r,
        "budget": plan.budget,
        "parameters": plan.parameters,
        "scaling_rule": plan.scaling_rule.value,
        "lora_alpha": plan.lora_alpha,
        "steps": arm.steps,
        "ranks": plan.ranks,
        **({"served": served, "changes": changes} if changes else {}),
        "loss_first_10": sum(losses[:10]) / 10,
        "loss_last_20": sum(losses[-20:]) / 20,
        "validation": validation,
        "test": test,
        "bfloat16_products": bfloat16_products(),
        "seconds": {
            "start": round(clock[1] - clock[0], 2),
            "train": round(clock[2] - clock[1], 2),
            "evaluate": round(clock[3] - clock[2], 2),
        },
        **bench.identity,
        **environment(),
    }


def _served(started: Started, bench: Bench) -> tuple[nn.Module, dict[str, Any]]:
    """A fresh encoder with the exported adapter, as stock PEFT loads it: it is what is scored where ranks moved."""
    from peft import PeftModel

    assert started.session is not None
    with tempfile.TemporaryDirectory() as folder:
        report = started.session.export(Path(folder) / "adapter", layout="compact")
        model: nn.Module = PeftModel.from_pretrained(bench.fresh_model(), report.folder).eval()
    live = {n: int(m.r["default"]) for n, m in model.named_modules() if isinstance(m, LoraLayer) and "default" in m.r}
    cost = {layer.shape.name: layer.shape.cost for layer in started.plan.layers}
    ranks = {name.removeprefix("base_model.model."): rank for name, rank in live.items()}
    return model, {
        "ranks": ranks,
        "parameters": sum(rank * cost[name] for name, rank in ranks.items()),
        "logit_error": report.logit_error,
        "discarded": None if report.compression is None else report.compression.total,
    }


if __name__ == "__main__":
    main()
