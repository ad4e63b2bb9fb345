"""An export is whole or not there: what was in the destination survives every failure."""

import json
import os
from pathlib import Path

import pytest
import torch

from rankwise.adapters.attach import adapted_layers
from rankwise.adapters.checkpoint import save_native
from rankwise.adapters.state import STATE_FILE, FoldState
from rankwise.errors import ArtifactError, ConfigError, ExportError, ModelError, OutputError, VerificationError
from rankwise.export import staging, write
from rankwise.export.consumers import EXPORT_TARGETS, consumer_layout
from rankwise.export.files import read_adapter
from rankwise.export.write import export_adapter, export_folder
from tests.export.trained import ARCHITECTURES, trained


@pytest.fixture(scope="module")
def llama():
    return trained("llama", ranks=(2, 0, 5))


def _content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _siblings(folder):
    return sorted(p.name for p in folder.parent.iterdir())


def test_the_folder_holds_exactly_what_the_report_says(llama, tmp_path):
    model, plan = llama
    extra = {"README.md": "hello", "x/y.bin": b"1"}
    report = export_adapter(model, tmp_path / "new" / "a", plan=plan, extra_files=extra)
    content = _content(tmp_path / "new" / "a")
    assert set(content) == set(report.files) == {"adapter_config.json", "adapter_model.safetensors", *extra}
    assert report.bytes == sum(map(len, content.values()))
    assert (report.layers, report.r, report.vllm_max_lora_rank, report.dtype) == (14, 5, 8, "float32")
    assert _siblings(tmp_path / "new" / "a") == ["a"]
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["verification"]["layers"] == 14
    assert report.to_dict()["verdicts"][0]["consumer"] == "peft"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "new" / "a").stat().st_mode & 0o777 == 0o777 & ~umask


def test_the_same_adapter_gives_the_same_bytes(llama, tmp_path):
    model, plan = llama
    for name in ("a", "b"):
        export_adapter(model, tmp_path / name, plan=plan)
    assert _content(tmp_path / "a") == _content(tmp_path / "b")


def test_an_adapter_that_is_there_is_not_overwritten_unasked(llama, tmp_path):
    model, plan = llama
    export_adapter(model, tmp_path / "a", plan=plan)
    before = _content(tmp_path / "a")
    with pytest.raises(OutputError, match=r"already holds adapter_config\.json, adapter_model\.safetensors"):
        export_adapter(model, tmp_path / "a", layout="compact", plan=plan)
    assert _content(tmp_path / "a") == before
    report = export_adapter(model, tmp_path / "a", layout="compact", plan=plan, overwrite=True)
    assert report.layout == "compact"
    assert _content(tmp_path / "a") != before


def test_other_files_of_the_destination_stay(llama, tmp_path):
    model, plan = llama
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text("{}")
    export_adapter(model, tmp_path / "run", plan=plan)
    assert set(_content(tmp_path / "run")) == {"plan.json", "adapter_config.json", "adapter_model.safetensors"}
    assert _siblings(tmp_path / "run") == ["run"]


def test_an_extra_file_that_is_there_is_not_overwritten_unasked(llama, tmp_path):
    model, plan = llama
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("mine")
    with pytest.raises(OutputError, match=r"already holds README\.md"):
        export_adapter(model, tmp_path / "run", plan=plan, extra_files={"README.md": "yours"})
    assert _content(tmp_path / "run") == {"README.md": b"mine"}


@pytest.mark.parametrize("name", ["../out.txt", "/etc/out.txt", "adapter_config.json"])
def test_an_extra_file_cannot_leave_the_folder_or_replace_the_adapter(llama, tmp_path, name):
    model, plan = llama
    with pytest.raises(OutputError, match="extra file"):
        export_adapter(model, tmp_path / "a", plan=plan, extra_files={name: "x"})
    assert _siblings(tmp_path / "a") == []


def test_extra_files_are_copied_from_paths(llama, tmp_path):
    model, plan = llama
    (tmp_path / "tokenizer.json").write_bytes(b"abc")
    export_adapter(model, tmp_path / "a", plan=plan, extra_files={"tokenizer.json": tmp_path / "tokenizer.json"})
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == b"abc"


def _break_one_factor(model):
    layer = next(iter(adapted_layers(model).values()))
    return layer.module.lora_A["default"].register_forward_hook(lambda module, inputs, output: output * 1.5)


def test_a_failed_verification_leaves_the_destination_alone_and_keeps_the_evidence(tmp_path):
    model, plan = trained("llama", ranks=(2, 5))
    batch = ARCHITECTURES["llama"].batch()
    export_adapter(model, tmp_path / "a", plan=plan)
    before = _content(tmp_path / "a")
    handle = _break_one_factor(model)
    for _ in range(2):  # an earlier failed adapter is replaced
        with pytest.raises(VerificationError, match="The failed files are kept in") as caught:
            export_adapter(
                model, tmp_path / "a", plan=plan, batch=batch, overwrite=True, failed_folder=tmp_path / "failed-adapter"
            )
    handle.remove()
    assert caught.value.exit_code == 3
    assert _content(tmp_path / "a") == before
    assert read_adapter(tmp_path / "failed-adapter").config["r"] == 5
    assert _siblings(tmp_path / "a") == ["a", "failed-adapter"]


def test_a_failed_verification_without_a_place_for_it_leaves_nothing(tmp_path):
    model, plan = trained("llama", ranks=(2, 5))
    _break_one_factor(model)
    with pytest.raises(VerificationError):
        export_adapter(model, tmp_path / "a", plan=plan, batch=ARCHITECTURES["llama"].batch())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_failure_while_placing_files_brings_every_old_file_back(llama, tmp_path, monkeypatch, fails_at):
    model, plan = llama
    export_adapter(model, tmp_path / "a", plan=plan, extra_files={"old.txt": "old"})
    before = _content(tmp_path / "a")
    replace, calls = Path.replace, []

    def failing(self, target):
        if "staged" in str(self):
            calls.append(target)
            if len(calls) == fails_at + 1:
                raise OSError("disk full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        export_adapter(
            model, tmp_path / "a", layout="compact", plan=plan, overwrite=True, extra_files={"new.txt": "new"}
        )
    monkeypatch.undo()
    assert _content(tmp_path / "a") == before
    assert _siblings(tmp_path / "a") == ["a"]


def test_the_old_adapter_is_replaced_file_by_file_the_configuration_last(llama, tmp_path, monkeypatch):
    model, plan = llama
    export_adapter(model, tmp_path / "a", plan=plan)
    replace, order = Path.replace, []

    def recording(self, target):
        order.append(Path(target).name)
        assert set(_content(tmp_path / "a")) == {"adapter_config.json", "adapter_model.safetensors"}
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", recording)
    export_adapter(model, tmp_path / "a", layout="compact", plan=plan, overwrite=True)
    assert order == ["adapter_model.safetensors", "adapter_config.json"]


def test_without_hard_links_the_old_files_are_copied(tmp_path, monkeypatch):
    for name, text in (("stage", "new"), ("dest", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(text)

    def refuse(self, target):
        raise OSError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    staging.put_in_place(tmp_path / "stage", tmp_path / "dest")
    assert (tmp_path / "dest" / "f").read_text() == "new"


def test_a_write_that_fails_leaves_nothing_behind(llama, tmp_path, monkeypatch):
    model, plan = llama

    def fail(*arguments, **keywords):
        raise OSError("disk full")

    monkeypatch.setattr(write, "write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        export_adapter(model, tmp_path / "a", plan=plan)
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_are_not_the_plan_s_are_refused(llama, tmp_path):
    model, plan = llama
    name = next(name for name, rank in plan.ranks.items() if rank == 2)
    with pytest.raises(ExportError, match=f"{name}: rank 2, planned 1"):
        export_adapter(model, tmp_path / "a", plan=plan.with_ranks({name: 1}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", [name for name in EXPORT_TARGETS if name != "merged"])
def test_every_export_target_is_served_by_its_layout(llama, tmp_path, target):
    model, plan = llama
    report = export_adapter(model, tmp_path / "a", layout=consumer_layout(target), consumers=(target,), plan=plan)
    assert all(v.status == "ok" for v in report.verdicts if v.consumer in EXPORT_TARGETS[target])
    assert report.r == (8 if target == "tgi" else 5)


def test_what_a_consumer_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    model, plan = trained("bert", ranks=(2, 5))
    for target in ("vllm", "sglang", "tgi", "gguf", "ollama"):
        with pytest.raises(ExportError, match="modules_to_save is not supported"):
            export_adapter(model, tmp_path / "a", consumers=(target,), plan=plan)
    with pytest.raises(ExportError, match=r"llama\.cpp 2026-10: wrong"):
        export_adapter(trained("llama", ranks=(2, 5))[0], tmp_path / "a", layout="compact", consumers=("gguf",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "unifrom"}, "'unifrom' is not one of"),
        ({"dtype": "int8"}, "'int8' is not one of float32, bfloat16, float16"),
        ({"consumers": ("vlm",)}, "'vlm' is not one of"),
    ],
)
def test_unknown_words_are_refused_before_the_adapter_is_read(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export_folder(tmp_path / "nowhere", tmp_path / "a", **options)


def test_a_destination_that_is_a_file_is_refused(llama, tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        export_adapter(llama[0], tmp_path / "a")


@pytest.mark.parametrize("layout", ["uniform", "compact", "per_rank"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_checkpoint_exports_from_files_alone_to_what_the_live_model_exports_to(tmp_path, name, layout):
    model, plan = trained(name, ranks=(2, 0, 5))
    save_native(model, tmp_path / "native")
    live = export_adapter(model, tmp_path / "live", layout=layout, plan=plan)
    files = export_folder(tmp_path / "native", tmp_path / "files", layout=layout, plan=plan)
    assert files.logit_error is None
    assert (files.layers, files.ranks, files.r) == (live.layers, live.ranks, live.r)
    first, second = read_adapter(tmp_path / "live"), read_adapter(tmp_path / "files")
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(tensor, second.tensors[key]) for key, tensor in first.tensors.items())
    ignored = ("target_modules",)
    assert {k: v for k, v in first.config.items() if k not in ignored} == {
        k: v for k, v in second.config.items() if k not in ignored
    }


def test_with_a_base_model_a_checkpoint_gets_leaf_names_and_compared_logits(tmp_path):
    model, plan = trained("bert", ranks=(2, 0, 5))
    save_native(model, tmp_path / "native")
    base = ARCHITECTURES["bert"].build()
    report = export_folder(
        tmp_path / "native", tmp_path / "a", plan=plan, base=base, batch=ARCHITECTURES["bert"].batch()
    )
    assert report.logit_error < 1e-5
    assert read_adapter(tmp_path / "a").config["target_modules"] == ["dense", "key", "query", "value"]
    assert not any("lora" in name for name, _ in base.named_modules())


@pytest.mark.parametrize("layout", ["uniform", "compact", "per_rank"])
def test_padding_is_taken_out_again_when_a_uniform_adapter_is_exported(llama, tmp_path, layout):
    model, plan = llama
    export_adapter(model, tmp_path / "uniform", plan=plan)
    export_adapter(model, tmp_path / "live", layout=layout, plan=plan)
    report = export_folder(tmp_path / "uniform", tmp_path / "again", layout=layout, plan=plan)
    assert report.verification.update_error < 1e-6
    first, second = read_adapter(tmp_path / "live"), read_adapter(tmp_path / "again")
    assert {k: t.shape for k, t in first.tensors.items()} == {k: t.shape for k, t in second.tensors.items()}
    assert all(torch.allclose(tensor, second.tensors[key], rtol=1e-6) for key, tensor in first.tensors.items())


def test_a_folder_cannot_be_exported_onto_itself(llama, tmp_path):
    model, plan = llama
    export_adapter(model, tmp_path / "a", plan=plan)
    with pytest.raises(OutputError, match="is the source itself"):
        export_folder(tmp_path / "a", tmp_path / "a", overwrite=True)


def test_the_method_s_state_beside_a_checkpoint_is_folded(tmp_path):
    model, plan = trained("llama", ranks=(2, 5))
    save_native(model, tmp_path / "native")
    gates = {name: torch.arange(rank).float() for name, rank in plan.ranks.items()}  # the first rank is off
    FoldState(gates=gates).save(tmp_path / "native" / STATE_FILE)
    base, batch = ARCHITECTURES["llama"].build(), ARCHITECTURES["llama"].batch()
    report = export_folder(tmp_path / "native", tmp_path / "a", plan=plan, base=base, batch=batch)
    assert (report.r, report.ranks[0]) == (4, 1)
    assert report.logit_error is None
    assert any("logits were not compared" in note for note in report.notes)


def test_a_live_model_with_gates_is_verified_with_its_hooks_on(tmp_path):
    model, plan = trained("llama", ranks=(2, 5))
    gates, handles = {}, []
    for name, layer in adapted_layers(model).items():
        gate = torch.linspace(0, 1, layer.rank)
        gates[name] = gate
        hook = lambda module, inputs, output, gate=gate: output * gate  # noqa: E731
        handles.append(layer.module.lora_A["default"].register_forward_hook(hook))
    batch = ARCHITECTURES["llama"].batch()
    report = export_adapter(model, tmp_path / "a", state=FoldState(gates=gates), plan=plan, batch=batch)
    assert report.logit_error < 1e-5
    with pytest.raises(VerificationError):
        export_adapter(model, tmp_path / "b", plan=plan, batch=batch)


@pytest.mark.parametrize("layout", ["uniform", "compact", "per_rank"])
def test_an_adapter_whose_gates_are_all_off_equals_the_base_model(tmp_path, layout):
    model, plan = trained("llama", ranks=(2, 5))
    handles = [
        layer.module.lora_A["default"].register_forward_hook(lambda module, inputs, output: output * 0)
        for layer in adapted_layers(model).values()
    ]
    state = FoldState(gates={name: torch.zeros(rank) for name, rank in plan.ranks.items()})
    batch = ARCHITECTURES["llama"].batch()
    report = export_adapter(model, tmp_path / "a", layout=layout, state=state, plan=plan, batch=batch)
    assert (report.r, report.ranks) == (1, (0, 0.0, 0))
    assert report.logit_error == 0
    assert any("no layer has a rank" in note for note in report.notes)
    assert all(verdict.status == "ok" for verdict in report.verdicts if verdict.evidence == "run")
    assert len(handles) == 14


def test_a_damaged_source_writes_nothing(tmp_path):
    model, _ = trained("llama", ranks=(2,))
    save_native(model, tmp_path / "native")
    weights = tmp_path / "native" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ArtifactError):
        export_folder(tmp_path / "native", tmp_path / "out" / "a")
    assert _siblings(tmp_path / "native") == ["native"]


def test_the_refusal_to_overwrite_says_how_to_allow_it_on_the_command_line_and_in_python(llama, tmp_path):
    model, plan = llama
    export_adapter(model, tmp_path / "a", plan=plan)
    with pytest.raises(OutputError, match=r"with --overwrite \(overwrite=True\)"):
        export_adapter(model, tmp_path / "a", plan=plan)


def test_a_place_that_cannot_be_written_is_refused_before_the_adapter_is_read(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(OutputError, match=r"cannot be made: .*file is not a folder"):
            export_folder(tmp_path / "no adapter", folder)
    with pytest.raises(OutputError, match="file is a file; name a folder"):
        export_folder(tmp_path / "no adapter", tmp_path / "file")
    assert _content(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that even root cannot write into")
def test_a_folder_that_the_system_refuses_to_make_is_refused_with_its_reason(tmp_path):
    with pytest.raises(OutputError, match=r"/proc/x/y cannot be written: a folder in /proc cannot be made \(.+\)"):
        export_folder(tmp_path / "no adapter", Path("/proc/x/y"))


def test_a_writable_place_is_left_as_it_was(tmp_path):
    staging.refuse_unwritable(tmp_path / "new" / "a")
    staging.refuse_unwritable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_cannot_be_made_after_all_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written"), staging.staged_folder(tmp_path / "file" / "a"):
        pass


@pytest.mark.parametrize("layout", ["uniform", "merged"])
def test_a_base_of_another_family_is_refused_with_both_names(llama, tmp_path, layout):
    model, plan = llama
    save_native(model, tmp_path / "native")
    options = {"base": ARCHITECTURES["bert"].build(), "batch": ARCHITECTURES["bert"].batch(), "plan": plan}
    message = (
        r"--base: .*\(BertForSequenceClassification\) is not the base of .*native: (\d+) of \1 layers are missing "
        r"\(first model\.layers\.0\..+\); adapter_config\.json names "
    )
    with pytest.raises(ModelError, match=message):
        export_folder(tmp_path / "native", tmp_path / "a", layout=layout, **options)
    assert not (tmp_path / "a").exists()


def test_a_base_of_another_size_is_refused_with_both_sizes(llama, tmp_path):
    model, plan = llama
    save_native(model, tmp_path / "native")
    base = ARCHITECTURES["llama"].build()
    layer = base.model.layers[0].self_attn
    layer.q_proj = torch.nn.Linear(3, 5)
    message = r"1 of \d+ layers have other sizes \(first .*q_proj is \[5, 3\] there and \[\d+, \d+\] in the adapter\)"
    with pytest.raises(ModelError, match=message):
        export_folder(tmp_path / "native", tmp_path / "a", base=base, plan=plan)
