"""BeamLoRA keeps what its specification promises (beamlora.md sections 3, 6, 7); golden cases are in tests/golden."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from rankwise.adapters.attach import adapted_layers, adapter_tensors, attach_lora
from rankwise.adapters.checkpoint import read_safetensors
from rankwise.adapters.fingerprint import weights_fingerprint
from rankwise.adapters.gates import CONTAINER
from rankwise.adapters.state import FoldState
from rankwise.adapters.targets import resolve_targets
from rankwise.errors import CheckpointError, ConfigError, HealthError
from rankwise.export.fold import fold
from rankwise.linalg.random import generator
from rankwise.methods.base import Budget
from rankwise.methods.beamlora import (
    BeamLoRA,
    BeamLoRASchedule,
    capped,
    due_after,
    halved_logits,
    kept_share,
    mean_logits,
    pruned_masks,
    scores,
    seeded_permutation,
    snapshot_step,
    source_ranks,
)
from rankwise.methods.schedule import Scene, Schedule
from rankwise.ranks.plan import RankPlan
from tests.methods.perturbed import BATCHES, Adapted, adapted, faults_of
from tests.support.models import tiny_llama

NEUTRAL = BeamLoRA(train_scores=False, cumsum_threshold=1.0)
TARGETS = ["q_proj", "v_proj"]
MOMENTS = ("exp_avg", "exp_avg_sq")
OFFICIAL = BeamLoRA.presets["official"]


@dataclass
class Run:
    """A model with scores, its schedule and its optimizer."""

    one: Adapted
    schedule: BeamLoRASchedule
    optimizer: AdamW
    max_steps: int

    def step(self, step: int, *, ended: bool = True) -> Tensor:
        """One step as the bare loop makes it, perhaps without its end; its loss."""
        self.schedule.before_step(step)
        loss: Tensor = self.one.model(**BATCHES[step % len(BATCHES)]).loss
        loss.backward()
        self.schedule.before_optimizer_step(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if ended:
            self.schedule.after_step(step)
        return loss.detach()

    def steps(self, first: int, last: int) -> list[Tensor]:
        return [self.step(step) for step in range(first, last + 1)]

    def logits(self) -> dict[str, Tensor]:
        gates = self.schedule.gates
        return {name: gates.value(name).detach().clone() for name in gates.names}

    def factors(self) -> dict[str, Tensor]:
        return {
            f"{side}.{name}": factor.detach().clone()
            for name, layer in self.one.layers.items()
            for side, factor in (("A", layer.lora_A), ("B", layer.lora_B))
        }

    def moments(self) -> dict[str, Tensor]:
        return {
            f"{side}.{key}.{name}": self.optimizer.state[factor][key].clone()
            for name, layer in self.one.layers.items()
            for side, factor in (("A", layer.lora_A), ("B", layer.lora_B), ("z", self.schedule.gates.value(name)))
            for key in MOMENTS
        }

    def everything(self) -> dict[str, Tensor]:
        return {**self.factors(), **self.moments(), **self.logits()}


def scheduled(method: BeamLoRA, *, rank: int = 4, seed: int = 0, **options: Any) -> tuple[Adapted, BeamLoRASchedule]:
    one = adapted(rank=rank, targets=TARGETS, **options)
    made = method.make_schedule(Scene(model=one.model, layers=one.layers, seed=seed))
    assert isinstance(made, BeamLoRASchedule)
    return one, made


def run_of(method: BeamLoRA, max_steps: int = 12, *, begin: bool = True, lr: float = 1e-2, **options: Any) -> Run:
    one, schedule = scheduled(method, **options)
    optimizer = AdamW([{"params": one.factors}, *schedule.owned_groups(lr, 0.0)], lr=lr, weight_decay=0.0)
    if begin:
        schedule.begin(optimizer, max_steps)
    return Run(one, schedule, optimizer, max_steps)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def before_the_reset(method: BeamLoRA, reset: int, **options: Any) -> tuple[Run, dict[str, Tensor], dict[str, Tensor]]:
    """A run that stands just before the reset after step `reset`: what its snapshot holds, and all there is now."""
    run = run_of(method, spread=0.1, **options)
    run.steps(1, reset - 1)
    past = {name: value for name, value in run.schedule.state_dict().items() if name.startswith("snapshot.")}
    run.step(reset, ended=False)
    return run, past, run.everything()


# --- settings ---------------------------------------------------------------------------------------------------------


def test_every_fault_of_the_settings_is_told() -> None:
    faults = faults_of(BeamLoRA, tau=-1, reset_every=1, scope="modul", variant="paper", conserve=1)
    assert len(faults) == 5
    assert "beamlora.scope: 'modul' is not known (did you mean 'module'?)" in faults[0]
    assert any("beamlora.reset_every: 1 is out of range; use a whole number >= 2" in fault for fault in faults)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau": 0},
        {"tau": math.nan},
        {"cumsum_threshold": 0.0},
        {"cumsum_threshold": 1.5},
        {"cumsum_threshold": True},
        {"reset_every": 2.5},
        {"reset_end_step": 0},
        {"keep_boundary": "yes"},
        {"reset_optimizer": None},
        {"conserve": True, "variant": "official"},
        {"train_scores": False},
    ],
)
def test_a_value_that_makes_no_sense_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"beamlora.{next(iter(wrong))}"):
        BeamLoRA(**wrong)


def test_the_presets_are_those_of_the_specification() -> None:
    paper, official = (BeamLoRA(**BeamLoRA.presets[name]) for name in ("paper", "official"))  # type: ignore[arg-type]
    assert (paper.tau, paper.cumsum_threshold, paper.reset_every, paper.reset_end_step) == (0.05, 0.95, 3000, 24688)
    assert paper.variant == BeamLoRA().variant == "intended"
    assert (official.tau, official.cumsum_threshold, official.variant) == (0.05, 0.95, "official")
    assert (official.reset_every, official.reset_end_step) == (None, None)


def test_a_plan_is_told_of_the_scores_and_of_the_jumps() -> None:
    budget = Budget(r=4, lora_alpha=8, parameters=100)
    assert "8 scores are trained" in BeamLoRA().notes({"a": 4, "b": 4}, budget)[0]
    assert "the loss may jump" in BeamLoRA().notes({"a": 4}, budget)[1]
    assert NEUTRAL.notes({"a": 4}, budget) == ()


# --- equations --------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    z = torch.tensor([0.05 * math.log(3), 0.0])
    torch.testing.assert_close(scores(z, 0.05), torch.tensor([1.5, 0.5]))
    torch.testing.assert_close(scores(torch.zeros(3, 5), 0.05), torch.ones(3, 5))


@given(st.lists(st.floats(-0.25, 0.25, width=32), min_size=2, max_size=12), st.floats(0.02, 0.2))
def test_m2_the_scores_of_a_module_sum_to_its_rank_and_their_gradient_to_zero(values: list[float], tau: float) -> None:
    found = scores(torch.tensor(values), tau)
    assert float(found.sum()) == pytest.approx(len(values), rel=1e-5)
    largest = max(values)
    weights = [math.exp((value - largest) / tau) for value in values]
    slow = [len(values) * weight / sum(weights) for weight in weights]
    torch.testing.assert_close(found.double(), torch.tensor(slow, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    exact = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    (scores(exact, tau) * torch.linspace(-1, 2, len(values))).sum().backward()
    assert exact.grad is not None
    assert abs(float(exact.grad.sum())) <= 1e-10


def test_the_share_that_is_kept_by_hand() -> None:
    found = [kept_share(step, first=0.9, end_step=4) for step in (1, 3, 5, 6, 1000)]
    assert found == pytest.approx([0.9, 0.95, 1.0, 1.0, 1.0], abs=1e-15)


@given(st.floats(0.01, 1.0), st.integers(1, 500), st.integers(1, 600))
def test_the_share_rises_from_the_first_to_one(first: float, end: int, step: int) -> None:
    here, later = (kept_share(at, first=first, end_step=end) for at in (step, step + 1))
    assert first - 1e-12 <= here <= later + 1e-12
    assert later <= 1.0
    assert kept_share(end + 1, first=first, end_step=end) == 1.0


def timetable(max_steps: int, period: int) -> list[tuple[str, int]]:
    steps = range(1, max_steps + 1)
    return [(event, step) for step in steps for event in due_after(step, period=period, max_steps=max_steps)]


def test_times_by_hand() -> None:
    assert timetable(8, 4) == [("snapshot", 3), ("reset", 4), ("snapshot", 7)]
    assert timetable(5, 2) == [("snapshot", 2), ("reset", 2), ("snapshot", 4)]
    assert timetable(9, 3) == [("snapshot", 2), ("reset", 3), ("snapshot", 5), ("reset", 6), ("snapshot", 8)]
    assert timetable(7, 4) == [("snapshot", 3), ("snapshot", 7)]


@given(st.integers(2, 40), st.integers(1, 300))
def test_a_reset_reads_a_past_of_half_a_period_and_none_comes_in_the_last_period(period: int, max_steps: int) -> None:
    table = timetable(max_steps, period)
    resets = [step for kind, step in table if kind == "reset"]
    snapshots = [step for kind, step in table if kind == "snapshot"]
    assert resets == [step for step in range(1, max_steps + 1) if step % period == 0 and max_steps - step >= period]
    assert all(step % period == (period // 2 + 1) % period for step in snapshots)
    for step in resets:
        at = snapshot_step(step, period)
        assert step - at == math.ceil(period / 2) - 1
        assert table.index(("snapshot", at)) < table.index(("reset", step))


def test_the_cut_by_hand() -> None:
    """Falling: 3.0, 1.5, 1.2, 0.9, 0.8, 0.4, 0.15, 0.05; sums 3.0, 4.5, 5.7, 6.6, 7.4, 7.8, 7.95, 8.0 of 8."""
    importance = torch.tensor([[3.0, 0.8, 0.15, 0.05], [1.5, 0.4, 0.9, 1.2]])
    cut = pruned_masks(importance, 0.9)  # of 7.2, which 7.4 passes
    assert cut.tolist() == [[False, True, True, True], [False, True, False, False]]
    kept = pruned_masks(importance, 0.9, keep_boundary=True)
    assert kept.tolist() == [[False, False, True, True], [False, True, False, False]]
    alone = pruned_masks(importance, 0.9, scope="module")  # of 3.6 each
    assert alone.tolist() == [[False, True, True, True], [False, True, False, False]]
    assert capped(cut, importance).tolist() == [[False, False, True, True], [False, True, False, False]]


def reference_masks(
    importance: Sequence[Sequence[float]], share: float, scope: str, keep: bool
) -> set[tuple[int, int]]:
    """The cut in Python's floats."""
    places = [(module, rank) for module, row in enumerate(importance) for rank in range(len(row))]
    groups = (
        [places]
        if scope == "global"
        else [[place for place in places if place[0] == m] for m in range(len(importance))]
    )
    pruned: set[tuple[int, int]] = set()
    for group in groups:
        total, over = 0.0, False
        for place in sorted(group, key=lambda place: (-importance[place[0]][place[1]], place)):
            total += importance[place[0]][place[1]]
            crossing = not over and total > share * len(group)
            assume(abs(total - share * len(group)) > 1e-4)
            over = over or crossing
            if over and not (crossing and keep):
                pruned.add(place)
    return pruned


modules = st.integers(1, 4).flatmap(
    lambda rank: st.lists(
        st.lists(st.floats(-0.25, 0.25, width=32), min_size=2 * rank, max_size=2 * rank), min_size=1, max_size=4
    )
)


@settings(max_examples=60)
@given(modules, st.floats(0.3, 0.999), st.sampled_from(["global", "module"]), st.booleans())
def test_the_cut_equals_a_slow_reference(values: list[list[float]], share: float, scope: Any, keep: bool) -> None:
    importance = scores(torch.tensor(values), 0.05)
    wanted = reference_masks(importance.double().tolist(), share, scope, keep)
    mask = pruned_masks(importance, share, scope=scope, keep_boundary=keep)
    assert {tuple(place) for place in mask.nonzero().tolist()} == wanted
    lowered = capped(mask, importance)
    rank = importance.shape[1]
    assert not bool((lowered & ~mask).any())
    for row, before, after in zip(importance, mask, lowered, strict=True):
        count = int(after.sum())
        assert count == min(int(before.sum()), rank // 2)
        best = source_ranks(row, torch.arange(count))
        assert not set(best.tolist()) & set(after.nonzero().flatten().tolist())
        if count:
            assert float(row[best].min()) >= float(row[after].max())


@given(modules)
def test_m4_what_is_pruned_shrinks_as_the_share_grows_and_at_one_it_is_nothing(values: list[list[float]]) -> None:
    importance = scores(torch.tensor(values), 0.05)
    counts = [int(pruned_masks(importance, share).sum()) for share in (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert counts[-2] >= 1  # the item that passes is pruned


def test_equal_scores_go_by_module_then_rank() -> None:
    mask = pruned_masks(torch.ones(2, 4), 0.6)  # the fifth of eight passes 4.8
    assert mask.tolist() == [[False] * 4, [True] * 4]
    assert capped(mask, torch.ones(2, 4)).tolist() == [[False] * 4, [False, False, True, True]]
    assert source_ranks(torch.ones(4), torch.tensor([1, 0])).tolist() == [1, 0]


@pytest.mark.parametrize(("std", "share"), [(0.001, 0.052), (0.01, 0.074), (0.02, 0.107), (0.05, 0.258), (0.1, 0.605)])
def test_the_share_pruned_is_the_one_that_was_measured(std: float, share: float) -> None:
    """beamlora.md section 3.2: N 224, r 64, Gaussian logits, p 0.95."""
    z = std * torch.randn(224, 64, generator=generator(0, "test"))
    assert float(pruned_masks(scores(z, 0.05), 0.95).double().mean()) == pytest.approx(share, abs=0.004)


def test_the_mean_of_the_logits_by_hand() -> None:
    z = torch.tensor([0.3, -0.1, 0.2, 0.0])
    found = mean_logits(z, torch.tensor([1, 3]), torch.tensor([2, 0]))
    torch.testing.assert_close(found, torch.tensor([0.15, 0.05, 0.05, 0.15]))
    two = torch.tensor([0.8, 0.2]).log() * 0.05  # the figure of the paper: (0.8, 0.2) becomes (0.5, 0.5)
    halves = scores(mean_logits(two, torch.tensor([1]), torch.tensor([0])), 0.05) / 2
    torch.testing.assert_close(halves, torch.tensor([0.5, 0.5]))


@given(st.lists(st.floats(-0.25, 0.25, width=32), min_size=4, max_size=10), st.integers(0, 10**6))
def test_m7_a_pair_carries_the_weight_of_its_source(values: list[float], seed: int) -> None:
    z, tau = torch.tensor(values, dtype=torch.float64), 0.05
    count = len(values) // 2
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    pruned, sources = order[:count], order[count : 2 * count]
    before, after = (z / tau).exp(), (halved_logits(z, pruned, sources, tau) / tau).exp()
    torch.testing.assert_close(after[pruned] + after[sources], before[sources], rtol=1e-12, atol=0)
    torch.testing.assert_close(after.sum(), before.sum() - before[pruned].sum(), rtol=1e-10, atol=0)


def test_pairs_depend_on_seed_step_and_module_and_leave_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    draws = {(s, t, m): tuple(seeded_permutation(s, t, m, 20).tolist()) for s in (0, 1) for t in (2, 4) for m in (0, 1)}
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(draws.values())) == len(draws)
    assert all(sorted(draw) == list(range(20)) for draw in draws.values())
    assert draws[0, 2, 0] == tuple(seeded_permutation(0, 2, 0, 20).tolist())


# --- the neutral setting ----------------------------------------------------------------------------------------------


def plain(rank: int, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    one = adapted(rank=rank, targets=TARGETS)
    optimizer = AdamW(one.factors, lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(1, steps + 1):
        loss = one.model(**BATCHES[step % len(BATCHES)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, [factor.detach() for factor in one.factors]


@pytest.mark.parametrize("rank", [2, 3, 4, 8])
def test_m1_still_scores_are_plain_lora(rank: int) -> None:
    """Bit for bit where r is a power of two; elsewhere r softmax(0) may round."""
    run = run_of(NEUTRAL, 8, rank=rank)
    assert run.schedule.owned_groups(1e-2, 0.0) == []
    found = [*run.steps(1, 8), *(factor.detach() for factor in run.one.factors)]
    assert run.schedule.events() == ()
    assert run.schedule.fault() is None
    losses, factors = plain(rank, 8)
    for mine, its in zip(found, [*losses, *factors], strict=True):
        if rank == 3:
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(mine, its)


def test_the_start_computes_what_the_base_model_computes() -> None:
    logits = tiny_llama()(**BATCHES[0]).logits
    run = run_of(BeamLoRA())
    assert torch.equal(run.one.model(**BATCHES[0]).logits, logits)


# --- resets in training -----------------------------------------------------------------------------------------------


def test_m3_shapes_ranks_and_the_number_of_parameters_never_change() -> None:
    run = run_of(BeamLoRA(cumsum_threshold=0.7, reset_every=2))
    before = {name: p.shape for name, p in run.one.model.named_parameters()}
    fingerprint, stream = weights_fingerprint(run.one.model), torch.get_rng_state()
    for step in range(1, 13):
        run.step(step)
        assert {name: p.shape for name, p in run.one.model.named_parameters()} == before
        assert set(run.schedule.live_ranks().values()) == {4}
    assert [event.step for event in run.schedule.events()] == [2, 4, 6, 8, 10]
    assert weights_fingerprint(run.one.model) == fingerprint
    assert torch.equal(torch.get_rng_state(), stream)
    assert run.schedule.fault() is None


def test_a_reset_by_a_slow_reference() -> None:
    """The factors, moments and logits after a reset, rank by rank from the event and what was before."""
    run, past, before = before_the_reset(BeamLoRA(cumsum_threshold=0.6, reset_every=4, reset_end_step=10**9), 4)
    run.schedule.after_step(4)
    (event,) = run.schedule.events()
    importance = scores(torch.stack([before[name] for name in run.one.layers]), 0.05)
    mask = capped(pruned_masks(importance, kept_share(4, first=0.6, end_step=10**9)), importance)
    assert event.step == 4
    assert event.kind == "reset"
    assert event.figures["pruned"] == int(mask.sum()) > 0
    assert event.figures["history_age"] == 1
    assert event.ranks == {name: 4 for name, row in zip(run.one.layers, mask, strict=True) if row.any()}
    after = run.everything()
    for index, name in enumerate(run.one.layers):
        pruned = mask[index].nonzero().flatten().tolist()
        order = seeded_permutation(0, 4, index, len(pruned)).tolist()
        best = sorted(range(4), key=lambda rank, row=importance[index]: (-float(row[rank]), rank))[: len(pruned)]
        sources = [best[at] for at in order]
        if pruned:
            told = event.layers[name]
            assert (told["pruned"], told["sources"], told["permutation"]) == (pruned, sources, order)
            assert told["importance"] == importance[index].tolist()
        z = before[name].double().tolist()
        for i, j in zip(pruned, sources, strict=True):
            z[i] = z[j] = (z[i] + z[j]) / 2
        torch.testing.assert_close(after[name].double(), torch.tensor(z, dtype=torch.float64), rtol=1e-6, atol=1e-9)
        for part, dim in (("A", 0), ("B", 1)):
            for key in (part, *(f"{part}.{moment}" for moment in MOMENTS)):
                wanted = before[f"{key}.{name}"].clone()
                for i, j in zip(pruned, sources, strict=True):
                    wanted.select(dim, i).copy_(past[f"snapshot.{key}.{name}"].select(dim, j))
                assert torch.equal(after[f"{key}.{name}"], wanted)
        for moment in MOMENTS:
            wanted = before[f"z.{moment}.{name}"]
            assert torch.equal(after[f"z.{moment}.{name}"], torch.zeros_like(wanted) if pruned else wanted)


def test_m10_the_moments_of_a_copy_are_those_of_its_source_in_the_snapshot() -> None:
    for seed in range(3):
        run, past, before = before_the_reset(BeamLoRA(cumsum_threshold=0.3, reset_every=4), 4, seed=seed)
        steps = [float(run.optimizer.state[factor]["step"]) for factor in run.one.factors]
        run.schedule.after_step(4)
        (event,) = run.schedule.events()
        for name, told in event.layers.items():
            assert 1 <= len(told["pruned"]) <= 2
            assert not set(told["pruned"]) & set(told["sources"])
            layer = run.one.layers[name]
            for moment in MOMENTS:
                A, B = (run.optimizer.state[factor][moment] for factor in (layer.lora_A, layer.lora_B))
                assert torch.equal(A[told["pruned"]], past[f"snapshot.A.{moment}.{name}"][told["sources"]])
                assert torch.equal(B[:, told["pruned"]], past[f"snapshot.B.{moment}.{name}"][:, told["sources"]])
                assert torch.equal(A[told["sources"]], before[f"A.{moment}.{name}"][told["sources"]])
        assert [float(run.optimizer.state[factor]["step"]) for factor in run.one.factors] == steps


def test_the_moments_of_scores_are_emptied_where_ranks_were_pruned_and_only_there() -> None:
    run, _, before = before_the_reset(BeamLoRA(cumsum_threshold=0.999, reset_every=4), 4)
    run.schedule.after_step(4)
    (event,) = run.schedule.events()
    assert 0 < len(event.layers) < len(run.one.layers)
    after = run.moments()
    for name in run.one.layers:
        for moment in MOMENTS:
            key = f"z.{moment}.{name}"
            assert before[key].any()
            assert torch.equal(after[key], torch.zeros(4) if name in event.layers else before[key])


def test_m5_the_official_variant_leaves_the_factors_moments_and_empties_those_of_all_scores() -> None:
    method = BeamLoRA(**OFFICIAL | {"reset_every": 4, "cumsum_threshold": 0.999})  # type: ignore[arg-type]
    run, past, before = before_the_reset(method, 4)
    assert not any("exp_avg" in name for name in past)
    run.schedule.after_step(4)
    (event,) = run.schedule.events()
    assert 0 < len(event.layers) < len(run.one.layers)
    after = run.everything()
    for name in run.one.layers:
        for moment in MOMENTS:
            assert torch.equal(after[f"A.{moment}.{name}"], before[f"A.{moment}.{name}"])
            assert torch.equal(after[f"B.{moment}.{name}"], before[f"B.{moment}.{name}"])
            assert not after[f"z.{moment}.{name}"].any()


def test_the_official_variant_prunes_more_than_half_of_a_module() -> None:
    method = BeamLoRA(**OFFICIAL | {"reset_every": 2, "cumsum_threshold": 0.5})  # type: ignore[arg-type]
    run = run_of(method)
    run.schedule.gates.write(next(iter(run.one.layers)), torch.tensor([0.3, 0.0, 0.0, 0.0]))
    run.schedule.after_step(2)
    (event,) = run.schedule.events()
    assert len(next(iter(event.layers.values()))["pruned"]) == 3


@pytest.mark.parametrize("variant", ["intended", "official"])
def test_without_reset_optimizer_no_moment_moves(variant: Any) -> None:
    method = BeamLoRA(cumsum_threshold=0.6, reset_every=4, reset_optimizer=False, variant=variant)
    run, past, _ = before_the_reset(method, 4)
    before = run.moments()
    assert past
    assert not any("exp_avg" in name for name in past)
    run.schedule.after_step(4)
    (event,) = run.schedule.events()
    assert event.layers
    assert same(run.moments(), before)


def test_moments_of_amsgrad_are_copied_too() -> None:
    one, schedule = scheduled(BeamLoRA(cumsum_threshold=0.6, reset_every=2), spread=0.1)
    groups = [{"params": one.factors}, *schedule.owned_groups(1e-2, 0.0)]
    run = Run(one, schedule, AdamW(groups, lr=1e-2, amsgrad=True), 4)
    schedule.begin(run.optimizer, 4)
    run.steps(1, 2)
    (event,) = schedule.events()
    name, told = next(iter(event.layers.items()))
    largest = run.optimizer.state[one.layers[name].lora_A]["max_exp_avg_sq"]
    assert torch.equal(largest[told["pruned"]], largest[told["sources"]])


@pytest.mark.parametrize("conserve", [False, True])
def test_m6_the_change_of_the_update_is_that_of_the_copied_ranks(conserve: bool) -> None:
    """A period of 2 copies the present; where a pair's logits are equal, its weights stay."""
    run = run_of(BeamLoRA(cumsum_threshold=0.8, reset_every=2, conserve=conserve), spread=0.3)
    run.step(1)
    name = next(iter(run.one.layers))
    layer = run.one.layers[name]
    for other in run.one.layers:
        run.schedule.gates.write(other, torch.zeros(4))
    run.schedule.gates.write(name, torch.tensor([0.02, -0.01, -0.01, 0.0]))
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    z = {other: run.schedule.gates.value(other).detach().double() for other in run.one.layers}
    before = {n: [t.detach().double() for t in (o.lora_A, o.lora_B)] for n, o in run.one.layers.items()}
    run.schedule.after_step(2)
    (event,) = run.schedule.events()
    assert event.figures["history_age"] == 0
    checked = 0
    for other, told in event.layers.items():
        one = run.one.layers[other]
        A, B = before[other]
        g = 4 * torch.softmax(z[other] / 0.05, dim=0)
        delta = one.scaling * (B * g) @ A
        new = scores(run.schedule.gates.value(other).detach().double(), 0.05)
        found = one.scaling * (one.lora_B.detach().double() * new) @ one.lora_A.detach().double()
        if conserve:  # the pair carries the source's weight, normalized without the pruned ranks
            rest = 4 / (4 - g[told["pruned"]].sum())
            kept = [rank for rank in range(4) if rank not in told["pruned"]]
            wanted = one.scaling * rest * (B[:, kept] * g[kept]) @ A[kept]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        elif all(z[other][i] == z[other][j] for i, j in zip(told["pruned"], told["sources"], strict=True)):
            wanted = delta.clone()
            for i, j in zip(told["pruned"], told["sources"], strict=True):
                wanted += one.scaling * g[i] * (torch.outer(B[:, j], A[j]) - torch.outer(B[:, i], A[i]))
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        else:
            continue
        checked += 1
    assert checked


def test_conserve_keeps_no_past() -> None:
    run = run_of(BeamLoRA(cumsum_threshold=0.6, reset_every=4, conserve=True))
    run.steps(1, 3)
    assert not any(name.startswith("snapshot.") for name in run.schedule.state_dict())
    run.step(4)
    assert len(run.schedule.events()) == 1


def test_the_scores_train_with_the_factors_rate_and_decay() -> None:
    _, schedule = scheduled(BeamLoRA())
    (group,) = schedule.owned_groups(3e-4, 0.1)
    assert (group["lr"], group["weight_decay"]) == (3e-4, 0.1)
    assert [p.dtype for p in group["params"]] == [torch.float32] * 4
    assert all(p.requires_grad and not p.any() for p in group["params"])


def test_a_snapshot_that_no_reset_reads_is_not_taken_and_one_that_was_read_is_let_go() -> None:
    run = run_of(BeamLoRA(reset_every=4, reset_end_step=5), 16)
    held = []
    for step in range(1, 17):
        run.step(step)
        if run.schedule.state_dict()["snapshot_step"] is not None:
            held.append(step)
    assert held == [3]  # the resets at 8 and 12 prune nothing
    assert [(event.step, event.figures["pruned"] > 0) for event in run.schedule.events()] == [
        (4, True),
        (8, False),
        (12, False),
    ]


def test_the_length_of_the_run_sets_the_times() -> None:
    (told,) = scheduled(BeamLoRA())[1].outlook(37031)
    assert told == (
        "beamlora: 11 resets, one after every 3084 steps to step 33924; the share of the scores that is kept rises "
        "from 0.95 to 1 after step 24688"
    )
    run = run_of(BeamLoRA(), 60)
    assert (run.schedule.state_dict()["period"], run.schedule.state_dict()["end_step"]) == (4, 40)
    assert scheduled(NEUTRAL)[1].outlook(1) == ()


def test_two_runs_of_one_seed_are_equal_and_another_seed_pairs_otherwise() -> None:
    def pairs(seed: int) -> tuple[list[Any], dict[str, Tensor]]:
        run = run_of(BeamLoRA(cumsum_threshold=0.3, reset_every=2), seed=seed, rank=8)
        run.steps(1, 6)
        return [event.layers for event in run.schedule.events()], run.everything()

    first, again, other = pairs(0), pairs(0), pairs(1)
    assert first[0] == again[0]
    assert same(first[1], again[1])
    assert first[0] != other[0]


def test_micro_batches_and_repeated_calls_are_one_step() -> None:
    run = run_of(BeamLoRA(reset_every=2))
    run.steps(1, 2)
    before = run.everything()
    run.schedule.after_step(2)
    assert len(run.schedule.events()) == 1
    assert run.schedule.events() == ()
    assert same(run.everything(), before)


def test_figures_and_memory() -> None:
    run = run_of(BeamLoRA(reset_every=2), 4)
    assert run.schedule.figures() == {
        "beamlora_smallest": 1.0,
        "beamlora_largest": 1.0,
        "beamlora_overwritten": 0.0,
    }
    run.steps(1, 4)
    run.schedule.end(4)
    figures = run.schedule.figures()
    assert figures["beamlora_smallest"] < 1 < figures["beamlora_largest"]
    assert figures["beamlora_overwritten"] >= 1
    factors = sum(factor.nbytes for factor in run.one.factors)
    assert run.schedule.memory_bytes() == 3 * factors + 16 * 16
    assert scheduled(BeamLoRA(variant="official"))[1].memory_bytes() == factors + 16 * 16
    assert scheduled(NEUTRAL)[1].memory_bytes() == 16 * 16


# --- export and what is left behind -----------------------------------------------------------------------------------


def test_m9_the_folded_adapter_computes_the_same_logits_in_a_plain_model() -> None:
    run = run_of(BeamLoRA(cumsum_threshold=0.7, reset_every=2), spread=0.2)
    run.steps(1, 6)
    for index, name in enumerate(run.one.layers):
        run.schedule.gates.write(name, 0.05 * torch.randn(4, generator=generator(index, "test")))
    run.one.model.eval()
    state = run.schedule.fold_state()
    folded = fold(run.one.model, state)
    assert all(float(gate.sum()) == pytest.approx(4, rel=1e-5) for gate in state.gates.values())
    other = adapted(rank=4, targets=TARGETS)
    other.model.eval()
    for name, layer in other.layers.items():
        layer.lora_A.data.copy_(folded.layers[name].lora_A)
        layer.lora_B.data.copy_(folded.layers[name].lora_B * (folded.layers[name].scaling / layer.scaling))
    with torch.no_grad():
        found, wanted = (model(**BATCHES[1]).logits for model in (other.model, run.one.model))
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_the_scores_are_not_in_the_adapter_file_and_close_takes_them_off() -> None:
    run = run_of(BeamLoRA(reset_every=2))
    run.steps(1, 3)
    assert all(".lora_A." in name or ".lora_B." in name for name in adapter_tensors(run.one.model))
    for _ in range(2):
        run.schedule.close()
    assert not hasattr(run.one.model, CONTAINER)
    assert not any(module._forward_hooks for module in run.one.model.modules())


# --- across a checkpoint ----------------------------------------------------------------------------------------------


def stored(run: Run, folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint gives back: the schedule's state, the optimizer's and the factors."""
    state = run.schedule.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    FoldState().save(folder / "state.safetensors", method=tensors)
    read = {name.removeprefix("method."): v for name, v in read_safetensors(folder / "state.safetensors").items()}
    rest = {name: value for name, value in state.items() if name not in tensors}
    assert all(value is None or isinstance(value, str | int) for value in rest.values())
    torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")
    return {**rest, **read}, torch.load(folder / "optimizer.pt", weights_only=True), run.factors()


def resumed(method: BeamLoRA, kept: tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]], max_steps: int) -> Run:
    run = run_of(method, max_steps, begin=False)
    for name, layer in run.one.layers.items():
        layer.lora_A.data.copy_(kept[2][f"A.{name}"])
        layer.lora_B.data.copy_(kept[2][f"B.{name}"])
    run.schedule.load_state_dict(kept[0])
    run.optimizer.load_state_dict(kept[1])
    run.schedule.begin(run.optimizer, max_steps)
    return run


RESUMED = [
    BeamLoRA(cumsum_threshold=0.7, reset_every=6, reset_end_step=20),
    BeamLoRA(cumsum_threshold=0.7, reset_every=6, variant="official"),
    BeamLoRA(cumsum_threshold=0.7, reset_every=6, conserve=True),
    BeamLoRA(),
]


@pytest.mark.parametrize("method", RESUMED, ids=["intended", "official", "conserve", "defaults"])
@pytest.mark.parametrize("at", [2, 4, 5, 6, 9], ids=lambda at: f"after step {at}")
def test_m11_a_run_resumed_anywhere_is_bit_equal(method: BeamLoRA, at: int, tmp_path: Path) -> None:
    """A period of 6 takes its snapshots after steps 4 and 10."""
    whole = run_of(method, 18)
    whole.steps(1, at)
    kept = stored(whole, tmp_path)
    whole.schedule.events()
    losses = whole.steps(at + 1, 13)
    again = resumed(method, kept, 18)
    assert again.schedule.remarks() == ()
    found = again.steps(at + 1, 13)
    for mine, its in zip(found, losses, strict=True):
        assert torch.equal(mine, its)
    assert same(again.everything(), whole.everything())
    assert again.schedule.events() == whole.schedule.events() != ()
    mine, its = again.schedule.state_dict(), whole.schedule.state_dict()
    assert mine.keys() == its.keys()
    for key, value in its.items():
        assert torch.equal(mine[key], value) if isinstance(value, Tensor) else mine[key] == value


def test_m11_without_a_stored_snapshot_the_reset_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run_of(RESUMED[0], 18)
    whole.steps(1, 5)
    state, optimizer, factors = stored(whole, tmp_path)
    state = {name: value for name, value in state.items() if not name.startswith("snapshot.")}
    again = resumed(RESUMED[0], (state, optimizer, factors), 18)
    assert "lacks what the reset after step 6 copies from" in again.schedule.remarks()[0]
    again.step(6)
    assert "the reset after step 6 is skipped" in caplog.text
    assert again.schedule.events() == ()
    fault = again.schedule.fault()
    assert fault is not None
    assert "no reset was made in 6 steps, and 1 fell due" in fault.message
    assert "1 for want of the past" in fault.message
    again.steps(7, 12)
    assert [event.step for event in again.schedule.events()] == [12]
    assert again.schedule.fault() is None


def test_a_resumed_run_keeps_its_times_when_its_length_changes(tmp_path: Path) -> None:
    whole = run_of(BeamLoRA(), 48)
    whole.steps(1, 5)
    again = resumed(BeamLoRA(), stored(whole, tmp_path), 96)
    assert (again.schedule.state_dict()["period"], again.schedule.state_dict()["end_step"]) == (4, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "sora"}, "is of 'sora', the run is beamlora"),
        ({"step": None}, "step is missing"),
        ({"made": True}, "made is missing"),
        ({"period": 4}, "period is 4, and the settings say 6"),
        ({"z.model.layers.0.self_attn.q_proj": torch.zeros(3)}, r"z\..*q_proj has the shape \[3\] instead of \[4\]"),
        ({"z.lm_head": torch.zeros(4)}, r"z\.lm_head belongs to no layer"),
        ({"snapshot_tensors": 3}, r"of 3 tensors of the snapshot are there"),
        ({"snapshot.B.lm_head": torch.zeros(4)}, "29 of 28 tensors of the snapshot are there"),
    ],
)
def test_a_state_that_is_not_this_plans_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    whole = run_of(RESUMED[0], 18)
    whole.steps(1, 5)
    state, _, _ = stored(whole, tmp_path)
    _, schedule = scheduled(RESUMED[0])
    with pytest.raises(CheckpointError, match=message):
        schedule.load_state_dict({**state, **change})
    for missing in ("snapshot_step", "z.model.layers.0.self_attn.q_proj"):
        with pytest.raises(CheckpointError, match=f"{missing} is missing"):
            schedule.load_state_dict({name: value for name, value in state.items() if name != missing})


# --- what is refused, and what fails a run ----------------------------------------------------------------------------


def uneven(ranks: Sequence[int]) -> Schedule:
    model = tiny_llama()
    found = resolve_targets(model, TARGETS)
    plan = RankPlan.from_shapes(found.shapes, list(ranks), r=4, lora_alpha=8.0)
    peft_model = attach_lora(model, plan)
    try:
        return BeamLoRA().make_schedule(Scene(model=peft_model, layers=adapted_layers(peft_model), seed=0))
    finally:
        assert not hasattr(peft_model, CONTAINER)


def test_layers_of_different_ranks_and_of_rank_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"one rank everywhere, and .*0.*q_proj has 4 and .*1.*q_proj 3"):
        uneven([4, 4, 3, 4])
    with pytest.raises(ConfigError, match=r"r: 1: .*use r >= 2"):
        uneven([1, 1, 1, 1])


@pytest.mark.parametrize(
    ("method", "max_steps", "message"),
    [
        (
            BeamLoRA(reset_every=8),
            15,
            "a run of 15 steps has none; set beamlora.reset_every to 7 or less, or train for 16",
        ),
        (BeamLoRA(), 3, "a run of 3 steps has none; train for 4 steps or more"),
        (BeamLoRA(reset_every=8, reset_end_step=6), 40, r"reset_end_step: 6: .* after step 8; use 8 or more"),
    ],
)
def test_a_run_without_a_reset_is_refused_before_it_begins(method: BeamLoRA, max_steps: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(method, max_steps)
    with pytest.raises(ConfigError, match=message):
        scheduled(method)[1].outlook(max_steps)


def test_the_shortest_run_has_one_reset() -> None:
    run = run_of(BeamLoRA(), 4)
    run.steps(1, 4)
    assert [event.step for event in run.schedule.events()] == [2]
    assert run.schedule.fault() is None


class DeepSpeedZeroOptimizer(AdamW):
    """What DeepSpeed puts in the place of the optimizer."""


DeepSpeedZeroOptimizer.__module__ = "deepspeed.runtime.zero.stage_1_and_2"


def test_optimizers_whose_moments_it_cannot_move_are_refused() -> None:
    from rankwise.methods.lora_rite import LoRARITEOptimizer

    one, schedule = scheduled(BeamLoRA())
    groups = [{"params": one.factors}, *schedule.owned_groups(1e-2, 0.0)]
    pairs: Any = [
        {"params": one.factors, "kind": "lora_pair", "scaling": [layer.scaling for layer in one.layers.values()]},
        {"kind": "plain", **schedule.owned_groups(1e-2, 0.0)[0]},
    ]
    refused: list[Optimizer] = [
        SGD(groups, lr=1e-2),
        DeepSpeedZeroOptimizer(groups, lr=1e-2),
        LoRARITEOptimizer(pairs, lr=1e-2),
    ]
    for optimizer in refused:
        with pytest.raises(ConfigError, match=f"runs {type(optimizer).__name__}: use optim: adamw_torch"):
            schedule.begin(optimizer, 12)


def test_scores_that_nobody_trains_or_that_were_rounded_are_refused() -> None:
    one, schedule = scheduled(BeamLoRA())
    with pytest.raises(ConfigError, match="scores are in no group of AdamW"):
        schedule.begin(one.adamw(), 12)
    groups = [{"params": one.factors}, *schedule.owned_groups(1e-2, 0.0)]
    schedule.gates.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"scores are torch\.bfloat16"):
        schedule.begin(AdamW(groups, lr=1e-2), 12)


def test_flattened_factors_are_refused() -> None:
    one, schedule = scheduled(BeamLoRA())
    groups = [{"params": one.factors}, *schedule.owned_groups(1e-2, 0.0)]
    name, layer = next(iter(one.layers.items()))
    module: Any = layer.module
    module.lora_A["default"].weight = torch.nn.Parameter(layer.lora_A.detach().flatten())
    with pytest.raises(ConfigError, match=rf"{name}: lora_A is \[128\] and lora_B \[32, 4\].*train with DDP"):
        schedule.begin(AdamW(groups, lr=1e-2), 12)


def test_scores_that_are_not_finite_skip_a_reset_and_at_the_second_the_run_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = run_of(BeamLoRA(reset_every=2))
    run.step(1)
    name = list(run.one.layers)[1]
    run.schedule.gates.write(name, torch.tensor([0.0, math.nan, 0.0, 0.0]))
    before = run.factors()
    run.schedule.after_step(2)
    assert f"after step 2 the scores of {name} are NaN or infinite, and the reset is skipped" in caplog.text
    assert same(run.factors(), before)
    assert run.schedule.events() == ()
    fault = run.schedule.fault()
    assert fault is not None
    assert "1 were skipped for scores" in fault.message
    run.schedule.after_step(3)
    with pytest.raises(
        HealthError, match=f"after step 4 the scores of {name} are NaN or infinite, as at a reset before"
    ):
        run.schedule.after_step(4)


def test_a_run_that_ends_before_its_first_reset_is_no_fault_and_one_that_missed_it_is() -> None:
    run = run_of(BeamLoRA(reset_every=4), 8)
    assert run.schedule.fault() is None
    run.steps(1, 3)
    assert run.schedule.fault() is None
    run.schedule.after_step(5)  # a loop that forgot a step
    fault = run.schedule.fault()
    assert fault is not None
    assert "no reset was made in 5 steps, and 1 fell due" in fault.message


def test_scores_that_never_moved_fail_the_run() -> None:
    run = run_of(BeamLoRA(reset_every=2), 4)
    for step in range(1, 5):
        run.schedule.after_step(step)
    fault = run.schedule.fault()
    assert fault is not None
    assert "the scores never moved in 4 steps" in fault.message


def test_a_low_learning_rate_is_told_the_authors_temperature() -> None:
    assert any("tau 0.03" in text for text in run_of(BeamLoRA(), lr=5e-5).schedule.remarks())
    assert run_of(BeamLoRA(tau=0.03), lr=5e-5).schedule.remarks() == ()
    assert run_of(BeamLoRA(), lr=3e-4).schedule.remarks() == ()


def test_nothing_happens_before_begin() -> None:
    _, schedule = scheduled(BeamLoRA(reset_every=2))
    schedule.after_step(2)
    assert schedule.events() == schedule.remarks() == ()
    assert schedule.fault() is None
    assert isinstance(schedule, Schedule)
