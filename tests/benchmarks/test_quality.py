"""The quality benchmark's arithmetic: what runs next, what is kept of a run, and what an interval says."""

import json

import numpy as np
import pytest
from benchmarks.quality import records, schedule, setting, wordnet
from benchmarks.quality.arms import ARMS
from benchmarks.quality.records import Record, pack
from benchmarks.quality.setting import Scores
from benchmarks.quality.summary import paired_bootstrap

ARM = ARMS[0]


def run(rate, nll, seed=0, tested=True):
    return Record(
        {
            "arm": ARM.name,
            "learning_rate": rate,
            "seed": seed,
            "validation": {"nll": nll},
            "test": {} if tested else None,
        }
    )


def test_the_middle_of_the_grid_is_tried_first():
    assert schedule.grid_left(ARM, []) == 6e-3
    assert schedule.grid_left(ARM, [run(6e-3, 1.0)]) in (4.5e-3, 9e-3)


def test_a_best_at_the_edge_extends_the_grid_until_it_is_interior():
    found = [run(4.5e-3, 1.2), run(6e-3, 1.1), run(9e-3, 1.0)]
    assert not schedule.interior(ARM, found)
    assert schedule.grid_left(ARM, found) == 1.2e-2
    found.append(run(1.2e-2, None))  # diverged
    assert schedule.interior(ARM, found)
    assert schedule.grid_left(ARM, found) is None
    assert schedule.best_rate(ARM, found) == 9e-3
    assert schedule.grid_left(ARM, [run(4.5e-3, 0.9), run(6e-3, 1.1), run(9e-3, 1.0)]) == 3e-3


def test_seeds_are_run_at_the_best_rate_only():
    found = [run(4.5e-3, 1.2), run(6e-3, 1.0), run(9e-3, 1.1), run(9e-3, 0.9, seed=1)]
    assert schedule.best_rate(ARM, found) == 6e-3
    assert schedule.seeds_left(ARM, found, range(3)) == [1, 2]
    assert schedule.seeds_left(ARM, [*found, run(6e-3, 1.0, seed=2)], range(3)) == [1]


def test_every_arm_has_its_grid_on_the_ladder_and_a_baseline_of_its_budget_or_the_anchor():
    by_name = {arm.name: arm for arm in ARMS}
    for arm in ARMS:
        assert set(arm.rates) <= set(schedule.LADDER)
        if arm.baseline is not None and not arm.name.startswith("uniform"):
            assert by_name[arm.baseline].r == arm.r


def test_the_answers_to_the_rows_survive_their_file(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RUNS", tmp_path)
    random = np.random.default_rng(0)
    scores = Scores(random.random(2_503) < 0.7, random.exponential(1.0, 2_503))
    data = {"arm": "a", "learning_rate": 6e-3, "seed": 1, "validation": pack(scores, rows=False)}
    records.save({**data, "test": pack(scores, rows=True)})
    (found,) = records.load_all()
    assert found.key == ("a", 6e-3, 1)
    assert np.array_equal(found.test_scores().correct, scores.correct)
    assert np.allclose(found.test_scores().nll, scores.nll, rtol=1e-3)
    assert found.data["test"]["accuracy_first_2000"] == scores.correct[:2_000].mean()


def test_a_diverged_run_is_kept_as_valid_json_and_never_chosen():
    packed = pack(Scores(np.zeros(4, bool), np.full(4, np.nan)), rows=False)
    assert json.loads(json.dumps(packed, allow_nan=False)) == {"accuracy": 0.0, "nll": None}
    assert Record({"validation": packed}).choice == float("inf")


def test_the_interval_of_a_constant_difference_is_that_number():
    found = paired_bootstrap(np.full((3, 50), 2.0), resamples=50)
    assert (found.mean, found.low, found.high, found.sign) == (2.0, 2.0, 2.0, 1)


def test_the_interval_covers_rows_and_seeds():
    random = np.random.default_rng(1)
    rows_only = random.normal(0.0, 1.0, (1, 400))
    found = paired_bootstrap(rows_only, resamples=2_000)
    expected = 1.96 * rows_only.std() / 20
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)
    seeds = np.array([[-1.0], [0.0], [1.0]]) + np.zeros((3, 400))
    wide = paired_bootstrap(seeds, resamples=2_000)
    assert (wide.low, wide.high) == (-1.0, 1.0)
    assert wide.sign == 0


def test_warm_up_and_decay_end_at_zero():
    rates = [setting._rate(step, setting.STEPS) for step in range(setting.STEPS + 1)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates.index(1.0) == 9
    assert rates[setting.STEPS] == 0.0


def test_glosses_are_read_up_to_their_first_example(tmp_path, monkeypatch):
    monkeypatch.setattr(wordnet, "ROWS", 4)
    for index, part in enumerate(("noun", "verb", "adj", "adv")):
        line = f'00001740 {index:02d} n 01 entity 0 003 | what is {part}; known; "an example"; "two"  \n'
        (tmp_path / f"data.{part}").write_text("  1 This software and database is ...\n" + line)
    assert sorted(wordnet.load(tmp_path), key=lambda row: row[1])[0] == ("what is noun; known", 0)
    monkeypatch.setattr(wordnet, "ROWS", 5)
    with pytest.raises(SystemExit, match="holds 4 glosses"):
        wordnet.load(tmp_path)


def test_train_validation_and_test_rows_are_disjoint():
    found = wordnet.split([(str(i), 0) for i in range(50_000)])
    parts = [{text for text, _ in part} for part in (found.train, found.validation, found.test)]
    assert [len(part) for part in parts] == [30_000, 1_000, 10_000]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert [text for text, _ in found.test[:3]] == ["0", "1", "2"]
