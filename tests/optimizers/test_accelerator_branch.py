"""What runs on an accelerator, forced on a CPU: whole shapes as one chunk, float64 products, nothing left to the host.

No accelerator is at hand in a default run. The branch is the same code, so that its numbers can be held against those
of the CPU's own branch, and a device of its own (FakeTensor) shows crashes, wrong devices and hidden copies.
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rankwise.methods.lora_pro import LoRAProOptimizer
from rankwise.methods.lora_rite import LoRARITEOptimizer
from rankwise.optimizers import engine, stacks
from tests.optimizers.fake_device import FakeAccelerator, WaitingCopies
from tests.optimizers.support import MAKERS, Pair, copied, dense_gradients, group_of, make, new_pairs, relative, walk

every_kind = pytest.mark.parametrize("kind", sorted(MAKERS))
SHAPES = [(32, 48, 4), (32, 48, 4), (24, 16, 3), (20, 40, 8), (12, 16, 6)]


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch):
    block, tall = engine.Block, engine.PairOptimizer._tall

    def on() -> None:
        monkeypatch.setattr(engine, "Block", lambda **given: block(**{**given, "on_host": False}))
        monkeypatch.setattr(stacks, "_chunk_size", lambda factor: 1 << 30)

        def without_scratch(self, *given):
            found = tall(self, *given)
            found.scratch = None
            return found

        monkeypatch.setattr(engine.PairOptimizer, "_tall", without_scratch)

    return on


@every_kind
@pytest.mark.parametrize("fault", [None, "nan", "missing"])
def test_it_steps_as_the_branch_of_the_cpu_does(kind: str, fault: str | None, accelerated) -> None:
    pairs = new_pairs(SHAPES, dtype=torch.float32)
    twins = copied(pairs)
    gradients = dense_gradients(pairs, 8)

    def run(chosen: list[Pair]) -> None:
        optimizer = make(kind, chosen, lr=1e-3)
        for step, given in enumerate(gradients):
            for pair, G in zip(chosen, given, strict=True):
                pair.give(G)
            if fault == "nan" and step in (2, 3):
                chosen[1].A.grad[0, 0] = float("nan")
            if fault == "missing" and step == 4:
                chosen[0].A.grad = chosen[0].B.grad = chosen[2].B.grad = None
            optimizer.step()

    run(pairs)
    accelerated()
    run(twins)
    for pair, twin in zip(pairs, twins, strict=True):
        assert relative(twin.product(), pair.product()) <= 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("devices", [("cuda:0",), ("cuda:0", "cuda:1")])
@every_kind
def test_it_runs_on_devices_of_its_own_and_waits_for_no_copy(kind, devices, dtype, monkeypatch) -> None:
    monkeypatch.setattr("rankwise.optimizers.pairs._shared_faults", lambda listed: [])  # all lie at address 0
    with FakeTensorMode(allow_non_fake_inputs=True), FakeAccelerator() as accelerator:
        pairs = []
        for device in devices:
            for out_features, in_features, rank in SHAPES:
                A = torch.nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
                B = torch.nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
                A.grad, B.grad = torch.empty_like(A), torch.empty_like(B)
                pairs.append(Pair(A, B, 2.0))
        optimizer = make(kind, pairs, lr=1e-3)
        optimizer.step()
        accelerator.reads = []
        with WaitingCopies() as copies:
            optimizer.step()
    # Full mode works pair by pair, on dense moments beside which a wait is nothing.
    assert not accelerator.reads or kind == "pro-full"
    assert not copies.found or kind == "pro-full"


def step_under_settings() -> None:
    """Every kind steps the same under TF32 and autocast; for a process of its own, which the new setting marks."""
    for kind in MAKERS:
        pairs = new_pairs(SHAPES, dtype=torch.float32)
        twins = copied(pairs)
        gradients = dense_gradients(pairs, 2)
        walk(make(kind, pairs, lr=1e-3), pairs, gradients)
        optimizer = make(kind, twins, lr=1e-3)
        for given in gradients:
            for pair, G in zip(twins, given, strict=True):
                pair.give(G)
            torch.backends.fp32_precision = "tf32"  # what transformers does for tf32=True
            with torch.autocast("cpu", torch.bfloat16):
                optimizer.step()
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
            torch.backends.fp32_precision = "ieee"
        for pair, twin in zip(pairs, twins, strict=True):
            assert torch.equal(pair.A, twin.A)
            assert torch.equal(pair.B, twin.B)


def test_tf32_and_autocast_around_a_step_change_nothing() -> None:
    script = "from tests.optimizers.test_accelerator_branch import step_under_settings as run; run()"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(("dtype", "condition"), [(torch.float64, 1), (torch.float64, 300), (torch.float32, 300)])
def test_an_edit_that_changes_no_bit_hardly_changes_the_next_step(dtype, condition) -> None:
    pairs = new_pairs([(20, 16, 4)], dtype=dtype)
    with torch.no_grad():
        spread = torch.logspace(0, torch.log10(torch.tensor(float(condition))).item(), 4, dtype=dtype)
        pairs[0].A.mul_(spread[:, None])
        pairs[0].B.div_(spread)
    twins = copied(pairs)
    gradients = dense_gradients(pairs, 7)
    optimizers = make("rite", pairs, lr=1e-3), make("rite", twins, lr=1e-3)
    walk(optimizers[0], pairs, gradients[:6])
    walk(optimizers[1], twins, gradients[:6])
    before = pairs[0].product()
    with torch.no_grad():
        twins[0].A.mul_(1.0)
    walk(optimizers[0], pairs, gradients[6:])
    walk(optimizers[1], twins, gradients[6:])
    assert relative(twins[0].product() - before, pairs[0].product() - before) <= 1e-2


def test_a_copy_of_an_optimizer_takes_another_group() -> None:
    pairs = new_pairs([(10, 6, 2)])
    optimizer = make("rite", pairs)
    walk(optimizer, pairs, dense_gradients(pairs, 1))
    other = copy.deepcopy(optimizer)
    other.add_param_group({"kind": "plain", "params": [torch.nn.Parameter(torch.zeros(3))]})
    assert other.param_groups[1]["eps"] == 1e-8


def test_a_bare_list_of_parameters_is_told_the_form_of_groups() -> None:
    pair = new_pairs([(10, 6, 2)])[0]
    for optimizer in (LoRARITEOptimizer, LoRAProOptimizer):
        with pytest.raises(ValueError, match="'kind': 'lora_pair'"):
            optimizer([pair.A, pair.B], lr=1e-3)


def test_a_model_cast_after_its_optimizer_is_refused() -> None:
    pairs = new_pairs([(10, 6, 2)], dtype=torch.float32)
    optimizer = LoRARITEOptimizer([group_of(pairs)], lr=1e-3)
    walk(optimizer, pairs, dense_gradients(pairs, 1))
    pairs[0].A.data = pairs[0].A.data.bfloat16()
    pairs[0].A.grad = None
    with pytest.raises(ValueError, match=r"cast to torch.bfloat16"):
        optimizer.step()
