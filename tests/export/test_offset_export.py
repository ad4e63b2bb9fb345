"""An adapter trained beside an offset leaves as a plain one: exact at rank 2r, or smaller with its loss told."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rankwise.adapters.attach import adapted_layers, write_factors
from rankwise.adapters.offset import LiveOffset
from rankwise.adapters.state import STATE_FILE, FactorPair, FoldState
from rankwise.errors import ArtifactError, ConfigError, ExportError, VerificationError
from rankwise.export.compress import compress_adapter
from rankwise.export.files import peft_scaling, read_adapter, split_tensors
from rankwise.export.fold import FoldedAdapter, fold
from rankwise.export.write import export_adapter, export_folder
from rankwise.methods.lora_ga import LoRAGA
from rankwise.ranks.shapes import ScalingRule
from rankwise.training.attach import attach
from rankwise.training.session import Session
from tests.export.trained import ARCHITECTURES, trained
from tests.support.models import causal_batch, tiny_llama

BATCH = {key: value for key, value in causal_batch(9).items() if key != "labels"}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def beside_offset(
    name: str = "llama", place: str = "adapter", *, moved: float = 0.02, **options: object
) -> tuple[PeftModel, LiveOffset]:
    """A model of uneven ranks whose factors moved away from a start that is subtracted again."""
    model, _ = trained(name, size=0.2, **options)
    layers = adapted_layers(model)
    pairs = {n: FactorPair(x.lora_A.detach().clone(), x.lora_B.detach().clone()) for n, x in layers.items()}
    offset = LiveOffset(model, layers, pairs, place)
    for number, layer in enumerate(layers.values()):
        write_factors(
            layer,
            layer.lora_A.detach() + moved * drawn(*layer.lora_A.shape, seed=2 * number),
            layer.lora_B.detach() + moved * drawn(*layer.lora_B.shape, seed=2 * number + 1),
        )
    return model, offset


def session_of(tmp_path: Path, offset: str = "adapter") -> tuple[Session, Path]:
    """A short run and its checkpoint."""
    session = attach(tiny_llama(), LoRAGA(offset=offset), r=4, calibration=[causal_batch(seed) for seed in range(2)])
    for number, layer in enumerate(session.layers.values()):
        with torch.no_grad():
            layer.lora_B.add_(0.02 * drawn(*layer.lora_B.shape, seed=number))
    session.save(tmp_path / "run" / "checkpoint-0")
    return session, tmp_path / "run" / "checkpoint-0"


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def dense_updates(folder: Path) -> dict[str, Tensor]:
    files = read_adapter(folder)
    pairs, _ = split_tensors(files.tensors)
    return {n: peft_scaling(files.config, n) * p.lora_B.double() @ p.lora_A.double() for n, p in pairs.items()}


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["uniform", "compact", "per_rank"])
@pytest.mark.parametrize("rule", [ScalingRule.ALPHA_OVER_SQRT_RANK, ScalingRule.ALPHA_OVER_RANK])
@pytest.mark.parametrize("place", ["adapter", "base"])
def test_uneven_ranks_and_scalings_convert_exactly_where_peft_refuses(tmp_path, layout, rule, place):
    """PEFT's conversion knows no rsLoRA with patterns (common.md, peft#1930)."""
    model, offset = beside_offset(place=place, rule=rule)
    layers = adapted_layers(model)
    assert len({layer.scaling for layer in layers.values()}) > 3
    report = export_adapter(model, tmp_path / "out", layout=layout, offset=offset, batch=BATCH)
    found = dense_updates(tmp_path / "out")
    for name, layer in layers.items():
        pair = offset.pairs[name]
        A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        wanted = layer.scaling * (B @ A - pair.lora_B.double() @ pair.lora_A.double())
        assert (found[name] - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert report.logit_error <= 1e-5
    assert report.ranks == (2, pytest.approx(report.ranks[1]), 18)
    fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    assert (logits(fresh) - logits(model)).abs().max() <= 1e-5 * logits(model).abs().max()


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_other_architectures_too(tmp_path, name):
    model, offset = beside_offset(name)
    batch = ARCHITECTURES[name].batch()
    fresh = ARCHITECTURES[name].build()
    report = export_adapter(model, tmp_path / "out", offset=offset, batch=batch, fresh=fresh)
    assert report.logit_error <= 1e-5


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_merged_weights_are_the_original_ones_plus_the_difference(tmp_path, place):
    model, offset = beside_offset(place=place)
    wanted, before = logits(model), {n: x.base.module.weight.clone() for n, x in adapted_layers(model).items()}
    report = export_adapter(model, tmp_path / "out", layout="merged", offset=offset, batch=BATCH, fresh=tiny_llama())
    assert report.logit_error <= 1e-5
    assert all(torch.equal(x.base.module.weight, before[n]) for n, x in adapted_layers(model).items())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits(merged) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("moved", [1e-2, 1e-4])
def test_a_short_run_survives_16_bit_files(tmp_path, dtype, moved):
    """Rounded as two large products, the difference would be lost in their rounding."""
    model, offset = beside_offset(moved=moved)
    report = export_adapter(model, tmp_path / "out", offset=offset, dtype=dtype, batch=BATCH)
    assert report.verification.update_error <= 1e-2


def test_an_untrained_adapter_updates_nothing(tmp_path):
    model, offset = beside_offset(moved=0.0)
    export_adapter(model, tmp_path / "out", offset=offset, batch=BATCH)
    assert all(not update.any() for update in dense_updates(tmp_path / "out").values())
    assert (
        logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()) - logits(tiny_llama())
    ).abs().max() <= 1e-6


def test_the_base_is_moved_back_where_it_was_also_after_a_failure(tmp_path, monkeypatch):
    model, offset = beside_offset(place="base")
    before, computed = {n: x.base.module.weight.clone() for n, x in adapted_layers(model).items()}, logits(model)
    export_adapter(model, tmp_path / "good", offset=offset, batch=BATCH)
    wrong = {n: FactorPair(p.lora_A, 1.5 * p.lora_B) for n, p in offset.pairs.items()}
    with pytest.raises(VerificationError, match="logits"):
        export_adapter(model, tmp_path / "bad", state=FoldState(offsets=wrong), offset=offset, batch=BATCH)
    assert not (tmp_path / "bad").exists()
    assert all(torch.equal(x.base.module.weight, before[n]) for n, x in adapted_layers(model).items())
    assert torch.equal(logits(model), computed)


@pytest.mark.parametrize("batch", [None, BATCH])
@pytest.mark.parametrize("place", ["adapter", "base"])
def test_an_export_that_forgets_the_offset_is_refused(tmp_path, place, batch):
    model, offset = beside_offset(place=place)
    with pytest.raises(ExportError, match=r"use session\.export\(folder\), or pass offset=session\.offset"):
        export_adapter(model, tmp_path / "out", batch=batch)
    with pytest.raises(ExportError, match="trains beside an offset"):
        export_adapter(model, tmp_path / "out", batch=batch, state=FoldState())
    assert not (tmp_path / "out").exists()
    state = FoldState(offsets=offset.pairs)  # the live offset itself is found on the model
    assert export_adapter(model, tmp_path / "out", batch=BATCH, state=state).logit_error <= 1e-5
    offset.close()
    export_adapter(model, tmp_path / "whole", batch=BATCH)  # the model now computes its whole update


def test_a_start_without_any_offset_to_take_off_needs_none(tmp_path):
    model, _ = trained("llama")
    LiveOffset(model, adapted_layers(model), {}, "adapter")
    assert export_adapter(model, tmp_path / "out", batch=BATCH).logit_error <= 1e-5


def test_rounding_of_a_16_bit_base_is_told_against_the_trained_update(tmp_path):
    session = attach(
        tiny_llama().to(torch.bfloat16),
        LoRAGA(offset="base"),
        r=4,
        calibration=[causal_batch(seed) for seed in range(2)],
    )
    assert sum("rounding W - s B0 A0 to bfloat16 changed the weights by up to" in note for note in session.notes) == 1
    session.save(tmp_path / "checkpoint-0")
    with pytest.raises(
        VerificationError, match=r"q_proj: rounding changed the base weight by .*(?s:.)*offset: adapter"
    ):
        session.export(tmp_path / "out")
    with pytest.raises(VerificationError, match="training by 0"):
        export_folder(tmp_path / "checkpoint-0", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for number, layer in enumerate(session.layers.values()):
        with torch.no_grad():
            layer.lora_B.add_(0.1 * drawn(*layer.lora_B.shape, seed=number))
    session.save(tmp_path / "checkpoint-1")
    wanted = max(
        error / float(torch.linalg.matrix_norm(layer.scaling * (layer.lora_B.detach() - start.lora_B) @ start.lora_A))
        for (name, error), layer in zip(session.offset.cast_errors.items(), session.layers.values(), strict=True)
        for start in [session.offset.pairs[name]]
    )
    for report in (
        session.export(tmp_path / "live"),
        export_folder(tmp_path / "checkpoint-1", tmp_path / "stored"),
    ):
        (note,) = [note for note in report.notes if "rounding of the 16-bit base" in note]
        assert f"up to {wanted:.3g} of the trained update" in note
    session.close()


def test_rounding_of_a_float32_base_is_not_told():
    session = attach(tiny_llama(), LoRAGA(offset="base"), r=4, calibration=[causal_batch(0)])
    assert session.offset.cast_errors == {}
    assert not any("rounding" in note for note in session.notes)
    session.close()


class Linear8bitLt(torch.nn.Linear):
    """Stands for bitsandbytes' layer: int8 rows, float scales beside them, products rounded to 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.bfloat16() @ (self.weight.float() * self.weight.SCB[:, None] / 127).T.bfloat16()).float()


def test_a_packed_base_is_compared_as_its_kernels_round(tmp_path):
    model, offset = beside_offset()
    for layer in adapted_layers(model).values():
        dense, packed = layer.base.module.weight.detach(), Linear8bitLt(1, 1, bias=False)
        scales = dense.abs().amax(1)
        packed.in_features, packed.out_features = dense.shape[1], dense.shape[0]
        packed.weight = torch.nn.Parameter((dense / scales[:, None] * 127).round().to(torch.int8), requires_grad=False)
        packed.weight.SCB = scales
        layer.module.base_layer = packed
    report = export_adapter(model, tmp_path / "out", offset=offset, batch=BATCH)
    assert report.verification.update_bound == 1e-5
    assert report.verification.logit_bound == 5e-2


# --- from a checkpoint ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", ["adapter", "base"])
@pytest.mark.parametrize("layout", ["uniform", "merged"])
def test_a_checkpoint_exports_to_the_trained_model_on_the_original_base(tmp_path, offset, layout):
    session, checkpoint = session_of(tmp_path, offset)
    wanted = logits(session.model.eval())
    base = tiny_llama()
    report = export_folder(checkpoint, tmp_path / "out", layout=layout, base=base, batch=BATCH)
    assert report.logit_error <= 1e-5
    assert torch.equal(logits(base), logits(tiny_llama()))
    if layout == "uniform":
        found = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval())
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_checkpoint_without_its_state_is_refused(tmp_path):
    _, checkpoint = session_of(tmp_path)
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(ArtifactError, match=rf"{STATE_FILE} is missing: .*the\s+adapter would be wrong"):
        export_folder(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_state_of_another_checkpoint_is_refused(tmp_path):
    _, checkpoint = session_of(tmp_path)
    state = load_file(checkpoint / STATE_FILE)
    save_file({name: tensor + 1 for name, tensor in state.items()}, checkpoint / STATE_FILE)
    with pytest.raises(ArtifactError, match="is not the file that was written with this checkpoint"):
        export_folder(checkpoint, tmp_path / "out")


def test_a_state_that_lacks_a_layer_is_refused(tmp_path):
    _, checkpoint = session_of(tmp_path)
    state = FoldState.load(checkpoint / STATE_FILE)
    lost = next(iter(state.offsets))
    replace(state, offsets={n: p for n, p in state.offsets.items() if n != lost}).save(checkpoint / STATE_FILE)
    marker = json.loads((checkpoint / "rankwise.json").read_text())
    del marker["files"][STATE_FILE]
    (checkpoint / "rankwise.json").write_text(json.dumps(marker))
    with pytest.raises(ArtifactError, match=f"lacks the offset of {lost}"):
        export_folder(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_a_plain_save_is_exported_whole(tmp_path, place):
    model, offset = beside_offset(place=place)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "trainer_state.json").write_text("{}")  # Trainer.save_state
    report = export_folder(tmp_path / "plain", tmp_path / "out", base=tiny_llama(), batch=BATCH)
    assert report.logit_error <= 1e-5
    found = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval())
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    offset.close()
    model.save_pretrained(tmp_path / "closed")
    assert not (tmp_path / "closed" / STATE_FILE).exists()


def plainly_saved(folder: Path) -> Path:
    """As stock Trainer leaves a checkpoint of an adapter."""
    model, _ = trained("llama")
    model.save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_an_unfinished_checkpoint_of_a_run_is_refused(tmp_path):
    """By what lies in it, beside it or above it."""
    session, checkpoint = session_of(tmp_path)
    unfinished = plainly_saved(checkpoint.parent / "checkpoint-5")
    with pytest.raises(ArtifactError, match=r"checkpoint-5: an unfinished checkpoint: its marker rankwise\.json"):
        export_folder(unfinished, tmp_path / "out")
    session.model.save_pretrained(tmp_path / "alone" / "checkpoint-7")
    with pytest.raises(ArtifactError, match="an unfinished checkpoint"):
        export_folder(tmp_path / "alone" / "checkpoint-7", tmp_path / "out")
    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "rankwise.json").write_text('{"format": "rankwise-run"}')
    for name in ("checkpoint-3", "renamed"):
        with pytest.raises(ArtifactError, match="an unfinished checkpoint"):
            export_folder(plainly_saved(tmp_path / "above" / name), tmp_path / "out")
    (checkpoint / "rankwise.json").write_text("{")
    with pytest.raises(ArtifactError, match="missing or damaged"):
        export_folder(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_factors_of_another_step_than_the_marker_s_are_refused(tmp_path):
    session, checkpoint = session_of(tmp_path)
    with torch.no_grad():
        next(iter(session.layers.values())).lora_B.add_(1.0)
    session.model.save_pretrained(checkpoint)  # Trainer, killed before the callback took the marker away
    with pytest.raises(ArtifactError, match="is not the file that was written with this checkpoint"):
        export_folder(checkpoint, tmp_path / "out")


def test_a_checkpoint_of_a_stock_run_is_exported_with_a_note(tmp_path):
    report = export_folder(plainly_saved(tmp_path / "run" / "checkpoint-5"), tmp_path / "out")
    assert any("taken for a stock PEFT run's" in note for note in report.notes)


def test_without_an_offset_the_plain_adapter_is_right(tmp_path):
    session, checkpoint = session_of(tmp_path, "none")
    (checkpoint / STATE_FILE).unlink()
    report = export_folder(checkpoint, tmp_path / "out", base=tiny_llama(), batch=BATCH)
    assert report.ranks == (4, 4.0, 4)
    session.close()


# --- fewer ranks ----------------------------------------------------------------------------------------------------


def discarded_by_hand(folded: FoldedAdapter, max_rank: int) -> tuple[dict[str, float], float]:
    shares, lost, whole = {}, 0.0, 0.0
    for name, layer in folded.layers.items():
        values = torch.linalg.svdvals(layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).square()
        whole += float(values.sum())
        if layer.rank > max_rank:
            lost += float(values[max_rank:].sum())
            shares[name] = float(values[max_rank:].sum() / values.sum()) ** 0.5
    return shares, (lost / whole) ** 0.5


@pytest.mark.parametrize("max_rank", [1, 4, 9])
def test_fewer_ranks_discard_what_the_dense_svd_says(max_rank):
    model, offset = beside_offset()
    folded = fold(model, FoldState(offsets=offset.pairs))
    compressed, told = compress_adapter(folded, max_rank)
    shares, total = discarded_by_hand(folded, max_rank)
    assert told.discarded == pytest.approx(shares, rel=1e-4, abs=1e-6)
    assert told.total == pytest.approx(total, rel=1e-4)
    assert all(layer.rank <= max_rank for layer in compressed.layers.values())
    untouched = [name for name, layer in folded.layers.items() if layer.rank <= max_rank]
    assert all(compressed.layers[name] is folded.layers[name] for name in untouched)


def test_an_export_of_fewer_ranks_tells_what_it_lost_and_is_held_against_the_rest(tmp_path):
    model, offset = beside_offset()
    report = export_adapter(model, tmp_path / "out", offset=offset, max_rank=4, batch=BATCH)
    assert report.r == 4
    assert report.compression.total > 0.05
    assert report.verification.update_error <= 1e-5  # against the compressed update
    assert report.verification.logit_bound is None
    assert report.logit_error > 1e-4  # against the trained model
    written = report.to_dict()["compression"]
    assert written["max_rank"] == 4
    assert set(written["discarded"]) == {n for n, x in adapted_layers(model).items() if 2 * x.rank > 4}
    assert any(note.startswith("warning: max_rank 4: re-compressing") for note in report.notes)
    json.dumps(report.to_dict())


def test_ranks_that_hold_nothing_cost_nothing(tmp_path):
    """Where only lora_B moved, the update of rank 2r has rank r."""
    model, offset = beside_offset(moved=0.0)
    for number, layer in enumerate(adapted_layers(model).values()):
        write_factors(
            layer, layer.lora_A.detach(), layer.lora_B.detach() + 0.1 * drawn(*layer.lora_B.shape, seed=number)
        )
    report = export_adapter(model, tmp_path / "out", offset=offset, max_rank=9, batch=BATCH)
    assert report.compression.total <= 1e-6
    assert report.r == 9
    assert report.verification.logit_bound == 1e-5
    assert report.logit_error <= 1e-5


def test_nothing_is_compressed_where_no_layer_has_more_ranks(tmp_path):
    model, offset = beside_offset()
    report = export_adapter(model, tmp_path / "out", offset=offset, max_rank=18, batch=BATCH)
    assert report.compression.discarded == {}
    assert report.logit_error <= 1e-5
    assert "max_rank 18: no layer had more ranks; nothing was discarded." in report.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rank": 0}, "max_rank: 0 is not possible"),
        ({"max_rank": True}, "max_rank: True"),
        ({"max_rank": 2, "layout": "merged"}, "merged weights hold every rank"),
    ],
)
def test_a_max_rank_that_cannot_be_is_refused(tmp_path, options, message):
    model, offset = beside_offset()
    with pytest.raises(ConfigError, match=message):
        export_adapter(model, tmp_path / "out", offset=offset, **options)
    assert not (tmp_path / "out").exists()


def test_the_command_line_prints_the_loss_of_each_layer_and_of_all(tmp_path):
    from rankwise.cli.main import app

    _, checkpoint = session_of(tmp_path)
    run = CliRunner().invoke(app, ["export", str(checkpoint), "-o", str(tmp_path / "out"), "--max-rank", "2"])
    assert run.exit_code == 0, run.output
    assert "re-compressed to rank 2" in run.output
    assert "all layers together" in run.output
    assert run.output.count("self_attn.q_proj") >= 2


def test_a_health_check_says_what_a_lossy_export_equals(tmp_path):
    session, _ = session_of(tmp_path)
    session.export(tmp_path / "out", max_rank=2, batch=BATCH)
    check = next(check for check in session.health.checks if check.id == "export")
    assert "re-compressed to rank 2" in check.message
