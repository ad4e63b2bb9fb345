"""N steps equal k steps, a save, a fresh process and N - k steps, bit for bit; what does not fit is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from rankwise.adapters.state import STATE_FILE
from rankwise.errors import CheckpointError, ModelError
from rankwise.methods.gora import GoRA
from rankwise.training.attach import attach
from rankwise.training.marker import MARKER, last_complete_checkpoint
from rankwise.training.state import resume
from tests.support.models import classification_batch, tiny_bert_classifier, tiny_gpt2, tiny_llama
from tests.training.children import finish, start
from tests.training.jobs import RECIPES, Job, Rows, factors, final, new_session, run, stopper, trainer_arguments


@pytest.mark.parametrize(("loop", "method"), [("trainer", "gora"), ("sft", "rora"), ("accelerate", "rora")])
def test_a_run_split_over_two_processes_ends_bit_equal(tmp_path: Path, loop: str, method: str):
    whole, split = (
        Job(folder=str(tmp_path / name), loop=loop, method=method, steps=8, save_steps=3) for name in ("whole", "split")
    )
    for job in (whole, split):
        Path(job.folder).mkdir()
    assert finish(start(whole)) == 0
    assert finish(start(replace(split, stop_after=4))) == 0
    checkpoint = last_complete_checkpoint(split.folder)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-3"
    assert finish(start(split)) == 0
    ours, wanted = final(tmp_path / "split"), final(tmp_path / "whole")
    assert ours.keys() == wanted.keys()
    assert [name for name in ours if not torch.equal(ours[name], wanted[name])] == []


@pytest.mark.parametrize("method", RECIPES)
def test_every_recipe_split_in_two_ends_bit_equal(tmp_path: Path, method: str):
    whole, split = (
        Job(folder=str(tmp_path / name), loop="accelerate", method=method, steps=6, save_steps=2)
        for name in ("whole", "split")
    )
    run(whole)
    run(replace(split, stop_after=4))
    shutil.rmtree(tmp_path / "split" / "checkpoint-4")
    run(split)
    ours, wanted = final(tmp_path / "split"), final(tmp_path / "whole")
    assert [name for name in ours if not torch.equal(ours[name], wanted[name])] == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(Job(folder=str(folder), method="gora", steps=4, save_steps=4))
    return folder / "checkpoint-4"


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    target = tmp_path / checkpoint.name
    target.mkdir()
    for path in checkpoint.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_resume_rebuilds_plan_recipe_factors_and_counters(checkpoint: Path):
    session = resume(tiny_llama(), checkpoint)
    job = Job(folder=str(checkpoint.parent), method="gora", steps=4)
    started = new_session(job)
    assert session.plan == started.plan
    assert session.recipe == started.recipe
    assert session.calibration == replace(started.calibration, seconds=session.calibration.seconds)
    assert session.step == 4
    assert session.health.gradients.steps == 4
    stored = final(checkpoint.parent)
    assert all(torch.equal(value, stored[name]) for name, value in factors(session).items())
    assert session.notes == ()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", STATE_FILE, "trainer_state.json"])
def test_a_missing_file_is_refused_by_name(copied: Path, name: str):
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: the file is missing"):
        resume(tiny_llama(), copied)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_flipped_bit_or_a_truncated_file_is_refused(copied: Path, name: str):
    path = copied / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="the content is not what was written"):
        resume(tiny_llama(), copied)
    path.write_bytes(bytes(content[:-10]))
    with pytest.raises(CheckpointError, match=r"bytes, \d+ were written"):
        resume(tiny_llama(), copied)


def test_no_marker_no_resume(copied: Path):
    (copied / MARKER).unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        resume(tiny_llama(), copied)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        resume(tiny_llama(), copied / "nowhere")
    (copied / MARKER).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        resume(tiny_llama(), copied)


def test_another_base_model_is_refused(checkpoint: Path):
    with pytest.raises(CheckpointError, match=r"has [0-9a-f]{16}: load the model"):
        resume(tiny_gpt2(), checkpoint)
    with pytest.raises(CheckpointError, match="other weights"):
        resume(tiny_llama(seed=1), checkpoint)


def test_a_wrapped_model_is_refused_before_anything_is_read(checkpoint: Path):
    with pytest.raises(ModelError, match=r"wrapped in DataParallel.*attach before wrapping"):
        resume(torch.nn.DataParallel(tiny_llama()), checkpoint)


def test_another_thread_count_and_other_versions_are_told(copied: Path):
    marker = json.loads((copied / MARKER).read_text())
    marker["threads"] += 1
    marker["versions"]["torch"] = "1.0"
    (copied / MARKER).write_text(json.dumps(marker))
    notes = resume(tiny_llama(), copied).notes
    assert "threads" in notes[0]
    assert "torch 1.0 ->" in notes[1]


def test_a_trainer_that_starts_elsewhere_than_the_session_is_refused(checkpoint: Path, tmp_path: Path):
    from tests.training.jobs import LOOPS

    session = resume(tiny_llama(), checkpoint)
    with pytest.raises(CheckpointError, match="the session is at step 4 and Trainer starts from step 0"):
        LOOPS["trainer"](Job(folder=str(tmp_path), steps=8), session, None)


def test_the_stored_marker_holds_no_path_of_this_machine(checkpoint: Path):
    assert str(Path.home()) not in (checkpoint / MARKER).read_text()
    assert str(checkpoint.parent) not in (checkpoint / MARKER).read_text()


def classifier_run(folder: Path, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    """A classification run whose head is trained in full, from its last checkpoint if there is one."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    rows = [{key: value[0] for key, value in classification_batch(seed, rows=1).items()} for seed in range(12)]
    options = trainer_arguments(Job(folder=str(folder), steps=6, save_steps=2))
    args = TrainingArguments(**options)
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        session = attach(
            tiny_bert_classifier(),
            GoRA(),
            r=2,
            lora_dropout=0.2,
            modules_to_save=["classifier", "pooler"],
            task_type="SEQ_CLS",
            calibration=[classification_batch(seed) for seed in range(2)],
        )
    else:
        session = resume(tiny_bert_classifier(), checkpoint)
    trainer = Trainer(
        session.model,
        args,
        train_dataset=rows,
        optimizers=session.optimizers(args, 6),
        callbacks=[session.callback(), *stopper(Job(folder=str(folder), stop_after=stop_after))],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return {name: p.detach().clone() for name, p in session.model.named_parameters() if p.requires_grad}


def test_modules_that_are_trained_in_full_resume_bit_equal_too(tmp_path: Path):
    whole = classifier_run(tmp_path / "whole")
    classifier_run(tmp_path / "split", stop_after=3)
    split = classifier_run(tmp_path / "split")
    assert any("modules_to_save" in name and "classifier" in name for name in whole)
    assert whole.keys() == split.keys()
    assert [name for name in whole if not torch.equal(whole[name], split[name])] == []


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")  # PEFT, of its own file
def test_a_checkpoint_holds_the_adapter_alone_also_where_the_vocabulary_grew(tmp_path: Path):
    """PEFT would put the resized embeddings beside the factors, which nothing trained and resume does not know."""
    tiny_llama().save_pretrained(tmp_path / "base")

    def grown() -> LlamaForCausalLM:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(1)
        model.resize_token_embeddings(model.config.vocab_size + 6)
        return model

    from transformers import PrinterCallback, Trainer, TrainingArguments

    args = TrainingArguments(**trainer_arguments(Job(folder=str(tmp_path / "run"), save_steps=2)) | {"max_steps": 2})
    session = attach(grown(), "lora", r=2, target_modules=["q_proj"])
    trainer = Trainer(
        session.model,
        args,
        train_dataset=Rows(),
        optimizers=session.optimizers(args, 2),
        callbacks=[session.callback()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert all("lora_" in name for name in load_file(checkpoint / "adapter_model.safetensors"))
    resumed = factors(resume(grown(), checkpoint))
    assert all(torch.equal(value, resumed[name]) for name, value in factors(session).items())
