"""Whole ranks from shares under a parameter budget: the exact rule that every allocator uses.

Water-filling: one level is found at which the clipped shares cost exactly the budget, the wished ranks are rounded
down, and what is left of the budget is handed out rank by rank. The rule is rankwise's own (GoRA's `rank_mode: exact`);
the published rules, which do not conserve the budget, live with their methods.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from rankwise.errors import BudgetError, ConfigError
from rankwise.ranks.shapes import LayerShape, uniform_budget

__all__ = ["water_fill"]

# Wished ranks are rounded to this many parts of a rank, so that a last-digit difference in the shares (a common factor,
# another summation order) can neither turn 8 into 7 nor decide a tie.
_PARTS = 10**9


@dataclass(frozen=True, slots=True)
class _Basin:
    """One layer in exact integers: `weight` is its share times a common power of two."""

    name: str
    weight: int
    cost: int
    floor: int
    cap: int


def water_fill(
    shares: Sequence[float], shapes: Sequence[LayerShape], budget: int, *, floor: int, cap: int | None
) -> tuple[int, ...]:
    """Ranks in proportion to `shares`, within floor and cap, that cost at most `budget` parameters.

    The result depends on the ratios of the shares only. It never costs more than the budget, and the shortfall is
    below one rank of the cheapest layer that could still grow. A layer with share 0 stays at the floor; so more of the
    budget is left over only where every layer with a positive share is at its cap.

    Args:
        shares: wished ranks up to one common factor, finite, >= 0, at least one above 0, in the order of `shapes`.
        shapes: the layers; names are unique.
        budget: the most parameters that may be spent.
        floor: the least rank of every layer, >= 0 (a layer smaller than this gets its full size).
        cap: the largest rank of every layer, >= max(floor, 1); None leaves only the layer's own size, min(in, out).

    Returns:
        One rank a layer, in the order of `shapes`.

    Raises:
        ConfigError: shares or bounds that make no sense; every fault at once.
        BudgetError: the floors alone cost more than the budget.

    Example:
        >>> from rankwise.ranks.shapes import LayerShape
        >>> layers = [LayerShape("a", 4, 4), LayerShape("b", 4, 4)]
        >>> water_fill([3.0, 1.0], layers, 4 * 8, floor=0, cap=None)
        (3, 1)
    """
    _check(shares, shapes, floor, cap)
    basins = _basins(shares, shapes, floor, cap)
    least = sum(basin.floor * basin.cost for basin in basins)
    if least > budget:
        raise _too_small(shapes, budget, least, floor)
    if sum(basin.cap * basin.cost for basin in basins) <= budget:
        return tuple(basin.cap for basin in basins)
    level = _level(basins, budget)
    wished = [round(_clipped(basin, level) * _PARTS) for basin in basins]
    ranks = [parts // _PARTS for parts in wished]
    order = sorted(
        range(len(basins)), key=lambda i: (-(wished[i] % _PARTS), -basins[i].weight, basins[i].name)
    )  # largest fractional part first; equal shapes then keep the order of their shares even when both are clipped
    return _spend(basins, ranks, order, budget)


def _check(shares: Sequence[float], shapes: Sequence[LayerShape], floor: int, cap: int | None) -> None:
    faults = []
    if len(shares) != len(shapes):
        faults.append(f"{len(shares)} shares for {len(shapes)} layers: one share a layer is needed")
    faults += [
        f"layer {shape.name}: share {share} is not a finite number >= 0"
        for share, shape in zip(shares, shapes, strict=False)
        if not (math.isfinite(share) and share >= 0)
    ]
    if not faults and not any(share > 0 for share in shares):
        faults.append("every share is 0: at least one layer needs a positive share (use equal shares for equal ranks)")
    if floor < 0:
        faults.append(f"floor {floor} is below 0: the least rank is a whole number >= 0")
    if cap is not None and cap < max(floor, 1):
        faults.append(f"cap {cap} is below {max(floor, 1)}: the largest rank is at least 1 and not below the floor")
    if faults:
        raise ConfigError(faults)


def _basins(shares: Sequence[float], shapes: Sequence[LayerShape], floor: int, cap: int | None) -> list[_Basin]:
    ratios = [float(share).as_integer_ratio() for share in shares]
    common = max(denominator for _, denominator in ratios)  # all are powers of two
    basins = []
    for (numerator, denominator), shape in zip(ratios, shapes, strict=True):
        top = shape.max_rank if cap is None else min(cap, shape.max_rank)
        low = min(floor, top)
        weight = numerator * (common // denominator)
        basins.append(_Basin(shape.name, weight, shape.cost, low, top if weight else low))
    return basins


def _too_small(shapes: Sequence[LayerShape], budget: int, least: int, floor: int) -> BudgetError:
    one = uniform_budget(shapes, 1)
    return BudgetError(
        f"the budget of {budget} parameters (a uniform rank of {budget / one:.3g}) is too small: "
        f"at least {least} parameters are needed for the least rank of {floor} in each of {len(shapes)} layers; "
        f"use r >= {-(-least // one)}, a lower least rank, or fewer target modules"
    )


def _level(basins: Sequence[_Basin], budget: int) -> Fraction:
    """The level at which the clipped shares cost exactly `budget`: bisection over the corners, then one division."""
    growing = [basin for basin in basins if basin.cap > basin.floor]
    corners = sorted({Fraction(edge, b.weight) for b in growing for edge in (b.floor, b.cap)})
    low, high = 0, len(corners) - 1  # at the first corner every layer is at its floor, at the last at its cap
    while high - low > 1:
        middle = (low + high) // 2
        if _cost(basins, corners[middle]) <= budget:
            low = middle
        else:
            high = middle
    left, right = corners[low], corners[high]
    at_left = _cost(basins, left)
    slope = (_cost(basins, right) - at_left) / (right - left)  # linear between neighboring corners, and rising
    return left + (budget - at_left) / slope


def _clipped(basin: _Basin, level: Fraction) -> Fraction:
    return min(max(level * basin.weight, Fraction(basin.floor)), Fraction(basin.cap))


def _cost(basins: Sequence[_Basin], level: Fraction) -> Fraction:
    top, bottom = level.numerator, level.denominator
    total = sum(min(max(top * b.weight, b.floor * bottom), b.cap * bottom) * b.cost for b in basins)
    return Fraction(total, bottom)


def _spend(basins: Sequence[_Basin], ranks: list[int], order: Sequence[int], budget: int) -> tuple[int, ...]:
    """Hands out what rounding down left, one rank a layer and pass, until nothing fits."""
    left = budget - sum(rank * basin.cost for rank, basin in zip(ranks, basins, strict=True))
    grown = True
    while grown:
        grown = False
        for i in order:
            if ranks[i] < basins[i].cap and basins[i].cost <= left:
                ranks[i] += 1
                left -= basins[i].cost
                grown = True
    return tuple(ranks)
