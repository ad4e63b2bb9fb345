"""Why the ranks moved: what a schedule noted of each layer, as pictures and in words.

The details of a line of ranks.jsonl say by their keys what they are: the two terms of each rank's score (AB-LoRA),
which ranks became copies of which (BeamLoRA), the booster of a round (XGBLoRA). Others are shown as they are.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rankwise.report.charts import Picture
from rankwise.report.course import Gallery, maps_of, spread
from rankwise.report.files import RankChange, RankEvent, Run
from rankwise.report.grid import OUTSIDE, Panel, arrange, headings, split_name
from rankwise.report.small_map import small_map
from rankwise.report.words import facts, figure

__all__ = ["reason_galleries", "told"]

_PICTURES = 8
"""Events of one kind that are drawn; the table holds every one."""
_ROUNDS_WIDTH = 700
"""Of the picture of rounds, in pixels."""

_TERMS: Mapping[str, tuple[str, str]] = {
    "drop": (
        "What the model loses without a rank (drop)",
        "The mean over a layer's live ranks of what the score of the model falls by when one is switched off.",
    ),
    "solo": (
        "What a rank wins alone (solo)",
        "The mean over a layer's live ranks of what the score of the base model rises by with that rank alone.",
    ),
}


def reason_galleries(run: Run) -> list[Gallery]:
    """Pictures of what moved the ranks, as far as the events noted it; empty if none did.

    Args:
        run: the files of a run.
    """
    if run.plan is None:
        return []
    panels = arrange(run.plan.ranks)
    scored = [event for event in run.events if any(numbers(line, "drop") is not None for line in event.layers)]
    copied = [event for event in run.events if any(numbers(line, "sources") is not None for line in event.layers)]
    found = [_scores(term, spread(scored, _PICTURES), len(scored), panels) for term in _TERMS] if scored else []
    if copied:
        found.append(_copies(copied, panels))
    boosters = _boosters(run)
    return [*found, boosters] if boosters else found


def numbers(line: RankChange, key: str) -> list[float] | None:
    """A list of numbers among a layer's details, NaN for what was not finite; None if there is none."""
    value = line.detail.get(key) if isinstance(line.detail, Mapping) else None
    if not isinstance(value, list):
        return None
    found = [
        math.nan if each is None else float(each) for each in value if each is None or isinstance(each, int | float)
    ]
    return found if len(found) == len(value) else None


def _mean(values: Sequence[float]) -> float | None:
    """The mean of the finite values; None if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


# --- AB-LoRA: both terms of every score ---------------------------------------------------------------------------


def _scores(term: str, shown: Sequence[RankEvent], count: int, panels: Sequence[Panel]) -> Gallery:
    """One term of the scores in each round, with what the round did to the layers."""
    means = [{line.layer: _mean(numbers(line, term) or []) for line in event.layers} for event in shown]
    low, high = _ends(means)
    pictures = []
    for place, (event, values) in enumerate(zip(shown, means, strict=True)):
        lines = {line.layer: line for line in event.layers}
        hints = {name: _score_hint(name, lines.get(name), term) for panel in panels for name in panel.cells.values()}
        turns = {name: line.to - line.from_ for name, line in lines.items()}
        title = f"{term.capitalize()} after step {figure(event.step)}"
        chart = maps_of(
            f"{term}-{place}",
            title,
            panels,
            values,
            scale=(low, high),
            text=lambda value: figure(value, 1),
            hints=hints,
            turns=turns,
        )
        pictures.append(Picture(f"{_when(event)}: {_turned(event)}", chart))
    title, sentence = _TERMS[term]
    sentence += " A triangle marks a layer that gained or lost ranks by it."
    if count > len(shown):
        sentence += f" {len(shown)} of {count} rounds."
    return Gallery(term, title, sentence, pictures, figure(low, 2), figure(high, 2))


def _score_hint(name: str, line: RankChange | None, term: str) -> str:
    if line is None:
        return f"{name}: not scored"
    return ", ".join([f"{name}: {term} {_range(numbers(line, term) or [])}", *_slots_moved(line)])


def _when(event: RankEvent) -> str:
    step = f"after step {figure(event.step)}"
    return f"Round {figure(event.figures['round'])}, {step}" if "round" in event.figures else step.capitalize()


def _turned(event: RankEvent) -> str:
    fell, rose = (sum(sign * (line.to - line.from_) > 0 for line in event.layers) for sign in (-1, 1))
    return f"{figure(fell)} lower, {figure(rose)} higher" if fell or rose else "no rank moved"


# --- BeamLoRA: ranks that became copies ---------------------------------------------------------------------------


def _copies(events: Sequence[RankEvent], panels: Sequence[Panel]) -> Gallery:
    """How many ranks of each layer became copies of its best, at each reset."""
    counts = [{line.layer: len(numbers(line, "pruned") or []) for line in event.layers} for event in events]
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    high = max([1, *(count for each in counts for count in each.values())])
    shown = spread(events, _PICTURES)
    pictures = []
    for place, event in enumerate(shown):
        lines = {line.layer: line for line in event.layers}
        values = {name: float(len(numbers(line, "pruned") or [])) or None for name, line in lines.items()}
        hints = {
            name: f"{name}: {told(lines[name]) if name in lines else 'no rank overwritten'}"
            for panel in panels
            for name in panel.cells.values()
        }
        title = f"Ranks overwritten after step {figure(event.step)}"
        chart = maps_of(f"copies-{place}", title, panels, values, scale=(0.0, high), text=figure, hints=hints)
        count = sum(int(value or 0) for value in values.values())
        pictures.append(Picture(f"After step {figure(event.step)}: {figure(count)} in {len(lines)} layers", chart))
    (most, times), resets = total.most_common(1)[0], f"{len(events)} reset{'s' if len(events) > 1 else ''}"
    sentence = (
        "At a reset the lowest ranks of a layer become copies of its best; the number of ranks stays. "
        f"{figure(total.total())} ranks were overwritten in {resets}, most in {most} ({times})."
    )
    if len(events) > len(shown):
        sentence += f" {len(shown)} of {resets} are shown."
    return Gallery("copies", "Ranks overwritten", sentence, pictures, "0", figure(high))


# --- XGBLoRA: which layers each round trained ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What one round trained of one block: its layers, and the norms of their boosters (none while it is open)."""

    layers: list[str] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    @property
    def norm(self) -> float | None:
        """Of the layers' boosters together."""
        return math.hypot(*self.norms) if self.norms else None


_Blocks = Mapping[tuple[int, int], _Drawn]
"""By (round, block)."""


def _boosters(run: Run) -> Gallery | None:
    """Rounds from top to bottom, blocks from left to right: which were drawn, and how much the boosters weigh."""
    stacks = _by_block(_drawn_layers(run), run) if run.boosted else {}
    if not stacks:
        return None
    norms = [drawn.norm for blocks in stacks.values() for drawn in blocks.values() if drawn.norm is not None]
    low, high = (min(norms), max(norms)) if norms else (0.0, 0.0)
    panels = [_round_panel(stack, stacks[stack]) for stack in sorted(stacks, key=lambda stack: stack == OUTSIDE)]
    charts = []
    for place, (panel, heading) in enumerate(zip(panels, headings(panels), strict=True)):
        cells = {panel.cells[block, f"round {number}"]: drawn for (number, block), drawn in stacks[panel.stack].items()}
        chart = small_map(
            f"rounds-{place}",
            f"Blocks drawn in each round, {panel.stack}",
            panel,
            {name: drawn.norm for name, drawn in cells.items()},
            scale=(low, high),
            text=lambda value: figure(value, 2),
            hints={name: f"{name}: {_drawn_hint(drawn)}" for name, drawn in cells.items()},
            heading=heading,
            width=_ROUNDS_WIDTH,
        )
        charts.append(Picture("", chart))
    sentence = (
        "Which blocks each round trained; the color is the norm of the booster that the round added. "
        "An outlined cell is a round that is open, or whose booster was not kept."
    )
    title = "Rounds and the blocks they drew"
    return Gallery("rounds", title, sentence, charts, figure(low, 2), figure(high, 2), _ROUNDS_WIDTH)


def _drawn_layers(run: Run) -> dict[int, dict[str, float | None]]:
    """By round, the layers that it trained with the norm of each booster; None where none was added (yet).

    The event at a round's end names its layers by their norms, and those of the next round by a rank that rose.
    """
    rounds: dict[int, dict[str, float | None]] = defaultdict(dict)
    for event in run.events:
        number = int(event.figures.get("round", 0))
        for line in event.layers:
            norm = line.detail.get("booster_norm") if isinstance(line.detail, Mapping) else None
            if isinstance(norm, int | float) and math.isfinite(norm):
                rounds[number][line.layer] = float(norm)
            if event.kind in ("round", "fold") and line.to > line.from_:
                rounds[number + (event.kind == "fold")].setdefault(line.layer, None)
    return rounds


def _by_block(rounds: Mapping[int, Mapping[str, float | None]], run: Run) -> dict[str, dict[tuple[int, int], _Drawn]]:
    """The layers of each round by stack and block; one outside the blocks is a block by itself."""
    names = run.plan.ranks if run.plan else {}
    outside = {name: place for place, name in enumerate(name for name in names if split_name(name).index is None)}
    stacks: dict[str, dict[tuple[int, int], _Drawn]] = defaultdict(lambda: defaultdict(_Drawn))
    for number, layers in rounds.items():
        for name, norm in layers.items():
            position = split_name(name)
            block = outside.get(name, len(outside)) if position.index is None else position.index
            drawn = stacks[position.stack][number, block]
            drawn.layers.append(name)
            drawn.norms.extend([] if norm is None else [norm])
    return stacks


def _round_panel(stack: str, blocks: _Blocks) -> Panel:
    rounds = sorted({number for number, _ in blocks})
    cells: dict[tuple[int | None, str], str] = {
        (block, f"round {number}"): f"round {number}, {stack} {block}" for number, block in blocks
    }
    columns = sorted({block for _, block in blocks})
    return Panel(stack, tuple(columns), tuple(f"round {number}" for number in rounds), cells)


def _drawn_hint(drawn: _Drawn) -> str:
    names = drawn.layers[0] if len(drawn.layers) == 1 else f"{len(drawn.layers)} layers"
    return f"{names}, no booster kept" if drawn.norm is None else f"{names}, norm {figure(drawn.norm, 3)}"


# --- in words -----------------------------------------------------------------------------------------------------


def told(line: RankChange) -> str:
    """What was noted of a layer beside its rank, in a few words."""
    if numbers(line, "drop") is not None and numbers(line, "solo") is not None:
        return _told_scores(line)
    if numbers(line, "pruned") is not None and numbers(line, "sources") is not None:
        return _told_copies(line)
    if isinstance(line.detail, Mapping):
        return ", ".join(f"{name} {text}" for name, text in facts(line.detail))
    return "" if line.detail is None else str(line.detail)


def _told_scores(line: RankChange) -> str:
    slots = numbers(line, "slots") or []
    parts = [f"{len(slots)} rank{'s' if len(slots) != 1 else ''} scored"]
    parts += [f"{term} {_range(numbers(line, term) or [])}" for term in _TERMS]
    lowest = [value for value in numbers(line, "importance") or [] if math.isfinite(value)]
    parts += [f"lowest importance {figure(min(lowest), 3)}"] if lowest else []
    return ", ".join([*parts, *_slots_moved(line)])


def _slots_moved(line: RankChange) -> list[str]:
    """Which of its ranks a layer lost and gained."""
    words = (("pruned", "lost"), ("added", "gained"))
    return [f"{word} {_places(slots)}" for key, word in words if (slots := numbers(line, key))]


def _told_copies(line: RankChange) -> str:
    pruned, sources = numbers(line, "pruned") or [], numbers(line, "sources") or []
    text = f"{_places(pruned)} became copies of {_places(sources)}" if pruned else "nothing copied"
    scores = numbers(line, "importance")
    return f"{text}, scores {_range(scores)}" if scores else text


def _range(values: Sequence[float]) -> str:
    """Mean and ends of the finite values, and how many are not."""
    finite = [value for value in values if math.isfinite(value)]
    broken = len(values) - len(finite)
    lost = f" ({broken} not finite)" if broken else ""
    if not finite:
        return f"–{lost}"
    ends = f" ({figure(min(finite), 2)} to {figure(max(finite), 2)})" if len(finite) > 1 else ""
    return f"{figure(sum(finite) / len(finite), 2)}{ends}{lost}"


def _places(slots: Sequence[float]) -> str:
    return f"rank{'s' if len(slots) > 1 else ''} {', '.join(figure(slot) for slot in slots)}"


def _ends(values: Sequence[Mapping[str, float | None]]) -> tuple[float, float]:
    found = [value for each in values for value in each.values() if value is not None]
    return (min(found), max(found)) if found else (0.0, 0.0)
