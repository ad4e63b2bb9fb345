"""From rows to batches: the same for calibration and training, documents apart, every row accounted for."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from rankwise.workflows.config import RunConfig, load_config
from rankwise.workflows.job import Job, Phases, load_job
from rankwise.workflows.prepare import calibration_batches
from rankwise.workflows.quiet import quiet_libraries
from rankwise.workflows.trainer import majority_share
from tests.workflows.conftest import MakeConfig, write_rows

EXAMPLES = Path(__file__).parents[2] / "examples"


def job_of(config: RunConfig) -> Job:
    with quiet_libraries():
        return load_job(config, Phases(lambda event: None))


@pytest.mark.parametrize("task", ["classification", "causal"])
def test_calibration_reads_the_very_batches_that_training_will_see(request: pytest.FixtureRequest, task: str) -> None:
    from transformers import Trainer
    from trl.trainer.sft_trainer import SFTTrainer

    make: MakeConfig = request.getfixturevalue(task)
    with quiet_libraries():
        job = job_of(make(training={"seed": 3}))
        rows = {"train_dataset": job.prepared.train, "eval_dataset": job.prepared.validation}
        options = {"model": job.model, "args": job.arguments, **rows}
        if task == "causal":
            trainer: Trainer = SFTTrainer(**options, processing_class=job.tokenizer)
        else:
            trainer = Trainer(**options, data_collator=job.prepared.collator)
        seen = list(trainer.get_train_dataloader())
    read = list(calibration_batches(job.prepared, 8, 3))
    assert len(read) == len(seen) > 3
    for one, other in zip(read, seen, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["labels"], other["labels"])


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_documents_do_not_see_each_other(causal: MakeConfig, strategy: str) -> None:
    job = job_of(causal(data={"packing": True, "packing_strategy": strategy, "max_length": 32}))
    block = job.prepared.train[0]
    lengths = block["seq_lengths"]
    assert len(lengths) > 1
    batch = {key: value for key, value in job.prepared.collator([block]).items() if key != "labels"}
    with torch.no_grad():
        packed = job.model(**batch).logits[0]
        start = 0
        for length in lengths:
            alone = job.model(input_ids=torch.tensor([block["input_ids"][start : start + length]])).logits[0]
            torch.testing.assert_close(packed[start : start + length], alone, rtol=1e-4, atol=1e-5)
            start += length


def test_preparing_leaves_the_model_as_it_was(causal: MakeConfig) -> None:
    job = job_of(causal())
    assert "forward" not in vars(job.model)
    assert all(parameter.grad is None for parameter in job.model.parameters())


def test_rows_are_counted_cut_and_left_out(causal: MakeConfig, tmp_path: Path) -> None:
    rows = [{"prompt": "w1 " * length, "completion": "red"} for length in (1, 2, 9, 20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    job = job_of(causal(data={"train": path, "validation": None, "max_length": 8}))
    counts = job.prepared.counts["train"]
    assert (counts.rows, counts.truncated, counts.dropped) == (4, 2, 2)
    assert counts.labels == 2 * 2, "the word and the end of the text, of the two rows that fit"
    assert len(job.prepared.train) == 2
    assert "train: 2 of 4 rows left out, none of their labels counts" in job.prepared.notes


def test_rows_of_one_token_are_left_out_for_nothing_predicts_a_first_token(causal: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "bare.jinja").write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("w1", "w1 w2", "w2", "w1 w2 w3")]
    data = {"chat_template_path": str(tmp_path / "bare.jinja"), "validation": None}
    job = job_of(causal(data={"train": write_rows(tmp_path / "rows.jsonl", rows), **data}))
    assert [len(row) for row in job.prepared.train["input_ids"]] == [2, 3]
    counts = job.prepared.counts["train"]
    assert (counts.rows, counts.dropped, counts.labels) == (4, 2, 1 + 2)


def test_packed_labels_are_those_that_the_collator_lets_through(causal: MakeConfig) -> None:
    job = job_of(causal(data={"packing": True, "max_length": 32}))
    batch = job.prepared.collator([job.prepared.train[row] for row in range(len(job.prepared.train))])
    starts = batch["position_ids"] == 0
    assert job.prepared.counts["train"].labels == int(((batch["labels"] != -100) & ~starts).sum())


def test_the_new_head_is_found_trained_in_full_and_the_same_at_every_load(classification: MakeConfig) -> None:
    first, again = job_of(classification()), job_of(classification())
    assert first.modules_to_save == ("pooler", "classifier"), "the files of this BERT hold no pooler either"
    one, two = first.model.get_parameter("classifier.weight"), again.model.get_parameter("classifier.weight")
    assert torch.equal(one, two)
    other = job_of(classification(training={"seed": 1})).model.get_parameter("classifier.weight")
    assert not torch.equal(one, other)


def test_the_majority_share_is_that_of_the_label_most_frequent_in_training() -> None:
    train, test = Dataset.from_dict({"labels": [0, 1, 1, 2]}), Dataset.from_dict({"labels": [0, 0, 0, 1]})
    assert majority_share(train, test) == 0.25


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_run_file(path: Path) -> None:
    config = load_config(path)
    assert RunConfig.model_validate(config.to_dict()).hash() == config.hash()
