"""What one optimizer step costs: LoRA-RITE and LoRA-Pro beside fused AdamW and the public optimizers over pairs.

Cases: `llama-3.1-8b`, the 224 pairs of Llama-3.1-8B's linears at r = 16 (41.9 M parameters, 168 MB in float32), also
with bfloat16 parameters; `8x768`, the 56 pairs of the 8 x 768 model at r = 8. One thread. Every arm owns equal
parameters and gets the same gradients, as tensors of their own written just before the step, as a backward pass would.
Arms alternate: each round runs each arm once, in changing order, so that an arm finds its parameters and state
as cold as training leaves them (each arm holds more than the second-level cache, and all arms more than the third).
A ratio is the median over rounds of arm / AdamW in CPU time of the process, with lowest and highest; wall time is kept
beside it. A first round is not recorded.

Floors: the tall matrix products without which we know no way to compute the step (arms "products of ..."; multiplying
gradients, momenta and factors made beforehand, with nothing else), counted and run in the same rounds, as plain `bmm`
calls on stacks or `mm` calls one by one, whichever is faster; and the bytes that must move if r x r matrices are free.
State: bytes of `optimizer.state`, each storage counted once, and everything that stays alive between steps; a float32
master of 16-bit parameters is counted apart. Temporaries: the highest running sum of the allocator within a step.

    OMP_NUM_THREADS=1 python -m benchmarks.optimizers [--quick] [--cases ...] [--only ...] [--rounds 15] [--output FILE]

`pytorch_optimizer` is optional (`pip install --no-deps pytorch_optimizer`): without it the script says so and goes on.
"""

import argparse
import copy
import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.reports import on_one_thread, write_report
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

LR = 1e-5
BASELINE = "adamw"
TITLES = {
    BASELINE: "AdamW, fused",
    "rite": "LoRA-RITE",
    "pro": "LoRA-Pro, efficient",
    "full": "LoRA-Pro, full",
    "riemannian": "PEFT's Riemannian AdamW",
    "pytorch_optimizer": "pytorch_optimizer's LoRARite",
    "products-rite": "products of LoRA-RITE",
    "products-pro": "products of LoRA-Pro",
}


@dataclass(frozen=True)
class Case:
    """One set of pairs; `linears` are (name, out, in) of one block of the model."""

    blocks: int
    linears: tuple[tuple[str, int, int], ...]
    rank: int
    dtype: torch.dtype
    limits: dict[str, float] = field(default_factory=dict)


def _llama(hidden: int, kv: int, mlp: int) -> tuple[tuple[str, int, int], ...]:
    return (
        ("q_proj", hidden, hidden),
        ("k_proj", kv, hidden),
        ("v_proj", kv, hidden),
        ("o_proj", hidden, hidden),
        ("gate_proj", mlp, hidden),
        ("up_proj", mlp, hidden),
        ("down_proj", hidden, mlp),
    )


LARGE, SMALL = _llama(4096, 1024, 14336), _llama(768, 256, 2048)
CASES = {
    "llama-3.1-8b": Case(32, LARGE, 16, torch.float32, {"rite": 7.0, "pro": 5.5}),
    "llama-3.1-8b bf16": Case(32, LARGE, 16, torch.bfloat16),
    "8x768": Case(8, SMALL, 8, torch.float32, {"rite": 10.0, "pro": 6.5}),
}
STATE_LIMIT = 8 * 1.25
RIVALS = {"pytorch_optimizer": 0.5, "riemannian": 1.7}
"""By rival, the most that our RITE may cost of its time."""


class Pairs(nn.Module):
    """The factors of a case under the names that a PEFT model gives them; all trainable, with a scaling of 2."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList()
        for _ in range(case.blocks):
            block = nn.ModuleDict()
            for name, out_features, in_features in case.linears:
                factors = {}
                for key, rows, columns in (("lora_A", case.rank, in_features), ("lora_B", out_features, case.rank)):
                    module = nn.utils.skip_init(nn.Linear, columns, rows, bias=False, dtype=case.dtype)
                    value = torch.randn(rows, columns, generator=generator) * (
                        in_features**-0.5 if rows == case.rank else 1e-2
                    )
                    module.weight.data.copy_(value)
                    factors[key] = nn.ModuleDict({"default": module})
                block[name] = nn.ModuleDict(factors)
            self.layers.append(block)

    def factors(self) -> list[nn.Parameter]:
        """A1, B1, A2, B2, ..."""
        return list(self.parameters())

    def groups(self) -> list[dict[str, Any]]:
        factors = self.factors()
        return [{"params": factors, "kind": "lora_pair", "scaling": [2.0] * (len(factors) // 2)}]


class CannotRun(Exception):  # noqa: N818  (a fact about an arm, not a fault)
    """An arm that does not support the case."""


@dataclass
class Arm:
    """One step of an optimizer over its own parameters, or bare products; what it holds between steps."""

    parameters: list[nn.Parameter]
    step: Callable[[], object]
    optimizer: Optimizer | None = None
    held: int = 0
    counted: dict[str, Any] = field(default_factory=dict)


def optimizer_for(key: str, model: Pairs) -> Optimizer:
    if key == BASELINE:
        return torch.optim.AdamW(model.factors(), lr=LR, weight_decay=0.0, fused=True)
    if key == "rite":
        from rankwise.methods.lora_rite import LoRARITEOptimizer

        return LoRARITEOptimizer(model.groups(), lr=LR)
    if key in ("pro", "full"):
        from rankwise.methods.lora_pro import LoRAProOptimizer

        return LoRAProOptimizer(model.groups(), lr=LR, mode="efficient" if key == "pro" else "full")
    if key == "riemannian":
        from peft.optimizers import create_riemannian_optimizer

        return create_riemannian_optimizer(model, torch.optim.AdamW, lr=LR, weight_decay=0.0, fused=True)
    from pytorch_optimizer import LoRARite

    return LoRARite(model.factors(), lr=LR)


def absent(key: str) -> str | None:
    """Why an arm cannot run here; None if it can."""
    needed = {"pytorch_optimizer": "pytorch_optimizer", "rite": "rankwise.methods.lora_rite"}
    module = needed.get(key, "rankwise.methods.lora_pro" if key in ("pro", "full") else "torch")
    return None if importlib.util.find_spec(module) else f"{TITLES[key]}: {module} is not installed"


def make_arm(key: str, start: Pairs, gradients: Sequence[Tensor]) -> Arm:
    if key.startswith("products-"):
        return products_arm(key, start, gradients)
    model = copy.deepcopy(start)
    before = held_bytes()
    optimizer = optimizer_for(key, model)
    arm = Arm(model.factors(), optimizer.step, optimizer)
    kept = [parameter.detach().clone() for parameter in arm.parameters]
    for _ in range(2):  # the first step may be another one, the second warms allocators up
        give(arm, gradients)
        try:
            arm.step()
        except NotImplementedError as error:  # a decomposition that torch lacks for bfloat16
            raise CannotRun(f"{TITLES[key]}: {error}") from error
        take(arm)
    for parameter, old in zip(arm.parameters, kept, strict=True):
        assert parameter.isfinite().all(), f"{TITLES[key]}: a parameter is not finite"
        if parameter.dtype == torch.float32:  # bfloat16 rounds single steps of this size away
            assert not torch.equal(parameter, old), f"{TITLES[key]}: a parameter stayed where it was"
    del kept
    arm.held = held_bytes() - before
    return arm


def products_arm(key: str, start: Pairs, gradients: Sequence[Tensor]) -> Arm:
    """The products that no form of the step known to us avoids: stack by stack or one by one, whichever is faster."""
    run = rite_products if key == "products-rite" else pro_products
    factors = start.factors()
    whole = [
        Stack(p, g, torch.randn_like(p), torch.zeros_like(p), small_for(p, last), last)
        for p, g, last in [*stacked(factors[::2], gradients[::2]), *stacked(factors[1::2], gradients[1::2])]
    ]
    forms = {"stacked": whole, "one by one": [one for stack in whole for one in stack.split()]}
    spent: dict[str, float] = {}
    for _ in range(3):
        for name, form in forms.items():
            begun = time.process_time()
            operations = sum(run(stack) for stack in form)
            spent[name] = min(spent.get(name, float("inf")), time.process_time() - begun)
    best = min(spent, key=lambda name: spent[name])
    return Arm([], lambda: [run(stack) for stack in forms[best]], counted={"gflop": operations / 1e9, "form": best})


def small_for(p: Tensor, last: bool) -> Tensor:
    rank = p.shape[-1 if last else -2]
    return torch.randn(p.shape[0], rank, rank, generator=torch.Generator().manual_seed(1))


@dataclass
class Stack:
    """Factors p of one shape (or one of them) with gradients g, momenta m and room for a result.

    `last`: the rank is the last axis.
    """

    p: Tensor
    g: Tensor
    m: Tensor
    out: Tensor
    small: Tensor
    last: bool

    def split(self) -> "list[Stack]":
        """One a factor, on the same memory."""
        parts = zip(*(tensor.unbind(0) for tensor in (self.p, self.g, self.m, self.out, self.small)), strict=True)
        return [Stack(*part, self.last) for part in parts]

    def inner(self, left: Tensor, right: Tensor) -> float:
        """The r x r products of two stacks of factors; operations."""
        torch.matmul(left.mT, right) if self.last else torch.matmul(left, right.mT)
        return 2.0 * left.numel() * self.small.shape[-1]

    def outer(self, tall: Tensor, beta: float) -> float:
        """r x r times tall, added to beta times what the result holds; operations."""
        first, second = (tall, self.small) if self.last else (self.small, tall)
        add = torch.addmm if tall.ndim == 2 else torch.baddbmm
        add(self.out, first, second, beta=beta, alpha=1e-9, out=self.out)
        return 2.0 * tall.numel() * self.small.shape[-1]


def stacked(factors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Stacks of equal shape in float32 with their gradients, and whether the rank comes last (lora_B).

    Below rank 16 lora_B is turned to [rank, out]: in its own layout the same products take three times as long.
    """
    for shape in sorted({tuple(factor.shape) for factor in factors}):
        chosen = [index for index, factor in enumerate(factors) if tuple(factor.shape) == shape]
        both = [torch.stack([source[i].detach().float() for i in chosen]) for source in (factors, gradients)]
        last = shape[0] > shape[1]
        if last and shape[1] < 16:
            both, last = [one.mT.contiguous() for one in both], False
        yield both[0], both[1], last


def rite_products(stack: Stack) -> float:
    """p p^T, g g^T, p m^T; transported momentum plus preconditioned gradient: 10 r N."""
    counted = sum(stack.inner(*pair) for pair in ((stack.p, stack.p), (stack.g, stack.g), (stack.p, stack.m)))
    return counted + stack.outer(stack.m, 0.0) + stack.outer(stack.g, 1.0)


def pro_products(stack: Stack) -> float:
    """p p^T, g p^T; the two terms of the adjusted gradient: 8 r N."""
    counted = stack.inner(stack.p, stack.p) + stack.inner(stack.g, stack.p)
    return counted + stack.outer(stack.g, 0.0) + stack.outer(stack.p, 1.0)


def give(arm: Arm, gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(arm.parameters, gradients, strict=False):
        parameter.grad = gradient.clone()


def take(arm: Arm) -> None:
    for parameter in arm.parameters:
        parameter.grad = None


def held_bytes() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
        return sum(storages(found).values())


def storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def state_bytes(arm: Arm) -> dict[str, float]:
    """Bytes a parameter: of the state, of the float32 master in it, of all that is held."""
    assert arm.optimizer is not None
    rest, masters = [], []
    for state in arm.optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                (masters if "master" in str(key) else rest).append(value)
    own = storages([parameter.data for parameter in arm.parameters])
    master = {pointer: size for pointer, size in storages(masters).items() if pointer not in own}
    state = {pointer: size for pointer, size in storages(rest).items() if pointer not in own and pointer not in master}
    count = sum(parameter.numel() for parameter in arm.parameters)
    return {
        "state": round(sum(state.values()) / count, 3),
        "master": round(sum(master.values()) / count, 3),
        "held": round(arm.held / count, 3),
    }


def peak_of(arm: Arm, gradients: Sequence[Tensor]) -> int:
    """The most bytes that one step allocates above what was alive before it."""
    give(arm, gradients)
    with warnings.catch_warnings(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        arm.step()
    take(arm)
    events = recorded.profiler.kineto_results.events()
    live = highest = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        live += size
        highest = max(highest, live)
    return highest


def measure(name: str, keys: Sequence[str], rounds: int, *, memory: bool) -> dict[str, Any]:
    case = CASES[name]
    start = Pairs(case)
    rng = torch.Generator().manual_seed(2)
    gradients = [(torch.randn(parameter.shape, generator=rng) * 1e-4).to(case.dtype) for parameter in start.factors()]
    arms, missing = {}, []
    for key in keys:
        try:
            arms[key] = make_arm(key, start, gradients)
        except CannotRun as reason:
            missing.append(str(reason))
            print(f"left out: {reason}", file=sys.stderr)
    keys = list(arms)
    count = sum(parameter.numel() for parameter in start.factors())
    spent: dict[str, list[tuple[float, float]]] = {key: [] for key in keys}
    gc.collect()
    gc.disable()
    for number in range(rounds + 1):
        turn = number % len(keys)
        for key in [*keys[turn:], *keys[:turn]]:
            arm = arms[key]
            give(arm, gradients)
            cpu, wall = time.process_time(), time.perf_counter()
            arm.step()
            if number:
                spent[key].append((time.process_time() - cpu, time.perf_counter() - wall))
            take(arm)
        print(f"{name}: round {number} of {rounds}", end="\r", file=sys.stderr, flush=True)
    gc.enable()
    print(file=sys.stderr)
    result: dict[str, Any] = {"pairs": len(gradients) // 2, "parameters": count, "r": case.rank, "arms": {}}
    result |= {"dtype": str(case.dtype).removeprefix("torch."), "rounds": rounds, "load_average": _load()}
    for key, arm in arms.items():
        entry: dict[str, Any] = {"title": TITLES[key]}
        for index, clock in enumerate(("cpu", "wall")):
            taken = [both[index] for both in spent[key]]
            base = [both[index] for both in spent[BASELINE]]
            entry[f"{clock}_milliseconds"] = _spread([1e3 * value for value in taken])
            entry[f"{clock}_ratio"] = _spread([one / other for one, other in zip(taken, base, strict=True)])
        if arm.optimizer is not None:
            entry["bytes_per_parameter"] = state_bytes(arm)
            if memory:
                entry["peak_temporary_megabytes"] = round(peak_of(arm, gradients) / 2**20, 1)
        entry |= arm.counted
        result["arms"][key] = entry
    result["counts"] = counts(case, count)
    result["verdicts"] = verdicts(case, result)
    result["missing"] = missing
    return result


def counts(case: Case, parameters: int) -> dict[str, dict[str, float]]:
    """Arithmetic of tall products and bytes that must move, a step, in the parameters' dtype with float32 state.

    AdamW reads parameter, gradient, two moments and writes all but the gradient. A pair method reads factor and
    gradient (RITE: and momentum) once for the r x r matrices and again for the step, as none of it stays in a cache.
    """
    size = case.dtype.itemsize
    wide = parameters * 4
    master = 0 if case.dtype == torch.float32 else 2 * wide  # read and written; the parameter is then only written
    own = parameters * size
    rank = case.rank
    dense = case.blocks * sum(out_features * in_features for _, out_features, in_features in case.linears)
    full_products = 2.0 * dense * rank * 4  # B hA and hB A as one [2 r] product, B^T N, N A^T
    return {
        BASELINE: {"gflop": 0.0, "gigabytes": 7 * own / 1e9},
        "rite": {"gflop": 10 * rank * parameters / 1e9, "gigabytes": (5 * own + 3 * wide + master) / 1e9},
        "pro": {"gflop": 8 * rank * parameters / 1e9, "gigabytes": (5 * own + 4 * wide + master) / 1e9},
        "full": {
            "gflop": (full_products + 16 * rank * parameters) / 1e9,
            "gigabytes": (5 * own + 16 * dense + master) / 1e9,
        },
    }


def verdicts(case: Case, result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    arms, found = result["arms"], {}
    for key, limit in case.limits.items():
        if key in arms:
            floor = arms.get(f"products-{key}", {}).get("cpu_ratio", {}).get("median")
            figure = arms[key]["cpu_ratio"]["median"]
            found[f"{key}, times AdamW"] = {"figure": figure, "limit": limit, "products": floor}
    for rival, share in RIVALS.items() if case.limits else ():
        if rival in arms and "rite" in arms:
            figure = arms["rite"]["cpu_milliseconds"]["median"] / arms[rival]["cpu_milliseconds"]["median"]
            found[f"rite, times {TITLES[rival]}"] = {"figure": round(figure, 3), "limit": share}
    for key in ("rite", "pro"):
        if key in arms:
            figure = arms[key]["bytes_per_parameter"]["held"] - arms[key]["bytes_per_parameter"]["master"]
            found[f"{key}, bytes a parameter"] = {"figure": round(figure, 3), "limit": STATE_LIMIT}
    return {name: {**entry, "held": entry["figure"] <= entry["limit"]} for name, entry in found.items()}


def summary(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """A line of the file's history, which keeps every whole run, not the best one."""
    return {
        "case": name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": result["load_average"],
        "cpu_ratio": {key: entry["cpu_ratio"]["median"] for key, entry in result["arms"].items() if key != BASELINE},
    }


def table(result: dict[str, Any]) -> str:
    lines = []
    for key, entry in result["arms"].items():
        ratio, taken = entry["cpu_ratio"], entry["cpu_milliseconds"]["median"]
        memory = entry.get("bytes_per_parameter", {})
        lines.append(
            f"  {TITLES[key]:30s} {ratio['median']:8.2f} x ({ratio['low']:.2f}-{ratio['high']:.2f}) {taken:10.1f} ms"
            + (f"   state {memory['state']:.2f} B, held {memory['held']:.2f} B a parameter" if memory else "")
        )
    lines += [
        f"  {'ok  ' if v['held'] else 'MISS'} {name}: {v['figure']} (limit {v['limit']})"
        for name, v in result["verdicts"].items()
    ]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, high = min(values), max(values)
    return {"median": round(statistics.median(values), 4), "low": round(low, 4), "high": round(high, 4)}


def _load() -> list[float]:
    return [round(load, 1) for load in os.getloadavg()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--only", nargs="+", choices=[key for key in TITLES if key != BASELINE], help="arms beside AdamW"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="5 rounds, own arms only, nothing written unless --output")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    on_one_thread(parser)
    wanted = options.only or [key for key in TITLES if key != BASELINE]
    if options.quick and not options.only:
        wanted = ["rite", "pro", "products-rite", "products-pro"]
    missing = [reason for key in wanted if (reason := absent(key))]
    for reason in missing:
        print(f"left out: {reason}", file=sys.stderr)
    whole = options.only is None and not options.quick
    output = options.output or (Path("benchmarks/results/optimizers.json") if whole else None)
    report: dict[str, Any] = json.loads(output.read_text()) if output is not None and output.exists() else {}
    report["what"] = __doc__.split("\n\n")[0] if __doc__ else ""
    report.setdefault("cases", {})
    for name in options.cases:
        keys = [BASELINE, *(key for key in wanted if absent(key) is None)]
        if name != "8x768" and "full" in keys:
            keys.remove("full")  # its state is the size of the model
        rounds = 5 if options.quick else options.rounds
        result = measure(name, keys, rounds, memory=not options.quick)
        result["missing"] = [*missing, *result["missing"]]
        report["cases"][name] = result
        report.setdefault("runs", []).append(summary(name, result))
        print(name), print(table(result), flush=True)
        report["measured"] = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "platform": platform.platform(),
            "clock": "ratios are of processor time, which other work on the machine disturbs less than wall time",
            "versions": {package: version(package) for package in ("torch", "peft", "rankwise")}
            | {package: version(package) for package in ("pytorch_optimizer",) if importlib.util.find_spec(package)},
        }
        if output is not None:
            write_report(output, report)


if __name__ == "__main__":
    main()
