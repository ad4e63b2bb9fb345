"""Which run comes next: a learning-rate grid at seed 0 until its best is interior, then more seeds at the best."""

from collections.abc import Iterable, Sequence

from benchmarks.quality.arms import Arm
from benchmarks.quality.records import Record

__all__ = ["LADDER", "best_rate", "grid_left", "interior", "seeds_left"]

LADDER = (9.5e-5, 1.9e-4, 3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 4.5e-3, 6e-3, 9e-3, 1.2e-2, 1.5e-2, 2.4e-2)
GRID_SEED = 0


def _grid(arm: Arm, records: Iterable[Record]) -> dict[float, Record]:
    return {r.key[1]: r for r in records if r.key[0] == arm.name and r.key[2] == GRID_SEED}


def best_rate(arm: Arm, records: Iterable[Record]) -> float | None:
    """The learning rate with the lowest validation NLL at seed 0; None before the first run."""
    grid = _grid(arm, records)
    return min(grid, key=lambda rate: grid[rate].choice) if grid else None


def interior(arm: Arm, records: Sequence[Record]) -> bool:
    """Whether a lower and a higher learning rate were both tried and both found worse than the best."""
    tried, best = sorted(_grid(arm, records)), best_rate(arm, records)
    return best is not None and tried[0] < best < tried[-1]


def grid_left(arm: Arm, records: Sequence[Record]) -> float | None:
    """The next learning rate to try at seed 0; None once the best is interior (or at the end of the ladder).

    The middle of the grid, the likeliest best, comes first: a run is tested only if it beats those before it.
    """
    tried = _grid(arm, records)
    middle = arm.rates[len(arm.rates) // 2]
    for rate in sorted(arm.rates, key=lambda rate: abs(LADDER.index(rate) - LADDER.index(middle))):
        if rate not in tried:
            return rate
    best = best_rate(arm, records)
    assert best is not None
    place = LADDER.index(best)
    if best == max(tried) and place + 1 < len(LADDER):
        return LADDER[place + 1]
    if best == min(tried) and place > 0:
        return LADDER[place - 1]
    return None


def seeds_left(arm: Arm, records: Sequence[Record], seeds: Sequence[int]) -> list[int]:
    """Seeds without a tested run at the best learning rate."""
    best = best_rate(arm, records)
    done = {r.key[2] for r in records if r.key[:2] == (arm.name, best) and r.tested}
    return [seed for seed in seeds if seed not in done]
