"""The perturbed passes against autograd on an explicit W + E, for every kind of base layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from rankwise.adapters import perturbation
from rankwise.adapters.attach import AdaptedLayer, adapted_layers
from rankwise.adapters.perturbation import (
    LowRank,
    PerturbedLayer,
    RowNoise,
    Scratch,
    base_products,
    perturbed_layers,
    weight_row_squares,
)
from rankwise.errors import ModelError
from rankwise.linalg.normal import NormalStream
from tests.methods.perturbed import adapted, noise_on
from tests.support.models import tiny_gpt2, tiny_llama


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_layer(kind: str, dtype: torch.dtype = torch.float64, *, dropout: float = 0.0) -> AdaptedLayer:
    """q_proj of a Llama, or c_attn (Conv1D, with a bias) of a GPT-2, with a non-zero update."""
    model = tiny_gpt2(layers=1) if kind == "conv1d" else tiny_llama(layers=1)
    targets = ["c_attn"] if kind == "conv1d" else ["up_proj"]
    return adapted(model.to(dtype), targets=targets, spread=0.1, dropout=dropout).first


def noise(layer: AdaptedLayer, seed: int = 7, dtype: torch.dtype = torch.float64) -> RowNoise:
    return RowNoise(seed, 0.1 * random(layer.base.shape.out_features, seed=3, dtype=dtype).abs())


def thin(layer: AdaptedLayer, dtype: torch.dtype = torch.float64) -> LowRank:
    shape = layer.base.shape
    return LowRank(
        random(shape.out_features, 4, seed=4, dtype=dtype), random(4, shape.in_features, seed=5, dtype=dtype)
    )


def drawn(layer: AdaptedLayer, by: RowNoise | LowRank) -> Tensor:
    """E [out, in], explicit."""
    if isinstance(by, LowRank):
        return by.left @ by.right
    shape, transposed = (layer.base.shape.out_features, layer.base.shape.in_features), layer.base.kind == "conv1d"
    return perturbation._Draw(layer.name, by.seed, shape, transposed, by.std.dtype, Scratch()).around(None, by.std)


def passes(layer: AdaptedLayer, x: Tensor) -> dict[str, Tensor]:
    """The output of the LoRA layer and all gradients of a fixed function of it."""
    x = x.clone().requires_grad_()
    module: Any = layer.module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)  # the same dropout
        output = module(x)
    output.float().sin().sum().backward()
    found = {"output": output.detach(), "x": x.grad, "A": layer.lora_A.grad, "B": layer.lora_B.grad}
    layer.lora_A.grad = layer.lora_B.grad = None
    assert all(value is not None for value in found.values())
    return found  # type: ignore[return-value]


def explicit(layer: AdaptedLayer, E: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The same by autograd, with W + E written where W is; W is put back."""
    weight: Any = layer.base.module.weight
    kept = weight.data
    wide = torch.promote_types(kept.dtype, torch.float32)
    weight.data = (kept.to(wide) + (E.T if layer.base.kind == "conv1d" else E)).to(kept.dtype)
    try:
        return passes(layer, x)
    finally:
        weight.data = kept


def compare(found: dict[str, Tensor], reference: dict[str, Tensor], limit: float) -> None:
    for name, value in reference.items():
        error = float((found[name] - value).abs().max() / value.abs().max())
        assert error <= limit, (name, error)


PERTURBATIONS: dict[str, Callable[..., RowNoise | LowRank]] = {"noise": noise, "thin": thin}


@pytest.mark.parametrize("what", ["noise", "thin"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("way", ["swap", "add"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 7e-15), (torch.float32, 1e-5)])
def test_g6_both_passes_are_autograds_on_an_explicit_w_plus_e_before_dropout(
    what: str, kind: str, way: str, dtype: torch.dtype, limit: float
) -> None:
    layer = one_layer(kind, dtype, dropout=0.4)
    if way == "add":  # somebody else's forward on the base layer
        layer.base.module.forward = layer.base.module.forward  # type: ignore[method-assign]
    perturbed = PerturbedLayer(layer, Scratch())
    assert perturbed.way == way
    perturbed.by = PERTURBATIONS[what](layer, dtype=dtype)
    E = drawn(layer, perturbed.by)
    x = random(2, 5, layer.base.shape.in_features, seed=1, dtype=dtype)
    found = passes(layer, x)
    perturbed.close()
    compare(found, explicit(layer, E, x), limit)


def test_leaving_the_gradient_through_e_out_would_be_seen() -> None:
    layer = one_layer("linear")
    perturbed = PerturbedLayer(layer, Scratch())
    perturbed.by = noise(layer)
    x = random(3, layer.base.shape.in_features, seed=1, dtype=torch.float64)
    E = noise_on(layer)
    found = passes(layer, x)
    perturbed.close()
    module: Any = layer.base.module
    lost = x.clone().requires_grad_()
    output = functional.linear(lost, module.weight) + functional.linear(x, E)
    output = output + layer.scaling * functional.linear(functional.linear(lost, layer.lora_A), layer.lora_B)
    output.float().sin().sum().backward()
    assert float((found["x"] - lost.grad).abs().max() / found["x"].abs().max()) > 1e-2


def test_e_is_drawn_a_row_at_its_own_standard_deviation() -> None:
    layer = one_layer("linear")
    perturbed = PerturbedLayer(layer, Scratch())
    std = torch.zeros(layer.base.shape.out_features, dtype=torch.float64)
    std[3] = 0.5
    perturbed.by = RowNoise(1, std)
    E = noise_on(layer)
    assert not E[:3].any()
    assert not E[4:].any()
    assert 0.25 < float(E[3].std()) < 1.0
    assert torch.equal(noise_on(layer), E)
    perturbed.by = RowNoise(2, std)
    perturbed._scratch.forget()
    assert not torch.equal(noise_on(layer), E)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_backward_pass_and_a_new_draw_meet_the_same_e_in_every_block(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perturbation, "_CACHE_BLOCK", 70)  # two rows at a time, and a rest
    layer = one_layer(kind, torch.float32)
    scratch = Scratch()
    perturbed = PerturbedLayer(layer, scratch)
    perturbed.by = noise(layer, dtype=torch.float32)
    x = random(4, layer.base.shape.in_features, seed=1)
    kept = passes(layer, x)
    module: Any = layer.module
    leaf = x.clone().requires_grad_()
    output = module(leaf)
    scratch.forget()  # the backward pass has to draw
    output.sin().sum().backward()
    assert torch.equal(leaf.grad, kept["x"])
    perturbed.close()


def test_what_was_written_last_is_found_again_and_the_oldest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturbation, "_KEPT_BYTES", 1024)
    scratch, written = Scratch(), []

    def take(key: int, size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
        def write(target: Tensor) -> None:
            written.append(key)
            target.fill_(key)

        return scratch.written(("a", key, dtype), (1, size), torch.device("cpu"), write)

    for key in (1, 2, 3, 4):  # 256 bytes each: four fill it
        assert (take(key) == key).all()
    assert [float(take(key)[0, 0]) for key in (4, 3, 2, 1)] == [4, 3, 2, 1]
    assert written == [1, 2, 3, 4]
    take(5)
    assert written[-1] == 5
    for key in (2, 3, 4):
        assert (take(key) == key).all()
    assert written[-1] == 5
    take(1)
    assert written[-1] == 1  # it had given way to 5
    take(6, size=200)
    assert all((take(key) == key).all() for key in (6,))
    assert (take(7, size=1000, dtype=torch.bfloat16) == 7).all()  # larger than all: the memory grows
    assert (take(7, size=1000, dtype=torch.bfloat16) == 7).all()
    assert written.count(7) == 1
    scratch.forget()
    take(7, size=1000, dtype=torch.bfloat16)
    assert written.count(7) == 2


def test_a_write_that_fails_is_not_kept() -> None:
    scratch = Scratch()

    def broken(target: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scratch.written(("a", 1, torch.float32), (2, 2), torch.device("cpu"), broken)

    def whole(target: Tensor) -> None:
        target.fill_(3.0)

    assert (scratch.written(("a", 1, torch.float32), (2, 2), torch.device("cpu"), whole) == 3).all()


def test_one_block_of_memory_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturbation, "_KEPT_BYTES", 0)
    one = adapted(spread=0.1)
    scratch = Scratch()
    perturbed = perturbed_layers(one.layers, scratch)
    largest = 0
    for name, layer in one.layers.items():
        perturbed[name].by = noise(layer, dtype=torch.float32)
        largest = max(largest, layer.base.shape.out_features * layer.base.shape.in_features * 4)
    one.model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert scratch._arena is not None
    assert scratch._arena.numel() <= largest + 64
    scratch.release()
    assert scratch._arena is None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("what", ["noise", "thin"])
def test_16_bit_layers_and_autocast_compute_with_w_plus_e_rounded_once(what: str, autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    layer = one_layer("linear", dtype)
    assert layer.lora_A.dtype == torch.float32
    perturbed = PerturbedLayer(layer, Scratch())
    perturbed.by = by = PERTURBATIONS[what](layer, dtype=torch.float32)
    x = random(4, layer.base.shape.in_features, seed=1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = passes(layer, x)
    perturbed.by = None
    if isinstance(by, LowRank):
        E = by.left @ by.right
    else:
        stored = layer.base.weight()
        drawn = torch.empty(stored.shape)
        NormalStream(by.seed, torch.device("cpu")).fill(drawn)
        E = torch.addcmul(stored, drawn, by.std[:, None]) - stored
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        reference = explicit(layer, E, x)
    assert found["output"].dtype == reference["output"].dtype == torch.bfloat16
    if what == "noise":
        assert torch.equal(found["output"], reference["output"])
    compare(found, reference, 2e-2 if what == "noise" else 6e-2)


def test_a_trained_bias_gets_its_gradient_and_a_trained_weight_is_refused() -> None:
    layer = one_layer("conv1d")
    module: Any = layer.base.module
    module.bias.data = random(len(module.bias), dtype=torch.float64)
    module.bias.requires_grad_()
    for by in (noise(layer), thin(layer)):
        perturbed = PerturbedLayer(layer, Scratch())
        perturbed.by = by
        x = random(3, layer.base.shape.in_features, seed=1, dtype=torch.float64)
        passes(layer, x)
        found, module.bias.grad = module.bias.grad.clone(), None
        E = by.left @ by.right if isinstance(by, LowRank) else noise_on(layer)
        perturbed.close()
        explicit(layer, E, x)
        torch.testing.assert_close(found, module.bias.grad, rtol=1e-10, atol=1e-10)
        module.bias.grad = None
    module.weight.requires_grad_()
    with pytest.raises(ModelError, match=r"c_attn: its base weight is trained.*freeze it"):
        PerturbedLayer(layer, Scratch())


def test_all_layers_are_made_perturbable_or_none() -> None:
    one = adapted()
    *_, last = one.layers.values()
    weight: Any = last.base.module.weight
    weight.requires_grad_()
    with pytest.raises(ModelError):
        perturbed_layers(one.layers, Scratch())
    assert not any("forward" in layer.base.module.__dict__ for layer in one.layers.values())


@pytest.mark.parametrize("what", ["noise", "thin"])
def test_it_acts_only_in_training_with_the_adapter_switched_on(what: str) -> None:
    one = adapted(spread=0.1)
    layer = one.first
    module: Any = layer.module
    x = random(3, layer.base.shape.in_features, seed=1)
    plain = module(x)
    perturbed = PerturbedLayer(layer, Scratch())
    perturbed.by = PERTURBATIONS[what](layer, dtype=torch.float32)
    assert not torch.equal(module(x), plain)
    with torch.no_grad():  # not what decides
        assert not torch.equal(module(x), plain)
    module.eval()
    assert torch.equal(module(x), plain)
    module.train()
    with one.model.disable_adapter():
        base: Any = layer.base.module
        assert torch.equal(module(x), functional.linear(x, base.weight))
    perturbed.by = None
    assert torch.equal(module(x), plain)
    perturbed.by = PERTURBATIONS[what](layer, dtype=torch.float32)
    perturbed.close()
    assert torch.equal(module(x), plain)
    assert "forward" not in layer.base.module.__dict__
    assert not layer.base.module._forward_hooks


def test_closing_leaves_another_wrapper_around_the_layer_working() -> None:
    layer = one_layer("linear")
    module: Any = layer.base.module
    perturbed = PerturbedLayer(layer, Scratch())
    inner, calls = module.forward, []

    def wrapper(x: Tensor) -> Tensor:
        calls.append(1)
        return inner(x)

    module.forward = wrapper
    x = random(2, layer.base.shape.in_features, dtype=torch.float64)
    perturbed.by = noise(layer)
    noisy = module(x)
    perturbed.close()
    assert module.forward is wrapper
    assert not torch.equal(module(x), noisy)
    assert torch.equal(module(x), functional.linear(x, module.weight))
    assert len(calls) == 3


def test_a_class_with_a_forward_of_its_own_gets_its_noise_added() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    layer = one_layer("linear")
    base: Any = layer.base.module
    base.__class__ = Doubling
    x = random(2, layer.base.shape.in_features, dtype=torch.float64)
    plain = base(x)
    perturbed = PerturbedLayer(layer, Scratch())
    assert perturbed.way == "add"
    perturbed.by = RowNoise(0, torch.zeros(layer.base.shape.out_features, dtype=torch.float64))
    assert torch.equal(base(x), plain)
    perturbed.by = noise(layer)
    assert not torch.equal(base(x), plain)


def test_row_squares_and_products_are_those_of_the_dense_weight() -> None:
    for kind in ("linear", "conv1d"):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            layer = one_layer(kind, dtype)
            W = layer.base.weight(torch.float64)
            squares = weight_row_squares(layer)
            assert squares.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(squares.double(), W.square().sum(1), rtol=1e-6, atol=0)
            rows = random(3, layer.base.shape.in_features, dtype=squares.dtype)
            torch.testing.assert_close(base_products(layer, rows).double(), W @ rows.double().T, rtol=1e-5, atol=1e-6)


def test_wide_products_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = one_layer("linear", torch.bfloat16)
    rows = random(3, layer.base.shape.in_features)
    whole = base_products(layer, rows)
    monkeypatch.setattr(perturbation, "_WIDE_BLOCK", 100)
    assert torch.allclose(base_products(layer, rows), whole, rtol=1e-6, atol=1e-7)


def test_a_weight_that_is_sharded_already_is_refused() -> None:
    layer = one_layer("linear")
    weight: Any = layer.base.module.weight
    weight.ds_id = 4  # the mark of ZeRO-3
    with pytest.raises(ModelError, match=r"up_proj: the norms .* sharded already: attach before"):
        weight_row_squares(layer)


def test_conv1d_is_what_the_tests_call_conv1d() -> None:
    assert isinstance(one_layer("conv1d").base.module, Conv1D)


class Linear8bitLt(nn.Linear):
    """A packed layer as bitsandbytes leaves it: int8 rows and their scales, dequantized in its own forward."""

    def __init__(self, dense: Tensor) -> None:
        super().__init__(dense.shape[1], dense.shape[0])
        scales = dense.abs().amax(dim=1)
        codes = torch.round(dense * 127 / scales[:, None]).to(torch.int8)
        self.bias = nn.Parameter(random(len(dense), seed=9), requires_grad=False)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight.SCB = scales  # type: ignore[attr-defined]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        dense = self.weight.float() * (self.weight.SCB / 127)[:, None]  # type: ignore[attr-defined, operator]
        return functional.linear(input, dense, self.bias)


def test_packed_layers_are_measured_and_perturbed_without_their_weight() -> None:
    one = adapted(targets=["up_proj"], spread=0.1)
    module: Any = one.first.module
    module.base_layer = Linear8bitLt(module.base_layer.weight.detach())
    layer = next(iter(adapted_layers(one.model).values()))
    assert layer.base.kind == "8bit"
    W = layer.base.weight()
    torch.testing.assert_close(weight_row_squares(layer), W.square().sum(1))
    rows = random(3, layer.base.shape.in_features)
    torch.testing.assert_close(base_products(layer, rows), W @ rows.T, rtol=1e-5, atol=1e-5)
    x = random(4, layer.base.shape.in_features, seed=1)
    base: Any = layer.base.module
    plain = base(x)
    for by in (noise(layer, dtype=torch.float32), thin(layer, dtype=torch.float32)):
        perturbed = PerturbedLayer(layer, Scratch())
        assert perturbed.way == "add"
        perturbed.by = by
        E = drawn(layer, by)
        leaf = x.clone().requires_grad_()
        output = base(leaf)
        torch.testing.assert_close(output, plain + x @ E.T, rtol=1e-5, atol=1e-5)
        output.sum().backward()
        torch.testing.assert_close(leaf.grad, (W + E).sum(0).expand_as(x), rtol=1e-5, atol=1e-4)
        perturbed.close()
        assert torch.equal(base(x), plain)
