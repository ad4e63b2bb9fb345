"""What `rankwise plan` says a run will cost, held against the run's own numbers."""

from pathlib import Path

from rankwise.workflows.cost import RunCost, _storage_bytes
from rankwise.workflows.events import CostReady, Event
from rankwise.workflows.plan import plan
from tests.workflows.conftest import MakeConfig


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


def test_a_larger_batch_keeps_more_for_the_backward_pass(classification: MakeConfig) -> None:
    small = told(classification(method="lora", training={"max_steps": 1, "per_device_train_batch_size": 2}))
    large = told(classification(method="lora", training={"max_steps": 1, "per_device_train_batch_size": 8}))
    assert large.activation_bytes > 2 * small.activation_bytes
    assert large.model_bytes == small.model_bytes


def test_tied_weights_count_once() -> None:
    import torch

    weight = torch.zeros(10)
    assert sum(_storage_bytes([weight, weight.view(2, 5)]).values()) == 40
