"""The optimizer factory builds what Trainer would build, and refuses what would not train."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from rankwise.errors import ConfigError
from rankwise.training.attach import attach
from rankwise.training.optimizers import adamw_and_scheduler, parameter_groups
from tests.support.models import tiny_bert_classifier, tiny_llama


def arguments(folder: Path, **options: object) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], **options)


def test_groups_decay_as_trainers_do_and_modules_to_save_stand_apart():
    model = attach(tiny_bert_classifier(), "lora", r=2, modules_to_save=["classifier"], target_modules=["query"]).model
    groups = {group["name"]: group for group in parameter_groups(model, 0.1)}
    assert list(groups) == ["adapter", "modules_to_save", "modules_to_save, no decay"]
    assert groups["adapter"]["weight_decay"] == groups["modules_to_save"]["weight_decay"] == 0.1
    assert groups["modules_to_save, no decay"]["weight_decay"] == 0.0
    assert [tuple(p.shape) for p in groups["modules_to_save, no decay"]["params"]] == [(3,)]
    decaying = Trainer.get_decay_parameter_names(None, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups.values():
        assert {names[id(p)] in decaying for p in group["params"]} == {group["weight_decay"] > 0}
    held = {id(p) for group in groups.values() for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_optimizer_and_schedule_equal_trainers_own(tmp_path: Path):
    args = arguments(
        tmp_path,
        learning_rate=3e-3,
        weight_decay=0.02,
        adam_beta1=0.8,
        adam_epsilon=1e-7,
        lr_scheduler_type="cosine",
        warmup_steps=0.2,
    )
    session = attach(tiny_llama(), "lora", r=2)
    ours, schedule = session.optimizers(args, 20)
    trainer = Trainer(session.model, args)
    trainer.create_optimizer_and_scheduler(20)
    theirs = trainer.optimizer
    assert type(ours) is type(theirs)
    assert {k: ours.defaults[k] for k in ("lr", "betas", "eps")} == {
        k: theirs.defaults[k] for k in ("lr", "betas", "eps")
    }
    assert ours.param_groups[0]["weight_decay"] == theirs.param_groups[0]["weight_decay"] == 0.02
    for _ in range(20):
        assert schedule.get_last_lr() == trainer.lr_scheduler.get_last_lr()[:1]
        ours.step(), theirs.step(), schedule.step(), trainer.lr_scheduler.step()


@settings(max_examples=20, deadline=None)
@given(warmup=st.one_of(st.floats(0, 0.99), st.integers(0, 30)), steps=st.integers(1, 40))
def test_warmup_follows_trainers_rule(tmp_path_factory: pytest.TempPathFactory, warmup: float, steps: int):
    args = arguments(tmp_path_factory.getbasetemp(), learning_rate=1.0, warmup_steps=warmup)
    model = torch.nn.Linear(2, 2)
    _, schedule = adamw_and_scheduler(model, args, steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step(), schedule.step()
    wanted = args.get_warmup_steps(steps)
    assert rates[0] == (0.0 if wanted else 1.0)
    assert max(rates) <= 1.0


def test_any_object_with_a_learning_rate_serves():
    optimizer, schedule = adamw_and_scheduler(torch.nn.Linear(2, 2), SimpleNamespace(learning_rate=0.5), 4)
    assert optimizer.defaults["weight_decay"] == 0.01  # torch's default; the groups' own value counts
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    assert schedule.get_last_lr() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("args", "steps", "faults"),
    [
        ({"learning_rate": 0.0}, 5, ["learning_rate is 0.0"]),
        ({}, 0, ["learning_rate is None", "num_training_steps is 0"]),
        ({"learning_rate": float("nan"), "weight_decay": -1}, 5, ["learning_rate is nan", "weight_decay is -1"]),
        ({"learning_rate": 1e-3, "optim": "adafactor"}, 5, ["optim is 'adafactor'"]),
    ],
)
def test_what_would_not_train_is_refused_all_faults_at_once(args: dict[str, object], steps: int, faults: list[str]):
    with pytest.raises(ConfigError) as caught:
        adamw_and_scheduler(torch.nn.Linear(2, 2), SimpleNamespace(**args), steps)
    assert len(caught.value.faults) == len(faults)
    assert all(fault.startswith(wanted) for fault, wanted in zip(caught.value.faults, faults, strict=True))


def test_a_model_without_anything_to_train_is_refused():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        parameter_groups(torch.nn.Linear(2, 2).requires_grad_(False), 0.0)
