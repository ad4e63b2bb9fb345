"""A schedule, and a start that is subtracted: saved with each checkpoint, found again by resume, gone with close."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard

from rankwise.adapters.fingerprint import weights_fingerprint
from rankwise.adapters.state import STATE_FILE
from rankwise.errors import CheckpointError, ConfigError, ExportError, ModelError
from rankwise.methods.lora_ga import LoRAGA
from rankwise.methods.recipe import METHODS
from rankwise.methods.xgblora import XGBLoRA
from rankwise.training.attach import attach
from rankwise.training.marker import MARKER, seal, unseal
from rankwise.training.session import Session
from rankwise.training.state import resume
from tests.support.models import causal_batch, tiny_gpt2, tiny_llama
from tests.training.jobs import factors
from tests.training.stand_ins import Counter, Counting, Scoring

BATCHES = [causal_batch(seed) for seed in range(2)]
ARGS = SimpleNamespace(learning_rate=1e-2, lr_scheduler_type="constant")


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**METHODS, Counting.id: Counting, Scoring.id: Scoring}
    monkeypatch.setattr("rankwise.methods.registry.METHODS", known)


def trained(session: Session, steps: int, *, first: int = 1, optimizer: torch.optim.Optimizer | None = None):
    optimizer = optimizer or session.optimizers(ARGS, 9)[0]
    session.model.train()
    session.begin(optimizer, 9)
    for step in range(first, first + steps):
        session.before_step(step)
        session.model(**causal_batch(step)).loss.backward()
        session.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
        session.after_step(step)
    return optimizer


def saved(methods: object, folder: Path, steps: int = 2) -> Session:
    session = attach(tiny_llama(), methods, r=2, target_modules=["q_proj", "up_proj"], calibration=BATCHES)
    optimizer = trained(session, steps)
    session.save(folder, optimizer=optimizer)
    return session


def rewritten(folder: Path, edit: Callable[[dict], None]) -> None:
    """The marker edited and sealed again, as only another program would."""
    content = json.loads((folder / MARKER).read_text())
    edit(content)
    unseal(folder)
    seal(folder, {key: value for key, value in content.items() if key not in ("format", "version", "files")})


def without(folder: Path, *names: str, **more: torch.Tensor) -> None:
    """The state file without these tensors, in a checkpoint that is sealed again."""
    tensors = load_file(folder / STATE_FILE)
    save_file({name: value for name, value in tensors.items() if name not in names} | more, folder / STATE_FILE)
    rewritten(folder, lambda content: None)


# --- schedules ----------------------------------------------------------------------------------------------------


def test_a_schedule_sees_the_attached_model_and_the_real_optimizer():
    session = attach(tiny_llama(), Counting(), r=2, target_modules=["q_proj"], seed=5)
    assert isinstance(session.schedule, Counter)
    scene = session.schedule.scene
    assert scene.model is session.model
    assert scene.seed == 5
    assert scene.layers.keys() == session.layers.keys()
    assert (scene.validation, dict(scene.offsets)) == (None, {})
    optimizer = trained(session, 1)
    assert session.schedule.optimizer is optimizer
    assert session.schedule.calls == 1


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_a_schedule_knows_of_a_start_beside_the_adapter_and_not_of_one_in_the_weights_that_it_sees(place: str):
    methods = [LoRAGA(offset=place), Counting()]
    session = attach(tiny_llama(), methods, r=2, target_modules=["q_proj"], calibration=BATCHES)
    assert session.schedule.scene.offsets == (session.offset.pairs if place == "adapter" else {})
    session.close()


def test_a_schedule_goes_on_from_a_checkpoint_with_its_values_and_tensors(tmp_path: Path):
    session = saved(Counting(), tmp_path / "checkpoint-2")
    stored = load_file(tmp_path / "checkpoint-2" / STATE_FILE)
    assert torch.equal(stored["method.total"], session.schedule.total)
    marker = json.loads((tmp_path / "checkpoint-2" / MARKER).read_text())
    assert marker["schedule"] == {"id": "counting", "values": {"steps": 2}, "tensors": ["total"], "folds": []}
    again = resume(tiny_llama(), tmp_path / "checkpoint-2")
    assert again.schedule.state_dict().keys() == session.schedule.state_dict().keys()
    assert torch.equal(again.schedule.total, session.schedule.total)
    assert again.schedule.steps == 2
    assert not again.fold_state


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: without(folder, "method.total"), r"method\.total is missing \(1 of 1 of counting's tensors\)"),
        (lambda folder: rewritten(folder, lambda m: m.update(schedule=None)), "the state of counting is not recorded"),
        (
            lambda folder: rewritten(folder, lambda m: m["schedule"].update(id="scoring")),
            "the state of counting is not recorded",
        ),
        (
            lambda folder: rewritten(folder, lambda m: m["schedule"].update(values={"rounds": 2})),
            r"counter: \['rounds', 'total'\] is not its state",
        ),
        (
            lambda folder: rewritten(folder, lambda m: m.update(methods=[{"id": "lora", "settings": {}}])),
            "the state of no schedule is not recorded",
        ),
    ],
    ids=["tensor", "record", "another", "values", "no schedule"],
)
def test_a_schedules_state_that_is_missing_or_anothers_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
):
    folder = tmp_path / "checkpoint-2"
    saved(Counting(), folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        resume(tiny_llama(), folder)


def test_validation_batches_go_to_the_schedule_that_scores_and_to_no_other(tmp_path: Path):
    session = attach(tiny_llama(), Scoring(), r=2, target_modules=["q_proj"], validation=iter(BATCHES))
    assert session.schedule.scene.validation == BATCHES
    session.save(tmp_path / "checkpoint-0")
    with pytest.raises(ConfigError, match="scoring scores on validation batches: pass validation=batches"):
        attach(tiny_llama(), Scoring(), r=2)
    with pytest.raises(ConfigError, match="validation holds no batch"):
        attach(tiny_llama(), Scoring(), r=2, validation=[])
    with pytest.raises(ConfigError, match="counting has none: leave them out"):
        attach(tiny_llama(), Counting(), r=2, validation=BATCHES)
    with pytest.raises(ConfigError, match="pass validation=batches"):
        resume(tiny_llama(), tmp_path / "checkpoint-0")
    again = resume(tiny_llama(), tmp_path / "checkpoint-0", validation=BATCHES)
    assert again.schedule.scene.validation == BATCHES


def test_close_takes_the_schedule_off():
    session = attach(tiny_llama(), Counting(), r=2, target_modules=["q_proj"])
    assert len(session.model._forward_hooks) == 1
    session.close(), session.close()
    assert not session.model._forward_hooks


def test_a_schedule_that_refuses_leaves_no_offset_behind():
    model = tiny_llama()
    before = weights_fingerprint(model)
    with pytest.raises(ConfigError, match=r"counting\.refuses"):
        attach(model, [LoRAGA(offset="base"), Counting(refuses=True)], r=2, calibration=BATCHES)
    assert weights_fingerprint(model) == before


# --- starts that are subtracted ------------------------------------------------------------------------------------


def hooks(session: Session) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in session.model.modules())


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_a_start_that_is_subtracted_computes_the_base_model_and_leaves_it_as_it_was_found(place: str):
    model = tiny_llama()
    before, weights = model(**BATCHES[0]).logits, weights_fingerprint(model)
    session = attach(model, LoRAGA(offset=place), r=2, calibration=BATCHES, target_modules=["q_proj", "up_proj"])
    assert session.offset is not None
    assert session.base_weights == weights
    assert (weights_fingerprint(session.model) == weights) is (place == "adapter")
    assert torch.allclose(session.model(**BATCHES[0]).logits, before, atol=1e-5)
    assert session.fold_state.offsets.keys() == session.layers.keys()
    for name, layer in session.layers.items():
        pair = session.fold_state.offsets[name]
        assert torch.equal(pair.lora_A, layer.lora_A)
        assert torch.equal(pair.lora_B, layer.lora_B)
    trained(session, 1)
    with pytest.raises(ExportError, match="rankwise export"):
        session.model.merge_adapter()
    session.close(), session.close()
    assert weights_fingerprint(session.model) == weights
    assert hooks(session) == 0
    session.model.merge_adapter()


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("place", ["base", "adapter"])
def test_a_base_that_was_moved_and_sharded_since_is_refused_before_the_first_step(place: str):
    session = attach(tiny_llama(), LoRAGA(offset=place), r=2, calibration=BATCHES, target_modules=["q_proj"])
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(session.model, mesh=mesh)
    optimizer, _ = session.optimizers(ARGS, 9)
    if place == "adapter":
        session.begin(optimizer, 9)
    else:
        with pytest.raises(ConfigError, match=r"lora-ga\.offset: base writes the base weights, which FSDP shards"):
            session.begin(optimizer, 9)


@pytest.mark.usefixtures("alone")
def test_a_base_that_boosters_would_be_added_to_and_that_was_sharded_since_is_refused():
    session = attach(tiny_llama(), XGBLoRA(accumulate="merge"), r=2, target_modules=["q_proj"])
    fully_shard(session.model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    optimizer, _ = session.optimizers(ARGS, 9)
    with pytest.raises(ConfigError, match=r"xgblora\.accumulate: merge writes the base weights, which FSDP shards"):
        session.begin(optimizer, 9)
    session.close()


@pytest.mark.usefixtures("alone")
def test_a_resumed_base_with_boosters_that_was_sharded_is_refused_and_the_rest_is_closed(tmp_path: Path):
    """It cannot be given back, which is said once everything else is undone."""
    method = XGBLoRA(accumulate="merge", round_steps=1, layers_fraction=1.0)
    session = attach(tiny_llama(), method, r=2, target_modules=["q_proj"])
    optimizer, _ = session.optimizers(ARGS, 9)
    session.begin(optimizer, 9)
    session.before_step(1)
    session.model(**BATCHES[0]).loss.backward()
    session.before_optimizer_step(1)
    optimizer.step()
    session.after_step(1)
    session.save(tmp_path / "checkpoint-1", optimizer=optimizer)
    resumed = resume(tiny_llama(), tmp_path / "checkpoint-1")
    fully_shard(resumed.model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(ConfigError, match="which FSDP shards"):
        resumed.begin(resumed.optimizers(ARGS, 9)[0], 9)
    with pytest.raises(ModelError, match="sharded after xgblora moved it, so that it cannot be given back"):
        resumed.close()
    modules = dict(resumed.model.named_modules())
    assert not any(module._forward_hooks for name, module in modules.items() if "lora_" in name)
    assert not any("rankwise" in name for name in modules)


def test_without_an_offset_nothing_is_subtracted():
    session = attach(tiny_llama(), LoRAGA(offset="none"), r=2, calibration=BATCHES, target_modules=["q_proj"])
    assert session.offset is None
    assert not session.fold_state
    assert hooks(session) == 0


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_resume_puts_the_stored_start_back_bit_for_bit_and_asks_for_no_gradients(tmp_path: Path, place: str):
    folder = tmp_path / "checkpoint-2"
    session = saved(LoRAGA(offset=place), folder)
    session.model.eval()
    wanted = session.model(**BATCHES[0]).logits
    again = resume(tiny_llama(), folder)
    assert again.offset is not None
    assert again.offset.place == place
    assert again.base_weights == session.base_weights
    for name, pair in session.offset.pairs.items():
        assert torch.equal(again.offset.pairs[name].lora_A, pair.lora_A)
        assert torch.equal(again.offset.pairs[name].lora_B, pair.lora_B)
    assert all(torch.equal(value, factors(again)[name]) for name, value in factors(session).items())
    again.model.eval()
    assert torch.equal(again.model(**BATCHES[0]).logits, wanted)
    again.close()
    with pytest.raises(CheckpointError, match="other weights"):
        resume(tiny_llama(seed=1), folder)
    with pytest.raises(CheckpointError, match="load the model"):
        resume(tiny_gpt2(), folder)


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: without(folder, f"offset.{LAYER}.A", f"offset.{LAYER}.B"),
            rf"offset\.{LAYER}\.A and \.B are missing",
        ),
        (
            lambda folder: without(
                folder, **{f"offset.{LAYER}.A": torch.zeros(3, 32), f"offset.{LAYER}.B": torch.zeros(32, 3)}
            ),
            rf"offset\.{LAYER}\.A has rank 3, the plan gives the layer 2",
        ),
        (
            lambda folder: without(folder, **{"offset.x.A": torch.zeros(2, 32), "offset.x.B": torch.zeros(32, 2)}),
            r"offset\.x\.A and \.B belong to no start; .*the plan gives the layer 0",
        ),
        (
            lambda folder: rewritten(folder, lambda m: m.update(offset=None)),
            r"the start of lora-ga \(offset: adapter\) is not recorded",
        ),
        (
            lambda folder: rewritten(folder, lambda m: m["offset"].update(place="base")),
            r"the start of lora-ga \(offset: adapter\) is not recorded",
        ),
    ],
    ids=["missing", "rank", "extra", "record", "place"],
)
def test_a_start_that_is_missing_or_of_another_plan_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
):
    folder = tmp_path / "checkpoint-2"
    saved("lora-ga", folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        resume(tiny_llama(), folder)


def test_the_optimizer_state_of_another_plan_is_refused(tmp_path: Path):
    saved("lora-rite", tmp_path / "checkpoint-2")
    other = attach(tiny_llama(), "lora-rite", r=4, target_modules=["q_proj", "up_proj"])
    optimizer, _ = other.optimizers(ARGS, 9)
    with pytest.raises(CheckpointError, match=r"another rank plan than the session's.*rw\.resume"):
        other.restore(tmp_path / "checkpoint-2", optimizer)


def test_a_plan_that_is_too_large_for_the_start_is_refused_before_calibration():
    class Unread(list):
        def __iter__(self):
            raise AssertionError("calibration began")

    with pytest.raises(ConfigError, match=r"singular vectors, and rank 12 takes 24: lower r to 8"):
        attach(tiny_llama(), "lora-ga", r=12, calibration=Unread(BATCHES))


def test_what_is_worth_saying_of_the_start_is_among_the_notes():
    session = attach(tiny_llama(), "lora-ga", r=2, calibration=BATCHES, target_modules=["q_proj"])
    assert any("relative error" in note for note in session.notes)
