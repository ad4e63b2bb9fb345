"""The optimizer factory builds what Trainer would build, and refuses what would not train."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from rankwise.errors import ConfigError
from rankwise.methods.lora_rite import LoRARITEOptimizer
from rankwise.training.attach import attach
from rankwise.training.optimizers import adamw_and_scheduler, parameter_groups
from tests.support.models import tiny_bert_classifier, tiny_llama
from tests.training.stand_ins import Descending, Descent


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


def args_of(**options: object) -> SimpleNamespace:
    return SimpleNamespace(**{"learning_rate": 1e-2, "lr_scheduler_type": "constant", **options})


def test_a_recipes_own_optimizer_gets_pairs_with_their_scalings_and_everything_else_as_plain_groups():
    session = attach(
        tiny_bert_classifier(),
        Descending(),
        r=2,
        lora_alpha=6,
        modules_to_save=["classifier"],
        target_modules=["query"],
    )
    frozen = next(iter(session.layers.values()))
    frozen.lora_B.requires_grad_(False)  # a half that is frozen leaves a pair
    optimizer, _ = session.optimizers(args_of(weight_decay=0.1, adam_epsilon=1e-7), 5)
    pairs, *plain = optimizer.param_groups
    assert type(optimizer) is Descent
    assert pairs["kind"] == "lora_pair"
    assert pairs["names"] == list(session.layers)
    assert pairs["scaling"] == [3.0] * len(session.layers)
    assert pairs["weight_decay"] == 0.1
    assert {"betas", "eps"} & pairs.keys() == set(), "the method has its own"
    wanted = [factor for layer in session.layers.values() for factor in (layer.lora_A, layer.lora_B)]
    assert all(one is other for one, other in zip(pairs["params"], wanted, strict=True))
    assert [(group["kind"], group["name"], group["weight_decay"]) for group in plain] == [
        ("plain", "modules_to_save", 0.1),
        ("plain", "modules_to_save, no decay", 0.0),
    ]
    assert {(group["betas"], group["eps"]) for group in plain} == {((0.9, 0.999), 1e-7)}


def test_a_pair_that_is_frozen_whole_is_left_out_and_a_frozen_adapter_is_refused():
    session = attach(tiny_llama(), Descending(), r=2, target_modules=["q_proj"])
    first, *others = session.layers.values()
    first.lora_A.requires_grad_(False), first.lora_B.requires_grad_(False)
    optimizer, _ = session.optimizers(args_of(), 5)
    assert optimizer.param_groups[0]["names"] == [layer.name for layer in others]
    session.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable pair"):
        session.optimizers(args_of(), 5)


def test_one_schedule_moves_the_rates_of_all_groups():
    session = attach(
        tiny_bert_classifier(), Descending(), r=2, modules_to_save=["classifier"], target_modules=["query"]
    )
    optimizer, schedule = session.optimizers(args_of(lr_scheduler_type="linear", warmup_steps=2), 4)
    for rate in (0.0, 5e-3, 1e-2, 5e-3):
        assert {group["lr"] for group in optimizer.param_groups} == {rate}
        optimizer.step(), schedule.step()
    assert len(schedule.lr_lambdas) == len(optimizer.param_groups) == 3


def test_adamw_settings_that_the_pairs_do_not_follow_are_told_or_refused():
    changed = args_of(adam_beta1=0.8, adam_beta2=0.99)
    session = attach(tiny_llama(), Descending(), r=2, target_modules=["q_proj"])
    with pytest.raises(
        ConfigError, match=r"adam_beta1 is 0\.8, and descending moves the pairs by its own descending\.beta1"
    ):
        session.optimizers(changed, 5)
    session.optimizers(args_of(adam_beta2=0.99), 5)  # it has none of its own: the pairs follow
    assert session.notes == ()
    session = attach(
        tiny_bert_classifier(), Descending(), r=2, modules_to_save=["classifier"], target_modules=["query"]
    )
    with pytest.warns(UserWarning, match="it holds for modules_to_save alone"):
        optimizer, _ = session.optimizers(changed, 5)
    assert optimizer.param_groups[1]["betas"] == (0.8, 0.99)
    assert len(session.notes) == 1


def test_another_name_than_adamw_beside_an_own_optimizer_is_refused():
    session = attach(tiny_llama(), Descending(), r=2, target_modules=["q_proj"])
    with pytest.raises(
        ConfigError, match=r"optim is 'adafactor': .*descending's own optimizer; leave optim at adamw_torch"
    ):
        session.optimizers(args_of(optim="adafactor"), 5)


def test_a_state_that_does_not_fit_is_refused_with_the_figures_and_one_that_fits_is_noted():
    session = attach(tiny_llama(), Descending(needed=10**15), r=2, target_modules=["q_proj"])
    with pytest.raises(
        ConfigError,
        match=r"state takes 2,000,000\.0 GB for 2 layers, and .* GB are free on cpu: set descending\.needed: 0",
    ):
        session.optimizers(args_of(), 5)
    session = attach(tiny_llama(), Descending(needed=10**6), r=2, target_modules=["q_proj"])
    session.optimizers(args_of(), 5)
    assert session.notes == ("descending keeps 2 MB of optimizer state",)


def test_two_rates_for_the_factors_are_refused():
    for methods in ("lora", Descending()):
        with pytest.raises(ConfigError, match="loraplus_lr_ratio is 16: both factors of a layer train at one rate"):
            attach(tiny_llama(), methods, r=2).optimizers(args_of(loraplus_lr_ratio=16), 5)
    with pytest.raises(ConfigError, match="loraplus_lr_ratio: 16: lora-rite moves lora_A and lora_B by one rate"):
        attach(tiny_llama(), "lora-rite", r=2).optimizers(args_of(loraplus_lr_ratio=16), 5)


@pytest.mark.parametrize(
    ("options", "engine"),
    [
        ({"fsdp": "full_shard"}, "FSDP"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "DeepSpeed ZeRO-2"),
        ({"deepspeed": "zero.json"}, "DeepSpeed ZeRO-3"),
    ],
)
def test_an_engine_that_takes_the_pairs_apart_is_refused_before_the_first_step(options: dict[str, object], engine: str):
    session = attach(tiny_llama(), "lora-rite", r=2)
    with pytest.raises(ConfigError, match=rf"lora-rite cannot train under {engine}.*\(DDP\)"):
        session.optimizers(args_of(**options), 5)
    attach(tiny_llama(), "lora", r=2).optimizers(args_of(**options), 5)


def test_the_engine_that_accelerate_runs_is_refused_at_the_beginning(monkeypatch: pytest.MonkeyPatch):
    accelerator = Accelerator(cpu=True)
    session = attach(tiny_llama(), "lora-rite", r=2, target_modules=["q_proj"])
    optimizer = accelerator.prepare(session.optimizers(args_of(), 5)[0])
    for kind, engine in ((DistributedType.FSDP, "FSDP"), (DistributedType.DEEPSPEED, "DeepSpeed ZeRO-3")):
        monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", kind)
        with pytest.raises(ConfigError, match=f"lora-rite cannot train under {engine}"):
            session.begin(optimizer, 5)
    monkeypatch.undo()
    session.begin(optimizer, 5)
    session.close()


def test_the_trainers_own_optimizer_in_place_of_the_recipes_is_refused():
    session = attach(tiny_llama(), "lora-rite", r=2, target_modules=["q_proj"])
    factors = [parameter for parameter in session.model.parameters() if parameter.requires_grad]
    with pytest.raises(
        ConfigError, match=r"the recipe's optimizer is lora-rite, but the trainer runs AdamW: .*session\.optimizers"
    ):
        session.begin(torch.optim.AdamW(factors, lr=1e-3), 5)
    session.begin(LoRARITEOptimizer(session.model, lr=1e-3), 5)  # one's own, of the right kind
    session.close()


def test_what_is_no_torch_optimizer_is_refused():
    session = attach(tiny_llama(), "lora", r=2)
    with pytest.raises(ConfigError, match="SimpleNamespace is not a torch optimizer"):
        session.begin(SimpleNamespace(), 5)
