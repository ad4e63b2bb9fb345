"""LoRA-GA from attach to export on whole models: the acceptance properties that need one (lora_ga.md section 6)."""

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from rankwise.adapters.attach import adapter_disabled
from rankwise.adapters.fingerprint import weights_fingerprint
from rankwise.adapters.state import STATE_FILE
from rankwise.errors import CalibrationError, CheckpointError, ConfigError, HealthError, RecipeError, TargetError
from rankwise.linalg.factors import stack
from rankwise.methods.base import Method
from rankwise.methods.lora_ga import LoRAGA
from rankwise.training.attach import Calibration, attach, plan
from rankwise.training.session import Session
from rankwise.training.state import resume
from tests.calibration.support import label_tokens, reference, relative
from tests.support.models import causal_batch, tiny_gpt2, tiny_llama

BATCHES = [causal_batch(seed) for seed in range(3)]


def session_of(
    method: LoRAGA | None = None, *more: Method | str, base: nn.Module | None = None, **options: Any
) -> Session:
    options = {"r": 4, "calibration": BATCHES, **options}
    return attach(base or tiny_llama(), [method or LoRAGA(), *more], **options)


def logits(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(batch or causal_batch(9))).logits


def train(session: Session, steps: int = 4, *, lr: float = 5e-3, seed: int = 20) -> None:
    """A bare loop of plain AdamW."""
    parameters = [p for layer in session.layers.values() for p in (layer.lora_A, layer.lora_B)]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    session.model.train()
    session.begin(optimizer, steps)
    for step in range(1, steps + 1):
        session.before_step(step)
        session.model(**causal_batch(seed + step)).loss.backward()
        session.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
        session.after_step(step)
    session.end(steps)
    session.model.eval()


def served(folder: Any, base: nn.Module) -> Tensor:
    return logits(PeftModel.from_pretrained(base, folder).eval())


# --- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("offset", ["adapter", "base"])
def test_at_step_0_the_model_is_the_base_model(build, offset):
    wanted = logits(build())
    session = session_of(LoRAGA(offset=offset, on_small="cap"), base=build(), r=8)
    found = logits(session.model)
    assert torch.equal(found, wanted) if offset == "adapter" else (found - wanted).abs().max() <= 1e-5
    if offset == "adapter":
        with adapter_disabled(session.model):
            assert torch.equal(logits(session.model), wanted)
    assert session.offset is not None
    with session.offset.base_as_found(), adapter_disabled(session.model):
        assert torch.equal(logits(session.model), wanted)


def test_without_an_offset_it_is_not():
    wanted = logits(tiny_llama())
    session = session_of(LoRAGA(offset="none"))
    assert session.offset is None
    assert (logits(session.model) - wanted).abs().max() > 1e-2


def test_on_a_bfloat16_base_it_is_bit_for_bit():
    wanted = logits(tiny_llama(dtype=torch.bfloat16))
    session = session_of(base=tiny_llama(dtype=torch.bfloat16))
    assert torch.equal(logits(session.model), wanted)
    session.close()
    moved = session_of(LoRAGA(offset="base"), base=tiny_llama(dtype=torch.bfloat16))
    assert (logits(moved.model) - wanted).abs().max() <= 2e-2


@pytest.mark.parametrize("statistics", ["exact", "sketch"])
def test_the_first_step_goes_along_the_gradient_of_the_batches(statistics):
    """With r at half a layer's size nothing is left out: M is c times the whole gradient."""
    session = session_of(LoRAGA(statistics=statistics), r=8, target_modules=["k_proj", "v_proj"])
    wanted = reference(tiny_llama(), BATCHES, label_tokens)
    for name, layer in session.layers.items():
        A, B, G = layer.lora_A.detach().double(), layer.lora_B.detach().double(), wanted[name]
        M = B @ B.mT @ G + G @ A.mT @ A
        assert relative(M, layer.base.shape.out_features**0.5 / 16 * G) <= 1e-4


def test_the_session_tells_the_error_of_the_start():
    for method, source in ((LoRAGA(), "whole gradients"), (LoRAGA(statistics="sketch"), "a sketch of 2 readings")):
        notes = session_of(method).notes
        assert any("relative error of 0." in note and source in note for note in notes)
        assert any("by layer: model.layers.0.self_attn.q_proj 0." in note for note in notes)


def test_layers_that_are_too_small_are_refused_before_calibration_or_capped():
    read = []
    counted = Calibration(batches=BATCHES, on_batch=lambda *_: read.append(1))
    with pytest.raises(ConfigError, match=r"k_proj \(16 x 32\) has 16 singular vectors, and rank 9 takes 18"):
        session_of(r=9, calibration=counted)
    with pytest.raises(ConfigError, match="on_small: cap"):
        plan(tiny_llama(), LoRAGA(), r=9)
    assert not read
    session = session_of(LoRAGA(on_small="cap"), r=9)
    layer = session.layers["model.layers.0.self_attn.k_proj"]
    assert layer.lora_B[:, :8].any(0).all()
    assert not layer.lora_B[:, 8:].any()
    assert any("too few singular vectors for 2r in 4 layers" in note for note in session.notes)


def test_a_plan_of_lower_ranks_suits_small_layers():
    made = plan(tiny_llama(), "lora", r=9, lora_alpha=16)
    edited = made.with_ranks({name: min(rank, 8) for name, rank in made.ranks.items()})
    session = session_of(plan=edited, r=9)
    assert torch.equal(logits(session.model), logits(tiny_llama()))


@pytest.mark.parametrize("power_iterations", [0, 1])
def test_a_sketch_is_as_wide_as_each_layer_of_an_uneven_plan_needs(power_iterations):
    made = plan(tiny_llama(), "lora", r=2, lora_alpha=16)
    name = "model.layers.1.mlp.down_proj"
    edited = made.with_ranks({**dict.fromkeys(made.ranks, 1), name: 12})
    method = LoRAGA(statistics="sketch", power_iterations=power_iterations)
    session = session_of(method, plan=edited, r=2)
    assert session.layers[name].lora_B.any(0).all()
    assert session.layers[name].rank == 12


class Gated(nn.Module):
    """One layer of which the loss sees only zeros, beside one that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.config = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.seen, self.hidden = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(x) + 0.0 * self.hidden(x)


def squares(model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
    return model(batch).square().mean(), float(len(batch))


def test_a_layer_without_gradient_starts_as_plain_lora_without_an_offset():
    session = attach(
        Gated(), LoRAGA(), r=2, calibration=[torch.ones(3, 8)], loss=squares, target_modules=["seen", "hidden"]
    )
    assert session.offset is not None
    assert list(session.offset.pairs) == ["seen"]
    assert not session.layers["hidden"].lora_B.any()
    assert any("warning: no gradient in layer hidden: started as plain LoRA" in note for note in session.notes)


def test_it_needs_calibration_batches():
    with pytest.raises(CalibrationError, match="lora-ga needs gradient statistics"):
        attach(tiny_llama(), LoRAGA(), r=4)


def test_a_cache_of_another_request_is_refused(tmp_path):
    file = tmp_path / "statistics.safetensors"

    def cached(method: LoRAGA) -> Session:
        return session_of(method, calibration=Calibration(batches=BATCHES, cache=file))

    one = cached(LoRAGA(statistics="sketch"))
    two = cached(LoRAGA(statistics="sketch"))
    assert two.calibration is not None
    assert two.calibration.from_cache
    for name, layer in one.layers.items():
        assert torch.equal(layer.lora_A, two.layers[name].lora_A)
    for other in (LoRAGA(), LoRAGA(statistics="sketch", power_iterations=2)):
        with pytest.raises(CalibrationError, match="statistics taken with another request"):
            cached(other)


# --- training, export, resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", ["adapter", "base"])
@pytest.mark.parametrize("more", [(), ("rora",)])
def test_an_export_on_the_original_base_is_the_trained_model(tmp_path, offset, more):
    session = session_of(LoRAGA(offset=offset), *more)
    before = weights_fingerprint(tiny_llama())
    train(session)
    report = session.export(tmp_path / "adapter", batch=causal_batch(9))
    assert report.ranks == (8, 8.0, 8)
    assert report.logit_error <= 1e-5
    trained = logits(session.model)
    assert (served(tmp_path / "adapter", tiny_llama()) - trained).abs().max() <= 1e-5 * trained.abs().max()
    if offset == "adapter":
        assert weights_fingerprint(session.model) == before
    session.close()
    assert weights_fingerprint(session.model) == before


def test_an_export_of_an_untrained_model_changes_nothing(tmp_path):
    session = session_of()
    session.export(tmp_path / "adapter", batch=causal_batch(9))
    assert (served(tmp_path / "adapter", tiny_llama()) - logits(tiny_llama())).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float64])
def test_both_offsets_train_alike(dtype):
    ends = []
    for offset in ("adapter", "base"):
        session = session_of(LoRAGA(offset=offset))
        session.model.to(dtype)
        train(session, 20, lr=2e-4)
        ends.append([p.detach().clone() for x in session.layers.values() for p in (x.lora_A, x.lora_B)])
        session.close()
    assert max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*ends, strict=True)) <= 1e-5


def test_resuming_puts_the_stored_offset_back_bit_for_bit_and_never_computes_it_again(tmp_path):
    session = session_of()
    train(session)
    session.save(tmp_path / "checkpoint-4")
    again = resume(tiny_llama(), tmp_path / "checkpoint-4")
    assert again.offset is not None
    assert session.offset is not None
    assert again.offset.pairs.keys() == session.offset.pairs.keys()
    for name, pair in session.offset.pairs.items():
        assert torch.equal(again.offset.pairs[name].lora_A, pair.lora_A)
        assert torch.equal(again.offset.pairs[name].lora_B, pair.lora_B)
    again.model.eval()
    assert torch.equal(logits(again.model), logits(session.model))


def test_a_checkpoint_that_lost_its_offset_is_not_resumed(tmp_path):
    session = session_of()
    session.save(tmp_path / "checkpoint-0")
    (tmp_path / "checkpoint-0" / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match=STATE_FILE):
        resume(tiny_llama(), tmp_path / "checkpoint-0")


def test_tied_weights_are_refused():
    with pytest.raises(TargetError, match="lm_head"):
        session_of(base=tiny_llama(tied=True), target_modules=["q_proj", "lm_head"])


def test_a_layer_that_stayed_at_its_start_holds_no_update():
    session = session_of()
    parameters = [p for layer in session.layers.values() for p in (layer.lora_A, layer.lora_B)]
    optimizer = torch.optim.SGD(parameters, lr=1e-30)
    session.model.train()
    session.begin(optimizer, 1)
    session.before_step(1)
    session.model(**causal_batch()).loss.backward()
    session.before_optimizer_step(1)
    optimizer.step()
    session.after_step(1)
    with pytest.raises(HealthError, match=r"movement|update"):
        session.end(1)


def test_an_update_of_the_guard_is_the_difference_of_both_products():
    from rankwise.adapters.state import FactorPair, FoldState
    from rankwise.training.guard import _update_norm

    session = session_of()
    name, layer = next(iter(session.layers.items()))
    assert session.offset is not None
    pair = session.offset.pairs[name]
    assert _update_norm(layer, FoldState(offsets={name: pair})) == 0.0
    with torch.no_grad():
        layer.lora_B.add_(1e-4)
    A, B = stack([(layer.lora_A.detach(), layer.lora_B.detach(), 1.0), (pair.lora_A, pair.lora_B, -1.0)])
    wanted = layer.scaling * float((B.double() @ A.double()).norm())
    assert _update_norm(layer, FoldState(offsets={name: pair})) == pytest.approx(wanted, rel=1e-4)
    zero = FactorPair(torch.zeros_like(pair.lora_A), torch.zeros_like(pair.lora_B))
    zeros = FoldState(offsets={name: zero})
    assert _update_norm(layer, zeros) == pytest.approx(_update_norm(layer, FoldState()), rel=1e-6)


# --- company --------------------------------------------------------------------------------------------------------


def test_gora_and_lora_ga_both_start_the_factors():
    with pytest.raises(RecipeError, match="lora-ga and gora both fill the initialize slot"):
        session_of(LoRAGA(), "gora")


def test_rora_scales_it():
    session = session_of(LoRAGA(), "rora")
    assert {layer.scaling for layer in session.layers.values()} == {8.0}
    assert torch.equal(logits(session.model), logits(tiny_llama()))


def test_the_checkpoint_says_what_is_subtracted(tmp_path):
    session = session_of()
    session.save(tmp_path / "checkpoint-0")
    marker = json.loads((tmp_path / "checkpoint-0" / "rankwise.json").read_text())
    assert marker["offset"]["place"] == "adapter"
    assert len(marker["offset"]["layers"]) == len(session.layers)
