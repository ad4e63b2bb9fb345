"""The whole job on tiny models: a run leaves one verified adapter, says everything about itself, and can go on."""

import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rankwise.errors import CheckpointError, ConfigError, HealthError, OutputError, TrainingInterrupted
from rankwise.methods.ab_lora import ABLoRASchedule
from rankwise.ranks.plan import RankPlan
from rankwise.workflows.config import RunConfig
from rankwise.workflows.events import CostReady, Event, Metrics, Note, PhaseProgress, PhaseStarted, PlanReady, Result
from rankwise.workflows.plan import plan
from rankwise.workflows.quiet import log_as_notes
from rankwise.workflows.train import _Run, train
from rankwise.workflows.trainer import _precision_kept
from tests.workflows.conftest import CHAT_TEMPLATE, MakeConfig, colored, write_rows

FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "calibration.safetensors", "checkpoint-4",
    "checkpoint-6", "health.json", "metrics.jsonl", "plan.json", "ranks.jsonl", "rankwise.json", "report.html",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


class Killed(BaseException):
    """Stands in for a kill: nothing is cleaned up by whoever sees only ordinary errors."""


def killing_at(step: int) -> Callable[[Event], None]:
    def listener(event: Event) -> None:
        if isinstance(event, PhaseProgress) and event.phase == "training" and event.done == step:
            raise Killed

    return listener


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_equal_adapters(first: Path, second: Path) -> None:
    one, two = adapter(first), adapter(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_classification_run_leaves_a_folder_that_says_everything(classification: MakeConfig, bert: Path) -> None:
    config = classification()
    events: list[Event] = []
    result = train(config, events.append)
    folder = result.folder
    assert {path.name for path in folder.iterdir()} == FILES
    manifest = json.loads((folder / "rankwise.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["config"] == config.to_dict()
    assert manifest["config_hash"] == config.hash()
    assert manifest["label_names"] == ["blue", "red"]
    assert manifest["data"]["train"]["rows"] == 48
    assert manifest["data"]["train"]["labels"] == 48
    assert manifest["budget"]["used"] <= manifest["budget"]["parameters"]
    assert manifest["calibration"]["batches"] == 2
    assert manifest["export"]["verification"]["logit_error"] < 1e-5
    assert manifest["result"] == dict(result.figures)
    assert set(manifest["timings"]) >= {"data", "model", "calibration", "training", "evaluation", "export", "report"}
    health = json.loads((folder / "health.json").read_text())
    assert health["status"] == "passed"
    assert {check["id"] for check in health["checks"]} >= {"labels", "targets", "movement", "update", "export"}
    written = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in written if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert written[-1]["test_accuracy"] == result.figures["test_accuracy"]
    assert [dict(event.values) for event in events if isinstance(event, Metrics)] == written
    assert RankPlan.load(folder / "plan.json") == result.plan
    assert [event.plan for event in events if isinstance(event, PlanReady)] == [result.plan]
    assert isinstance(events[-1], Result)
    card = (folder / "README.md").read_text()
    assert "| 1 | red |" in card
    assert "GoRA" in card
    assert str(bert) in card


def test_the_final_adapter_loads_in_stock_peft_and_computes_what_was_measured(
    classification: MakeConfig, bert: Path
) -> None:
    result = train(classification())
    with torch.random.fork_rng():
        base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    model = PeftModel.from_pretrained(base, result.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    rows = colored(12, start=100)
    tokens = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**tokens).logits.argmax(-1)
    right = [["blue", "red"][number] == row["label"] for number, row in zip(predicted.tolist(), rows, strict=True)]
    assert sum(right) / len(right) == result.figures["test_accuracy"]


def test_a_classification_learns_what_can_be_learned(classification: MakeConfig) -> None:
    training = {"max_steps": 60, "save_steps": 60, "lr_scheduler_type": "constant"}
    result = train(classification(training=training, r=4, lora_alpha=8.0, gora={"r_min": 1, "r_max": 8}))
    assert result.figures["test_accuracy"] == 1.0
    assert float(str(result.figures["majority_share"])) < 0.8


def test_a_causal_run_trains_on_every_form_of_rows(causal: MakeConfig, tmp_path: Path, llama: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    forms = {
        "prompts": ([{"prompt": "w1 w2", "completion": f" w{n % 5} red"} for n in range(24)], {}),
        "chats": (
            [
                {"messages": [{"role": "w1", "content": "w2 w3"}, {"role": "w4", "content": f"w{n % 5}"}]}
                for n in range(24)
            ],
            {"chat_template_path": str(template)},
        ),
    }
    for name, (rows, data) in forms.items():
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        result = train(
            causal(
                data={"train": path, "validation": None, **data},
                output_dir=str(tmp_path / name),
                method="rora",
                training={"max_steps": 2},
            )
        )
        base = AutoModelForCausalLM.from_pretrained(llama)
        assert PeftModel.from_pretrained(base, result.folder).peft_config["default"].r == 2


COMPOSED = (["gora", "lora-rite"], ["lora-ga", "lora-pro"], ["gora", "ggpo"], ["rora", "mgpo"])


@pytest.mark.parametrize("methods", COMPOSED, ids="+".join)
def test_compositions_train_and_leave_one_verified_plain_adapter(
    classification: MakeConfig, methods: list[str]
) -> None:
    config = classification(method=methods, training={"max_steps": 4, "learning_rate": 1e-3})
    result = train(config)
    manifest = json.loads((result.folder / "rankwise.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["config"]["training"]["max_grad_norm"] == (0.0 if "lora-rite" in methods else 1.0)
    assert manifest["export"]["verification"]["logit_error"] <= 1e-5
    health = {check["id"]: check["status"] for check in result.health["checks"]}
    assert health["update"] == "passed"
    assert health.get("schedule", "passed") == "passed"
    perturbs = "ggpo" in methods or "mgpo" in methods
    assert ("schedule" in health) is perturbs
    told = [line for line in lines(result.folder / "metrics.jsonl") if any(key.startswith(methods[1]) for key in line)]
    assert bool(told) is perturbs
    assert all("lora_A" in name or "lora_B" in name for name in adapter(result.folder) if "layer" in name)


def test_sora_drops_ranks_tells_each_change_and_leaves_a_plain_adapter(classification: MakeConfig) -> None:
    settings = {"threshold": [0.0, 1.0], "threshold_scale": "constant"}
    events: list[Event] = []
    config = classification(method="sora", sora=settings, training={"max_steps": 6, "learning_rate": 5e-2})
    result = train(config, events.append)
    changes = lines(result.folder / "ranks.jsonl")
    assert [line["kind"] for line in changes if "layer" not in line].count("stage") == 2
    dropped = {line["layer"]: line["to"] for line in changes if "layer" in line}
    assert dropped
    planned = RankPlan.load(result.folder / "plan.json").ranks
    assert all(rank < planned[name] for name, rank in dropped.items())
    manifest = json.loads((result.folder / "rankwise.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["export"]["verification"]["logit_error"] <= 1e-5
    assert (result.folder / "checkpoint-3").is_dir(), "a checkpoint at the end of the first stage"
    assert [event.text for event in events if isinstance(event, Note) and "2 stages" in event.text]
    assert all("lora_A" in name or "lora_B" in name for name in adapter(result.folder) if "layer" in name)


def test_ab_lora_moves_ranks_by_validation_rows_and_leaves_a_plain_adapter(classification: MakeConfig) -> None:
    training = {"max_steps": 12, "learning_rate": 5e-2}
    options = {"method": "ab-lora", "data": {"validation": 0.25}, "training": training}
    told: list[Event] = []
    plan(classification(**options), told.append)
    assert [
        event.text for event in told if isinstance(event, Note) and "4 rounds, after steps 2, 3, 4, 5" in event.text
    ]
    costs = [event.cost for event in told if isinstance(event, CostReady)]
    assert costs[0]["event_seconds"] > 0
    result = train(classification(**options))
    changes = lines(result.folder / "ranks.jsonl")
    rounds = [line for line in changes if "layer" not in line]
    assert [line["step"] for line in rounds] == [2, 3, 4, 5]
    ranks = dict(RankPlan.load(result.folder / "plan.json").ranks)
    for line in changes:
        if "layer" in line:
            assert len(line["detail"]["drop"]) == len(line["detail"]["solo"]) == line["from"] == ranks[line["layer"]]
            ranks[line["layer"]] = line["to"]
    manifest = json.loads((result.folder / "rankwise.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["export"]["verification"]["logit_error"] <= 1e-5
    assert set(ranks.values()) != {2}
    plain = train(classification(**options | {"method": "lora", "output_dir": str(result.folder) + "-plain"}))
    assert result.figures["trained_parameters"] == plain.figures["trained_parameters"], "empty slots are not counted"
    uniform = adapter(result.folder)
    assert {min(tensor.shape) for name, tensor in uniform.items() if "layer" in name} == {max(ranks.values())}


def test_ab_loras_rounds_that_are_prevented_end_the_run_with_exit_code_3(
    classification: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ABLoRASchedule, "_round", lambda self, step: None)
    monkeypatch.setattr(ABLoRASchedule, "after_step", lambda self, step: None)
    config = classification(method="ab-lora", data={"validation": 0.25}, training={"max_steps": 12})
    with pytest.raises(HealthError, match="ab-lora made 0 of its 4 rounds in 12 steps") as caught:
        train(config)
    assert caught.value.exit_code == 3


def test_xgblora_folds_its_rounds_tells_each_and_leaves_an_adapter_within_the_budget(
    classification: MakeConfig, bert: Path, tmp_path: Path
) -> None:
    settings = {"rounds": 4, "layers_fraction": 0.5}
    options: dict[str, Any] = {"method": "xgblora", "xgblora": settings, "r": 1}
    options["training"] = {"max_steps": 11, "save_steps": 2, "learning_rate": 2e-2}
    events: list[Event] = []
    result = train(classification(**options), events.append)
    changes = lines(result.folder / "ranks.jsonl")
    assert [(line["step"], line["kind"]) for line in changes if "layer" not in line] == [
        (0, "round"), (3, "fold"), (6, "fold"), (9, "fold"), (11, "fold"), (11, "export"),
    ]  # fmt: skip
    folded = {line["layer"]: line["to"] for line in changes if "layer" in line and line["kind"] != "export"}
    assert sum(folded.values()) == 4 * len(folded) / 2, "each round adds a rank in half of the layers"
    assert all(line["detail"]["booster_norm"] > 0 for line in changes if line["kind"] == "fold" and "detail" in line)
    logged = [line["xgblora_rank"] for line in lines(result.folder / "metrics.jsonl") if "xgblora_rank" in line]
    assert (logged[0], logged[-1]) == (0.0, 2.0)
    manifest = json.loads((result.folder / "rankwise.json").read_text())
    assert manifest["status"] == "finished"
    written, plan_ = manifest["export"], result.plan
    assert written["verification"]["update_error"] <= 1e-5
    lost = written["compression"]
    assert 0 < lost["total"] < 1
    (warned,) = [event.text for event in events if isinstance(event, Note) and event.level == "warning"]
    assert warned.startswith(f"the exported adapter leaves out {lost['total']:.3g} of the norm of what was trained")
    assert f"changes the logits by {written['logit_error']:.3g}; every other figure is of the trained model" in warned
    cut = {
        line["layer"]: (line["from"], line["to"]) for line in changes if "layer" in line and line["kind"] == "export"
    }
    assert all(folded[name] == before > after for name, (before, after) in cut.items())
    final = folded | {name: after for name, (_, after) in cut.items()}
    assert final == lost["ranks"]
    costs = {layer.name: layer.shape.cost for layer in plan_.layers}
    kept = unpadded_parameters(result.folder)
    assert kept == sum(rank * costs[name] for name, rank in final.items()) <= plan_.budget
    assert f"{kept:,} of {plan_.budget:,} parameters used" in (result.folder / "report.html").read_text()
    told = [event.text for event in events if isinstance(event, Note)]
    assert [text for text in told if text.startswith("xgblora: 4 rounds of 3 steps, the last of 2; each trains 1 of 2")]
    assert [text for text in told if text.startswith("step 3: round 1 of 4 ended")]
    assert {check["id"]: check["status"] for check in result.health["checks"]}["schedule"] == "passed"
    with torch.random.fork_rng():
        base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    assert PeftModel.from_pretrained(base, result.folder).peft_config["default"].r == lost["max_rank"]

    again = classification(**options, output_dir=str(tmp_path / "again"))
    with pytest.raises(Killed):
        train(again, killing_at(9))  # the last checkpoint is of step 8, in the middle of the third round
    resumed = train(again)
    assert_equal_adapters(result.folder, resumed.folder)
    assert lines(resumed.folder / "ranks.jsonl") == changes


def unpadded_parameters(folder: Path) -> int:
    """Of the factors, the ranks that are not padding."""
    stored = adapter(folder)
    pairs = [(name, name.replace("lora_A", "lora_B")) for name in stored if "lora_A" in name]
    return sum(int(stored[b].any(dim=0).sum()) * (stored[a].shape[1] + stored[b].shape[0]) for a, b in pairs)


def test_a_run_whose_rounds_were_kept_from_ending_is_exit_3(
    classification: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rankwise.cli.main import main
    from rankwise.methods.xgblora import BoostingSchedule

    config = classification(method="xgblora", training={"max_steps": 4})
    path = config.folder.parent / "run.yaml"
    path.write_text(json.dumps(config.to_dict()))
    monkeypatch.setattr(BoostingSchedule, "_close_round", lambda *_, **__: None)
    with pytest.raises(SystemExit) as left:
        main(["train", str(path)])
    assert left.value.code == 3
    assert "health check 'schedule' failed" in capsys.readouterr().err
    health = json.loads((config.folder / "health.json").read_text())
    assert {check["id"]: check["status"] for check in health["checks"]}["schedule"] == "failed"
    assert json.loads((config.folder / "rankwise.json").read_text())["status"] == "failed"
    assert not (config.folder / "adapter_model.safetensors").exists()


def test_the_papers_rounds_count_the_epochs_of_the_runs_own_rows(classification: MakeConfig) -> None:
    options = {"method": "ab-lora", "preset": "paper", "data": {"validation": 0.25}}
    training = {"per_device_train_batch_size": 4, "max_steps": -1, "num_train_epochs": 2}
    with pytest.raises(ConfigError, match=r"8 rounds of 0\.25 take 27 steps of the run's 18"):
        train(classification(**options, training=training))
    events: list[Event] = []
    plan(classification(**options, training={**training, "num_train_epochs": 3}), events.append)
    assert [event.text for event in events if isinstance(event, Note) and "after steps 9, 11, 14, 16" in event.text]


def test_beamlora_tells_each_reset_and_leaves_a_plain_adapter_of_the_planned_ranks(classification: MakeConfig) -> None:
    settings = {"cumsum_threshold": 0.7, "reset_every": 2}
    config = classification(method="beamlora", beamlora=settings, training={"max_steps": 8, "learning_rate": 5e-2})
    planned: list[Event] = []
    plan(config, planned.append)
    resets = "beamlora: 3 resets, one after every 2 steps to step 6; the share of the scores that is kept rises from"
    assert [event.text for event in planned if isinstance(event, Note) and event.text.startswith(resets)]
    events: list[Event] = []
    result = train(config, events.append)
    assert [event.text for event in events if isinstance(event, Note) and event.text.startswith(resets)]
    changes = lines(result.folder / "ranks.jsonl")
    assert [line["step"] for line in changes if "layer" not in line] == [2, 4, 6]
    copied = [line for line in changes if "layer" in line]
    assert copied
    for line in copied:
        assert line["from"] == line["to"] == 2
        assert set(line["detail"]) == {"pruned", "sources", "permutation", "importance"}
    assert any(event.text.startswith("step 4: ") for event in events if isinstance(event, Note))
    assert "beamlora_largest" in lines(result.folder / "metrics.jsonl")[0]
    manifest = json.loads((result.folder / "rankwise.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["export"]["verification"]["logit_error"] <= 1e-5
    assert {check["id"]: check["status"] for check in result.health["checks"]}["schedule"] == "passed"
    assert all("lora_A" in name or "lora_B" in name for name in adapter(result.folder) if "layer" in name)


def test_a_beamlora_run_whose_resets_never_come_ends_with_exit_code_3(
    classification: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rankwise.cli.main import main
    from rankwise.methods.beamlora import BeamLoRASchedule

    monkeypatch.setattr(BeamLoRASchedule, "_reset", lambda *_: None)
    values = classification(method="beamlora").to_dict()
    (tmp_path / "run.yaml").write_text(json.dumps({key: values[key] for key in ("model", "task", "data", "method")}))
    folder = tmp_path / "run"
    settings = ("--set", f"output_dir={folder}", "--set", "r=2", "--set", "training.max_steps=6")
    with pytest.raises(SystemExit) as left:
        main(["train", str(tmp_path / "run.yaml"), "--quiet", *settings])
    assert left.value.code == 3
    assert "no reset was made in 6 steps, and 2 fell due" in capsys.readouterr().err
    health = json.loads((folder / "health.json").read_text())
    assert health["status"] == "failed"
    assert [check["status"] for check in health["checks"] if check["id"] == "schedule"] == ["failed"]
    assert json.loads((folder / "rankwise.json").read_text())["status"] == "failed"
    assert not (folder / "adapter_model.safetensors").exists()


def test_rounds_that_do_not_fit_the_run_are_refused_with_nothing_written(classification: MakeConfig) -> None:
    config = classification(method="xgblora", xgblora={"rounds": 20}, training={"max_steps": 6})
    for job in (plan, train):
        with pytest.raises(ConfigError, match=r"xgblora\.rounds: 20 rounds do not fit in 6 optimizer steps"):
            job(config)
    assert not config.folder.exists()


def test_boosters_are_not_added_to_16_bit_weights(classification: MakeConfig) -> None:
    config = classification(
        method="xgblora",
        xgblora={"accumulate": "merge"},
        dtype="bfloat16",
        training={"max_steps": 6, "bf16": False},
    )
    for job in (plan, train):
        with pytest.raises(ConfigError, match="merge writes the base weights, which are bfloat16 and would lose most"):
            job(config)
    assert not config.folder.exists()


def test_a_composition_that_is_cut_short_goes_on_as_if_nothing_had_happened(causal: MakeConfig, tmp_path: Path) -> None:
    options = {"method": ["lora-ga", "lora-pro"], "training": {"max_steps": 5}, "lora_dropout": 0.1}
    whole = train(causal(output_dir=str(tmp_path / "whole"), **options))
    with pytest.raises(Killed):
        train(causal(**options), killing_at(4))
    events: list[Event] = []
    again = train(causal(**options), events.append)
    assert "calibration" not in [event.phase for event in events if isinstance(event, PhaseStarted)]
    assert_equal_adapters(whole.folder, again.folder)


def test_a_clipping_that_the_method_must_not_have_is_used_as_given_with_a_warning(causal: MakeConfig) -> None:
    events: list[Event] = []
    config = causal(method="lora-rite", training={"max_steps": 2, "max_grad_norm": 0.5, "adam_epsilon": 1e-7})
    with pytest.raises(ConfigError, match="adam_epsilon is 1e-07, and lora-rite moves the pairs by its own"):
        train(config)
    assert not config.folder.exists()
    train(causal(method="lora-rite", training={"max_steps": 2, "max_grad_norm": 0.5}), events.append)
    warned = [event.text for event in events if isinstance(event, Note) and event.level == "warning"]
    assert [text for text in warned if text.startswith("max_grad_norm is 0.5, and lora-rite clips by itself")]
    assert len(warned) == 1


def test_another_optimizer_than_the_recipes_is_refused_with_nothing_written(causal: MakeConfig) -> None:
    config = causal(method="lora-rite", training={"max_steps": 2, "optim": "adafactor"})
    with pytest.raises(ConfigError, match="optim is 'adafactor'"):
        train(config)
    assert not config.folder.exists()


def test_what_rankwises_own_modules_log_as_a_warning_is_told_as_a_note(capfd: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = []
    logger = logging.getLogger("rankwise.methods.some")
    with log_as_notes(events.append):
        logger.warning("%d layers sat out", 3)
        logger.info("nothing")
    assert events == [Note(text="3 layers sat out", level="warning")]
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("rankwise").propagate


def test_what_a_full_state_takes_is_told_before_training(causal: MakeConfig) -> None:
    events: list[Event] = []
    options = {"method": "lora-pro", "lora-pro": {"mode": "full"}, "training": {"max_steps": 2}}
    plan(causal(**options), events.append)
    train(causal(**options), events.append)
    told = [event.text for event in events if isinstance(event, Note)]
    assert len([text for text in told if text.startswith("lora-pro keeps ") and "MB of optimizer state" in text]) == 2


def test_only_completions_are_learned_and_the_labels_are_counted(causal: MakeConfig, tmp_path: Path) -> None:
    rows = [{"prompt": "w1 w2 w3", "completion": " red blue"} for _ in range(10)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    result = train(causal(data={"train": path, "validation": None}, method="lora", training={"max_steps": 2}))
    manifest = json.loads((result.folder / "rankwise.json").read_text())
    assert manifest["data"]["train"]["labels"] == 10 * 3, "two words and the end of the text"


def test_causal_evaluation_and_truncation_are_reported(causal: MakeConfig) -> None:
    events: list[Event] = []
    result = train(causal(data={"max_length": 4}, method="lora"), events.append)
    assert result.figures["eval_loss"] > 0
    assert 0 <= result.figures["eval_token_accuracy"] <= 1
    told = [event.text for event in events if isinstance(event, Note)]
    assert "train: 36 of 36 rows (100.0%) cut at 4 tokens" in told


def test_packed_rows_train_too(causal: MakeConfig) -> None:
    result = train(causal(data={"packing": True, "max_length": 32}, method="gora", training={"max_steps": 2}))
    assert result.health["status"] == "passed"


def test_plan_gives_the_ranks_that_train_uses_and_writes_nothing(classification: MakeConfig) -> None:
    config = classification()
    events: list[Event] = []
    made = plan(config, events.append)
    assert not config.folder.exists()
    assert "calibration" in [event.phase for event in events if isinstance(event, PhaseStarted)]
    assert "training" not in [event.phase for event in events if isinstance(event, PhaseStarted)]
    assert train(config).plan.ranks == made.ranks


def test_an_edited_plan_is_used(classification: MakeConfig, tmp_path: Path) -> None:
    config = classification()
    made = plan(config)
    name = max(made.ranks, key=lambda layer: made.ranks[layer])
    edited = made.ranks | {name: made.ranks[name] - 2}
    made.with_ranks(edited).save(tmp_path / "plan.json")
    assert train(config, plan_file=tmp_path / "plan.json").plan.ranks == edited


@pytest.mark.parametrize("task", ["classification", "causal"])
def test_a_run_that_is_cut_short_goes_on_as_if_nothing_had_happened(
    request: pytest.FixtureRequest, tmp_path: Path, task: str
) -> None:
    make: MakeConfig = request.getfixturevalue(task)
    whole = train(make(output_dir=str(tmp_path / "whole"), training={"max_steps": 5}, lora_dropout=0.1))
    config = make(training={"max_steps": 5}, lora_dropout=0.1)
    with pytest.raises(Killed):
        train(config, killing_at(4))
    events: list[Event] = []
    again = train(config, events.append)
    starts = {event.phase: event.done for event in events if isinstance(event, PhaseStarted)}
    assert starts["training"] == 2
    assert "calibration" not in starts
    assert_equal_adapters(whole.folder, again.folder)
    steps = [line["step"] for line in lines(again.folder / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5]


def test_a_run_killed_before_its_first_checkpoint_starts_again_with_its_statistics(classification: MakeConfig) -> None:
    config = classification()
    with pytest.raises(Killed):
        train(config, killing_at(1))
    events: list[Event] = []
    train(config, events.append)
    (calibration,) = [event for event in events if type(event).__name__ == "PhaseDone" and event.phase == "calibration"]
    assert calibration.detail == "kept from before"


def test_whole_gradients_are_not_kept_in_the_run_s_folder(classification: MakeConfig) -> None:
    result = train(classification(method="lora-ga", training={"max_steps": 2}, **{"lora-ga": {"on_small": "cap"}}))
    assert not (result.folder / "calibration.safetensors").exists()


def test_a_calibration_cache_that_cannot_be_written_does_not_end_the_run(
    classification: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def full(source: Any, target: Any) -> Any:
        if Path(source).name == "calibration.safetensors":
            raise OSError(28, "No space left on device")
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    events: list[Event] = []
    result = train(classification(training={"max_steps": 2}), events.append)
    assert not list(result.folder.glob("*calibration.safetensors*"))
    assert any("No space left" in event.text for event in events if isinstance(event, Note))


def test_a_run_killed_while_it_exports_ends_with_the_adapter_it_had_trained(
    classification: MakeConfig, tmp_path: Path
) -> None:
    whole = train(classification(output_dir=str(tmp_path / "whole")))
    config = classification()

    def listener(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.phase == "export":
            raise Killed

    with pytest.raises(Killed):
        train(config, listener)
    again = train(config)
    assert_equal_adapters(whole.folder, again.folder)
    told = again.figures["train_loss"]
    assert again.figures == whole.figures | {"train_loss": told}
    assert told == pytest.approx(whole.figures["train_loss"], rel=1e-3), "of all parts, from what was logged"


def test_what_comes_after_the_last_step_is_told_once_however_often_the_end_comes(
    classification: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"rounds": 4, "layers_fraction": 1.0}
    config = classification(method="xgblora", xgblora=settings, r=1, training={"max_steps": 8, "save_steps": 1})
    finish = _Run._finish

    def killed(self: Any, figures: Any) -> Any:
        monkeypatch.setattr(_Run, "_finish", finish)
        raise Killed

    monkeypatch.setattr(_Run, "_finish", killed)
    with pytest.raises(Killed):
        train(config)
    before = lines(config.folder / "ranks.jsonl")
    assert [line for line in before if line["kind"] == "export"]
    train(config)
    assert lines(config.folder / "ranks.jsonl") == before
    card = (config.folder / "README.md").read_text()
    ranks = {line["layer"]: line["to"] for line in before if "layer" in line}
    held = [rank for rank in ranks.values() if rank]
    assert f"| ranks | {min(held)} to {max(held)} in {len(held)} of {len(ranks)} layers |" in card
    assert "These are of the model as it was trained. To keep to the budget the adapter leaves out " in card


def test_a_run_goes_on_with_the_ranks_it_began_with(classification: MakeConfig, tmp_path: Path) -> None:
    config = classification(method="lora")
    with pytest.raises(Killed):
        train(config, killing_at(3))
    made = plan(classification())
    made.save(tmp_path / "plan.json")
    with pytest.raises(CheckpointError, match="began with other ranks and goes on with them; leave --plan out"):
        train(config, plan_file=tmp_path / "plan.json")


def test_trainable_parameters_keep_their_precision_whatever_the_trainer_does() -> None:
    model = torch.nn.Linear(2, 2)
    before = model.weight.data.clone()
    with _precision_kept(model):
        model.weight.data = model.weight.data.to(torch.bfloat16)
    assert model.weight.dtype is torch.float32
    assert torch.equal(model.weight.data, before)


KILLED = """
import os, signal, sys
from rankwise.workflows.config import RunConfig
from rankwise.workflows.events import PhaseProgress
from rankwise.workflows.train import train

def listener(event):
    if isinstance(event, PhaseProgress) and event.phase == "training" and event.done == 5:
        os.kill(os.getpid(), int(sys.argv[2]))

train(RunConfig.model_validate_json(sys.argv[1]), listener)
"""


def run_and_signal(config: RunConfig, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", KILLED, json.dumps(config.to_dict()), str(int(number))]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=240)


def test_sigkill_and_the_same_call_again_end_bit_equal(classification: MakeConfig, tmp_path: Path) -> None:
    whole = train(classification(output_dir=str(tmp_path / "whole")))
    config = classification()
    done = run_and_signal(config, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert json.loads((config.folder / "rankwise.json").read_text())["status"] == "running"
    again = train(config)
    assert_equal_adapters(whole.folder, again.folder)


def test_sigterm_saves_a_checkpoint_at_the_end_of_the_step(classification: MakeConfig) -> None:
    config = classification(training={"save_steps": 100})

    def listener(event: Event) -> None:
        if isinstance(event, PhaseProgress) and event.phase == "training" and event.done == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match="after step 4 of 6"):
        train(config, listener)
    assert (config.folder / "checkpoint-4").is_dir()
    assert json.loads((config.folder / "rankwise.json").read_text())["status"] == "interrupted"
    assert train(config, resume=True).figures["steps"] == 6


def test_a_signal_before_the_first_step_saves_nothing(classification: MakeConfig) -> None:
    config = classification()

    def listener(event: Event) -> None:
        if isinstance(event, PlanReady):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="before the first step"):
        train(config, listener)
    assert not config.folder.exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_is_not_touched(classification: MakeConfig) -> None:
    config = classification(method="lora", training={"max_steps": 2})
    train(config)
    before = {path.name: path.stat().st_mtime_ns for path in config.folder.iterdir()}
    with pytest.raises(OutputError, match="holds a finished run; choose another output_dir"):
        train(config)
    assert {path.name: path.stat().st_mtime_ns for path in config.folder.iterdir()} == before


def test_an_unfinished_run_of_another_config_is_not_touched(classification: MakeConfig) -> None:
    with pytest.raises(Killed):
        train(classification(), killing_at(3))
    other = classification(training={"learning_rate": 1e-3})
    with pytest.raises(OutputError, match=r"another config \(training.learning_rate: 0.005 there, 0.001 here\)"):
        train(other)


def test_files_of_others_are_not_touched(classification: MakeConfig) -> None:
    config = classification()
    config.folder.mkdir()
    (config.folder / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds files that are no rankwise run \(thesis.tex\)"):
        train(config)
    assert [path.name for path in config.folder.iterdir()] == ["thesis.tex"]


def test_resume_insists_on_something_to_go_on_from(classification: MakeConfig, tmp_path: Path) -> None:
    config = classification()
    with pytest.raises(CheckpointError, match="holds no run to go on from"):
        train(config, resume=True)
    with pytest.raises(Killed):
        train(config, killing_at(3))
    with pytest.raises(CheckpointError, match="is not a checkpoint of"):
        train(config, resume=tmp_path / "elsewhere" / "checkpoint-2")
    assert train(config, resume=config.folder / "checkpoint-2").figures["steps"] == 6


def test_training_data_that_changed_is_refused_when_a_run_goes_on(classification: MakeConfig, tmp_path: Path) -> None:
    config = classification()
    with pytest.raises(Killed):
        train(config, killing_at(3))
    write_rows(tmp_path / "train.jsonl", colored(40))
    with pytest.raises(CheckpointError, match=r"data.train: .*train.jsonl is not what the run began with"):
        train(config)


def test_a_run_that_breaks_says_so_in_its_manifest_and_is_no_success(
    classification: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = classification(method="lora")
    forward = torch.nn.CrossEntropyLoss.forward
    calls = []

    def broken(self: torch.nn.CrossEntropyLoss, *inputs: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return forward(self, *inputs) * (float("nan") if len(calls) > 3 else 1.0)

    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", broken)
    with pytest.raises(HealthError, match="health check 'loss' failed"):
        train(config)
    manifest = json.loads((config.folder / "rankwise.json").read_text())
    assert manifest["status"] == "failed"
    assert "loss" in manifest["error"]
    assert json.loads((config.folder / "health.json").read_text())["status"] == "failed"
    assert (config.folder / "report.html").is_file()
    assert not (config.folder / "adapter_model.safetensors").exists()


def test_a_run_prints_nothing(classification: MakeConfig, capfd: pytest.CaptureFixture[str]) -> None:
    train(classification(method="lora", training={"max_steps": 2}))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
