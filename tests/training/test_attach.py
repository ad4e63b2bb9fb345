"""From model and recipe to session: what is decided, what is refused, what stays untouched."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from rankwise.adapters.attach import adapted_layers
from rankwise.adapters.fingerprint import architecture_fingerprint, weights_fingerprint
from rankwise.errors import BudgetError, CalibrationError, ConfigError, ModelError, PlanError, TargetError
from rankwise.methods.gora import GoRA
from rankwise.methods.lora import LoRA
from rankwise.methods.lora_ga import LoRAGA
from rankwise.methods.rora import RoRA
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.shapes import ScalingRule, uniform_budget
from rankwise.training.attach import Calibration, attach, plan
from tests.support.models import causal_batch, classification_batch, tiny_bert_classifier, tiny_gpt2, tiny_llama

BATCHES = [causal_batch(seed) for seed in range(4)]


def test_lora_attaches_a_stock_peft_model_that_starts_as_the_base():
    model = tiny_llama()
    before = model(**BATCHES[0]).logits
    session = attach(model, "lora", r=4, lora_alpha=8, target_modules=["q_proj"])
    assert type(session.model).__module__.startswith("peft.")
    assert isinstance(session.model, PeftModel)
    assert torch.equal(session.model(**BATCHES[0]).logits, before)
    assert {layer.rank for layer in session.layers.values()} == {4}
    assert {layer.scaling for layer in session.layers.values()} == {2.0}


def test_the_neutral_session_computes_what_stock_peft_computes():
    session = attach(tiny_llama(), LoRA(), r=4, target_modules="all-linear")
    stock = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    for name, layer in adapted_layers(stock).items():
        layer.lora_A.data.copy_(session.layers[name].lora_A)
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(1))
        session.layers[name].lora_B.data.copy_(layer.lora_B)
    assert torch.equal(session.model(**BATCHES[0]).logits, stock(**BATCHES[0]).logits)


def test_gora_spends_no_more_than_the_budget_and_moves_against_the_gradient():
    model = tiny_llama()
    base_loss = float(model(**BATCHES[0]).loss.detach())
    session = attach(model, GoRA(gamma=0.05), r=4, calibration=BATCHES[:1])
    shapes = [layer.shape for layer in session.plan.layers]
    assert session.plan.parameters <= uniform_budget(shapes, 4) == session.plan.budget
    assert len(set(session.plan.ranks.values())) > 1
    assert float(session.model(**BATCHES[0]).loss.detach()) < base_loss
    assert session.calibration is not None
    assert session.calibration.batches == 1


def test_base_weights_and_every_random_state_are_left_alone():
    model = tiny_llama()
    weights = weights_fingerprint(model)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    session = attach(model, GoRA(adaptive_gamma=True), r=4, calibration=iter(BATCHES), lora_dropout=0.1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert weights_fingerprint(session.model) == weights == session.base_weights


@pytest.mark.parametrize("methods", ["lora", RoRA(), GoRA()])
def test_the_same_inputs_give_the_same_bits(methods: object):
    first, second = (attach(tiny_llama(), methods, r=4, calibration=BATCHES, seed=3) for _ in range(2))
    assert first.plan.hash() == second.plan.hash()
    for name, layer in first.layers.items():
        assert torch.equal(layer.lora_A, second.layers[name].lora_A)
        assert torch.equal(layer.lora_B, second.layers[name].lora_B)


def test_another_seed_draws_another_start():
    first, second = (attach(tiny_llama(), "lora", r=2, seed=seed) for seed in (0, 1))
    name = next(iter(first.layers))
    assert not torch.equal(first.layers[name].lora_A, second.layers[name].lora_A)


def test_plan_decides_what_attach_decides_and_leaves_the_model_bare():
    model = tiny_llama()
    made = plan(model, GoRA(), r=4, calibration=BATCHES)
    assert not isinstance(model, PeftModel)
    assert made.hash() == attach(model, GoRA(), r=4, calibration=BATCHES).plan.hash()
    assert made.model.fingerprint == architecture_fingerprint(tiny_llama())


def test_an_edited_plan_is_used_as_it_is_with_the_start_of_the_methods(tmp_path: Path):
    made = plan(tiny_llama(), GoRA(), r=4, calibration=BATCHES)
    first, second = list(made.ranks)[:2]
    made.with_ranks({first: 1, second: 0}).save(tmp_path / "plan.json")
    session = attach(tiny_llama(), GoRA(), plan=RankPlan.load(tmp_path / "plan.json"), calibration=BATCHES)
    assert session.layers[first].rank == 1
    assert second not in session.layers
    assert float(session.layers[first].lora_B.detach().abs().sum()) > 0


def test_the_allocation_of_one_method_goes_with_the_start_of_another():
    made = plan(tiny_llama(), GoRA(), r=4, calibration=BATCHES)
    session = attach(tiny_llama(), "lora", plan=made, seed=4)
    assert session.plan.ranks == made.ranks
    assert session.plan.methods == ("lora",)
    assert session.seed == 4
    told = "ranks and the scaling rule alpha/sqrt(rank) from a plan of gora, start from lora"
    assert told in session.plan.notes
    assert all(float(layer.lora_B.detach().abs().sum()) == 0 for layer in session.layers.values())


def test_a_plan_for_another_model_is_refused():
    made = plan(tiny_llama(), "lora", r=2)
    with pytest.raises(PlanError, match="another model"):
        attach(tiny_gpt2(), "lora", plan=made)
    with pytest.raises(PlanError, match="the plan is for another model"):
        attach(tiny_llama(hidden=16), "lora", plan=made)
    small = plan(tiny_llama(), "lora", r=2, target_modules=["layers.0.self_attn.q_proj"])
    with pytest.raises(PlanError, match="architecture"):
        attach(tiny_llama(layers=3), "lora", plan=small)


def test_an_explicit_rank_above_a_layers_size_is_an_error_and_an_allocated_one_is_capped():
    with pytest.raises(BudgetError, match="at most 16"):
        attach(tiny_llama(), "lora", r=20)
    session = attach(tiny_llama(), GoRA(r_min=1), r=12, calibration=BATCHES)
    assert all(layer.rank <= layer.base.shape.max_rank for layer in session.layers.values())


def test_a_method_that_needs_gradients_says_so():
    with pytest.raises(CalibrationError, match="gora needs gradient statistics: pass calibration"):
        attach(tiny_llama(), GoRA(), r=4)
    with pytest.raises(CalibrationError, match="pass calibration"):
        plan(tiny_llama(), GoRA(), r=4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ConfigError, "r is 0"),
        ({"r": 2.0}, ConfigError, "r is 2.0"),
        ({"lora_alpha": 0}, ConfigError, "lora_alpha is 0"),
        ({"lora_alpha": "16"}, ConfigError, "lora_alpha is '16'"),
        ({"target_modules": ["q_prj"]}, TargetError, "q_proj"),
        ({"methods": "gorra"}, ConfigError, "gora"),
        ({"lora_dropout": 1.0}, ConfigError, "lora_dropout"),
    ],
)
def test_bad_settings_are_refused_in_the_users_words(options: dict[str, object], error: type, message: str):
    with pytest.raises(error, match=message):
        attach(tiny_llama(), **options)


def test_nan_in_the_base_weights_is_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        attach(model, "lora")


def test_calibration_settings_are_checked_at_once():
    with pytest.raises(ConfigError) as caught:
        Calibration(batches=[], max_batches=0, sample_share=0)
    assert len(caught.value.faults) == 2


def test_the_cache_answers_the_same_question_without_a_pass(tmp_path: Path):
    calls: list[int] = []

    def counting(done: int, *more: object) -> None:
        calls.append(done)

    source = Calibration(batches=BATCHES, cache=tmp_path / "statistics.safetensors", on_batch=counting)
    first = attach(tiny_llama(), GoRA(), r=4, calibration=source)
    passed = len(calls)
    second = attach(tiny_llama(), GoRA(), r=4, calibration=source)
    assert passed >= len(BATCHES)
    assert len(calls) == passed
    assert second.calibration is not None
    assert second.calibration.from_cache
    for name, layer in first.layers.items():
        assert torch.equal(layer.lora_B, second.layers[name].lora_B)
    with pytest.raises(CalibrationError, match="another"):
        attach(tiny_llama(seed=1), GoRA(), r=4, calibration=source)


def test_whole_gradients_are_kept_only_where_that_is_wanted(tmp_path: Path):
    file = tmp_path / "statistics.safetensors"
    for cached in (False, True):
        source = Calibration(batches=BATCHES, cache=file, cache_gradients=cached)
        attach(tiny_llama(), LoRAGA(), r=4, calibration=source)
        assert file.exists() == cached
    for name, method in (("products", LoRAGA(statistics="sketch")), ("scores", GoRA())):
        source = Calibration(batches=BATCHES, cache=tmp_path / name, cache_gradients=False)
        attach(tiny_llama(), method, r=4, calibration=source)
        assert (tmp_path / name).exists()


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").touch()
    source = Calibration(batches=BATCHES, cache=tmp_path / "file" / "statistics.safetensors")
    assert attach(tiny_llama(), GoRA(), r=4, calibration=source).calibration is not None
    assert "was not written" in caplog.text


def test_a_bf16_base_carries_float32_factors():
    session = attach(tiny_llama(dtype=torch.bfloat16), GoRA(), r=4, calibration=BATCHES)
    assert {layer.lora_A.dtype for layer in session.layers.values()} == {torch.float32}


def test_modules_to_save_are_trained_and_not_adapted():
    session = attach(tiny_llama(), "lora", r=2, modules_to_save=["lm_head"])
    trainable = [name for name, parameter in session.model.named_parameters() if parameter.requires_grad]
    assert any("modules_to_save" in name for name in trainable)
    assert not any("lm_head" in name for name in session.layers)


def test_close_leaves_no_hook_on_the_model():
    session = attach(tiny_llama(), "lora", r=2)
    optimizer, _ = session.optimizers(type("Args", (), {"learning_rate": 1e-3})(), 5)
    session.begin(optimizer, 5)
    hooked = [p for p in session.model.parameters() if p._post_accumulate_grad_hooks]
    assert len(hooked) == 2 * len(session.layers)
    session.close()
    assert not any(p._post_accumulate_grad_hooks for p in session.model.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_validation_batches_that_nobody_would_read_are_refused():
    with pytest.raises(ConfigError, match="leave them out"):
        attach(tiny_llama(), "lora", validation=BATCHES)


class DistributedDataParallel(torch.nn.Module):
    """Stands for torch's, which wants a process group."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled(module: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, torch.nn.DataParallel, DistributedDataParallel])
@pytest.mark.parametrize("methods", ["lora", "rora", "gora"])
def test_a_wrapped_model_is_refused_because_its_adapter_would_load_as_nothing(wrap: Callable, methods: str):
    with pytest.raises(ModelError, match="attach before wrapping or compiling"):
        attach(wrap(tiny_llama()), methods, r=2, calibration=BATCHES)
    with pytest.raises(ModelError, match="attach before wrapping or compiling"):
        plan(wrap(tiny_llama()), methods, r=2, calibration=BATCHES)
    with pytest.raises(ModelError, match="attach before wrapping or compiling"):
        attach(wrap(tiny_llama()), methods, plan=plan(tiny_llama(), "lora", r=2), calibration=BATCHES)


def test_a_part_of_the_model_that_is_compiled_is_named():
    model = tiny_llama()
    model.model.layers[1] = compiled(model.model.layers[1])
    with pytest.raises(ModelError, match=r"'model\.layers\.1' is wrapped in OptimizedModule.*_orig_mod"):
        attach(model, "lora", r=2)


def test_a_method_that_is_its_scaling_takes_no_plan_with_another():
    made = plan(tiny_llama(), "lora", r=4)
    with pytest.raises(PlanError, match=r'is "alpha/rank" \(made by lora\) and rora scales by "alpha/sqrt\(rank\)"'):
        attach(tiny_llama(), "rora", plan=made)
    session = attach(tiny_llama(), "rora", plan=replace(made, scaling_rule=ScalingRule.ALPHA_OVER_SQRT_RANK))
    assert {layer.scaling for layer in session.layers.values()} == {8.0}


def with_an_unused_layer() -> torch.nn.Module:
    model = tiny_llama()
    model.model.spare = torch.nn.Linear(16, 16)
    return model


def test_a_layer_without_gradient_is_an_error_that_the_user_can_allow(tmp_path: Path):
    source = Calibration(batches=BATCHES, cache=tmp_path / "statistics.safetensors")
    with pytest.raises(CalibrationError, match="on_unused='min'"):
        attach(with_an_unused_layer(), GoRA(), r=4, calibration=source)
    session = attach(with_an_unused_layer(), GoRA(), r=4, calibration=replace(source, on_unused="min"))
    assert session.plan["model.spare"].rank == 2  # r_min
    assert not session.layers["model.spare"].lora_B.detach().any()
    with pytest.raises(CalibrationError, match="another settings"):
        attach(with_an_unused_layer(), GoRA(), r=4, calibration=source)


def test_gradients_that_are_all_zero_are_an_error_that_the_user_can_allow():
    def still(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        return model(**batch).loss * 0.0, 1.0

    with pytest.raises(CalibrationError, match="every gradient is zero"):
        attach(tiny_llama(), GoRA(), r=4, calibration=BATCHES, loss=still)
    session = attach(tiny_llama(), GoRA(), r=4, calibration=Calibration(batches=BATCHES, on_zero="uniform"), loss=still)
    assert len({layer.importance for layer in session.plan.layers}) == 1
    assert any("equal shares" in note for note in session.plan.notes)
    assert not any(bool(layer.lora_B.detach().any()) for layer in session.layers.values())


def test_what_calibration_may_allow_is_checked():
    with pytest.raises(ConfigError, match=r"calibration\.on_unused is 'max': allowed are error and min"):
        Calibration(batches=[], on_unused="max")


@pytest.mark.parametrize("rank_mode", ["paper", "official"])
def test_a_published_rule_that_overspends_is_told_against_the_uniform_budget(rank_mode: str, tmp_path: Path):
    made = plan(tiny_llama(), GoRA(rank_mode=rank_mode, r_min=4), r=4, calibration=BATCHES)
    assert made.budget == uniform_budget([layer.shape for layer in made.layers], 4) < made.parameters
    assert made.over_budget == made.parameters / made.budget - 1
    assert f"over budget by {made.over_budget:.1%}" in str(made)
    assert any(f"warning: over budget by {made.over_budget:.1%}" in note for note in made.notes)
    made.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == made


def test_the_exact_rule_may_not_overspend_by_hand_either(tmp_path: Path):
    made = plan(tiny_llama(), GoRA(), r=4, calibration=BATCHES)
    assert made.over_budget == 0
    assert not made.overspend_allowed
    with pytest.raises(PlanError, match=r"above .budget."):
        made.with_ranks(dict.fromkeys(made.ranks, 6))


@pytest.mark.parametrize("methods", ["lora", "gora"])
def test_nan_outside_the_targets_is_refused_too(methods: str):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"model\.norm\.weight \(1 of 32 values\)"):
        attach(model, methods, calibration=BATCHES, target_modules=["q_proj"])


def test_a_sampled_importance_is_told_with_its_error():
    sampled = plan(tiny_llama(), GoRA(), r=4, calibration=Calibration(batches=BATCHES, memory="sampled"))
    assert all(re.search(r"; sampled, \N{PLUS-MINUS SIGN} \d+\.\d%$", layer.reason) for layer in sampled.layers)
    exact = plan(tiny_llama(), GoRA(), r=4, calibration=BATCHES)
    assert not any("sampled" in layer.reason for layer in exact.layers)


def test_calibration_without_the_dropout_of_training_is_a_note():
    batches = [classification_batch(seed) for seed in range(2)]
    model = tiny_bert_classifier()
    model.bert.embeddings.dropout.p = 0.1
    quiet = attach(model, GoRA(), r=2, calibration=batches, target_modules=["query"], task_type="SEQ_CLS")
    assert any("without the base model's dropout" in note for note in quiet.notes)
    model = tiny_bert_classifier()
    source = Calibration(batches=batches, train_mode=True)
    same = attach(model, GoRA(), r=2, calibration=source, target_modules=["query"], task_type="SEQ_CLS")
    assert not any("dropout" in note for note in same.notes)


def test_skipped_calibration_batches_are_a_note():
    count = iter(range(100))

    def sometimes(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        return model(**batch).loss * (float("nan") if next(count) == 3 else 1.0), 1.0

    many = [causal_batch(seed) for seed in range(12)]
    session = attach(tiny_llama(), GoRA(), r=2, calibration=many, target_modules=["q_proj"], loss=sometimes)
    assert any("skipped 1 of 12 batches" in note for note in session.notes)
