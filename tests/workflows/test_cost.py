"""What `rankwise plan` says a run will cost, held against the run's own numbers."""

from pathlib import Path

import pytest

from rankwise.errors import ConfigError
from rankwise.workflows.cost import RunCost, _storage_bytes
from rankwise.workflows.events import CostReady, Event, Note
from rankwise.workflows.plan import plan
from rankwise.workflows.train import train
from tests.workflows.conftest import MakeConfig

HEAD = (32 * 2 + 2) + (32 * 32 + 32)
"""Parameters of the new classifier and pooler, which are trained in full."""


def told(config: object) -> RunCost:
    events: list[Event] = []
    plan(config, events.append)  # type: ignore[arg-type]
    found = [event.cost for event in events if isinstance(event, CostReady)]
    assert len(found) == 1
    fields = {name: found[0][name] for name in RunCost.__dataclass_fields__}
    cost = RunCost(**fields)  # type: ignore[arg-type]
    assert cost.to_dict() == found[0]
    return cost


def test_a_plans_cost_counts_what_is_trained_and_every_step(classification: MakeConfig, tmp_path: Path) -> None:
    cost = told(
        classification(
            method="lora", training={"max_steps": 7, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 4}
        )
    )
    assert (cost.steps, cost.micro_batches) == (7, 3)
    assert cost.gradient_bytes == 4 * cost.trained_parameters
    assert cost.optimizer_bytes == 8 * cost.trained_parameters
    assert cost.model_bytes > 4 * cost.trained_parameters
    assert cost.activation_bytes > 0
    assert cost.seconds > 0
    assert not list(tmp_path.glob("**/rankwise.json"))


def test_plain_lora_is_its_own_measure(classification: MakeConfig) -> None:
    for method in ("lora", "gora"):
        cost = told(classification(method=method, training={"max_steps": 2}))
        assert cost.overhead == 1
        assert cost.plain_micro_batch_seconds == cost.micro_batch_seconds


def test_a_recipe_is_measured_with_what_it_brings_and_beside_plain_lora(classification: MakeConfig) -> None:
    training = {"max_steps": 2, "gradient_accumulation_steps": 2}
    plain = told(classification(method="lora", training=training))
    start = told(classification(method="lora-ga", training=training))
    assert start.overhead != 1
    whole = 2 * start.plain_micro_batch_seconds + start.plain_optimizer_seconds
    assert start.overhead == pytest.approx((2 * start.micro_batch_seconds + start.optimizer_seconds) / whole)
    offsets = 4 * (plain.trained_parameters - HEAD)
    assert start.model_bytes == plain.model_bytes + offsets, "a copy of every factor stands beside the adapter"
    assert start.optimizer_bytes == plain.optimizer_bytes
    moved = told(classification(method="lora-rite", training=training))
    assert moved.overhead != 1
    assert moved.model_bytes == plain.model_bytes
    # Two moments for the head, one moment and small squares for the pairs.
    assert 4 * plain.trained_parameters < moved.optimizer_bytes < 1.25 * plain.optimizer_bytes


def test_a_start_that_the_base_holds_costs_a_step_nothing(classification: MakeConfig) -> None:
    cost = told(classification(method="lora-ga", **{"lora-ga": {"offset": "base"}}, training={"max_steps": 2}))
    assert cost.overhead == 1


def test_a_full_state_is_told_before_it_is_made_and_refused_where_it_does_not_fit(
    classification: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = classification(method="lora-pro", **{"lora-pro": {"mode": "full"}}, training={"max_steps": 2})
    events: list[Event] = []
    made = plan(config, events.append)
    dense = sum(2 * 4 * layer.out_features * layer.in_features for layer in made.layers)
    (cost,) = [event.cost for event in events if isinstance(event, CostReady)]
    note = events.index(Note(text=f"lora-pro keeps {dense / 1e6:.3g} MB of optimizer state"))
    assert note < events.index(CostReady(cost=cost))
    # Moments of the layers, AdamW's two of the head, and a few step counts.
    assert dense + 8 * HEAD <= cost["optimizer_bytes"] <= 1.05 * (dense + 8 * HEAD)
    monkeypatch.setattr("rankwise.training.optimizers.free_memory", lambda device: 1000)
    refusal = r"lora-pro's optimizer state takes .* GB are free on cpu: set lora-pro\.mode: efficient"
    for job in (plan, train):
        with pytest.raises(ConfigError, match=refusal):
            job(config)
    assert not config.folder.exists()


def test_a_larger_batch_keeps_more_for_the_backward_pass(classification: MakeConfig) -> None:
    small = told(classification(method="lora", training={"max_steps": 1, "per_device_train_batch_size": 2}))
    large = told(classification(method="lora", training={"max_steps": 1, "per_device_train_batch_size": 8}))
    assert large.activation_bytes > 2 * small.activation_bytes
    assert large.model_bytes == small.model_bytes


def test_tied_weights_count_once() -> None:
    import torch

    weight = torch.zeros(10)
    assert sum(_storage_bytes([weight, weight.view(2, 5)]).values()) == 40


def test_the_memory_of_a_schedule_and_of_a_base_kept_to_go_back_to_is_counted(classification: MakeConfig) -> None:
    training = {"max_steps": 2}
    plain = told(classification(method="lora", training=training))
    assert (plain.schedule_bytes, plain.base_copy_bytes) == (0, 0)
    pairs = 4 * (plain.trained_parameters - HEAD)
    noise = told(classification(method="ggpo", training=training))
    assert noise.schedule_bytes > 128 * 2**20, "W + E is kept on a CPU as far as 128 MiB go"
    assert noise.memory_bytes - noise.schedule_bytes == (
        noise.model_bytes + noise.gradient_bytes + noise.optimizer_bytes + noise.activation_bytes
    )
    read = told(classification(method="mgpo", training=training))
    own = told(classification(method=["lora-rite", "mgpo"], training=training))
    assert read.schedule_bytes >= 2 * pairs, "the two factors of the term have twice the rank"
    assert own.schedule_bytes == read.schedule_bytes + pairs, "a momentum of every factor"
    gated = told(classification(method="sora", training=training))
    assert gated.schedule_bytes == 4 * 4 * 12 * 2, "gates with gradient and moments: 12 layers of rank 2"
    scored = told(classification(method="beamlora", training={"max_steps": 4}))
    past = scored.schedule_bytes - gated.schedule_bytes  # scores take what gates take
    assert past == 3 * pairs, "factors and both their moments, half a period old"
    grown = told(classification(method="xgblora", xgblora={"rounds": 2, "layers_fraction": 1.0}, training=training))
    assert grown.schedule_bytes == 2 * 4 * (grown.trained_parameters - HEAD), "room for two boosters of every layer"
    merging = {"rounds": 2, "layers_fraction": 1.0, "accumulate": "merge"}
    merged = told(classification(method="xgblora", xgblora=merging, training=training))
    assert merged.schedule_bytes == grown.schedule_bytes
    assert merged.model_bytes == grown.model_bytes
    moved = told(classification(method="lora-ga", **{"lora-ga": {"offset": "base"}}, training=training))
    # Two blocks: query, key, value and output of 32 x 32, and two of 32 x 64.
    assert moved.base_copy_bytes == 4 * 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert moved.model_bytes == plain.model_bytes
    assert merged.base_copy_bytes == moved.base_copy_bytes
