"""Bad input is one clear message before anything is written."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.errors import (
    BudgetError,
    ConfigError,
    DataError,
    ModelError,
    PlanError,
    RankwiseError,
    RecipeError,
    TargetError,
)
from rankwise.workflows.plan import plan
from rankwise.workflows.quiet import quiet_libraries
from rankwise.workflows.train import train
from tests.workflows.conftest import MakeConfig, colored, make_model, make_tokenizer, write_rows


def refused(make: MakeConfig, error: type[RankwiseError], message: str, **changes: Any) -> None:
    """The run is refused with exit code 2, and its folder is never made."""
    plan_file = changes.pop("plan_file", None)
    config = make(**changes)
    with pytest.raises(error, match=message) as caught:
        train(config, plan_file=plan_file)
    assert caught.value.exit_code == 2
    assert not config.folder.exists()


def test_a_model_path_that_does_not_exist(classification: MakeConfig, tmp_path: Path) -> None:
    refused(classification, ModelError, "does not exist; give a local folder or a hub id", model=str(tmp_path / "no"))


def test_a_folder_that_holds_no_model(classification: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(classification, ModelError, "holds no config.json", model=str(tmp_path / "empty"))


def test_a_relative_path_that_reads_as_a_hub_id(classification: MakeConfig) -> None:
    message = "model: models/tiny-llama is no folder here, and the hub gave no model of that name"
    refused(classification, ModelError, message, model="models/tiny-llama")


@pytest.mark.parametrize("name", ["./tiny", "../models/tiny", "models/a/tiny", "models/tiny/", "~/no-model", "a b"])
def test_a_name_that_is_no_hub_id_does_not_reach_the_hub(
    classification: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def asked(*args: Any, **options: Any) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", asked)
    refused(classification, ModelError, f"model: {name} does not exist; give a local folder", model=name)


def test_the_hubs_retries_are_not_logged_while_the_libraries_are_quiet() -> None:
    client = logging.getLogger("huggingface_hub.utils._http")
    before = client.getEffectiveLevel()
    with quiet_libraries():
        assert not client.isEnabledFor(logging.WARNING)
    assert client.getEffectiveLevel() == before


def test_a_data_path_that_does_not_exist(classification: MakeConfig) -> None:
    refused(classification, DataError, "data.train: none.jsonl does not exist", data={"train": "none.jsonl"})


def test_empty_data(classification: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    refused(classification, DataError, "is empty", data={"train": str(tmp_path / "empty.jsonl")})


def test_missing_columns(classification: MakeConfig, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"body": "a"}])
    refused(classification, DataError, "it has body", data={"train": path})


@pytest.mark.parametrize("packing", [False, True])
def test_labels_that_are_all_masked(causal: MakeConfig, tmp_path: Path, packing: bool) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1 w2 w3 w4 w5", "completion": " red"}] * 8)
    data = {"train": path, "validation": None, "max_length": 4, "packing": packing}
    refused(causal, DataError, "data.train: every label of the 8 rows is masked", data=data)


@pytest.mark.parametrize("packing", [False, True])
def test_text_rows_of_one_token_each_have_nothing_to_predict(causal: MakeConfig, packing: bool) -> None:
    data = {"max_length": 1, "validation": None, "packing": packing}
    message = "data.train: every label of the 48 rows is masked"
    refused(causal, DataError, message, method="lora", gora={}, data=data)


def test_conversations_without_a_chat_template(causal: MakeConfig, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "w1"}]}] * 4)
    refused(causal, DataError, "has no chat template; set data.chat_template_path", data={"train": path})


def test_rows_that_trl_cannot_format(causal: MakeConfig, tmp_path: Path) -> None:
    data = {"assistant_only_loss": True}
    refused(causal, DataError, "TRL cannot prepare the rows", data=data)


def test_a_target_pattern_that_matches_nothing(classification: MakeConfig) -> None:
    refused(classification, TargetError, "quary", target_modules=["quary"])


def test_an_explicit_rank_above_a_layers_size(classification: MakeConfig) -> None:
    refused(classification, BudgetError, "r: 64 is above the size of layer", method="lora", r=64, gora={})


def test_a_budget_below_one_rank_a_layer(classification: MakeConfig) -> None:
    refused(classification, BudgetError, "r_min|budget", r=1, gora={"r_min": 2, "r_max": 4})


def test_beamlora_at_rank_one_in_a_run_without_a_reset_or_with_an_optimizer_it_cannot_edit(
    classification: MakeConfig,
) -> None:
    message = "r: 1: beamlora's score of a single rank is always 1"
    refused(classification, ConfigError, message, method="beamlora", r=1)
    message = "beamlora.reset_every: 2: .*a run of 3 steps has none; train for 4 steps or more"
    refused(classification, ConfigError, message, method="beamlora", training={"max_steps": 3})
    message = "training.optim: adafactor: beamlora copies and empties the moments of single ranks"
    refused(classification, RecipeError, message, method="beamlora", training={"optim": "adafactor"})


def test_beamlora_with_an_edited_plan_of_uneven_ranks(classification: MakeConfig, tmp_path: Path) -> None:
    made = plan(classification(method="beamlora"))
    first = next(iter(made.ranks))
    made.with_ranks(made.ranks | {first: 1}).save(tmp_path / "plan.json")
    message = f"one rank everywhere, and {first} has 1 and .* 2: give every layer the same rank"
    refused(classification, ConfigError, message, method="beamlora", plan_file=tmp_path / "plan.json")


def test_a_plan_file_for_another_model(classification: MakeConfig, causal: MakeConfig, tmp_path: Path) -> None:
    plan(causal(method="lora")).save(tmp_path / "plan.json")
    refused(classification, PlanError, "plan", plan_file=tmp_path / "plan.json")


def test_a_damaged_plan_file(classification: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"format": "rankwise-plan"')
    refused(classification, PlanError, "plan.json", plan_file=tmp_path / "plan.json")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    make_model("bert", folder)
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize("key", ["embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight"])
def test_nan_in_the_base_weights(classification: MakeConfig, damaged: Path, key: str) -> None:
    weights = load_file(damaged / "model.safetensors")
    weights[key][3, 5] = float("nan")
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    refused(classification, ModelError, f"1 weights of .* hold NaN or infinite values: bert.{key}", model=str(damaged))


@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, 0.999])
def test_a_truncated_safetensors_file(classification: MakeConfig, damaged: Path, kept: float) -> None:
    path = damaged / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    refused(classification, ModelError, r"model.safetensors is corrupt or cut off", model=str(damaged))


def test_a_model_that_lacks_weights(classification: MakeConfig, damaged: Path) -> None:
    weights = load_file(damaged / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    refused(classification, ModelError, "lack 1 weights of BertForSequenceClassification", model=str(damaged))


def test_rows_longer_than_the_model_can_read_are_an_error_only_when_asked_for(
    classification: MakeConfig, tmp_path: Path
) -> None:
    message = "data.max_length: 512 is more than the 64 positions"
    refused(classification, ConfigError, message, data={"max_length": 512})
    rows = [{"text": "w1 " * 100 + row["text"], "label": row["label"]} for row in colored(16)]
    path = write_rows(tmp_path / "long.jsonl", rows)
    config = classification(method="lora", training={"max_steps": 2})
    data = config.data.model_dump(exclude={"max_length"}) | {"train": path, "test": None}
    config = type(config).model_validate(config.to_dict() | {"data": data})
    notes: list[str] = []
    train(config, lambda event: notes.append(getattr(event, "text", "")))
    assert "rows are read up to the model's 64 positions" in notes
    assert "train: 16 of 16 rows (100.0%) cut at 64 tokens" in notes


def test_an_argument_that_the_library_refuses(classification: MakeConfig) -> None:
    refused(classification, ConfigError, "training: ", training={"save_strategy": "best"})


def test_ranks_scored_on_validation_rows_that_are_not_there(classification: MakeConfig) -> None:
    message = "data.validation: ab-lora scores ranks on validation rows, and the run has none"
    refused(classification, ConfigError, message, method="ab-lora")


def test_a_run_that_is_all_warm_up(classification: MakeConfig) -> None:
    message = "training.warmup_steps: 0.03 makes 1 warm-up steps of the run's 1"
    refused(classification, ConfigError, message, method="lora", training={"max_steps": 1})


def test_the_library_state_is_put_back_after_a_refusal(classification: MakeConfig) -> None:
    from transformers.utils import logging as library

    before = (library.get_verbosity(), library.is_progress_bar_enabled(), torch.get_rng_state())
    refused(classification, TargetError, "quary", target_modules=["quary"], method="lora")
    assert before[:2] == (library.get_verbosity(), library.is_progress_bar_enabled())
    assert torch.equal(before[2], torch.get_rng_state())
