"""AB-LoRA in a session: slots beside the ranks, rounds that are told, killed, taken back, prevented or cut short."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import rankwise as rw
from rankwise.adapters.attach import adapted_layers, attach_lora
from rankwise.adapters.checkpoint import load_native
from rankwise.errors import CheckpointError, ConfigError, HealthError
from rankwise.methods.ab_lora import ABLoRA, ABLoRASchedule
from rankwise.ranks.shapes import ScalingRule
from rankwise.training.session import Session
from rankwise.training.state import resume
from tests.support.models import causal_batch, tiny_llama
from tests.training.children import finish, start
from tests.training.jobs import Job, final, kill_now

BATCHES = [causal_batch(seed) for seed in range(2)]
VALIDATION = [causal_batch(seed, rows=3) for seed in (40, 41)]
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
STEPS = 12


def session_of(method: ABLoRA | None = None, *, r: int = 2, **options: Any) -> Session:
    made = method or ABLoRA(prune_per_round=3)
    return rw.attach(tiny_llama(), made, r=r, target_modules=TARGETS, validation=VALIDATION, **options)


def walk(session: Session, last: int = STEPS, first: int = 1, parts: Any = None, steps: int = STEPS) -> Any:
    """Steps of a bare loop; what it began with."""
    args = SimpleNamespace(learning_rate=1e-2, lr_scheduler_type="linear")
    optimizer, scheduler = parts or session.optimizers(args, steps)
    if parts is None:
        session.begin(optimizer, steps)
    session.model.train()
    for step in range(first, last + 1):
        session.before_step(step)
        session.model(**BATCHES[step % len(BATCHES)]).loss.backward()
        session.before_optimizer_step(step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        session.after_step(step)
    return optimizer, scheduler


def whole(session: Session) -> dict[str, Tensor]:
    gates = session.fold_state.gates
    return {
        f"{name}.{part}": value
        for name, layer in session.layers.items()
        for part, value in (("A", layer.lora_A.detach()), ("B", layer.lora_B.detach()), ("gate", gates[name]))
    }


@pytest.mark.parametrize("rule", list(ScalingRule))
def test_slots_are_empty_and_the_scaling_is_that_of_the_rank(rule: ScalingRule) -> None:
    plain = rw.plan(tiny_llama(), "lora", r=3, lora_alpha=10, target_modules=TARGETS)
    ranks = {name: 1 + index % 3 for index, name in enumerate(plain.ranks)}
    given = rw.RankPlan.from_shapes(
        [layer.shape for layer in plain.layers], list(ranks.values()), r=3, lora_alpha=10, scaling_rule=rule
    )
    alone = adapted_layers(attach_lora(tiny_llama(), given))
    slots = {name: rank + 2 for name, rank in ranks.items()}
    layers = adapted_layers(attach_lora(tiny_llama(), given, slots=slots))
    for name, layer in layers.items():
        assert layer.rank == slots[name]
        assert layer.scaling == pytest.approx(given.scaling(name), rel=1e-12)
        assert torch.equal(layer.lora_A[: ranks[name]], alone[name].lora_A)
        assert not layer.lora_A[ranks[name] :].any()
        assert not layer.lora_B.any()


@pytest.mark.parametrize("rule", list(ScalingRule))
def test_stock_peft_reads_a_checkpoint_with_slots_as_the_run_has_it(rule: ScalingRule, tmp_path: Path) -> None:
    from peft import PeftModel

    plain = rw.plan(tiny_llama(), "lora", r=3, lora_alpha=10, target_modules=TARGETS)
    ranks = [1 + index % 3 for index in range(len(plain.ranks))]
    given = rw.RankPlan.from_shapes(
        [layer.shape for layer in plain.layers], ranks, r=3, lora_alpha=10, scaling_rule=rule
    )
    method: list[Any] = [ABLoRA(prune_per_round=3)]
    if rule is ScalingRule.ALPHA_OVER_SQRT_RANK:
        method.append("rora")
    session = rw.attach(tiny_llama(), method, plan=given, validation=VALIDATION)
    optimizer, scheduler = walk(session)
    session.save(tmp_path / "checkpoint-12", optimizer=optimizer, scheduler=scheduler)
    session.model.eval()
    with torch.no_grad():
        wanted = session.model(input_ids=BATCHES[0]["input_ids"]).logits
        loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "checkpoint-12")).eval()
        found = loaded(input_ids=BATCHES[0]["input_ids"]).logits
    assert float((found - wanted).abs().max()) <= 1e-6
    session.close()


def test_attach_gives_room_for_one_rank_a_round_and_a_dropped_layer_none() -> None:
    plan = rw.plan(tiny_llama(), ABLoRA(), r=2, target_modules=TARGETS)
    dropped = next(iter(plan.ranks))
    session = rw.attach(tiny_llama(), ABLoRA(growth=3), plan=plan.with_ranks({dropped: 0}), validation=VALIDATION)
    assert dropped not in session.layers
    assert {layer.rank for layer in session.layers.values()} == {5}
    assert set(session.schedule.live_ranks().values()) == {2}  # type: ignore[union-attr]
    session.close()


def test_every_round_is_told_with_both_terms_of_every_rank_and_the_budget_is_kept() -> None:
    session = session_of()
    walk(session)
    session.end(STEPS)
    changes = session.drain_changes()
    assert not [line for line in changes if "final" in line], "nothing came after the last step"
    events = [line for line in changes if "layer" not in line]
    assert len(events) == len(ABLoRA().round_steps(STEPS))
    assert all(event["figures"]["live_parameters"] <= session.plan.budget for event in events)
    told = [line for line in changes if "layer" in line]
    for event in events:
        lines = [line for line in told if line["step"] == event["step"]]
        assert {line["layer"] for line in lines} == set(session.layers), "unchanged layers tell their scores too"
        for line in lines:
            sizes = {len(line["detail"][part]) for part in ("slots", "drop", "solo", "importance")}
            assert sizes == {line["from"]}
            assert line["to"] == line["from"] - len(line["detail"]["pruned"]) + len(line["detail"]["added"])
    ranks = dict(session.plan.ranks)
    for line in told:
        assert ranks[line["layer"]] == line["from"]
        ranks[line["layer"]] = line["to"]
    assert ranks == session.schedule.live_ranks()  # type: ignore[union-attr]
    assert ranks != session.plan.ranks
    assert session.health.status == "passed"
    session.close()


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_the_export_holds_the_live_ranks_alone_and_stock_peft_computes_the_gated_model(
    layout: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    session = session_of()
    walk(session)
    session.end(STEPS)
    session.model.eval()
    with torch.no_grad():
        wanted = session.model(input_ids=BATCHES[0]["input_ids"]).logits
    live = session.schedule.live_ranks()  # type: ignore[union-attr]
    session.export(tmp_path / "adapter", layout=layout, batch={"input_ids": BATCHES[0]["input_ids"]})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == max(live.values())
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        found = loaded(input_ids=BATCHES[0]["input_ids"]).logits
    assert float((found - wanted).abs().max()) <= 1e-5
    session.close()


@pytest.mark.parametrize("cut", [3, 7])
def test_a_run_that_goes_on_in_the_middle_of_its_rounds_makes_the_same_bits(cut: int, tmp_path: Path) -> None:
    undisturbed = session_of()
    walk(undisturbed)
    undisturbed.end(STEPS)
    session = session_of()
    optimizer, scheduler = walk(session, last=cut)
    folder = tmp_path / f"checkpoint-{cut}"
    session.save(folder, optimizer=optimizer, scheduler=scheduler)
    session.close()
    again = resume(tiny_llama(), folder, validation=VALIDATION)
    assert {layer.rank for layer in again.layers.values()} == {10}
    args = SimpleNamespace(learning_rate=1e-2, lr_scheduler_type="linear")
    optimizer, scheduler = again.optimizers(args, STEPS)
    assert again.restore(folder, optimizer, scheduler) == cut
    again.begin(optimizer, STEPS)
    walk(again, first=cut + 1, parts=(optimizer, scheduler))
    again.end(STEPS)
    ours, wanted = whole(again), whole(undisturbed)
    assert [name for name, value in wanted.items() if not torch.equal(value, ours[name])] == []


def test_the_masks_of_the_best_checkpoint_come_back(tmp_path: Path) -> None:
    session = session_of()
    parts = walk(session, last=3)
    saved = session.fold_state.gates
    session.save(tmp_path / "checkpoint-3", optimizer=parts[0], scheduler=parts[1])
    walk(session, first=4, parts=parts)
    assert any(not torch.equal(gate, saved[name]) for name, gate in session.fold_state.gates.items())
    session.drain_changes()
    session.take_back(tmp_path / "checkpoint-3")
    assert all(torch.equal(gate, saved[name]) for name, gate in session.fold_state.gates.items())
    assert {line["kind"] for line in session.drain_changes()} == {"best"}
    session.close()


def kill_in_a_round() -> None:
    """Dies between pruning and growing of the second round."""
    grow, calls = ABLoRASchedule._grow, [0]

    def killed(self: ABLoRASchedule, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            kill_now()
        return grow(self, *args)

    ABLoRASchedule._grow = killed  # type: ignore[method-assign]


def test_a_run_killed_in_the_middle_of_a_round_ends_bit_equal(tmp_path: Path) -> None:
    whole_run = Job(folder=str(tmp_path / "whole"), method="ab-lora", steps=STEPS, save_steps=1)
    Path(whole_run.folder).mkdir()
    assert finish(start(whole_run)) == 0
    job = Job(folder=str(tmp_path / "killed"), method="ab-lora", steps=STEPS, save_steps=1)
    Path(job.folder).mkdir()
    assert finish(start(job, kill_in_a_round)) != 0
    assert not (Path(job.folder) / "final.safetensors").exists()
    assert finish(start(job)) == 0
    ours, wanted = final(Path(job.folder)), final(Path(whole_run.folder))
    assert ours.keys() == wanted.keys()
    assert [name for name in ours if not torch.equal(ours[name], wanted[name])] == []
    assert load_file(Path(job.folder) / "checkpoint-12" / "rankwise_state.safetensors")


def test_a_run_whose_rounds_are_prevented_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of()
    monkeypatch.setattr(ABLoRASchedule, "after_step", lambda self, step: None)
    walk(session)
    with pytest.raises(HealthError, match="ab-lora made 0 of its 4 rounds in 12 steps, and 4 were due"):
        session.end(STEPS)
    assert session.health.status == "failed"
    session.close()


def test_a_run_that_ends_before_its_first_round_is_plain_lora_and_fails() -> None:
    session = session_of()
    walk(session, last=4, steps=100)
    with pytest.raises(HealthError, match="the first comes after step 17: this is plain LoRA"):
        session.end(4)
    session.close()


def test_a_run_that_stops_between_its_rounds_exports_what_is_live(tmp_path: Path) -> None:
    session = session_of()
    walk(session, last=3)
    live = session.schedule.live_ranks()  # type: ignore[union-attr]
    session.end(3)
    last = [line for line in session.drain_changes() if line["kind"] == "unfinished"]
    assert "before 2 of its rounds; " in last[0]["reason"]
    fresh = {line["layer"]: line["from"] - line["to"] for line in last[1:]}
    assert sum(fresh.values()) > 0, "new ranks of the last round, which no step trained"
    assert session.schedule.live_ranks() == {n: r - fresh.get(n, 0) for n, r in live.items()}  # type: ignore[union-attr]
    assert session.health.status == "passed"
    report = session.export(tmp_path / "adapter")
    assert report.verification is not None
    session.close()


def test_a_resumed_run_keeps_its_rounds_whatever_its_new_length(tmp_path: Path) -> None:
    method = ABLoRA(rounds=2, prune_per_round=2, warmup_epochs=1, round_epochs=0.5, epoch_steps=4)
    session = session_of(method)
    optimizer, scheduler = walk(session, last=7)
    session.save(tmp_path / "checkpoint-7", optimizer=optimizer, scheduler=scheduler)
    again = resume(tiny_llama(), tmp_path / "checkpoint-7", validation=VALIDATION)
    args = SimpleNamespace(learning_rate=1e-2, lr_scheduler_type="constant")
    optimizer, _ = again.optimizers(args, 8)  # its rounds are made, for which a run of 8 steps would have no room
    again.begin(optimizer, 8)
    session = session_of(method)
    optimizer, scheduler = walk(session, last=5)
    session.save(tmp_path / "checkpoint-5", optimizer=optimizer, scheduler=scheduler)
    again = resume(tiny_llama(), tmp_path / "checkpoint-5", validation=VALIDATION)
    assert again.schedule is not None
    assert again.schedule.outlook(40)[0].startswith("ab-lora: 1 more rounds, after steps 6 of 40")
    with pytest.raises(ConfigError, match="resume with at least 7 steps"):
        again.optimizers(args, 6)


def saved_at(session: Session, folder: Path, step: int, last: int) -> dict[str, Tensor]:
    """Trains to `last`, saves at `step`, and loads the saved factors as a trainer loads the best; the gates then."""
    parts = walk(session, last=step)
    session.save(folder, optimizer=parts[0], scheduler=parts[1])
    gates = session.fold_state.gates
    walk(session, first=step + 1, last=last, parts=parts)
    load_native(session.model, folder)
    session.drain_changes()
    return dict(gates)


@pytest.mark.parametrize(("step", "last"), [(1, 3), (1, 4), (3, 5), (1, 5), (6, 12)])
def test_the_best_checkpoint_is_exported_as_it_was_evaluated(step: int, last: int, tmp_path: Path) -> None:
    session = session_of()
    gates = saved_at(session, tmp_path / "best", step, last)
    fresh = dict(session.schedule.state_dict()["fresh"])  # type: ignore[union-attr]  # of the last step, not the best's
    session.end(last, best=tmp_path / "best")
    assert step > 2 or not any("off again" in line["reason"] for line in session.drain_changes()), fresh
    for name, gate in session.fold_state.gates.items():
        kept = session.layers[name].lora_B.any(dim=0).float()
        assert torch.equal(gate, gates[name] * kept) if step in (3,) else torch.equal(gate, gates[name])
    assert session.health.status == "passed"
    session.close()


def test_a_best_checkpoint_from_before_the_rounds_is_said_to_be_plain(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = session_of()
    saved_at(session, tmp_path / "best", 1, STEPS)
    session.end(STEPS, best=tmp_path / "best")
    (event,) = [line for line in session.drain_changes() if line["kind"] == "unfinished"]
    told = "the best checkpoint, of step 1, is from before 4 of the rounds, and has the ranks of the start"
    assert event["reason"] == told
    assert [text for text in caplog.messages if told in text]
    session.close()


@pytest.mark.parametrize("last", [2, 3, 4, 5])
def test_a_run_may_end_at_a_round_though_a_layer_was_emptied_and_filled_again(last: int) -> None:
    session = session_of(ABLoRA(prune_per_round=7, budget="ranks"))
    walk(session, last=last)
    session.end(last)
    assert session.health.status == "passed"
    for name, layer in session.layers.items():
        gate = session.fold_state.gates[name]
        assert bool(layer.lora_B[:, gate.bool()].any(dim=0).all()), "no live rank is untrained"
    session.close()


def test_ranks_that_a_floor_holds_all_are_refused_before_anything_is_attached() -> None:
    with pytest.raises(ConfigError, match=r"ab-lora\.min_rank: 2 leaves 0 of 16 ranks to switch off"):
        session_of(ABLoRA(min_rank=2))
    with pytest.raises(ConfigError, match="8 of 16 ranks would be switched off in every round"):
        session_of(ABLoRA(prune_per_round=8))


def test_rounds_that_switch_nothing_off_fail_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of()
    monkeypatch.setattr(ABLoRASchedule, "_lowest", lambda self, values, slots: {})
    walk(session)
    with pytest.raises(HealthError, match="none of ab-lora's 4 scored rounds switched a rank off"):
        session.end(STEPS)
    session.close()


def test_a_run_that_lost_ranks_can_be_resumed_and_other_validation_rows_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ABLoRASchedule, "_grow", lambda self, values, pruned: {})
    session = session_of(ABLoRA(prune_per_round=7, rounds=1))
    optimizer, scheduler = walk(session, last=4)
    assert sum(session.schedule.live_ranks().values()) == 16 - 7  # type: ignore[union-attr]
    session.save(tmp_path / "checkpoint-4", optimizer=optimizer, scheduler=scheduler)
    resume(tiny_llama(), tmp_path / "checkpoint-4", validation=VALIDATION).close()
    with pytest.raises(CheckpointError, match="it scored on other validation batches"):
        resume(tiny_llama(), tmp_path / "checkpoint-4", validation=VALIDATION[:1])


def test_validation_rows_are_asked_for_only_where_ranks_are_scored() -> None:
    with pytest.raises(ConfigError, match="ab-lora scores on validation batches: pass validation=batches"):
        rw.attach(tiny_llama(), ABLoRA(), r=2, target_modules=TARGETS)
    with pytest.raises(ConfigError, match="validation batches are for schedules that score"):
        rw.attach(tiny_llama(), ABLoRA(rounds=0), r=2, target_modules=TARGETS, validation=VALIDATION)
    session = rw.attach(tiny_llama(), ABLoRA(rounds=0), r=2, target_modules=TARGETS)
    walk(session)
    session.end(STEPS)
    session.close()
