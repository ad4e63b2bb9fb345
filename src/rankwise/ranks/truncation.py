"""Which ranks of a trained adapter are kept when all of them together are more than a parameter budget holds."""

import itertools
import math
from collections.abc import Mapping, Sequence

from rankwise.errors import BudgetError, ConfigError
from rankwise.ranks.shapes import LayerShape

__all__ = ["truncated_ranks"]


def truncated_ranks(
    singular_values: Mapping[str, Sequence[float]], shapes: Sequence[LayerShape], budget: int
) -> dict[str, int]:
    """The leading ranks of each layer that cost at most `budget` parameters and hold the most for them.

    One order over all layers: what holds the least energy (squared singular value) for each of its in + out parameters
    is dropped first. What is left of the budget goes to the next ranks that still fit. Among layers of one size that is
    the order of the singular values, and the energy discarded is the least possible.

    Args:
        singular_values: by layer, those of its whole update, scaling included, largest first; zeros are never kept.
        shapes: the layers, in the model's order; ties keep the layer that comes first.
        budget: the most lora_A and lora_B parameters, >= 0; those of a uniform rank r are
            `uniform_budget(shapes, r)`.

    Returns:
        By layer, how many of its singular values are kept.

    Raises:
        ConfigError: values that are negative, not finite or not sorted, or a layer without values.
        BudgetError: a budget below 0.

    Example:
        >>> layers = [LayerShape("a", 4, 4), LayerShape("b", 4, 4)]
        >>> truncated_ranks({"a": [3.0, 0.5], "b": [2.0, 1.0]}, layers, 3 * 8)
        {'a': 1, 'b': 2}
    """
    if budget < 0:
        raise BudgetError(f"the budget is {budget} parameters: it must be at least 0")
    faults = [fault for shape in shapes if (fault := _fault(shape.name, singular_values.get(shape.name)))]
    if faults:
        raise ConfigError(faults)
    candidates = [
        # Ratios are compared as logarithms, or squares of small numbers would underflow.
        (2 * math.log(value) - math.log(shape.cost), -index, -k)
        for index, shape in enumerate(shapes)
        for k, value in enumerate(singular_values[shape.name])
        if value > 0
    ]
    kept = dict.fromkeys((shape.name for shape in shapes), 0)
    left = budget
    for _, index, _ in sorted(candidates, reverse=True):
        shape = shapes[-index]
        if shape.cost <= left:
            left -= shape.cost
            kept[shape.name] += 1
    return kept


def _fault(name: str, values: Sequence[float] | None) -> str | None:
    if values is None:
        return f"layer {name}: there are no singular values"
    if not all(math.isfinite(value) and value >= 0 for value in values):
        return f"layer {name}: singular values must be finite and at least 0"
    if any(later > earlier for earlier, later in itertools.pairwise(values)):
        return f"layer {name}: singular values must come largest first"
    return None
