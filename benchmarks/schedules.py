"""What moving ranks costs: scoring rounds against plain passes, steps under gates against stock LoRA, compilations.

`scoring`: AB-LoRA's exact and screened scores of all ranks, on a 4 x 256 Llama with all linear layers at r = 8 and a
validation batch of 32 x 64 tokens, against the 2R + 1 forward passes of the definition (one of which is timed beside
each, R being the live ranks). Exact scores are held against the definition's on one seed; screened ones against exact
ones on all seeds: the ranks that would be pruned, up to ties within 1e-6 of the last one.
`steps`: a training step of a session beside a stock PEFT LoRA step of the same slots, alternating, 8 x 768 Llama.
`recompression`: cutting 20 boosters a layer to the budget of r = 8, beside the time of a run of 600 steps.
`compilations`: how often torch.compile compiles a model whose ranks move in 12 events.
`large`: one exact and one screened round of the 8 x 768 Llama. Ratios are of processor time on one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.schedules [--parts scoring steps ...] [--seeds 20]
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
from benchmarks.models import causal_batches, llama_4x256, llama_8x768
from benchmarks.reports import circumstances, measure_parts, on_one_thread, spread, write_report
from benchmarks.training_step import ARGS, step_function, timed
from torch import Tensor

import rankwise as rw
from rankwise.adapters.attach import attach_lora
from rankwise.export.fold import fold
from rankwise.export.truncate import truncate_adapter
from rankwise.methods.ab_lora import ABLoRA, ABLoRASchedule, lowest
from rankwise.methods.ablation import Ablation, Scores
from rankwise.methods.screening import screened
from rankwise.training.session import Session

OUT = Path("benchmarks/results/schedules.json")
ROWS, LENGTH, R = 32, 64, 8
TRAINED = (40, 150)
TIE = 1e-6
LIMITS = {
    "exact": 1.5,
    "screened, 40 steps": 4.0,
    "screened, 150 steps": 2.5,
    "step": 1.05,
    "xgblora step": 1.15,
    "recompression": 0.01,
}
STEPS = 31
RUN = 600
LONG = 10_000
"""Steps that a timed run says it has: no event falls among the few that are timed."""
METHODS: dict[str, Callable[[], Any]] = {
    "ab-lora": lambda: rw.ABLoRA(),
    "sora": lambda: rw.SoRA(),
    "beamlora": lambda: rw.BeamLoRA(),
    "xgblora": lambda: rw.XGBLoRA(),
}


def rule_batches(count: int, rows: int, seed: int, vocabulary: int) -> list[dict[str, Tensor]]:
    """Rows with something to learn: four of five tokens are followed by their image under one fixed permutation."""
    image = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(1_000 + seed)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, vocabulary, (rows, LENGTH), generator=rng)
        follows = torch.rand(rows, LENGTH, generator=rng) < 0.8
        for place in range(1, LENGTH):
            tokens[:, place] = torch.where(follows[:, place], image[tokens[:, place - 1]], tokens[:, place])
        batches.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()})
    return batches


def processor(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.process_time()
    found = work()
    return time.process_time() - begun, found


def scored_session(model: Any, seed: int) -> tuple[Session, ABLoRASchedule, Ablation, list[Any]]:
    """An AB-LoRA session whose rounds never come by themselves, and its scorer."""
    vocabulary = model.config.vocab_size
    validation = rule_batches(1, ROWS, 10_000 + seed, vocabulary)
    session = rw.attach(model, ABLoRA(), r=R, seed=seed, validation=validation)
    assert isinstance(session.schedule, ABLoRASchedule)
    return session, session.schedule, session.schedule._ablation, validation


def train(session: Session, steps: int, seed: int, *, parts: Any = None) -> Any:
    """Steps of a bare loop on rows of the rule, without rounds."""
    model: Any = session.model
    if parts is None:
        args = SimpleNamespace(learning_rate=2e-3, lr_scheduler_type="constant")
        parts = session.optimizers(args, LONG)[0]
        session.begin(parts, LONG)
    model.train()
    for batch in rule_batches(steps, 8, seed + steps, model.config.vocab_size):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        parts.step()
        parts.zero_grad()
    return parts


def importance_of(method: ABLoRA, scores: Scores) -> dict[str, Tensor]:
    return {name: method.w_drop * scores.drop[name] + method.w_solo * scores.solo[name] for name in scores.slots}


def agree(chosen: Any, wanted: Any, values: dict[str, Tensor], slots: Any, count: int) -> tuple[int, bool]:
    """How many ranks differ, and whether all of them are ties of the last one taken."""
    last = sorted(value for name in values for value in values[name].tolist())[count - 1]
    apart = set(chosen) ^ set(wanted)
    ties = all(abs(float(values[name][slots[name].index(slot)]) - last) <= TIE for name, slot in apart)
    return len(apart) // 2, ties


def scoring(seeds: int, results: dict[str, Any], keep: Callable[[], None]) -> dict[str, Any]:
    """The seeds that are not there yet; `keep` is called after each, so that a stopped run can go on."""
    if not results:
        results |= {"exact_against_plain": _against_the_definition()}
        results |= {f"{steps} steps": {"seeds": []} for steps in TRAINED}
    for seed in range(len(results[f"{TRAINED[-1]} steps"]["seeds"]), seeds):
        session, schedule, ablation, validation = scored_session(llama_4x256(seed), seed)
        parts, done = None, 0
        for steps in TRAINED:
            parts = train(session, steps - done, seed, parts=parts)
            done = steps
            found = results[f"{steps} steps"]["seeds"][:seed]
            results[f"{steps} steps"]["seeds"] = [*found, _one_seed(schedule, ablation, validation)]
        session.close()
        _summed(results)
        keep()
        print(seed, {name: part["seeds"][-1] for name, part in results.items() if "seeds" in part}, flush=True)
    return results


def _summed(results: dict[str, Any]) -> None:
    for steps in TRAINED:
        part = results[f"{steps} steps"]
        found = part["seeds"]
        for name in ("exact", "screened"):
            part[f"{name}_speedup"] = spread([one[f"{name}_speedup"] for one in found])
        part["same_up_to_ties"] = sum(one["same_up_to_ties"] for one in found)
        part["ranks_missed"] = sum(one["differing"] for one in found if not one["same_up_to_ties"])
        part["of"] = len(found)


def _one_seed(schedule: ABLoRASchedule, ablation: Ablation, validation: list[Any]) -> dict[str, Any]:
    """One exact and one screened round, with plain passes timed before, between and after."""
    slots, method, count = schedule._live_slots(), schedule._method, schedule._prunes
    ranks = sum(map(len, slots.values()))

    def plain() -> float:
        return processor(lambda: ablation.plain(validation, dict.fromkeys(slots, ())))[0] / 2

    passes = [plain()]
    exact_time, exact = processor(lambda: ablation.exact(validation, slots))
    passes.append(plain())
    screened_time, cheap = processor(
        lambda: screened(
            ablation,
            validation,
            slots,
            score=schedule._importance,
            count=count,
            lowest=lambda values: list(schedule._lowest(values, slots)),
        )
    )
    passes.append(plain())
    one = statistics.median(passes)
    values = importance_of(method, exact)
    wanted, chosen = (lowest(found, slots, count) for found in (values, importance_of(method, cheap)))
    differing, ties = agree(chosen, wanted, values, slots, count)
    definition = (2 * ranks + 1) * one
    return {
        "ranks": ranks,
        "pruned": count,
        "plain_pass_seconds": round(one, 4),
        "exact_speedup": round(definition / exact_time, 3),
        "screened_speedup": round(definition / screened_time, 3),
        "screened_sequences": round(cheap.sequences, 1),
        "exact_sequences": round(exact.sequences, 1),
        "differing": differing,
        "same_up_to_ties": ties,
    }


def _against_the_definition() -> dict[str, Any]:
    """Every score of one trained model by one pass each, and by the cheap way."""
    session, schedule, ablation, validation = scored_session(llama_4x256(99), 99)
    train(session, TRAINED[0], 99)
    slots = schedule._live_slots()
    plain_time, plain = processor(lambda: ablation.plain(validation, slots))
    exact_time, exact = processor(lambda: ablation.exact(validation, slots))
    apart = max(
        float((getattr(plain, term)[name] - getattr(exact, term)[name]).abs().max())
        for term in ("drop", "solo")
        for name in slots
    )
    values = importance_of(schedule._method, plain)
    wanted = lowest(values, slots, schedule._prunes)
    chosen = lowest(importance_of(schedule._method, exact), slots, schedule._prunes)
    differing, ties = agree(chosen, wanted, values, slots, schedule._prunes)
    session.close()
    return {
        "largest_difference_of_a_term": apart,
        "speedup_over_all_plain_passes": round(plain_time / exact_time, 3),
        "differing": differing,
        "same_up_to_ties": ties,
        "pass_megabytes": round(ablation.pass_bytes / 1e6, 1),
        "scoring_bytes": schedule._method.scoring_bytes,
    }


def large() -> dict[str, Any]:
    """One round of the 8 x 768 Llama; the definition's time is that of one plain pass times 2R + 1."""
    session, schedule, ablation, validation = scored_session(llama_8x768(0), 0)
    train(session, TRAINED[0], 0)
    found = _one_seed(schedule, ablation, validation)
    session.close()
    return found


def steps(pairs: int) -> dict[str, Any]:
    return {name: _step_ratio(name, make(), pairs) for name, make in METHODS.items()}


def _step_ratio(name: str, method: Any, pairs: int) -> dict[str, Any]:
    base = llama_8x768()
    batches = causal_batches(base, 8)
    validation = rule_batches(1, 4, 0, base.config.vocab_size) if method.needs_validation else None
    session = rw.attach(base, method, r=R, validation=validation)
    slots = {layer: one.rank for layer, one in session.layers.items()}
    # XGBLoRA's boosters grow to the rank that is exported: r everywhere.
    ranks = dict.fromkeys(slots, R) if name == "xgblora" else slots
    plan = rw.plan(llama_8x768(), "lora", r=max(ranks.values())).with_ranks(ranks)
    stock = attach_lora(llama_8x768(), plan)
    arms = []
    for model, owner in ((session.model, session), (stock, None)):
        model.train()
        holder = session if owner else Session(stock, plan, rw.Recipe.of("lora"), 0)
        optimizer, scheduler = holder.optimizers(ARGS, LONG)
        if owner is not None:
            owner.begin(optimizer, LONG)
        arms.append(step_function(model, optimizer, scheduler, batches, owner))
    ours, theirs = arms
    for number in (1, 2):
        ours(number), theirs(number)
    ratios = []
    for number in range(3, pairs + 3):
        if number % 2:
            mine, other = timed(ours, number), timed(theirs, number)
        else:
            other, mine = timed(theirs, number), timed(ours, number)
        ratios.append(mine[1] / other[1])
    session.close()
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)], "pairs": len(ratios)}


def recompression() -> dict[str, Any]:
    """Twenty rounds of one step each, in all layers, folded and cut to the budget of r."""
    base = llama_8x768()
    batches = causal_batches(base, 8)
    rounds = 20
    session = rw.attach(base, rw.XGBLoRA(rounds=rounds, layers_fraction=1.0), r=R)
    optimizer, scheduler = session.optimizers(ARGS, rounds)
    session.begin(optimizer, rounds)
    session.model.train()
    step = step_function(session.model, optimizer, scheduler, batches, session)
    seconds = [timed(step, number)[1] for number in range(1, rounds + 1)]
    session.end(rounds)
    folded = fold(session.model, session.fold_state)
    spent, (cut, told) = processor(lambda: truncate_adapter(folded, session.plan.budget))
    session.close()
    run = RUN * statistics.median(seconds)
    return {
        "ranks_before": [min(folded.ranks.values()), max(folded.ranks.values())],
        "ranks_after": [min(cut.ranks.values()), max(cut.ranks.values())],
        "discarded": None if told is None else round(told.total, 4),
        "seconds": round(spent, 3),
        "share_of_a_run": round(spent / run, 5),
        "run_steps": RUN,
    }


def compilations() -> dict[str, Any]:
    return {name: _compiled(name) for name in METHODS}


SCHEDULED: dict[str, Callable[[], Any]] = {
    "ab-lora": lambda: rw.ABLoRA(rounds=12, prune_per_round=3, sequences=4),
    "sora": lambda: rw.SoRA(target_density=0.3),
    "beamlora": lambda: rw.BeamLoRA(),
    "xgblora": lambda: rw.XGBLoRA(rounds=12),
}


def _compiled(name: str) -> dict[str, Any]:
    """Events of a run of 60 steps whose model is compiled, and compilations after its first step."""
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    length = 60
    dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    base = llama_4x256()
    method = SCHEDULED[name]()
    validation = rule_batches(1, 4, 0, base.config.vocab_size) if method.needs_validation else None
    session = rw.attach(base, method, r=4, validation=validation)
    args = SimpleNamespace(learning_rate=5e-3, lr_scheduler_type="constant")
    optimizer, _ = session.optimizers(args, length)
    session.model.train()
    session.begin(optimizer, length)
    compiled: Any = torch.compile(session.model, backend=counter)
    first, events = 0, 0
    for number, batch in enumerate(rule_batches(length, 4, 0, base.config.vocab_size), 1):
        session.before_step(number)
        compiled(**batch).loss.backward()
        session.before_optimizer_step(number)
        optimizer.step()
        optimizer.zero_grad()
        session.after_step(number)
        events += sum("layer" not in line for line in session.drain_changes())
        first = counter.frame_count if number == 1 else first
    found = {"events": events, "compiled_in_the_first_step": first, "compiled_later": counter.frame_count - first}
    session.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("scoring", "steps", "recompression", "compilations", "large"), default=None
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=STEPS - 2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    on_one_thread(parser)
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    report |= {
        "benchmark": "schedules",
        "scored_model": f"4 x 256 Llama, float32, all-linear, r = {R}, validation {ROWS} x {LENGTH}",
        "stepped_model": "8 x 768 Llama, float32, micro-batch 2 x 128, all-linear, r = 8",
        "limits": LIMITS,
        "clock": "processor time on one thread",
        **circumstances("accelerate"),
    }

    def keep() -> None:
        write_report(options.out, report)

    parts = {
        "compilations": compilations,
        "steps": lambda: steps(options.pairs),
        "recompression": recompression,
        "large": large,
        "scoring": lambda: scoring(options.seeds, report.setdefault("scoring", {}), keep),
    }
    for name in options.parts or list(parts):
        measure_parts(report, parts, [name], 1)
        write_report(options.out, report)
    print(json.dumps({name: report[name] for name in parts if name in report and name != "scoring"}, indent=1))


if __name__ == "__main__":
    main()
