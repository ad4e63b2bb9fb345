"""One of the processes of test_processes.py: `python -m tests.calibration.worker RANK WORLD FOLDER`.

It imports neither transformers nor PEFT, so that starting it costs little.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankwise.calibration.collect import collect
from rankwise.calibration.processes import assert_equal_everywhere, broadcast_object, decided_by_first
from rankwise.errors import ArtifactError
from tests.calibration.support import EVERYTHING, FOLLOWED, GRADIENT, targets

BATCHES = [torch.randn(1 + seed, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
MANY = [torch.randn(2, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(12)]


def toy() -> nn.Module:
    """Three targets with dropout in between."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def mean_square(model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
    """A mean over rows, weighted by rows."""
    return model(batch).square().mean(), float(len(batch))


class _Stop:
    def __call__(self, batches: int, scores: Any) -> bool:
        return batches == 3


def _poisoned(model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
    """The same, with an infinite gradient for the twelfth of twelve batches alone (process 1 runs it)."""
    value, weight = mean_square(model, batch)
    if torch.equal(batch, MANY[11]):
        value.register_hook(lambda grad: grad * float("inf"))
    return value, weight


DEFAULTS: dict[str, Any] = {"batches": BATCHES, "loss": mean_square}
CASES: dict[str, dict[str, Any]] = {
    "exact": {"request": replace(EVERYTHING, gradient=True), "memory": "exact"},
    "sampled": {"request": EVERYTHING, "memory": "sampled"},
    "low": {"request": GRADIENT, "memory": "low", "token_weighted": False},
    "stop": {"request": replace(EVERYTHING, stop=_Stop()), "memory": "exact"},
    "bad": {"request": GRADIENT, "batches": MANY, "loss": _poisoned},
    "followed": {"request": FOLLOWED},
    "dropout": {"request": GRADIENT, "train_mode": True, "collector": "param"},
}


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    model = toy()
    for case, settings in CASES.items():
        found = collect(model, targets(model), **{**DEFAULTS, **settings})
        torch.save(found, folder / f"{case}-{rank}.pt")
    single = collect(model, targets(model), BATCHES[:1], GRADIENT, loss=mean_square)
    torch.save(single, folder / f"single-{rank}.pt")
    (folder / f"runs-{rank}.txt").write_text(" ".join(numbers_run(model)))
    (folder / f"failure-{rank}.txt").write_text(
        said(lambda: collect(model, targets(model), BATCHES, GRADIENT, loss=boom))
    )
    differ = said(lambda: assert_equal_everywhere("ab"[rank], "the plan"))
    (folder / f"differ-{rank}.txt").write_text(differ)
    (folder / f"broadcast-{rank}.txt").write_text(str(broadcast_object(rank)))
    (folder / f"first-{rank}.txt").write_text(said(lambda: decided_by_first(damaged)))
    dist.destroy_process_group()


def numbers_run(model: nn.Module) -> list[str]:
    """Which batches this process ran, by global number."""
    seen: list[str] = []

    def loss(m: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        seen.append(str(len(batch) - 1))
        return mean_square(m, batch)

    collect(model, targets(model), BATCHES, GRADIENT, loss=loss)
    return seen


def boom(model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
    """Fails on the second batch, which process 1 runs."""
    if torch.equal(batch, BATCHES[1]):
        raise KeyError("boom")
    return mean_square(model, batch)


def damaged() -> None:
    """What process 0 meets when it reads a damaged cache."""
    raise ArtifactError("the cache is damaged")


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "nothing"


if __name__ == "__main__":
    main()
