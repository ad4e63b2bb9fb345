"""Pairs are found on any stock PEFT model, also one that rankwise did not make; the rest is plain AdamW."""

import copy
import hashlib
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import rankwise
from rankwise.errors import ConfigError
from rankwise.methods.lora_pro import LoRAProOptimizer
from rankwise.methods.lora_rite import LoRARITEOptimizer
from tests.optimizers.support import Pair, assert_same_bits, group_of
from tests.support.models import causal_batch, tiny_gpt2, tiny_llama

BATCHES = [causal_batch(seed) for seed in range(3)]
OPTIMIZERS: dict[str, Any] = {
    "rite": LoRARITEOptimizer,
    "pro-efficient": LoRAProOptimizer,
    "pro-full": lambda model, **settings: LoRAProOptimizer(model, mode="full", **settings),
    "pro-sgd": lambda model, **settings: LoRAProOptimizer(model, mode="sgd", **settings),
}
every_optimizer = pytest.mark.parametrize("kind", sorted(OPTIMIZERS))


def peft_model(**settings: Any) -> PeftModel:
    """A tiny Llama with a stock adapter whose B is not zero; the same for the same settings."""
    model = get_peft_model(
        tiny_llama(),
        LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}),
    )
    fill(model)
    return model


def fill(model: nn.Module) -> None:
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            stream = torch.Generator().manual_seed(number)
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=stream))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    model.train()
    losses = []
    for batch in BATCHES:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def kinds(optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    return {group["kind"]: group["params"] for group in optimizer.param_groups}


def named(model: nn.Module, parameters: list[Tensor]) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]


def base_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@every_optimizer
def test_every_pair_of_a_stock_model_is_found_with_its_scaling_and_nothing_else(kind: str) -> None:
    model = peft_model()
    optimizer = OPTIMIZERS[kind](model, lr=1e-3)
    (group,) = optimizer.param_groups
    names = named(model, group["params"])
    assert names == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for first, second in zip(names[::2], names[1::2], strict=True):
        assert second == first.replace(".lora_A.", ".lora_B.")
    assert group["scaling"] == [2.0] * 6


@every_optimizer
def test_a_model_and_its_explicit_groups_train_alike_and_the_base_keeps_its_bits(kind: str) -> None:
    model, other = peft_model(), peft_model()
    before = base_hash(model)
    layers = [module for module in other.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]
    pairs = [Pair(m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"]) for m in layers]
    train(model, OPTIMIZERS[kind](model, lr=1e-2, weight_decay=0.1))
    train(other, OPTIMIZERS[kind]([group_of(pairs)], lr=1e-2, weight_decay=0.1))
    assert base_hash(model) == before
    found = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    expected = [parameter.detach() for parameter in other.parameters() if parameter.requires_grad]
    assert_same_bits(found, expected)
    assert not torch.equal(found[0], next(p for p in peft_model().parameters() if p.requires_grad))


@every_optimizer
def test_the_loss_of_a_stock_model_falls(kind: str) -> None:
    model = peft_model()
    optimizer = OPTIMIZERS[kind](model, lr=1e-2 if kind != "pro-sgd" else 1.0)
    first = train(model, optimizer)[0]
    for _ in range(4):
        last = train(model, optimizer)[0]
    assert last < first


def test_each_layer_keeps_its_own_rank_and_scaling() -> None:
    model = peft_model(rank_pattern={"v_proj": 2}, alpha_pattern={"down_proj": 2}, use_rslora=True)
    (group,) = LoRARITEOptimizer(model, lr=1e-3).param_groups
    ranks = [parameter.shape[0] for parameter in group["params"][::2]]
    assert sorted(ranks) == [2, 2, 4, 4, 4, 4]
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    assert group["scaling"] == [layer.scaling["default"] for layer in layers]
    assert len(set(group["scaling"])) == 3


@every_optimizer
def test_modules_to_save_and_the_like_are_plain(kind: str) -> None:
    model = peft_model(modules_to_save=["lm_head"])
    optimizer = OPTIMIZERS[kind](model, lr=1e-2)
    names = named(model, kinds(optimizer)["plain"])
    assert names == [name for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in name]
    before = [parameter.detach().clone() for parameter in kinds(optimizer)["plain"]]
    train(model, optimizer)
    assert not torch.equal(kinds(optimizer)["plain"][0].detach(), before[0])


def test_embedding_factors_are_plain() -> None:
    model = peft_model(target_modules=["embed_tokens", "q_proj"])
    optimizer = LoRARITEOptimizer(model, lr=1e-2)
    assert all("lora_embedding_" in name for name in named(model, kinds(optimizer)["plain"]))
    assert len(kinds(optimizer)["plain"]) == 2
    train(model, optimizer)


def test_magnitudes_of_dora_are_plain() -> None:
    model = peft_model(use_dora=True)
    optimizer = LoRARITEOptimizer(model, lr=1e-2)
    assert all("lora_magnitude_vector" in name for name in named(model, kinds(optimizer)["plain"]))
    assert len(kinds(optimizer)["lora_pair"]) == 12
    train(model, optimizer)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_biases_that_peft_trains_are_plain() -> None:
    model = peft_model(lora_bias=True)
    optimizer = LoRAProOptimizer(model, lr=1e-2)
    assert all(name.endswith("lora_B.default.bias") for name in named(model, kinds(optimizer)["plain"]))
    train(model, optimizer)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((-1, -2)))


def test_convolution_factors_are_plain() -> None:
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(Convolutions(), LoraConfig(r=2, target_modules=["conv", "head"]))
    optimizer = LoRARITEOptimizer(model, lr=1e-2)
    assert all(".conv." in name for name in named(model, kinds(optimizer)["plain"]))
    assert all(".head." in name for name in named(model, kinds(optimizer)["lora_pair"]))
    for _ in range(2):
        model(torch.ones(1, 3, 4, 4)).sum().backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_transposed_base_layers_have_the_same_factors() -> None:
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"]))
    optimizer = LoRARITEOptimizer(model, lr=1e-2)
    assert len(kinds(optimizer)["lora_pair"]) == 4
    train(model, optimizer)


# Several adapters.


def two_adapters() -> PeftModel:
    model = peft_model()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    fill(model)
    return model


def test_the_adapter_that_is_named_is_optimized_with_its_own_scaling() -> None:
    model = two_adapters()
    (group,) = LoRARITEOptimizer(model, lr=1e-3).param_groups
    assert all(".default." in name for name in named(model, group["params"]))
    model.set_adapter("other")
    (group,) = LoRARITEOptimizer(model, lr=1e-3, adapter_name="other").param_groups
    assert all(".other." in name for name in named(model, group["params"]))
    assert group["scaling"] == [4.0, 4.0]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    train(model, LoRARITEOptimizer(model, lr=1e-2, adapter_name="other"))
    assert all(torch.equal(model.get_parameter(name).detach(), value) for name, value in before.items())


def test_an_adapter_that_is_not_there_or_not_trainable_is_named_with_those_that_are() -> None:
    model = two_adapters()
    with pytest.raises(ConfigError, match=r"'third'.*default.*other"):
        LoRARITEOptimizer(model, lr=1e-3, adapter_name="third")
    with pytest.raises(ConfigError, match=r"other"):
        LoRARITEOptimizer(model, lr=1e-3, adapter_name="other")  # it is not the active one


def test_a_model_without_an_adapter_is_told_to_attach_one() -> None:
    with pytest.raises(ConfigError, match=r"attach|get_peft_model"):
        LoRAProOptimizer(tiny_llama(), lr=1e-3)


# Halves.


@every_optimizer
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_stays_and_the_other_trains(kind: str, frozen: str) -> None:
    model = peft_model()
    for name, parameter in model.named_parameters():
        if f".{frozen}." in name:
            parameter.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = OPTIMIZERS[kind](model, lr=1e-2)
    assert len(kinds(optimizer)["lora_pair"]) == 12
    train(model, optimizer)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter.detach(), before[name])
        assert moved is (".lora_" in name and f".{frozen}." not in name), name


def test_a_half_that_something_took_away_is_named() -> None:
    model = peft_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    del layer.lora_B["default"]
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj.*half|half.*q_proj|both halves"):
        LoRARITEOptimizer(model, lr=1e-3)


def test_factors_shared_by_two_layers_are_refused() -> None:
    model = peft_model()
    first, second = (model.base_model.model.model.layers[k].self_attn.q_proj for k in (0, 1))
    second.lora_A["default"].weight = nn.Parameter(first.lora_A["default"].weight.detach())
    with pytest.raises(ConfigError, match=r"shared"):
        LoRARITEOptimizer(model, lr=1e-3)


@every_optimizer
def test_a_scaling_that_changes_under_way_is_refused_with_the_layer(kind: str) -> None:
    model = peft_model()
    optimizer = OPTIMIZERS[kind](model, lr=1e-3)
    train(model, optimizer)
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    layer.scaling["default"] = 3.0
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.v_proj.* 2 .* 3 "):
        train(model, optimizer)
    assert_same_bits([parameter.detach() for parameter in model.parameters()], before)


def test_a_state_of_other_layers_is_refused_by_the_layers_name() -> None:
    model, other = peft_model(), peft_model(target_modules=["k_proj", "v_proj", "down_proj"])
    optimizer = LoRARITEOptimizer(model, lr=1e-3)
    train(model, optimizer)
    with pytest.raises(rankwise.RankwiseError, match=r"q_proj.*k_proj|k_proj.*q_proj"):
        LoRARITEOptimizer(other, lr=1e-3).load_state_dict(optimizer.state_dict())


@every_optimizer
def test_a_model_resumes_bit_for_bit(kind: str) -> None:
    model = peft_model(modules_to_save=["lm_head"])
    optimizer = OPTIMIZERS[kind](model, lr=1e-2)
    train(model, optimizer)
    other, saved = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    resumed = OPTIMIZERS[kind](other, lr=1e-2)
    resumed.load_state_dict(saved)
    assert train(model, optimizer) == train(other, resumed)
    assert_same_bits([p.detach() for p in other.parameters()], [p.detach() for p in model.parameters()])


def test_bfloat16_adapters_are_trained_through_a_float32_master() -> None:
    model = get_peft_model(
        tiny_llama(dtype=torch.bfloat16),
        LoraConfig(r=4, target_modules=["q_proj"]),
        autocast_adapter_dtype=False,
    )
    fill(model)
    optimizer = LoRARITEOptimizer(model, lr=1e-3)
    train(model, optimizer)
    parameters = kinds(optimizer)["lora_pair"]
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert_same_bits(
        [parameter.detach() for parameter in parameters],
        [optimizer.state[parameter]["master"].bfloat16() for parameter in parameters],
    )


def test_the_facade_shows_both_optimizers() -> None:
    assert rankwise.LoRARITEOptimizer is LoRARITEOptimizer
    assert rankwise.LoRAProOptimizer is LoRAProOptimizer
    model = peft_model()
    train(model, rankwise.LoRARITEOptimizer(model, lr=1e-3))
