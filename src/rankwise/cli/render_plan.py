"""A rank plan in the terminal: heat map, table and budget, each fitting itself to the width it is given."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from rankwise.ranks.plan import LayerPlan, RankPlan
from rankwise.report.grid import Panel, arrange, headings
from rankwise.report.summary import kind_shares, rank_sentence
from rankwise.report.words import duration, figure

__all__ = ["BudgetLine", "HeatMap", "RankTable", "cost_view", "frameless", "plan_summary", "plan_view"]

_FOLD_ABOVE = 48
"""Layers that a table shows one by one."""

_STEPS = (
    ("#1d3c4b", "#ffffff"),
    ("#1f5063", "#ffffff"),
    ("#226678", "#ffffff"),
    ("#297680", "#ffffff"),
    ("#469a96", "#0d1f29"),
    ("#6eb5a2", "#0d1f29"),
    ("#a0d0b3", "#0d1f29"),
    ("#d6ecd2", "#0d1f29"),
)
"""Background and text of the color scale, few to many ranks."""


def plan_summary(plan: RankPlan) -> RenderableType:
    """Where the ranks of a plan went, and what they cost: heat map and budget line.

    Args:
        plan: any plan, rank 0 and a single layer included.
    """
    setting = f"r {plan.r}, scaling {plan.scaling_rule.value}, alpha {plan.lora_alpha:g}"
    return Group(
        Text(rank_sentence(plan, plan.ranks)), HeatMap(plan.ranks), BudgetLine(plan.parameters, plan.budget, setting)
    )


def plan_view(plan: RankPlan) -> RenderableType:
    """A whole plan: what it is for, heat map, table, budget and notes.

    Args:
        plan: any plan; above 48 layers the table has one line a kind.
    """
    head = Text.assemble((" + ".join(plan.methods), "bold"), f" on {plan.model.name or 'a model'}")
    folded = len(plan.layers) > _FOLD_ABOVE
    table: RenderableType = _kind_table(plan) if folded else RankTable(plan)
    hint = [Text(f"{len(plan.layers)} layers by kind; --json or --output lists each.", style="dim")] if folded else []
    notes = [Text(f"note: {note}") for note in plan.notes]
    return Group(head, plan_summary(plan), Text(), table, *hint, *notes)


def cost_view(cost: Mapping[str, float | int]) -> RenderableType:
    """What a plan will take on this machine: memory at the peak of a step, its parts, and the time of training.

    Args:
        cost: `RunCost.to_dict()`.
    """
    parts = {part: cost[f"{part}_bytes"] for part in ("model", "gradient", "optimizer", "activation")}
    more = {"schedule": cost["schedule_bytes"], "copy of the base on the CPU": cost["base_copy_bytes"]}
    parts |= {part: count for part, count in more.items() if count}
    told = ", ".join(f"{part} {_size(count)}" for part, count in parts.items())
    step = cost["micro_batches"] * cost["micro_batch_seconds"] + cost["optimizer_seconds"]
    overhead = [] if cost["overhead"] == 1 else [_overhead(cost)]
    events = [_events(cost["event_seconds"])] if cost["event_seconds"] else []
    return Group(
        Text.assemble(("Memory of a step  ", "bold"), f"{_size(cost['memory_bytes'])} ({told})"),
        Text.assemble(
            ("Time of training  ", "bold"),
            f"{duration(cost['seconds'])} for {cost['steps']:,} steps of {figure(step, 2)} s, measured here; "
            "calibration, evaluation and saving come on top",
        ),
        *overhead,
        *events,
    )


def _events(seconds: float) -> Text:
    """What rounds take that come between steps; in the time of training already."""
    return Text.assemble(("Between steps  ", "bold"), f"{duration(seconds)} of it for the rounds of the schedule")


def _overhead(cost: Mapping[str, float | int]) -> Text:
    """A step beside a plain LoRA step of the same ranks, and which part of it takes the time."""
    parts = ("micro_batch", "optimizer")
    told = ", ".join(
        f"{name.replace('_', '-')} {figure(cost[f'{name}_seconds'], 2)} s against "
        f"{figure(cost[f'plain_{name}_seconds'], 2)} s"
        for name in parts
    )
    return Text.assemble(("Against plain LoRA  ", "bold"), f"{cost['overhead']:.2f} x a step under AdamW ({told})")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{figure(count, 3)} {unit}"
        count /= 1000
    return f"{figure(count, 3)} GB"


@dataclass(frozen=True)
class HeatMap:
    """Ranks with kinds from top to bottom and depth from left to right; blocks are averaged where the width is short.

    Args:
        ranks: rank by full layer name.
    """

    ranks: Mapping[str, int]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The panels, one after the other."""
        panels = arrange(self.ranks)
        for panel, heading in zip(panels, headings(panels), strict=True):
            if heading:
                yield Text(heading, style="bold")
            yield from self._panel(panel, options.max_width)

    def _panel(self, panel: Panel, width: int) -> Iterator[Text]:
        label = min(max(map(len, panel.kinds)), max(8, width // 3))
        room = width - label - 8
        digits = len(str(max(self.ranks.values()))) + 1
        digits += room >= (digits + 1) * len(panel.rows)  # some air where there is room for it
        fitting = max(1, room // digits)
        together = math.ceil(len(panel.rows) / fitting)
        groups = [panel.rows[start : start + together] for start in range(0, len(panel.rows), together)]
        for kind in panel.kinds:
            yield self._line(panel, kind, groups, label, digits)
        if len(panel.rows) > 1:
            yield _scale(groups, label, digits)
        if together > 1:
            yield Text(f"{'':{label}} each cell is the mean of up to {together} blocks", style="dim")

    def _line(self, panel: Panel, kind: str, groups: Sequence[tuple[int | None, ...]], label: int, digits: int) -> Text:
        line = Text(_shortened(kind, label).rjust(label) + " ", no_wrap=True)
        lowest, highest = min(self.ranks.values()), max(self.ranks.values())
        every: list[int] = []
        for group in groups:
            found = [self.ranks[panel.cells[row, kind]] for row in group if (row, kind) in panel.cells]
            line.append(*_cell(found, lowest, highest, digits))
            every += found
        if len(panel.rows) > 1:
            line.append(f"{sum(every) / len(every):7.1f}", style="dim")
        return line


def _scale(groups: Sequence[tuple[int | None, ...]], label: int, digits: int) -> Text:
    """Block indices under the columns, as many as have room."""
    line = Text("block".rjust(label) + " ", style="dim", no_wrap=True)
    widest = max(len(str(group[0])) for group in groups)
    every = math.ceil((widest + 1) / digits)
    for place in range(0, len(groups), every):
        room = min(every, len(groups) - place) * digits
        index = str(groups[place][0])
        line.append((index if len(index) <= room else "").rjust(digits - 1).ljust(room))
    line.append("mean".rjust(7))
    return line


def _cell(ranks: Sequence[int], lowest: int, highest: int, digits: int) -> tuple[str, str]:
    if not ranks:
        return " " * digits, ""
    mean = sum(ranks) / len(ranks)
    text = f"{round(mean)}".rjust(digits - 1) + " "
    if mean == 0:
        return text, "dim"
    share = 0.5 if highest == lowest else (mean - lowest) / (highest - lowest)
    back, front = _STEPS[round(share * (len(_STEPS) - 1))]
    return text, f"bold {front} on {back}"


@dataclass(frozen=True)
class RankTable:
    """One line a layer; a narrow console drops sizes, scalings and reasons rather than the ends of names."""

    plan: RankPlan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table for the width at hand, and a reason that all layers share."""
        reasons = {layer.reason for layer in self.plan.layers}
        wide = options.max_width >= 110
        shape, scaling = ([">out x in"], [">scaling"]) if wide else ([], [])
        table = frameless("layer", *shape, ">rank", *scaling, ">parameters", ">importance")
        if wide and len(reasons) > 1:
            table.add_column("reason", overflow="fold")
        for layer in self.plan.layers:
            table.add_row(*self._row(layer, wide, reason=wide and len(reasons) > 1))
        yield table
        if len(reasons) == 1 and (reason := reasons.pop()):
            yield Text(f"reason of every rank: {reason}", style="dim")
        elif not wide and len(reasons) > 1:
            yield Text("why each rank: in 110 columns or more, or with --json or -o", style="dim")

    def _row(self, layer: LayerPlan, wide: bool, *, reason: bool) -> list[RenderableType]:
        cells: list[RenderableType] = [Text(layer.name, overflow="fold")]
        if wide:
            cells.append(f"{layer.out_features} x {layer.in_features}")
        cells.append(Text(str(layer.rank), style="bold" if layer.rank else "dim"))
        if wide:
            cells.append(figure(self.plan.scaling(layer.name)) if layer.rank else "-")
        cells += [f"{layer.parameters:,}", _importance(layer.importance)]
        return [*cells, Text(layer.reason)] if reason else cells


def _importance(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else figure(value, 3)


def _kind_table(plan: RankPlan) -> Table:
    table = frameless("kind", ">layers", ">ranks", ">mean", ">parameters", ">of budget")
    for share in kind_shares(plan, plan.ranks):
        ranks = str(share.lowest) if share.lowest == share.highest else f"{share.lowest}-{share.highest}"
        part = f"{share.parameters / max(1, plan.budget):.1%}"
        table.add_row(Text(share.kind), str(share.layers), ranks, f"{share.mean:.1f}", f"{share.parameters:,}", part)
    return table


@dataclass(frozen=True)
class BudgetLine:
    """The budget as a bar with its figures, and what scales the update.

    Args:
        used: parameters.
        allowed: parameters.
        setting: a few words behind the figures.
    """

    used: int
    allowed: int
    setting: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line, or two where the width is short."""
        share = self.used / max(1, self.allowed)
        length = min(24, max(8, options.max_width // 5))
        full = math.floor(length * min(1.0, share))
        on, off = ("#", "-") if options.ascii_only else ("█", "░")
        figures = f" {share:.1%}  {self.used:,} of {self.allowed:,} parameters"
        over = f", over budget by {share - 1:.1%}" if self.used > self.allowed else ""
        bar = Text.assemble("budget ", (on * full, "cyan"), (off * (length - full), "dim"))
        line = Text.assemble(bar, (figures, "bold"), (over, "bold yellow"))
        setting = Text(f"({self.setting})", style="dim")
        if len(line) + len(setting) + 1 <= options.max_width:
            yield Text.assemble(line, " ", setting)
        else:
            yield line
            yield setting


def frameless(*columns: str) -> Table:
    """A table without frame; a leading > aligns a column of figures to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else "~" + text[len(text) - length + 1 :]
