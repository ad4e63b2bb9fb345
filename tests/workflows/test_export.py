"""Export from whatever a run left: its final adapter, a checkpoint, or a foreign adapter."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rankwise.errors import ArtifactError, ConfigError, OutputError
from rankwise.workflows.events import Event, Note
from rankwise.workflows.export import export
from rankwise.workflows.train import train
from tests.workflows.conftest import MakeConfig


@pytest.fixture
def run(causal: MakeConfig) -> Path:
    return train(causal(data={"validation": None})).folder


def test_a_run_is_exported_in_every_layout(run: Path, tmp_path: Path) -> None:
    for layout in ("uniform", "compact", "per_rank"):
        report = export(run, tmp_path / layout, layout=layout)
        assert report.layout == layout
        assert report.verification is not None
        assert report.verification.update_error < 1e-5
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= set(report.files)


def test_compact_keeps_the_ranks_that_were_trained(run: Path, tmp_path: Path) -> None:
    from rankwise.ranks.plan import RankPlan

    ranks = sorted(rank for rank in RankPlan.load(run / "plan.json").ranks.values() if rank)
    report = export(run, tmp_path / "compact", layout="compact")
    assert (report.ranks[0], report.ranks[2]) == (ranks[0], ranks[-1])
    assert ranks[0] < ranks[-1]


def test_merged_weights_are_written_with_the_base_that_the_adapter_names(run: Path, tmp_path: Path) -> None:
    report = export(run, tmp_path / "merged", consumer="merged")
    assert report.layout == "merged"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged") is not None


def test_with_a_base_the_logits_are_compared(run: Path, llama: Path, tmp_path: Path) -> None:
    report = export(run / "checkpoint-4", tmp_path / "adapter", base_model=str(llama), consumer="vllm")
    assert report.logit_error is not None
    assert report.logit_error < 1e-5


def test_a_foreign_adapter_is_exported_too(llama: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], use_rslora=True, init_lora_weights=False))
    model.save_pretrained(tmp_path / "foreign")
    assert export(tmp_path / "foreign", tmp_path / "served").layers == 2


def test_an_unfinished_checkpoint_is_refused_before_a_base_model_is_loaded(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint-4" / "rankwise.json").unlink()
    with pytest.raises(ArtifactError, match="an unfinished checkpoint"):
        export(run / "checkpoint-4", tmp_path / "out", base_model=str(tmp_path / "none"))


def test_what_holds_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        export(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"holds no adapter_config\.json and no complete"):
        export(tmp_path / "empty", tmp_path / "out")


def test_unknown_layouts_and_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout: 'zip' is not one of uniform, compact"):
        export(tmp_path, tmp_path / "out", layout="zip")
    with pytest.raises(ConfigError, match="--for merged writes merged weights, and --layout asks for compact"):
        export(tmp_path, tmp_path / "out", layout="compact", consumer="merged")


def test_a_finished_run_that_lost_its_configuration_is_no_reason_to_export_a_checkpoint(
    run: Path, tmp_path: Path
) -> None:
    (run / "adapter_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"the final adapter is incomplete: adapter_config\.json is missing"):
        export(run, tmp_path / "out")
    (run / "rankwise.json").unlink()
    with pytest.raises(ArtifactError, match="the final adapter is incomplete"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(run / "checkpoint-4", tmp_path / "out").layers > 0


def test_an_unfinished_run_is_exported_from_its_last_checkpoint(run: Path, tmp_path: Path) -> None:
    manifest = json.loads((run / "rankwise.json").read_text())
    (run / "rankwise.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    (run / "adapter_config.json").unlink()
    notes: list[Event] = []
    export(run, tmp_path / "out", notes.append)
    assert any(isinstance(note, Note) and "exporting checkpoint-4" in note.text for note in notes)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be made"):
        export(tmp_path / "none", tmp_path / "file" / "out", base_model="nobody/nothing")
