"""Lines of ranks.jsonl as each schedule writes them, from made-up figures."""

from collections.abc import Callable, Mapping

from rankwise.ranks.plan import RankPlan
from rankwise.report.grid import split_name

Line = dict[str, object]


def event(
    step: int,
    kind: str,
    reason: str,
    figures: Mapping[str, float],
    ranks: Mapping[str, tuple[int, int]],
    details: Mapping[str, object] | None = None,
) -> list[Line]:
    """An event's line, then one for each layer with its rank before and after."""
    about: Line = {"step": step, "kind": kind, "reason": reason}
    lines = [about | {"figures": dict(figures)}]
    for name, (before, after) in ranks.items():
        line = about | {"layer": name, "from": before, "to": after}
        lines.append(line | {"detail": details[name]} if details and name in details else line)
    return lines


def sora(plan: RankPlan, events: int = 20) -> list[Line]:
    """Every event takes a rank from every third layer, until each has one less than half."""
    ranks, lines = dict(plan.ranks), []
    for number in range(events):
        moved = {
            name: (ranks[name], ranks[name] - 1)
            for place, name in enumerate(ranks)
            if (place + number) % 3 == 0 and ranks[name] > 0
        }
        ranks |= {name: after for name, (_, after) in moved.items()}
        share = sum(ranks.values()) / max(1, sum(plan.ranks.values()))
        figures = {"density": share, "lambda": 1.5**number, "live_ranks": float(sum(ranks.values()))}
        lines += event(40 + 8 * number, "prune", "gates became zero", figures, moved)
    return lines


def ab_lora(plan: RankPlan, rounds: int = 3) -> list[Line]:
    """Each round measures all layers, takes a rank from the first that has one and gives one to the last."""
    ranks, lines = dict(plan.ranks), []
    last = list(ranks)[-1]
    for number in range(1, rounds + 1):
        first = next(name for name, rank in ranks.items() if rank)
        details = {
            name: {
                "slots": list(range(rank)),
                "drop": [0.01 * (slot + number) for slot in range(rank)],
                "solo": [None if slot == 1 else -0.001 * slot for slot in range(rank)],
                "importance": [0.01 * (slot + number) - 0.001 * slot for slot in range(rank)],
                "pruned": [0] if name == first else [],
                "added": [rank] if name == last else [],
            }
            for name, rank in ranks.items()
        }
        turn = {first: -1, last: 1}
        moved = {name: (rank, rank + turn.get(name, 0)) for name, rank in ranks.items()}
        ranks |= {name: after for name, (_, after) in moved.items()}
        figures = {"round": number, "pruned": 1, "added": 1, "score_model": -1.5 + 0.1 * number}
        reason = "1 lowest scores off, 1 new ranks in layers that lost none"
        lines += event(50 * number, "reallocate", reason, figures, moved, details)
    return lines


def beamlora(plan: RankPlan, resets: int = 10) -> list[Line]:
    """Each reset overwrites a rank of one layer; no rank moves, and the last reset overwrites none."""
    names, lines = list(plan.ranks), []
    for number in range(resets):
        name = names[number % len(names)]
        rank = plan.ranks[name]
        detail = {"pruned": [2, 3], "sources": [0, 1], "permutation": [1, 0], "importance": [1.25, 1.0, 0.5, 0.25]}
        done = number < resets - 1
        figures = {"kept_share": 0.9 + 0.01 * number, "pruned": 2.0 * done, "pruned_share": 0.01 * done}
        reason = "the lowest ranks became copies of the best" if done else "no rank is beyond the share kept"
        moved, details = ({name: (rank, rank)}, {name: detail}) if done else ({}, {})
        lines += event(10 * (number + 1), "reset", reason, figures, moved, details)
    return lines


def xgblora(plan: RankPlan, rounds: int = 4, *, ended: bool = True) -> list[Line]:
    """Round n trains block n - 1 at rank 2; the next one opens as one ends."""

    def drawn(number: int) -> list[str]:
        return [name for name in plan.ranks if split_name(name).index == number - 1]

    first = dict.fromkeys(drawn(1), (0, 2))
    lines = event(0, "round", f"round 1 of {rounds} trains block 0", {"round": 1.0, "booster_norm": 0.0}, first)
    for number in range(1, rounds + ended):
        moved = dict.fromkeys(drawn(number), (2, 2))
        if number < rounds:
            moved |= dict.fromkeys(drawn(number + 1), (0, 2))
        details = {name: {"booster_norm": 0.5 / number, "accumulated_rank": 2} for name in drawn(number)}
        figures = {"round": float(number), "rounds": float(rounds), "booster_norm": 1.0 / number}
        lines += event(20 * number, "fold", f"round {number} of {rounds} ended", figures, moved, details)
    return lines


def best(name: str, before: int, after: int) -> list[Line]:
    """What a run says that took the best checkpoint back: layers without an event before them."""
    reason = "checkpoint-50 is the best, and its factors were loaded"
    return [{"step": 250, "kind": "best", "reason": reason, "layer": name, "from": before, "to": after}]


SCHEDULES: Mapping[str, Callable[[RankPlan], list[Line]]] = {
    "sora": sora,
    "ab-lora": ab_lora,
    "beamlora": beamlora,
    "xgblora": xgblora,
}
