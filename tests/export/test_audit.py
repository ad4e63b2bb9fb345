"""`rankwise check` flags what servers would compute from any adapter folder, and the command it gives mends it."""

import json
import math
import shlex

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from rankwise.adapters.checkpoint import save_native
from rankwise.adapters.state import STATE_FILE
from rankwise.errors import ArtifactError
from rankwise.export.audit import check_folder
from rankwise.export.write import export_adapter, export_folder
from rankwise.methods.lora_ga import LoRAGA
from rankwise.ranks.shapes import ScalingRule
from rankwise.training.attach import attach
from tests.export.trained import trained
from tests.support.models import causal_batch, tiny_llama


@pytest.fixture
def native(tmp_path):
    """Ranks 1, 2, 4, 8, 16 at scaling 16 / sqrt(rank) under r = 4."""
    model, _ = trained("llama", ranks=(1, 2, 4, 8, 16), rule=ScalingRule.ALPHA_OVER_SQRT_RANK, lora_alpha=16)
    save_native(model, tmp_path / "native")
    return tmp_path / "native"


def test_a_native_uneven_rslora_adapter_is_flagged_with_the_sizes_that_follow_by_hand(native):
    # r = 4, alpha = 16. Old vLLM uses 16/sqrt(4) = 8 for all: worst where 4 is right (rank 16), 8/4 - 1 = 1.
    # SGLang's rule uses 4 for all: worst where 16 is right (rank 1). llama.cpp uses 16/16 = 1 where 4 is right.
    audit = check_folder(native)
    verdicts = {verdict.consumer: verdict for verdict in audit.verdicts}
    assert verdicts["peft"].status == verdicts["transformers"].status == verdicts["vllm"].status == "ok"
    assert (verdicts["vllm<=0.31"].status, verdicts["vllm<=0.31"].error) == ("wrong", pytest.approx(1.0))
    assert (verdicts["llama.cpp"].status, verdicts["llama.cpp"].error) == ("wrong", pytest.approx(0.75))
    assert verdicts["sglang"].status == "refuses"
    assert verdicts["sglang"].reason == "ranks [1, 2, 4, 8, 16] are not all r=4"
    assert audit.rule_errors == pytest.approx({"a": 0.0, "b": 1.0, "c": 0.75, "d": 0.75}, abs=1e-12)
    assert not audit.served_alike
    assert (audit.r, audit.lora_alpha, audit.use_rslora, audit.ranks[0], audit.ranks[2]) == (4, 16, True, 1, 16)
    assert audit.vllm_max_lora_rank == 16


def test_the_command_that_it_gives_mends_the_adapter(native):
    audit = check_folder(native)
    words = shlex.split(audit.command)
    assert words == ["rankwise", "export", str(native), "-o", f"{native}-uniform", "--layout", "uniform"]
    export_folder(words[2], words[4], layout=words[6])
    mended = check_folder(words[4])
    assert mended.served_alike
    assert mended.command is None
    assert mended.advice == ""


def test_a_folder_with_a_blank_in_its_name_gives_a_command_that_a_shell_reads(native):
    moved = native.rename(native.parent / "my adapter")
    assert shlex.split(check_folder(moved).command)[2] == str(moved)


def test_a_rank_off_tgi_s_grid_is_named_and_mended_without_spoiling_the_verdict(tmp_path):
    model, plan = trained("llama", ranks=(5, 2))
    export_adapter(model, tmp_path / "a", plan=plan)
    audit = check_folder(tmp_path / "a")
    assert audit.served_alike
    assert audit.command.endswith("--for tgi")
    export_folder(tmp_path / "a", tmp_path / "b", consumers=("tgi",))
    assert check_folder(tmp_path / "b").command is None


@pytest.mark.parametrize("save", ["checkpoint", "plain"])
def test_factors_beside_an_offset_are_never_served_alike_and_the_command_mends_them(tmp_path, save):
    session = attach(tiny_llama(), LoRAGA(), r=4, calibration=[causal_batch(0)])
    source = tmp_path / "a"
    session.save(source) if save == "checkpoint" else session.model.save_pretrained(source)
    session.close()
    audit = check_folder(source)
    assert not audit.served_alike
    assert "trained beside an offset: served as it is, it computes something else" in audit.faults
    words = shlex.split(audit.command)
    assert words == ["rankwise", "export", str(source), "-o", f"{source}-uniform", "--layout", "uniform"]
    export_folder(words[2], words[4], layout=words[6])
    assert check_folder(words[4]).served_alike
    (source / STATE_FILE).unlink()
    assert check_folder(source).served_alike == (save == "plain")


def test_saved_modules_point_to_merged_weights(tmp_path):
    model, plan = trained("bert", ranks=(2,))
    export_adapter(model, tmp_path / "a", plan=plan)
    audit = check_folder(tmp_path / "a")
    assert not audit.served_alike
    assert "--layout merged --base BASE_MODEL" in audit.command


def test_the_command_for_merged_weights_names_the_base_that_the_configuration_names(tmp_path):
    model, plan = trained("bert", ranks=(2,))
    export_adapter(model, tmp_path / "a", plan=plan)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "models/my bert"}))
    words = shlex.split(check_folder(tmp_path / "a").command)
    assert words[-4:] == ["--layout", "merged", "--base", "models/my bert"]


def test_any_stock_adapter_can_be_checked(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.01)
    model.save_pretrained(tmp_path)
    audit = check_folder(tmp_path)
    assert audit.served_alike
    assert {verdict.status for verdict in audit.verdicts} == {"ok"}
    assert (audit.layers, audit.parameters) == (4, 2 * 8 * (64 + 48))
    values = json.loads(json.dumps(audit.to_dict(), allow_nan=False))
    assert values["served_alike"] is True
    assert values["ranks"] == [8, 8.0, 8]


def test_an_infinite_error_is_still_plain_json(tmp_path):
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=8, lora_alpha=0, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    audit = check_folder(tmp_path)
    assert audit.rule_errors["d"] == math.inf
    assert json.loads(json.dumps(audit.to_dict(), allow_nan=False))["rule_errors"]["d"] > 1e300


def test_non_finite_and_undeclared_tensors_are_faults_of_the_file(tmp_path):
    model, plan = trained("llama", ranks=(2,))
    export_adapter(model, tmp_path / "a", plan=plan)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(1)}, weights)
    audit = check_folder(tmp_path / "a")
    assert not audit.served_alike
    assert any("holds NaN or Inf" in fault for fault in audit.faults)
    assert any("lm_head.weight: neither a factor nor declared" in fault for fault in audit.faults)
    assert audit.command is None


def test_a_file_that_peft_cannot_load_has_no_mending_command(native):
    config = json.loads((native / "adapter_config.json").read_text())
    (native / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {}}))
    audit = check_folder(native)
    assert audit.command is None
    assert "PEFT itself cannot load this" in audit.advice


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10"), "truncated or damaged"),
        (lambda f: (f / "adapter_config.json").unlink(), "is missing"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "a list"),
        (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LOHA"}'), "'LOHA'"),
        (lambda f: save_file({"a": torch.ones(1)}, f / "adapter_model.safetensors"), "no lora_A or lora_B tensor"),
    ],
)
def test_what_cannot_be_audited_says_why(native, damage, message):
    damage(native)
    with pytest.raises(ArtifactError, match=message):
        check_folder(native)


def test_the_audit_changes_nothing_in_the_folder(native):
    before = {path.name: path.read_bytes() for path in native.iterdir()}
    check_folder(native)
    assert {path.name: path.read_bytes() for path in native.iterdir()} == before
