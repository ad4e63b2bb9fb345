"""XGBLoRA in a session: what is exported keeps to the budget, and a run whose rounds never ended fails."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import rankwise as rw
from rankwise.adapters.attach import adapted_layers
from rankwise.adapters.fingerprint import weights_fingerprint
from rankwise.adapters.state import STATE_FILE, FoldState
from rankwise.errors import ArtifactError, BudgetError, ConfigError, ExportError, HealthError, ModelError, RecipeError
from rankwise.export.fold import fold
from rankwise.export.stored import what_to_fold
from rankwise.export.truncate import truncate_adapter
from rankwise.export.write import export_folder
from rankwise.linalg.factors import product_norm, relative_difference
from rankwise.methods.xgblora import XGBLoRA
from rankwise.training.marker import read_marker
from rankwise.training.session import Session
from tests.adapters.test_perturbation import Linear8bitLt
from tests.support.models import causal_batch, tiny_llama
from tests.training.jobs import Job, Rows, trainer_arguments

ARGS = SimpleNamespace(learning_rate=2e-2, lr_scheduler_type="constant")
TARGETS = ["q_proj", "up_proj"]
GROWING = XGBLoRA(round_steps=2, layers_fraction=1.0)
"""Every round adds a rank to every layer."""
PROBE = causal_batch(99)


def session_of(method: Any, *, r: int = 2, **options: Any) -> Session:
    return rw.attach(tiny_llama(), method, r=r, target_modules=TARGETS, **options)


def walk(session: Session, steps: int, *, first: int = 1, last: int | None = None, optimizer: Any = None) -> Any:
    """A bare loop, from `first` to `last` of a run of `steps`."""
    session.model.train()
    if optimizer is None:
        optimizer = session.optimizers(ARGS, steps)[0]
        session.begin(optimizer, steps)
    for step in range(first, (last or steps) + 1):
        session.before_step(step)
        session.model(**causal_batch(step)).loss.backward()
        session.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
        session.after_step(step)
    return optimizer


def trained(method: Any, steps: int = 8, **options: Any) -> Session:
    session = session_of(method, **options)
    walk(session, steps)
    session.end(steps)
    return session


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=PROBE["input_ids"]).logits
    return found


def parameters(folder: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())


def check(session: Session, name: str) -> Any:
    return next(one for one in session.health.checks if one.id == name)


# --- budget -------------------------------------------------------------------------------------------------------


def test_boosters_train_at_their_own_rank_and_alpha_under_the_budget_of_r() -> None:
    session = session_of("xgblora", r=4, lora_alpha=32)
    assert set(session.plan.ranks.values()) == {1}
    assert session.plan.parameters * 4 == session.plan.budget
    assert {layer.scaling for layer in session.layers.values()} == {2.0}
    assert session.export_budget == session.plan.budget
    assert session_of(XGBLoRA(max_rank="none")).export_budget is None
    assert session_of("lora").export_budget is None
    with pytest.raises(BudgetError, match="booster_rank: 4 is above r: 2"):
        session_of(XGBLoRA(booster_rank=4))


def test_under_rora_the_scaling_is_by_the_root_of_the_boosters_rank() -> None:
    session = session_of([rw.RoRA(), XGBLoRA(booster_rank=4, booster_alpha=2)], r=4)
    assert {layer.scaling for layer in session.layers.values()} == {1.0}
    assert not [note for note in session.plan.notes if "changes nothing" in note]
    alike = session_of([rw.RoRA(), XGBLoRA()], r=4)
    assert {layer.scaling for layer in alike.layers.values()} == {2.0}
    assert [note for note in alike.plan.notes if "rora changes nothing" in note]


def test_ranks_edited_in_a_plan_are_those_of_the_boosters() -> None:
    plan = rw.plan(tiny_llama(), "xgblora", r=4, target_modules=TARGETS)
    edited = plan.with_ranks({next(iter(plan.ranks)): 2})
    session = rw.attach(tiny_llama(), GROWING, plan=edited)
    walk(session, 4)
    assert list(session.schedule.live_ranks().values()) == [4, *[2] * (len(plan.ranks) - 1)]
    assert [note for note in session.plan.notes if "the ranks of the plan, 1 to 2, and its alpha 2" in note]


# --- export -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_boosters_within_the_budget_are_exported_whole(layout: Any, tmp_path: Path) -> None:
    session = trained(GROWING, r=4)
    report = session.export(tmp_path / "adapter", layout=layout, batch=PROBE)
    assert report.compression is None
    assert report.ranks == (4, 4.0, 4)
    assert report.logit_error is not None
    assert report.logit_error <= 1e-5
    served = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert torch.allclose(logits(served), logits(session.model), atol=1e-5)


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_boosters_above_the_budget_are_cut_to_the_best_that_fits_and_the_loss_is_told(
    layout: Any, tmp_path: Path
) -> None:
    session = trained(GROWING, steps=12)  # six ranks a layer, and the budget is that of two
    whole = fold(session.model, session.fold_state)
    expected, lost = truncate_adapter(whole, session.plan.budget)
    report = session.export(tmp_path / "adapter", layout=layout, batch=PROBE)
    assert lost is not None
    assert report.compression == lost
    assert 0 < lost.total < 1
    assert sum(layer.rank * layer.shape.cost for layer in expected.layers.values()) <= session.plan.budget
    if layout == "compact":
        assert parameters(tmp_path / "adapter") <= session.plan.budget
    served = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    for name, layer in adapted_layers(served).items():
        mine = expected.layers[name]
        found = (layer.lora_A.detach(), layer.lora_B.detach() * layer.scaling)
        assert relative_difference(found, (mine.lora_A, mine.lora_B * mine.scaling)) <= 1e-5
    assert report.verification is not None
    assert report.verification.update_error <= 1e-5
    assert report.verification.logit_bound is None
    found_error = float((logits(served) - logits(session.model)).abs().max() / logits(session.model).abs().max())
    assert report.logit_error == pytest.approx(found_error, rel=1e-2)
    assert any("max_rank auto" in note and f"the budget is {session.plan.budget}" in note for note in report.notes)
    assert "discards" in check(session, "export").message


def test_merged_weights_hold_every_rank(tmp_path: Path) -> None:
    session = trained(GROWING, steps=12)
    wanted = logits(session.model)
    session.export(tmp_path / "merged", layout="merged", batch=PROBE)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), wanted, atol=1e-5)


def test_x4_on_a_bfloat16_base_the_export_is_the_model_within_its_rounding(tmp_path: Path) -> None:
    session = rw.attach(tiny_llama().to(torch.bfloat16), GROWING, r=4, target_modules=TARGETS)
    walk(session, 8)
    wanted = logits(session.model).float()
    report = session.export(tmp_path / "adapter", batch=PROBE)
    assert report.compression is None
    served = PeftModel.from_pretrained(tiny_llama().to(torch.bfloat16), tmp_path / "adapter")
    error = (logits(served).float() - wanted).abs().max() / wanted.abs().max()
    assert error <= 2e-2


MERGING = replace(GROWING, accumulate="merge")


@pytest.mark.parametrize("steps", [8, 12])
@pytest.mark.parametrize("layout", ["uniform", "compact", "merged"])
def test_boosters_in_the_base_weights_are_exported_as_factors_for_the_base_as_it_was_found(
    layout: Any, steps: int, tmp_path: Path
) -> None:
    """After 8 steps they fit the budget, after 12 they are cut to it."""
    session, factors = (trained(method, steps, r=4) for method in (MERGING, GROWING))
    found = weights_fingerprint(tiny_llama())
    assert session.base_weights == found
    assert weights_fingerprint(session.model) != found
    wanted = logits(session.model)
    report = session.export(tmp_path / "adapter", layout=layout, batch=PROBE)
    assert torch.equal(logits(session.model), wanted)  # the session goes on as it was
    if layout == "merged":
        served: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    else:
        its = factors.export(tmp_path / "factors", layout=layout, batch=PROBE)
        assert report.ranks == its.ranks
        assert (report.compression is None) == (its.compression is None) == (steps == 8)
        served = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    if steps == 8 or layout == "merged":
        assert torch.allclose(logits(served), wanted, atol=1e-5)
    session.close()
    assert weights_fingerprint(session.model) == found


def test_a_checkpoint_of_boosters_in_the_base_weights_goes_on_and_is_exported(tmp_path: Path) -> None:
    session = session_of(MERGING)
    optimizer = walk(session, 12, last=7)
    session.save(tmp_path / "checkpoint-7", optimizer=optimizer)
    marker = read_marker(tmp_path / "checkpoint-7")
    assert marker["base"]["weights"] == weights_fingerprint(tiny_llama())
    resumed = rw.resume(tiny_llama(), tmp_path / "checkpoint-7")
    assert torch.equal(logits(resumed.model), logits(session.model))
    assert resumed.base_weights == session.base_weights
    export_folder(tmp_path / "checkpoint-7", tmp_path / "folder", max_rank=4)
    served = PeftModel.from_pretrained(tiny_llama(), tmp_path / "folder")
    assert torch.allclose(logits(served), logits(session.model), atol=1e-5)
    resumed.close()
    assert weights_fingerprint(resumed.model) == session.base_weights


@pytest.mark.parametrize("layout", ["uniform", "merged"])
def test_a_copy_of_a_model_with_boosters_in_its_weights_is_exported_for_its_own_base(
    layout: Any, tmp_path: Path
) -> None:
    session = trained(MERGING, r=4)
    twin, wanted = copy.deepcopy(session.model), logits(session.model)
    rw.export_adapter(twin, tmp_path / "twin", layout=layout, state=session.fold_state, batch=PROBE)
    if layout == "merged":
        served: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "twin")
    else:
        served = PeftModel.from_pretrained(tiny_llama(), tmp_path / "twin")
    assert torch.allclose(logits(served), wanted, atol=1e-5)
    assert torch.equal(logits(session.model), wanted)
    assert torch.equal(logits(twin), wanted)


def test_a_base_too_narrow_for_boosters_is_refused_before_anything_is_done_to_the_model() -> None:
    model = tiny_llama().to(torch.bfloat16)
    for act in (rw.plan, rw.attach):
        with pytest.raises(RecipeError, match=r"which are bfloat16 .*use accumulate: factors"):
            act(model, MERGING, r=4, target_modules=TARGETS)
    rw.attach(model, GROWING, r=4, target_modules=TARGETS).close()


def test_a_base_that_was_made_narrower_since_is_refused_at_the_first_step() -> None:
    session = session_of(MERGING)
    optimizer = session.optimizers(ARGS, 8)[0]
    for layer in session.layers.values():
        layer.base.module.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"hold no such sum .* which is bfloat16"):
        session.begin(optimizer, 8)


def test_what_ends_after_it_was_closed_does_not_write_the_base_again() -> None:
    session = session_of(MERGING)
    walk(session, 8, last=5)
    session.close()
    with pytest.raises(ModelError, match="was given back and is not written again"):
        session.schedule.end(5)
    assert weights_fingerprint(session.model) == weights_fingerprint(tiny_llama())


def test_every_rank_is_exported_where_that_was_asked_for(tmp_path: Path) -> None:
    session = trained(XGBLoRA(round_steps=2, layers_fraction=1.0, max_rank="none"), steps=12)
    report = session.export(tmp_path / "all", batch=PROBE)
    assert (report.ranks, report.compression) == ((6, 6.0, 6), None)
    auto = trained(GROWING, steps=12)
    for options in ({"max_rank": 6}, {"budget": None}):  # the user's own word
        report = auto.export(tmp_path / next(iter(options)), batch=PROBE, **options)
        assert report.ranks == (6, 6.0, 6)
        assert report.logit_error is not None
        assert report.logit_error <= 1e-5
    assert auto.export(tmp_path / "merged", layout="merged", fresh=tiny_llama(), batch=PROBE).logit_error is not None


def test_a_checkpoint_in_the_middle_of_a_round_is_exported_as_the_session_would(tmp_path: Path) -> None:
    session = session_of(GROWING)
    optimizer = walk(session, 12, last=7)
    checkpoint = tmp_path / "checkpoint-7"
    session.save(checkpoint, optimizer=optimizer)
    mine, its = (tmp_path / name for name in ("session", "folder"))
    session.export(mine, layout="compact", plan=None)
    report = export_folder(checkpoint, its, layout="compact")
    assert report.compression is not None
    assert parameters(its) <= session.plan.budget
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (mine, its))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert export_folder(checkpoint, tmp_path / "all", max_rank=4).ranks == (4, 4.0, 4)

    assert set(what_to_fold(checkpoint)) == {"gates", "boosters"}
    (checkpoint / STATE_FILE).unlink()
    assert set(what_to_fold(checkpoint)) == {"gates", "boosters"}
    with pytest.raises(ArtifactError, match=rf"{STATE_FILE} is missing: .*beside boosters and gates"):
        export_folder(checkpoint, tmp_path / "without")


def test_beside_boosters_nothing_is_merged_and_a_plain_save_holds_them(tmp_path: Path) -> None:
    session = session_of(GROWING, r=4)
    walk(session, 8, last=5)
    for merge in ("merge_adapter", "merge_and_unload", "unload"):
        with pytest.raises(ExportError, match="run `rankwise export`"):
            getattr(session.model, merge)()
    session.model.save_pretrained(str(tmp_path / "saved"))
    state = FoldState.load(tmp_path / "saved" / STATE_FILE)
    assert {len(pair.lora_A) for pair in state.boosters.values()} == {2}
    export_folder(tmp_path / "saved", tmp_path / "adapter")
    served = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert torch.allclose(logits(served), logits(session.model), atol=1e-5)
    with pytest.raises(ExportError, match=r"give state=session\.fold_state"):
        rw.export_adapter(session.model, tmp_path / "forgotten")


def test_x14_packed_weights_are_left_as_they_were_and_the_adapter_is_exported(tmp_path: Path) -> None:
    session = session_of(GROWING, r=4)
    packed = []
    for layer in session.layers.values():
        module: Any = layer.module
        module.base_layer = Linear8bitLt(module.base_layer.weight.detach())
        packed.append(module.base_layer.weight)
    before = [weight.detach().clone() for weight in packed]
    walk(session, 8)
    session.end(8)
    assert all(torch.equal(weight, kept) for weight, kept in zip(packed, before, strict=True))
    report = session.export(tmp_path / "adapter", batch=PROBE)
    assert report.verification is not None
    assert report.verification.update_error <= 1e-5
    assert report.logit_error is not None
    assert report.logit_error <= 1e-5


# --- proof of training --------------------------------------------------------------------------------------------


def test_the_guard_measures_what_the_boosters_add_up_to() -> None:
    session = trained(XGBLoRA(round_steps=4, layers_fraction=0.5), steps=4)
    folded = fold(session.model, session.fold_state)
    norms = [layer.scaling * product_norm(layer.lora_A, layer.lora_B) for layer in folded.layers.values() if layer.rank]
    update = check(session, "update")
    assert update.status == "passed"
    assert update.measured == pytest.approx(min(norms), rel=1e-5)
    assert f"{len(norms)} of {len(norms)} layers that had a gradient" in update.message
    assert f"{len(folded.layers) - len(norms)} layers end without a rank that counts" in update.message


@pytest.mark.parametrize("prevented", ["after_step", "_close_round"])
def test_a_run_whose_rounds_were_kept_from_ending_fails(prevented: str) -> None:
    session = session_of(GROWING)
    schedule: Any = session.schedule
    setattr(schedule, prevented, lambda *_, **__: None)
    walk(session, 4)
    with pytest.raises(HealthError, match=r"'schedule' failed: .*round 1 of 2 ends at step 2 and is still open"):
        session.end(4)
    assert check(session, "schedule").status == "failed"


def test_an_optimizer_that_moves_other_tensors_is_found_also_in_the_first_round() -> None:
    session = session_of(XGBLoRA(rounds=1, layers_fraction=1.0))
    optimizer = session.optimizers(ARGS, 10)[0]
    session.begin(optimizer, 10)
    for group in optimizer.param_groups:
        group["params"] = [parameter.detach().clone() for parameter in group["params"]]
    walk(session, 10, last=3, optimizer=optimizer)
    with pytest.raises(HealthError, match=r"'schedule' failed: .*of 1 rounds 0 ended with lora_B"):
        session.end(3)


def test_what_the_outlook_and_the_remarks_both_say_is_noted_once() -> None:
    session = session_of(XGBLoRA(rounds=1, layers_fraction=0.5))
    walk(session, 4, last=1)
    assert len([note for note in session.notes if "drawn in no round" in note]) == 1
    assert len(set(session.notes)) == len(session.notes)


def test_rounds_that_do_not_fit_the_run_are_refused_when_the_optimizer_is_made() -> None:
    with pytest.raises(ConfigError, match="20 rounds do not fit in 6 optimizer steps"):
        session_of(XGBLoRA(rounds=20)).optimizers(ARGS, 6)


# --- the best checkpoint ------------------------------------------------------------------------------------------


class Logits(TrainerCallback):
    """What the model computes after each evaluation, by step."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found[state.global_step] = logits(model)
        model.train()


@pytest.mark.parametrize(
    ("stops_early", "accumulate"), [(True, "factors"), (False, "factors"), (True, "merge"), (False, "merge")]
)
def test_the_best_checkpoint_comes_back_with_its_boosters_whenever_the_run_ends(
    stops_early: bool, accumulate: Any, tmp_path: Path
) -> None:
    """The loss is called better the larger it is: the first evaluation, in the middle of a round, stays the best."""
    session = session_of(XGBLoRA(round_steps=5, layers_fraction=1.0, accumulate=accumulate), r=4)
    job = Job(folder=str(tmp_path), steps=12, save_steps=2, keep=None)
    options = {**trainer_arguments(job), "warmup_steps": 0, "eval_strategy": "steps", "eval_steps": 2}
    args = TrainingArguments(
        **options, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
    )
    seen = Logits()
    changes: list[Any] = []
    keep = session.callback(on_event=lambda event: changes.extend(event.changes))
    more = [EarlyStoppingCallback(early_stopping_patience=3)] if stops_early else []
    made = Trainer(
        session.model, args, train_dataset=Rows(), eval_dataset=Rows(4), optimizers=session.optimizers(args, 12),
        callbacks=[keep, seen, *more],
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    made.train()
    best = int(made.state.best_global_step)
    assert best == 2
    assert made.state.global_step == (8 if stops_early else 12)
    assert session.health.status == "passed"
    assert torch.allclose(logits(session.model), seen.found[best], atol=1e-6)
    assert not torch.allclose(seen.found[made.state.global_step], seen.found[best], atol=1e-3)
    assert set(session.schedule.live_ranks().values()) == {1}
    told = {line["layer"]: line["to"] for line in changes if "layer" in line}
    assert told == session.schedule.live_ranks()
    report = session.export(tmp_path / "adapter", batch=PROBE)
    assert report.logit_error is not None
    assert report.logit_error <= 1e-5
