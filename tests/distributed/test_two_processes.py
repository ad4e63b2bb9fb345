"""Two gloo processes hold one plan and agree with one process on the same global batches to 1e-5."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rankwise.training.marker import complete_checkpoints
from tests.distributed import workers
from tests.training.children import CONTEXT, finish


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(work: Callable[..., Any], world: int, folder: Path, *more: str) -> list[dict[str, Tensor]]:
    """Runs the work in `world` processes; what each kept."""
    start(work, world, folder, *more)
    return [load_file(folder / f"final-{rank}.safetensors") for rank in range(world)]


def start(work: Callable[..., Any], world: int, folder: Path, *more: str) -> None:
    """Runs the work in `world` processes, each to a good end."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    processes = [CONTEXT.Process(target=work, args=(rank, world, port, str(folder), *more)) for rank in range(world)]
    for process in processes:
        process.start()
    assert [finish(process) for process in processes] == [0] * world


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=1e-5, atol=1e-5), name


SHARDABLE = ("gora lora-rite", "lora-ga lora-pro", "gora ggpo", "rora mgpo")
COMPOSED = (*SHARDABLE, "ab-lora", "sora", "beamlora", "xgblora")
ALONE = ("gora", "lora-ga", "lora-ga base", "lora-pro", "lora-pro full", "lora-rite", "ggpo", "mgpo", "xgblora merge")
SCORED = ("ab-lora screened", "ab-lora taylor")
BY_UPDATE = ("gora lora-rite: ",)
"""Compared by the update alone: its size decides how RITE steps, and from a small lora_B (GoRA's) lora_A grows by what
round-off leaves, without an effect on the product."""


def compared(alone: dict[str, Tensor], first: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    assert alone.keys() == first.keys()
    names = [name for name in alone if not name.startswith(BY_UPDATE) or ": update." in name]
    return {name: alone[name] for name in names}, {name: first[name] for name in names}


@pytest.mark.parametrize(
    "recipes",
    [COMPOSED, pytest.param(ALONE, marks=pytest.mark.slow), pytest.param(SCORED, marks=pytest.mark.slow)],
    ids=["composed", "alone", "scored"],
)
def test_plan_start_and_weights_agree_with_one_process_also_past_a_nan(tmp_path: Path, recipes: tuple[str, ...]):
    alone = run(workers.accelerate_loop, 1, tmp_path / "one", *recipes)[0]
    first, second = run(workers.accelerate_loop, 2, tmp_path / "two", *recipes)
    hashes = {path.read_text() for path in tmp_path.glob("*/plan-*")}
    assert len(hashes) == 1
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert_close(*compared(alone, first))
    for recipe in recipes:
        found = {name.removeprefix(f"{recipe}: "): v for name, v in alone.items() if name.startswith(f"{recipe}: ")}
        assert [n for n in found if f"start.{n}" in found and not torch.equal(found[n], found[f"start.{n}"])]


def test_trainer_under_ddp_agrees_with_one_process_and_resumes_bit_equal(tmp_path: Path):
    alone = run(workers.trainer, 1, tmp_path / "one")[0]
    two = tmp_path / "two"
    first, second = run(workers.trainer, 2, two)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(alone, first)
    assert [path.name for path in complete_checkpoints(two)] == ["checkpoint-4", "checkpoint-6"]
    assert {path.name for path in (two / "checkpoint-6").glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    shutil.rmtree(two / "checkpoint-6")
    again, _ = run(workers.trainer, 2, two)
    assert [name for name in first if not torch.equal(first[name], again[name])] == []


@pytest.mark.parametrize(
    "recipes",
    [
        ("rora", "lora-rite", "mgpo"),
        pytest.param(("lora-ga", "lora-pro", "lora-pro full", "ggpo", "xgblora", *SHARDABLE), marks=pytest.mark.slow),
    ],
    ids=["some", "others"],
)
def test_fsdp2_agrees_with_one_process_and_the_guard_sees_through_the_shards(tmp_path: Path, recipes: tuple[str, ...]):
    alone = run(workers.fsdp2_loop, 1, tmp_path / "one", *recipes)[0]
    first, second = run(workers.fsdp2_loop, 2, tmp_path / "two", *recipes)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(*compared(alone, first))


def test_every_process_gets_the_verdict_of_the_one_export(tmp_path: Path):
    start(workers.export, 2, tmp_path / "run")
    first, second = (tmp_path / "run" / f"verdict-{rank}" for rank in range(2))
    assert first.read_text() == second.read_text()
    lines = first.read_text().splitlines()
    assert lines[0] == "True"
    assert len(lines) >= 3
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_m12_two_processes_agree_in_every_reset_of_beamlora_and_do_not_go_on_where_they_differ(tmp_path: Path):
    """Masks, pairs, scores and weights are those of the other process, bit for bit."""
    first, second = run(workers.resets, 2, tmp_path / "run")
    told, other = (json.loads((tmp_path / "run" / f"told-{rank}.json").read_text()) for rank in range(2))
    assert told == other
    *lines, refusal = told
    assert [line["step"] for line in lines if "layer" not in line] == [3, 6, 9]
    copied = [line["detail"] for line in lines if "layer" in line]
    assert any(len(detail["pruned"]) > 1 for detail in copied)
    assert {name.partition(":")[0] for name in first} == {"3", "6", "9"}
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert "what beamlora's reset after step 12 goes by differs between processes" in refusal
