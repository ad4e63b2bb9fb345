"""Layers arranged as block index by kind, from nothing but their dotted names.

`model.layers.3.self_attn.q_proj` sits in row 3, column `q_proj`; `encoder.layer.2.attention.output.dense` in row 2,
column `attention.output.dense`, because `dense` alone would not say which. An encoder and a decoder, or a vision tower
and a language model, are different stacks and become different panels.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["OUTSIDE", "Panel", "Position", "arrange", "headings", "split_name"]

OUTSIDE = "outside the blocks"
"""The stack of layers whose name holds no index: a head, a pooler, an embedding's projection."""

_ITSELF = "(block)"
"""The column of a layer that is itself an entry of a list: `blocks.0`."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where one layer sits: the stack of blocks, the block's index (None outside any stack), the kind within it."""

    stack: str
    index: int | None
    kind: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One stack of blocks as a grid; a cell that no adapted layer fills is absent.

    Args:
        stack: the dotted name of the list of blocks, or OUTSIDE.
        rows: block indices in ascending order; `(None,)` outside the blocks.
        kinds: column labels in the order of the layers: the shortest endings that tell the kinds apart, outside the
            blocks whole names.
        cells: full layer name by (row, kind).
    """

    stack: str
    rows: tuple[int | None, ...]
    kinds: tuple[str, ...]
    cells: Mapping[tuple[int | None, str], str]


def headings(panels: Sequence[Panel]) -> tuple[str, ...]:
    """What stands above each panel: nothing above the only stack of blocks, else its name."""
    stacks = sum(panel.stack != OUTSIDE for panel in panels)
    return tuple("" if stacks == 1 and panel.stack != OUTSIDE else panel.stack for panel in panels)


def split_name(name: str) -> Position:
    """Where a layer sits, by the first number in its dotted name.

    Args:
        name: the full dotted name, for example `decoder.block.0.layer.1.EncDecAttention.q`.

    Returns:
        The stack before the number, the number, and the rest as the kind.
    """
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isascii() and part.isdecimal():
            return Position(".".join(parts[:place]), int(part), ".".join(parts[place + 1 :]))
    return Position(OUTSIDE, None, name)


def arrange(names: Iterable[str]) -> tuple[Panel, ...]:
    """The panels of a set of layers; each name appears in exactly one cell.

    Args:
        names: full dotted names, each once, in the order of the model.

    Returns:
        One panel a stack in order of first appearance; layers outside the blocks come last.
    """
    stacks: dict[tuple[bool, str], dict[str, Position]] = {}
    for name in names:
        position = split_name(name)
        stacks.setdefault((position.index is None, position.stack), {})[name] = position
    return tuple(_panel(stack, stacks[outside, stack]) for outside, stack in sorted(stacks, key=lambda key: key[0]))


def _panel(stack: str, positions: Mapping[str, Position]) -> Panel:
    kinds = dict.fromkeys(position.kind for position in positions.values())
    labels = {kind: kind for kind in kinds} if stack == OUTSIDE else _shortest_labels(kinds)
    rows = sorted({-1 if position.index is None else position.index for position in positions.values()})
    cells = {(position.index, labels[position.kind]): name for name, position in positions.items()}
    return Panel(stack, tuple(None if row < 0 else row for row in rows), tuple(labels.values()), cells)


def _shortest_labels(kinds: Iterable[str]) -> dict[str, str]:
    """The shortest dotted ending of each kind that no other kind shares; the whole kind where all are shared."""
    endings = {kind: _endings(kind) for kind in kinds}
    uses = Counter(ending for some in endings.values() for ending in some)
    return {
        kind: next((ending for ending in some if uses[ending] == 1), kind) or _ITSELF for kind, some in endings.items()
    }


def _endings(kind: str) -> list[str]:
    parts = kind.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
