"""Ablation scores from as few sequences as the decision needs: slopes corrected by what ablation finds on a sample.

Of every rank, two backward passes give the slopes of S in its gate, sequence by sequence, over the whole batch. On the
first 4, 8, 16, ... sequences its terms are found by ablation, and the mean difference to the slopes corrects them: a
control variate, whose error shrinks with the spread of that difference. A rank leaves the race as soon as t bounds
decide whether it is among the lowest; what is never decided is scored on the whole batch, which is exact. Then layers
run the same race for who is among the best, where new ranks go.

The bounds are those of a t test for every rank and look, at 1 %, not of all together: ranks that lie within round-off
or within the bounds' error of the last one taken may be exchanged.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from jaxtyping import Bool, Float64, Int64
from scipy import stats
from torch import Tensor

from rankwise.methods.ablation import Ablation, Scores, Slots, scores_of
from rankwise.methods.scored import rows_between

__all__ = ["half_widths", "screened", "undecided"]

Score = Callable[[Float64[Tensor, " n"], Float64[Tensor, " n"]], Float64[Tensor, " n"]]
"""The importance from drop and solo."""

_FIRST: Final = 4
_LEVEL: Final = 0.01


def undecided(estimates: Float64[Tensor, " n"], widths: Float64[Tensor, " n"], count: int) -> Bool[Tensor, " n"]:
    """Which values could be among the `count` lowest, and could be not.

    One is among them for sure if fewer than `count` others may lie below its upper bound, and not among them for sure
    if `count` others lie below its lower bound for sure.

    Args:
        estimates: the values, infinite ones with width 0; no NaN.
        widths: half of each one's interval, >= 0.
        count: how many are looked for.
    """
    low, high = estimates - widths, estimates + widths
    # Others only: a value of width above 0 has its own lower bound below its upper one.
    may_lie_below = (low[None, :] < high[:, None]).sum(dim=1) - (low < high).long()
    lie_below = (high[None, :] < low[:, None]).sum(dim=1)
    return ~((may_lie_below < count) | (lie_below >= count)) & (widths > 0)


def half_widths(
    spread: Float64[Tensor, " n"], seen: Int64[Tensor, " n"], rows: int, *, level: float = _LEVEL
) -> Float64[Tensor, " n"]:
    """Half the t interval of a sum over `rows` sequences, from `seen` of them drawn without replacement.

    Args:
        spread: standard deviation of one sequence's part, over those seen.
        seen: how many were seen, 2 to `rows`; at `rows` the interval is a point.
        rows: all of them.
        level: the chance that the interval misses, two-sided, in (0, 1).
    """
    quantiles = {size: float(stats.t.ppf(1 - level / 2, size - 1)) for size in set(seen.tolist())}
    t = torch.tensor([quantiles[size] for size in seen.tolist()], dtype=torch.float64)
    return t * rows * spread * ((1 - seen / rows) / seen).sqrt()


class _Race:
    """What is known of every rank: its slopes on all rows, its ablations on the first `seen` of them."""

    def __init__(self, ablation: Ablation, batches: Sequence[Any], slots: Slots, score: Score) -> None:
        self._ablation, self._batches, self._slots, self._score = ablation, batches, slots, score
        self.slopes, self._ends, self.weight = ablation.slopes(batches, slots)
        self.rows = self.slopes.shape[2]
        self._apart = torch.zeros_like(self.slopes)
        self.seen = torch.zeros(self.slopes.shape[1], dtype=torch.long)
        names = [name for name, chosen in slots.items() for _ in chosen]
        self.layers = {name: torch.tensor([own == name for own in names], dtype=torch.bool) for name in slots}

    def look(self, which: Bool[Tensor, " n"], size: int) -> None:
        """Ablates these ranks on as many of the first `size` rows as they have not been on."""
        for start in sorted(set(self.seen[which].tolist())):
            if start >= size:
                continue
            part = which & (self.seen == start)
            slots = {name: self._chosen(name, part) for name in self._slots}
            losses, _ = self._ablation.losses(rows_between(self._batches, start, size), slots)
            terms = losses[:, :-1] - losses[:, -1:]
            terms[1] = -terms[1]
            index = part.nonzero().squeeze(1)
            self._apart[:, index, start:size] = terms - self.slopes[:, index, start:size]
            self.seen[index] = size

    def _chosen(self, name: str, part: Bool[Tensor, " n"]) -> tuple[int, ...]:
        own = part[self.layers[name]].tolist()
        return tuple(slot for slot, taken in zip(self._slots[name], own, strict=True) if taken)

    def terms(self) -> Float64[Tensor, "2 n"]:
        """Drop and solo of every rank as estimated now, sums over labels."""
        return self.slopes.sum(dim=2) + self.rows * self._apart.sum(dim=2) / self.seen.clamp(min=1)

    def spread(self, which: Bool[Tensor, " n"], seen: int) -> float:
        """Standard deviation, a row, of the mean difference of these ranks over the first `seen` rows."""
        parts = self._apart[:, which, :seen]
        return float(self._score(parts[0].mean(dim=0), parts[1].mean(dim=0)).std())

    def values(self) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
        """Estimated importance of every rank, and half the width of its interval."""
        drop, solo = self.terms()
        values = self._score(drop, solo)
        inside = torch.arange(self.rows) < self.seen[:, None]
        apart = self._score(self._apart[0].flatten(), self._apart[1].flatten()).view(-1, self.rows)
        mean = torch.where(inside, apart, 0.0).sum(dim=1) / self.seen
        square = torch.where(inside, (apart - mean[:, None]).square(), 0.0).sum(dim=1)
        widths = half_widths((square / (self.seen - 1)).sqrt(), self.seen, self.rows)
        return values, torch.where(values.isfinite() & widths.isfinite(), widths, 0.0)

    def layer_values(self, names: Sequence[str]) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
        """Estimated mean importance of these layers' ranks, and half the width of its interval."""
        values, _ = self.values()
        means, spreads, seen = [], [], []
        for name in names:
            own = self.layers[name]
            # Last, as in the queue for new ranks: without a rank, or with one that breaks the model alone.
            last = not bool(own.any()) or bool((values[own] == -math.inf).any())
            means.append(-math.inf if last else float(values[own].mean()))
            usable = math.isfinite(means[-1])
            seen.append(int(self.seen[own].min()) if usable else self.rows)
            spreads.append(self.spread(own, seen[-1]) if usable else 0.0)
        sizes = torch.tensor(seen)
        widths = half_widths(torch.tensor(spreads, dtype=torch.float64), sizes, self.rows)
        return torch.tensor(means, dtype=torch.float64), widths.nan_to_num(nan=0.0)

    def scores(self) -> Scores:
        """What is known now."""
        drop, solo = self.terms() / self.weight
        model, base = (float(end) for end in -self._ends.sum(dim=1) / self.weight)
        passes, sequences = self._ablation.counted()
        return scores_of(self._slots, drop, solo, model=model, base=base, passes=passes, sequences=sequences)


def screened(
    ablation: Ablation,
    batches: Sequence[Any],
    slots: Slots,
    *,
    score: Score,
    count: int,
    lowest: Callable[[Mapping[str, Float64[Tensor, " slots"]]], Sequence[str]],
) -> Scores:
    """Scores good enough to tell the `count` lowest ranks, and the best of the layers that lose none.

    Falls back to exact scores where losses are not known row by row, there are too few rows, or slopes are not finite.

    Args:
        ablation: prepared for the model.
        batches: the batch, in parts.
        slots: what is scored.
        score: importance from both terms; linear but for infinities.
        count: how many ranks are switched off, and switched on elsewhere.
        lowest: the layers that lose a rank, from the scores by layer.

    Source: ours; the paper scores every rank exactly.
    """
    if not ablation.by_rows or sum(len(batch["labels"]) for batch in batches) < 2 * _FIRST:
        return ablation.exact(batches, slots)
    race = _Race(ablation, batches, slots, score)
    if not bool(race.slopes.isfinite().all()):
        return ablation.exact(batches, slots)
    sizes = [*(size for size in (_FIRST * 2**n for n in range(16)) if size < race.rows), race.rows]
    racing = torch.ones(len(race.seen), dtype=torch.bool)
    for size in sizes:
        race.look(racing, size)
        racing = undecided(*race.values(), count)
        if not racing.any():
            break
    values, _ = race.values()
    pruned = lowest({name: values[own] for name, own in race.layers.items()})
    names = [name for name in slots if name not in pruned]
    # With fewer layers than new ranks all get the quotient, and the race is for the remainder.
    best = count % len(names) if names and count >= len(names) else count
    for size in sizes if names and best else ():
        means, widths = race.layer_values(names)
        open_ = [name for name, one in zip(names, undecided(-means, widths, best).tolist(), strict=True) if one]
        if not open_:
            break
        for_look = torch.stack([race.layers[name] for name in open_]).any(dim=0)
        race.look(for_look, size)
    return race.scores()
