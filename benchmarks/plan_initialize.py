"""Plan and initialize GoRA for the 224 layers of Llama-3.1-8B against the matrix products that this needs.

Given are W and the mean gradient G of each layer in bfloat16; r = 16, default settings (lora_A Kaiming, ranks 8 to 64).
Timed, on one thread:
  ours    = importance and G A^T of every layer (`measure`: draws A with 64 rows, reads W and G once), `allocate`, and
            `initialize` of every layer (draws A again, QR, triangular solves);
  product = G A^T alone, for the same 64 rows of A from the same bfloat16 G, widened to float32 128 rows at a time (the
            ranks are not known while G is there, so all rows that a layer can get are needed);
  float32 = the same product by one torch.mm from a G that is float32 already, nothing to widen.
One layer is held at a time and made outside the timed regions; ours and the two floors alternate on the same tensors.
Times are those of the process on its core (user + system), which a neighbor on the machine stretches far less than the
clock on the wall; the wall clock's figures stand beside them. Each of the 32 transformer blocks is one sample of the
ratios; totals are over all layers.

    python benchmarks/plan_initialize.py [--output benchmarks/results/plan_initialize.json]
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from rankwise.adapters.layers import LinearLayer
from rankwise.calibration.statistics import GradientStatistics, LayerStatistics
from rankwise.methods.base import Budget, Start, keep_float32
from rankwise.methods.gora import GoRA
from rankwise.methods.measure import measure
from rankwise.ranks.shapes import LayerShape, uniform_budget

BLOCKS, RANK = 32, 16
SIZES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
ROWS = 128
Result = TypeVar("Result")


def llama_shapes(blocks: int) -> list[LayerShape]:
    return [
        LayerShape(f"model.layers.{block}.{name}", *size) for block in range(blocks) for name, size in SIZES.items()
    ]


class Layers:
    """Makes one layer's W and G at a time from a pool of random numbers; sizes of gradients differ between layers."""

    def __init__(self) -> None:
        self._pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))

    def make(self, index: int, shape: LayerShape) -> tuple[Tensor, Tensor]:
        count = shape.out_features * shape.in_features

        def tensor(shift: int, scale: float) -> Tensor:
            rolled = (self._pool.roll(7919 * shift) * scale).bfloat16()
            return rolled.repeat(-(-count // len(rolled)))[:count].reshape(shape.out_features, shape.in_features)

        return tensor(2 * index, 0.02), tensor(2 * index + 1, 1e-4 * 1.5 ** (index % 11))


@dataclass
class Seconds:
    """What one part took, a number a transformer block: on the core, and on the wall."""

    core: list[float]
    wall: list[float]

    def add(self, block: int, work: Callable[[], Result]) -> Result:
        core, wall = time.process_time(), time.perf_counter()
        result = work()
        self.core[block] += time.process_time() - core
        self.wall[block] += time.perf_counter() - wall
        return result


def widened_product(gradient: Tensor, rows: Tensor) -> Tensor:
    wide = torch.empty(ROWS, gradient.shape[1])
    products = torch.empty(gradient.shape[0], rows.shape[0])
    for first in range(0, gradient.shape[0], ROWS):
        block = wide[: min(ROWS, gradient.shape[0] - first)].copy_(gradient[first : first + ROWS])
        torch.mm(block, rows.mT, out=products[first : first + ROWS])
    return products


def largest_decomposition(work: Callable[[], object]) -> int:
    """The largest smaller side of a matrix that any SVD routine of torch was given."""
    seen = [0]
    patched = [(torch.linalg, "svd"), (torch.linalg, "svdvals"), (torch, "svd"), (torch, "svd_lowrank")]
    originals = [getattr(owner, name) for owner, name in patched]

    def watched(original: Callable[..., object]) -> Callable[..., object]:
        def call(matrix: Tensor, *args: object, **kwargs: object) -> object:
            seen.append(min(matrix.shape[-2:]))
            return original(matrix, *args, **kwargs)

        return call

    for (owner, name), original in zip(patched, originals, strict=True):
        setattr(owner, name, watched(original))
    try:
        work()
    finally:
        for (owner, name), original in zip(patched, originals, strict=True):
            setattr(owner, name, original)
    return max(seen)


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return {
        "median": statistics.median(values),
        "lower_quartile": low,
        "upper_quartile": high,
        "least": ordered[0],
        "most": ordered[-1],
    }


def run(blocks: int) -> dict[str, object]:
    shapes, method, layers = llama_shapes(blocks), GoRA(), Layers()
    budget = Budget(r=RANK, lora_alpha=16, parameters=uniform_budget(shapes, RANK))
    request = method.request(shapes, budget, 0)
    assert request.projection is not None
    names = ("measure", "product", "float32")
    totals = {name: Seconds([0.0] * blocks, [0.0] * blocks) for name in (*names, "allocate", "initialize")}
    found: dict[str, LayerStatistics] = {}
    for index, shape in enumerate(shapes):
        weight, gradient = layers.make(index, shape)
        rows, wide = request.projection(shape), gradient.float()
        work = {
            "measure": partial(measure, request, shape, weight, gradient),
            "product": partial(widened_product, gradient, rows),
            "float32": partial(torch.mm, wide, rows.mT),
        }
        for name in names if index == 0 else ():
            work[name]()  # the first call of each pays for set-up
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            result = totals[name].add(index // len(SIZES), work[name])
            if isinstance(result, LayerStatistics):
                found[shape.name] = result
        del weight, gradient, wide, work
        if index % 28 == 27:
            print(f"{index + 1} of {len(shapes)} layers", flush=True)
    given = GradientStatistics(
        layers=found, batches=1, skipped=0, tokens=1.0, loss=1.0, memory="exact", collector="outer"
    )
    allocation = method.allocate(shapes, budget, given)
    starts = []
    for shape, rank in zip(shapes, allocation.ranks, strict=True):
        module = nn.Linear(shape.in_features, shape.out_features, bias=False, device="meta")
        starts.append(
            Start(
                layer=LinearLayer(shape.name, module, "linear", shape),
                rank=rank,
                divisor=method.scaling_rule().divisor(rank, RANK),
                budget=budget,
                seed=0,
                dtype_cast=keep_float32,
                statistics=found[shape.name],
            )
        )
    totals["allocate"].add(0, partial(method.allocate, shapes, budget, given))
    for name, clock in (("core", totals["allocate"].core), ("wall", totals["allocate"].wall)):
        setattr(totals["allocate"], name, [clock[0] / blocks] * blocks)  # one call for all layers
    for index, start in enumerate(starts):
        totals["initialize"].add(index // len(SIZES), partial(method.initialize, start))
    small_layer = shapes[1]
    weight, gradient = layers.make(1, small_layer)
    decomposed = largest_decomposition(
        lambda: (measure(request, small_layer, weight, gradient), method.initialize(starts[1]))
    )
    return report(shapes, allocation.ranks, budget, totals, blocks, decomposed)


def report(
    shapes: list[LayerShape],
    ranks: tuple[int, ...],
    budget: Budget,
    totals: dict[str, Seconds],
    blocks: int,
    decomposed: int,
) -> dict[str, object]:
    def compared(clock: str) -> dict[str, object]:
        parts = {name: getattr(seconds, clock) for name, seconds in totals.items()}
        ours = [sum(parts[name][k] for name in ("measure", "allocate", "initialize")) for k in range(blocks)]
        total = {"ours": sum(ours), **{name: sum(values) for name, values in parts.items()}}
        return {
            "seconds": total,
            "ratio_to_product": spread([ours[k] / parts["product"][k] for k in range(blocks)]),
            "ratio_to_float32_product": spread([ours[k] / parts["float32"][k] for k in range(blocks)]),
        }

    return {
        "benchmark": "plan_initialize",
        "what": __doc__,
        "layers": len(shapes),
        "weights": sum(shape.out_features * shape.in_features for shape in shapes),
        "r": RANK,
        "ranks": {"least": min(ranks), "most": max(ranks)},
        "parameters": {
            "budget": budget.parameters,
            "used": sum(rank * shape.cost for rank, shape in zip(ranks, shapes, strict=True)),
        },
        "largest_svd_side": decomposed,
        "blocks": blocks,
        "core": compared("core"),
        "wall": compared("wall"),
        "limit": 1.5,
        "threads": torch.get_num_threads(),
        "load_average_at_end": os.getloadavg(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": {"cpu": cpu_name(), "capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()},
    }


def cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="fewer transformer blocks for a quick look")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "plan_initialize.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = run(arguments.blocks)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for key in ("core", "wall", "largest_svd_side"):
        print(key, json.dumps(result[key]))


if __name__ == "__main__":
    main()
