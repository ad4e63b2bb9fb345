"""The tables of docs/benchmark.md from the runs that are there; intervals by a paired bootstrap of rows and seeds."""

# ruff: noqa: E501  (a table's line is a line)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchmarks.quality.arms import ARMS, Arm
from benchmarks.quality.records import Record, load_all
from benchmarks.quality.schedule import LADDER, best_rate, interior
from benchmarks.quality.setting import STEPS
from scipy import stats

__all__ = ["Difference", "paired_bootstrap", "write"]

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "benchmark.md"
BEGIN, END = "<!-- tables: begin (python -m benchmarks.quality summary) -->", "<!-- tables: end -->"
RESAMPLES = 4_000
KINDS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention output",
    "intermediate.dense": "up",
    "output.dense": "down",
}
BLOCKS = 6
MAJORITY = 0.1305  # the share of the largest class among the first 2,000 test rows
FIRST_FIGURES = {"uniform-r1": 0.7057, "uniform-r4": 0.7352, "uniform-r16": 0.7525}  # on the first 2,000 test rows


@dataclass(frozen=True)
class Difference:
    """A mean difference and its 95 % percentile interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out 0, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def paired_bootstrap(differences: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """The mean of paired differences [seeds, rows], with rows and seeds both drawn again with replacement.

    All seeds share the test rows, so one draw of rows serves every drawn seed.
    """
    seeds, rows = differences.shape
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        weights = np.bincount(random.integers(0, rows, rows), minlength=rows)
        means[i] = (differences[random.integers(0, seeds, seeds)] @ weights).mean() / rows
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(differences.mean()), float(low), float(high))


def write() -> str:
    """Writes the tables into docs/benchmark.md, between their marks, and returns them."""
    records = load_all()
    tables = "\n\n".join(
        [_results(records), _comparisons(records), _places(records), _terms(records), _curves(records)]
    )
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
    return tables


def _chosen(arm: Arm, records: Sequence[Record]) -> dict[int, Record]:
    """The tested runs at the arm's best learning rate, by seed."""
    best = best_rate(arm, records)
    return {r.key[2]: r for r in records if r.key[:2] == (arm.name, best) and r.tested}


def _results(records: Sequence[Record]) -> str:
    lines = [
        "### Results at each arm's best learning rate",
        "",
        "| arm | parameters | learning rate | seeds | test accuracy, % | test NLL | on the first 2,000 rows, % |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in ARMS:
        runs = _chosen(arm, records)
        if not runs:
            continue
        tests = [run.data["test"] for _, run in sorted(runs.items())]
        accuracy = _spread([100 * test["accuracy"] for test in tests], 2)
        first = _spread([100 * test["accuracy_first_2000"] for test in tests], 2)
        best = best_rate(arm, records)
        edge = "" if interior(arm, records) else " (grid unfinished)"
        parameters = sorted({run.served["parameters"] for run in runs.values()})
        size = f"{parameters[0]:,}" if len(parameters) == 1 else f"{parameters[0]:,} to {parameters[-1]:,}"
        lines.append(
            f"| {arm.title} | {size} | {best:g}{edge} | {len(runs)} | {accuracy} | "
            f"{_spread([test['nll'] for test in tests], 4)} | {first}{_against(arm, tests)} |"
        )
    lines += ["", "± is the standard deviation over seeds."]
    return "\n".join(lines)


def _against(arm: Arm, tests: Sequence[dict[str, float]]) -> str:
    if arm.name not in FIRST_FIGURES:
        return ""
    mean = float(np.mean([test["accuracy_first_2000"] for test in tests]))
    return f" (first figures {100 * FIRST_FIGURES[arm.name]:.2f}: {100 * (mean - FIRST_FIGURES[arm.name]):+.2f})"


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _comparisons(records: Sequence[Record]) -> str:
    lines = [
        "### Differences, same rows and seeds",
        "",
        "| arm | against | seeds | accuracy, points [95 %] | NLL [95 %] | reading |",
        "|---|---|---:|---:|---:|---|",
    ]
    by_name = {arm.name: arm for arm in ARMS}
    for arm in ARMS:
        if arm.baseline is None:
            continue
        ours, theirs = _chosen(arm, records), _chosen(by_name[arm.baseline], records)
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            continue
        pairs = [(ours[seed].test_scores(), theirs[seed].test_scores()) for seed in seeds]
        accuracy = paired_bootstrap(np.stack([100.0 * a.correct - 100.0 * b.correct for a, b in pairs]))
        nll = paired_bootstrap(np.stack([a.nll - b.nll for a, b in pairs]))
        lines.append(
            f"| {arm.title} | {by_name[arm.baseline].title} | {len(seeds)} | "
            f"{accuracy.mean:+.2f} [{accuracy.low:+.2f}, {accuracy.high:+.2f}] | "
            f"{nll.mean:+.4f} [{nll.low:+.4f}, {nll.high:+.4f}] | {_reading(accuracy, nll, len(seeds))} |"
        )
    lines += [
        "",
        f"Paired bootstrap over the 10,000 test rows and the seeds, {RESAMPLES:,} draws. `better` and `worse` need "
        "both metrics to agree, with intervals that leave out 0. With fewer than five seeds they are a reading of "
        "these runs and no claim about the methods; with one seed an interval knows nothing of that seed's luck.",
    ]
    return "\n".join(lines)


def _reading(accuracy: Difference, nll: Difference, seeds: int) -> str:
    if accuracy.sign == 0 or accuracy.sign != -nll.sign:
        return "not separable"
    word = "better" if accuracy.sign > 0 else "worse"
    return word if seeds > 1 else f"{word} on these rows, one seed"


def _places(records: Sequence[Record]) -> str:
    """Where the ranks of the long runs lie in the end: means over the layers of a kind or a block, and over seeds."""
    lines = [
        "### Where ranks end after 600 steps",
        "",
        "Mean rank of the layers of a kind, then of a block, of the adapter that is served; means over the seeds at the best learning rate.",
        "",
        "| arm | seeds | parameters | "
        + " | ".join([*KINDS.values(), *(f"block {block}" for block in range(BLOCKS))])
        + " |",
        "|---|---:|---:|" + "---:|" * (len(KINDS) + BLOCKS),
    ]
    for arm in ARMS:
        runs = list(_chosen(arm, records).values()) if arm.steps != STEPS else []
        if not runs:
            continue
        served = [run.served for run in runs]
        places = [lambda name, kind=kind: name.split(".", 3)[3] == kind for kind in KINDS]
        places += [lambda name, block=block: f"layer.{block}." in name for block in range(BLOCKS)]
        names = list(runs[0].data["ranks"])
        cells = [
            np.mean([[one["ranks"].get(name, 0) for name in names if inside(name)] for one in served])
            for inside in places
        ]
        parameters = np.mean([one["parameters"] for one in served])
        lines.append(
            f"| {arm.title} | {len(runs)} | {parameters:,.0f} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |"
        )
    return "\n".join(lines)


def _terms(records: Sequence[Record]) -> str:
    """Both terms of AB-LoRA's scores: what decided, in the first and the last round."""
    lines = [
        "### Both terms of AB-LoRA's scores",
        "",
        "Over all live ranks of a round (seed 0 at the best learning rate): standard deviations of what switching a rank off loses and of what it wins "
        "alone, and the rank correlation of each term with the score. Every value of every round is in the runs' files.",
        "",
        "| arm | round | ranks | spread of the loss without it | spread of the gain alone | correlation with the score: without it | alone |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in ARMS:
        if not arm.name.startswith("ab-lora") or 0 not in _chosen(arm, records):
            continue
        changes = _chosen(arm, records)[0].data["changes"]
        rounds = [change for change in changes if "figures" in change and "round" in change["figures"]]
        for event in (rounds[0], rounds[-1]):
            details = [c["detail"] for c in changes if c["step"] == event["step"] and "detail" in c]
            drop, solo, score = (
                np.array([value for one in details for value in one[term]], dtype=float)
                for term in ("drop", "solo", "importance")
            )
            found = [float(stats.spearmanr(term, score).statistic) for term in (drop, solo)]
            lines.append(
                f"| {arm.title} | {event['figures']['round']:g} | {len(score)} | {drop.std():.4f} | {solo.std():.4f} | "
                f"{found[0]:.2f} | {found[1]:.2f} |"
            )
    return "\n".join(lines)


def _curves(records: Sequence[Record]) -> str:
    rates = [rate for rate in LADDER if any(r.key[1:] == (rate, 0) for r in records)]
    lines = [
        "### Learning rates, seed 0: validation accuracy, % / NLL",
        "",
        "| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---|" + "---:|" * len(rates),
    ]
    for arm in ARMS:
        grid = {r.key[1]: r.data["validation"] for r in records if r.key[0] == arm.name and r.key[2] == 0}
        if grid:
            best = best_rate(arm, records)
            cells = [_cell(grid[rate], best=rate == best) if rate in grid else "" for rate in rates]
            lines.append(f"| {arm.title} (r = {arm.r}) | " + " | ".join(cells) + " |")
    lines += ["", "Bold: chosen, by validation NLL. `collapsed`: no better than always naming the largest class."]
    return "\n".join(lines)


def _cell(scores: dict[str, float | None], *, best: bool) -> str:
    accuracy, nll = scores["accuracy"], scores["nll"]
    assert accuracy is not None
    text = f"{100 * accuracy:.1f} / " + ("not finite" if nll is None else f"{nll:.3f}")
    if accuracy < MAJORITY + 0.02:
        text += " (collapsed)"
    return f"**{text}**" if best else text
