"""What a rankwise training step costs beside a stock PEFT LoRA step of the same ranks: at most 1.02 times as much.

Each method runs beside stock LoRA with exactly its ranks, on a model of its own with equal weights: forward, backward,
clipping, AdamW, schedule. The rankwise arm adds what a session adds: the guard's hooks on gradients and optimizer, the
calls around steps, and a look at the counters at every tenth step. Arms alternate step by step, in changing order; the
ratio is the median over pairs of neighbouring steps. Run with OMP_NUM_THREADS=1:

    python -m benchmarks.training_step [--steps 40] [--out benchmarks/results/training_step.json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.models import causal_batches, llama_8x768
from benchmarks.reports import circumstances, write_report

from rankwise.adapters.attach import attach_lora
from rankwise.methods.gora import GoRA
from rankwise.methods.rora import RoRA
from rankwise.training.attach import attach
from rankwise.training.session import Session

LIMIT = 1.02
ARGS = SimpleNamespace(learning_rate=1e-4, weight_decay=0.01, lr_scheduler_type="cosine", warmup_steps=2)
LOG_EVERY = 10


def step_function(
    model: Any, optimizer: Any, scheduler: Any, batches: list[Any], session: Session | None
) -> Callable[[int], None]:
    """One optimizer step; with a session, everything that it adds."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(number: int) -> None:
        if session is not None:
            session.before_step(number)
        loss = model(**batches[number % len(batches)]).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        if session is not None:
            session.before_optimizer_step(number)
        optimizer.step()
        scheduler.step()
        model.zero_grad()
        if session is not None:
            session.after_step(number)
        if number % LOG_EVERY == 0:
            values = {"loss": float(loss.detach()), "grad_norm": float(norm)}
            if session is not None:
                session.logged(number, values)

    return step


def arms(method: Any, steps: int) -> tuple[Callable[[int], None], Callable[[int], None], dict[str, Any]]:
    base = llama_8x768()
    batches = causal_batches(base, 8)
    session = attach(base, method, r=8, calibration=batches[:2])
    stock = attach_lora(llama_8x768(), session.plan)
    found = []
    for model, owner in ((session.model, session), (stock, None)):
        model.train()
        optimizer, scheduler = Session.optimizers(
            session if owner else Session(stock, session.plan, session.recipe, 0), ARGS, steps + 1
        )
        if owner is not None:
            owner.begin(optimizer, steps)
        found.append(step_function(model, optimizer, scheduler, batches, owner))
    ranks = sorted(session.plan.ranks.values())
    facts = {"layers": len(ranks), "ranks": [ranks[0], ranks[-1]], "parameters": session.plan.parameters}
    return found[0], found[1], {**facts, "check_milliseconds": check_cost(session, batches[0])}


def check_cost(session: Session, batch: Any) -> float:
    """Processor milliseconds of the guard's look at all gradients, the one thing that a session adds to every step."""
    session.model(**batch).loss.backward()
    spent = []
    for _ in range(50):
        begun = time.process_time()
        session.health.gradients.check()
        spent.append(time.process_time() - begun)
    session.model.zero_grad()
    return round(statistics.median(spent) * 1e3, 3)


def timed(step: Callable[[int], None], number: int) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    step(number)
    return time.perf_counter() - wall, time.process_time() - processor


def measure(method: Any, steps: int) -> dict[str, Any]:
    ours, stock, facts = arms(method, steps)
    for number in (1, 2):
        ours(number), stock(number)
    pairs = []
    for number in range(3, steps + 1):
        if number % 2:
            mine, other = timed(ours, number), timed(stock, number)
        else:
            other, mine = timed(stock, number), timed(ours, number)
        pairs.append((mine, other))
    result: dict[str, Any] = dict(facts)
    for index, clock in enumerate(("wall", "processor")):
        ratios = [mine[index] / other[index] for mine, other in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[clock] = {
            "ratio": round(middle, 4),
            "quartiles": [round(low, 4), round(high, 4)],
            "ratio_of_sums": round(sum(m[index] for m, _ in pairs) / sum(o[index] for _, o in pairs), 4),
            "stock_median_seconds": round(statistics.median(o[index] for _, o in pairs), 4),
            "rankwise_median_seconds": round(statistics.median(m[index] for m, _ in pairs), 4),
        }
    result["pairs"] = len(pairs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training_step.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods = {"gora": GoRA(), "rora": RoRA()}
    results = {name: measure(method, options.steps) for name, method in methods.items()}
    report = {
        "benchmark": "training_step",
        "model": "8 x 768 Llama, float32, micro-batch 2 x 128, all-linear, r = 8",
        "limit": LIMIT,
        "results": results,
        "passed": all(result["processor"]["ratio"] <= LIMIT for result in results.values()),
        "clock": "the verdict uses processor time, which other work on the machine disturbs less than wall time",
        **circumstances("accelerate"),
    }
    write_report(options.out, report)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
