"""The offset is exact algebra beside the adapter, acts exactly where the adapter acts, and leaves nothing behind."""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rankwise.adapters.attach import AdaptedLayer, adapted_layers, adapter_disabled, write_factors
from rankwise.adapters.fingerprint import weights_fingerprint
from rankwise.adapters.offset import LiveOffset, live_offset
from rankwise.adapters.state import STATE_FILE, FactorPair, FoldState
from rankwise.errors import ArtifactError, ConfigError, ExportError, ModelError
from tests.export.trained import trained
from tests.support.models import causal_batch, tiny_llama

Pairs = dict[str, FactorPair]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def started(
    name: str = "llama", *, dropout: float = 0.0, size: float = 0.3
) -> tuple[PeftModel, Mapping[str, AdaptedLayer], Pairs]:
    """A model whose factors are those of a start of its own, and the pairs that undo it."""
    model, _ = trained(name, size=size)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(dropout) if dropout else nn.Identity()
    layers = adapted_layers(model)
    return (
        model.eval(),
        layers,
        {n: FactorPair(x.lora_A.detach().clone(), x.lora_B.detach().clone()) for n, x in layers.items()},
    )


def trained_on(layers: Mapping[str, AdaptedLayer], size: float = 0.05) -> None:
    """Moves every factor, as training would."""
    for number, layer in enumerate(layers.values()):
        write_factors(
            layer,
            layer.lora_A.detach() + size * drawn(*layer.lora_A.shape, seed=2 * number),
            layer.lora_B.detach() + size * drawn(*layer.lora_B.shape, seed=2 * number + 1),
        )


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def batch_of(name: str) -> dict[str, Tensor]:
    from tests.export.trained import ARCHITECTURES

    return ARCHITECTURES[name].batch()


def gradients(model: nn.Module, layers: Mapping[str, AdaptedLayer], batch: Mapping[str, Tensor]) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return [p.grad.clone() for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]


# --- one layer, by hand ---------------------------------------------------------------------------------------------


def one_layer(rank: int = 1, **config: object) -> tuple[PeftModel, AdaptedLayer]:
    base = nn.Sequential(nn.Linear(2, 2, bias=False))
    base[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], **config))
    return model, adapted_layers(model)["0"]


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_one_layer_computes_what_was_worked_out_by_hand(place):
    model, layer = one_layer()  # scaling 2
    write_factors(layer, torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [3.0]]))
    offset = LiveOffset(
        model, {"0": layer}, {"0": FactorPair(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [1.0]]))}, place
    )
    # x = (1, 2): W x = (1, 2); s B A x = 2 * 3 * (1, 3) = (6, 18); s B0 A0 x = 2 * 1 * (2, 1) = (4, 2)
    assert model(torch.tensor([1.0, 2.0])).tolist() == [3.0, 18.0]
    offset.close()
    assert model(torch.tensor([1.0, 2.0])).tolist() == [7.0, 20.0]


@settings(max_examples=30)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 4),
    alpha=st.floats(0.1, 40.0),
    seed=st.integers(0, 2**16),
    place=st.sampled_from(["adapter", "base"]),
)
def test_a_layer_computes_its_weight_plus_the_difference_of_both_updates(sizes, alpha, seed, place):
    out, inputs, rank, frozen = sizes
    with torch.random.fork_rng():
        base = nn.Sequential(nn.Linear(inputs, out)).double()
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])).double()
    layer = adapted_layers(model)["0"]
    W, bias = layer.base.module.weight.detach().clone(), layer.base.module.bias.detach()
    A, B = drawn(rank, inputs, seed=seed), drawn(out, rank, seed=seed + 1)
    A0, B0 = drawn(frozen, inputs, seed=seed + 2), drawn(out, frozen, seed=seed + 3)
    write_factors(layer, A, B)
    offset = LiveOffset(model, {"0": layer}, {"0": FactorPair(A0, B0)}, place)
    x = drawn(3, inputs, seed=seed + 4).double()
    wanted = x @ (W + layer.scaling * (B.double() @ A.double() - B0.double() @ A0.double())).T + bias
    assert torch.allclose(model(x), wanted, rtol=1e-12, atol=1e-11)
    offset.close()
    assert torch.equal(layer.base.module.weight, W)


# --- step 0 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_at_step_0_the_model_is_the_base_model_bit_for_bit(name):
    model, layers, pairs = started(name)
    batch = batch_of(name)
    with adapter_disabled(model):
        wanted = logits(model, batch)
    assert (logits(model, batch) - wanted).abs().max() > 0.05
    LiveOffset(model, layers, pairs, "adapter")
    assert torch.equal(logits(model, batch), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_16_bit_base_too(dtype):
    model, layers, pairs = started()
    for layer in layers.values():
        layer.base.module.to(dtype)
    model.base_model.model.model.embed_tokens.to(dtype)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm" or module is model.base_model.model.lm_head:
            module.to(dtype)
    with adapter_disabled(model):
        wanted = logits(model, causal_batch())
    LiveOffset(model, layers, pairs, "adapter")
    assert torch.equal(logits(model, causal_batch()), wanted)


def test_and_under_autocast_and_with_16_bit_factors():
    model, layers, pairs = started()
    offset = LiveOffset(model, layers, pairs, "adapter")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model, causal_batch())
        with adapter_disabled(model):
            assert torch.equal(found, logits(model, causal_batch()))
    offset.close()
    for layer in layers.values():  # the pair is that of the factors as they are stored
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    stored = {n: FactorPair(x.lora_A.detach(), x.lora_B.detach()) for n, x in layers.items()}
    offset = LiveOffset(model, layers, stored, "adapter")
    assert all(pair.lora_A.dtype == torch.float32 for pair in offset.pairs.values())
    with adapter_disabled(model):
        wanted = logits(model, causal_batch())
    assert torch.equal(logits(model, causal_batch()), wanted)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_in_the_base_the_start_cancels_up_to_the_base_s_rounding(dtype, bound):
    model, layers, pairs = started(size=0.05)
    model.to(dtype)
    for layer in layers.values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), layer.lora_B.float()
    with adapter_disabled(model):
        wanted = logits(model, causal_batch()).float()
    weights = {name: layer.base.weight().clone() for name, layer in layers.items()}
    LiveOffset(model, layers, pairs, "base")
    found = logits(model, causal_batch()).float()
    assert (found - wanted).abs().max() <= bound * wanted.abs().max()
    for name, layer in layers.items():
        start = layer.scaling * pairs[name].lora_B @ pairs[name].lora_A
        restored = layer.base.weight() + start
        assert (restored - weights[name]).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-2)


def test_dropout_is_for_the_adapter_s_own_path_alone():
    model, layers, pairs = started(dropout=0.5)
    with adapter_disabled(model):
        wanted = logits(model, causal_batch())
    LiveOffset(model, layers, pairs, "adapter")
    assert torch.equal(logits(model, causal_batch()), wanted)  # evaluation: the identity holds
    layer = next(iter(layers.values()))
    model.train()
    x = drawn(4, layer.base.shape.in_features, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = layer.module(x)
        torch.manual_seed(5)
        dropped = torch.nn.functional.dropout(x, 0.5)
    update = lambda pair, given: layer.scaling * given @ pair.lora_A.T @ pair.lora_B.T  # noqa: E731
    own = FactorPair(layer.lora_A.detach(), layer.lora_B.detach())
    expected = layer.base.module(x) + update(own, dropped) - update(pairs[layer.name], x)
    assert torch.allclose(found, expected, atol=1e-5)


# --- where the adapter acts, and nowhere else ----------------------------------------------------------------------


def test_the_base_shows_through_whenever_the_adapter_is_off_and_another_adapter_has_no_offset():
    model, layers, pairs = started()
    plain = copy.deepcopy(model)
    trained_on(layers)
    LiveOffset(model, layers, pairs, "adapter")
    batch = causal_batch()
    with plain.disable_adapter():
        wanted = logits(plain, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), wanted)
    for one in (model, plain):
        one.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    second = adapted_layers(model, "second")
    for name, layer in second.items():
        write_factors(layer, layer.lora_A.detach(), drawn(*layer.lora_B.shape, seed=9))
        write_factors(adapted_layers(plain, "second")[name], layer.lora_A.detach(), layer.lora_B.detach())
    found = logits(model, batch)
    for one in (model, plain):
        one.set_adapter("second")
    assert torch.equal(logits(model, batch), logits(plain, batch))
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), found)


def test_a_batch_that_mixes_adapters_gets_the_offset_in_its_own_rows():
    model, layers, pairs = started()
    trained_on(layers)
    LiveOffset(model, layers, pairs, "adapter")
    batch = {key: value for key, value in causal_batch().items() if key != "labels"}
    adapted = logits(model, batch)
    with adapter_disabled(model):
        bare = logits(model, batch)
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["default", "__base__"]).logits
    assert torch.allclose(mixed[0], adapted[0], atol=1e-5)
    assert torch.allclose(mixed[1], bare[1], atol=1e-5)


def test_layers_without_a_pair_and_pairs_without_an_update_are_left_alone():
    model, layers, pairs = started()
    names = list(layers)
    some = {names[0]: pairs[names[0]], names[1]: FactorPair(pairs[names[1]].lora_A, 0 * pairs[names[1]].lora_B)}
    LiveOffset(model, layers, some, "adapter")
    hooked = [n for n, layer in layers.items() if layer.module.lora_B["default"]._forward_hooks]
    assert hooked == names[:1]


# --- gradients and trajectories -------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_are_those_of_the_moved_base_also_under_both_kinds_of_checkpointing(checkpointing):
    found = {}
    for place in ("adapter", "base"):
        model, layers, pairs = started()
        model = model.double()
        trained_on(layers)
        LiveOffset(model, layers, pairs, place)
        model.train()
        if place == "adapter" and checkpointing is not None:
            model.enable_input_require_grads()
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        found[place] = gradients(model, layers, causal_batch())
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found.values(), strict=True))


def test_a_recomputation_that_stops_early_leaves_no_activation_behind():
    model, layers, pairs = started()
    offset = LiveOffset(model, layers, pairs, "adapter")
    model.train().enable_input_require_grads()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    gradients(model, layers, causal_batch())
    hooks = [next(iter(x.module.lora_B["default"]._forward_hooks.values())).__self__ for x in layers.values()]
    assert len(hooks) == len(offset.pairs)
    assert all(hook._seen is None or hook._seen() is None for hook in hooks)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_both_places_give_the_same_training_trajectory(rule):
    dtype = torch.float32 if rule == "sgd" else torch.float64
    ends = []
    for place in ("adapter", "base"):
        model, layers, pairs = started(size=0.05)
        model = model.to(dtype).train()
        before = weights_fingerprint(model)
        offset = LiveOffset(model, layers, pairs, place)
        parameters = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
        optimizer = torch.optim.SGD(parameters, lr=0.05) if rule == "sgd" else torch.optim.AdamW(parameters, lr=1e-3)
        for step in range(20):
            gradients(model, layers, causal_batch(step))
            optimizer.step()
        if place == "adapter":
            assert weights_fingerprint(model) == before
        offset.close()
        assert weights_fingerprint(model) == before
        ends.append([p.detach().clone() for p in parameters])
    moved = max(float((p - pairs[n].lora_B).abs().max()) for n, p in zip(layers, ends[0][1::2], strict=True))
    assert moved > 1e-3
    assert max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*ends, strict=True)) <= 1e-5


# --- what it touches, and takes away again --------------------------------------------------------------------------


def test_nothing_is_added_to_the_model_s_state_and_close_takes_everything_off():
    model, layers, pairs = started()
    names = [set(model.state_dict()), {n for n, _ in model.named_buffers()}, {n for n, _ in model.named_parameters()}]
    attributes = [set(vars(module)) for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with_start = logits(model, causal_batch())
    offset = LiveOffset(model, layers, pairs, "adapter")
    assert names == [
        set(model.state_dict()),
        {n for n, _ in model.named_buffers()},
        {n for n, _ in model.named_parameters()},
    ]
    offset.close()
    offset.close()
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert torch.equal(logits(model, causal_batch()), with_start)


def test_the_pairs_are_the_offset_s_own():
    model, layers, pairs = started()
    offset = LiveOffset(model, layers, pairs, "adapter")
    name = next(iter(layers))
    before = offset.pairs[name].lora_B.clone()
    pairs[name].lora_B.zero_()
    assert torch.equal(offset.pairs[name].lora_B, before)
    assert not any(f.requires_grad for p in offset.pairs.values() for f in (p.lora_A, p.lora_B))


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_merging_and_unloading_name_the_export_until_the_offset_is_closed(place):
    model, layers, pairs = started()
    offset = LiveOffset(model, layers, pairs, place)
    layer = next(iter(layers.values()))
    for refused in (model.merge_adapter, model.merge_and_unload, model.unload, layer.module.merge):
        with pytest.raises(ExportError, match="rankwise export"):
            refused()
    assert not layer.module.merged
    offset.close()
    model.merge_adapter()
    assert layer.module.merged
    model.unmerge_adapter()
    assert type(model.merge_and_unload()).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_moved_base_is_given_back_bit_for_bit_for_a_while_and_for_good(name):
    model, layers, pairs = started(name)
    before = {n: layer.base.module.weight.detach().clone() for n, layer in layers.items()}
    offset = LiveOffset(model, layers, pairs, "base")
    moved = {n: layer.base.module.weight.detach().clone() for n, layer in layers.items()}
    assert not any(torch.equal(before[n], moved[n]) for n in before)
    same = lambda wanted: all(torch.equal(layers[n].base.module.weight, wanted[n]) for n in wanted)  # noqa: E731
    with offset.base_as_found():
        assert same(before)
        with offset.base_as_found():
            assert same(before)
        assert same(before)
    assert same(moved)
    with pytest.raises(RuntimeError), offset.base_as_found():
        raise RuntimeError
    assert same(moved)
    with offset.base_as_found():
        offset.close()
    assert same(before)


def test_beside_the_adapter_the_base_is_always_as_found():
    model, layers, pairs = started()
    before = weights_fingerprint(model)
    with LiveOffset(model, layers, pairs, "adapter").base_as_found():
        assert weights_fingerprint(model) == before


def test_the_offset_is_found_on_the_model_until_it_is_closed():
    model, layers, pairs = started()
    assert live_offset(model) is None
    offset = LiveOffset(model, layers, pairs, "adapter")
    assert live_offset(model) is offset
    assert live_offset(model, "other") is None
    twin = copy.deepcopy(model)
    assert live_offset(twin) is not offset
    live_offset(twin).close()  # takes nothing off the original
    assert (live_offset(twin), live_offset(model)) == (None, offset)
    offset.close()
    assert live_offset(model) is None


def test_a_plain_save_leaves_the_pairs_beside_the_factors_until_the_offset_is_closed(tmp_path):
    model, layers, pairs = started()
    offset = LiveOffset(model, layers, pairs, "adapter")
    model.save_pretrained(tmp_path / "live", selected_adapters=["default"])
    stored = FoldState.load(tmp_path / "live" / STATE_FILE)
    assert stored.offsets.keys() == pairs.keys()
    assert all(torch.equal(stored.offsets[n].lora_B, pairs[n].lora_B) for n in pairs)
    assert (tmp_path / "live" / "adapter_model.safetensors").is_file()
    model.save_pretrained(tmp_path / "second", is_main_process=False)
    assert not (tmp_path / "second" / STATE_FILE).exists()
    with pytest.raises(ExportError, match="rankwise export"):
        model.save_pretrained(tmp_path / "third", path_initial_model_for_weight_conversion=str(tmp_path / "live"))
    offset.close()
    model.save_pretrained(tmp_path / "closed")
    assert not (tmp_path / "closed" / STATE_FILE).exists()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_rounding_of_a_16_bit_base_is_measured(name):
    model, layers, pairs = started(name)
    model.to(torch.bfloat16)
    before = {n: layer.base.module.weight.detach().double() for n, layer in layers.items()}
    offset = LiveOffset(model, layers, pairs, "base")
    for n, layer in layers.items():
        update = layer.scaling * pairs[n].lora_B.double() @ pairs[n].lora_A.double()
        update = update.T if name == "gpt2" else update
        error = torch.linalg.matrix_norm(layer.base.module.weight.double() - before[n] + update)
        assert offset.cast_errors[n] == pytest.approx(float(error), rel=1e-3)
        assert error > 0
    assert "to bfloat16 changed the weights by up to" in offset.notes[0]
    offset.close()
    assert offset.cast_errors == {}


class Recorded(TorchFunctionMode):
    """The precision of each product of two matrices, by back end."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, torch.dtype]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("matmul", "__matmul__"):
            backends = (torch.backends.cuda, torch.backends.mkldnn)
            self.seen.append((*(backend.matmul.fp32_precision for backend in backends), found.dtype))
        return found


def test_a_base_is_moved_in_full_float32_whatever_the_caller_has_switched_on():
    model, layers, pairs = started()
    torch.set_float32_matmul_precision("medium")
    try:
        with Recorded() as recorded, torch.autocast("cpu", torch.bfloat16):
            LiveOffset(model, layers, pairs, "base").close()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert recorded.seen == [("ieee", "ieee", torch.float32)] * len(layers)


# --- refusals -------------------------------------------------------------------------------------------------------


class Linear8bitLt(nn.Linear):
    """Stands for bitsandbytes' layer: int8 rows, float scales beside them."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.weight.SCB[:, None] / 127).T


def packed() -> tuple[PeftModel, dict[str, AdaptedLayer]]:
    model, layer = one_layer()
    dense = layer.base.module.weight.detach()
    layer.module.base_layer = Linear8bitLt(2, 2, bias=False)
    layer.module.base_layer.weight = nn.Parameter((dense * 127).to(torch.int8), requires_grad=False)
    layer.module.base_layer.weight.SCB = torch.ones(2)
    return model, adapted_layers(model)


def test_a_packed_base_takes_the_offset_beside_the_adapter_and_refuses_to_be_written():
    model, layers = packed()
    write_factors(layers["0"], torch.ones(1, 2), torch.ones(2, 1))
    pairs = {"0": FactorPair(torch.ones(1, 2), torch.ones(2, 1))}
    with pytest.raises(ConfigError, match=r"quantized \(8bit, torch\.int8\); use lora-ga\.offset: adapter"):
        LiveOffset(model, layers, pairs, "base")
    stored = layers["0"].base.module.weight.detach().clone()
    LiveOffset(model, layers, pairs, "adapter")
    assert torch.allclose(model(torch.tensor([[1.0, 2.0]])), torch.tensor([[1.0, 2.0]]))
    assert torch.equal(layers["0"].base.module.weight, stored)


def flattened(layer: AdaptedLayer) -> None:
    layer.base.module.weight = nn.Parameter(torch.zeros(4))


def emptied(layer: AdaptedLayer) -> None:
    layer.base.module.weight.ds_id = 0


@pytest.mark.parametrize("shard", [flattened, emptied])
def test_a_sharded_base_refuses_to_be_written(shard: Callable[[AdaptedLayer], None]):
    model, layer = one_layer()
    shard(layer)
    with pytest.raises(ConfigError, match=r"0: .* sharded; use lora-ga\.offset: adapter"):
        LiveOffset(model, {"0": layer}, {"0": FactorPair(torch.ones(1, 2), torch.ones(2, 1))}, "base")


def test_a_base_that_is_sharded_later_cannot_be_given_back_and_says_so():
    model, layer = one_layer()
    offset = LiveOffset(model, {"0": layer}, {"0": FactorPair(torch.ones(1, 2), torch.ones(2, 1))}, "base")
    flattened(layer)
    with pytest.raises(ModelError, match="sharded after lora-ga moved it"):
        offset.close()


def test_pairs_of_other_layers_and_sizes_are_refused_together():
    model, layer = one_layer()
    wrong = {"0": FactorPair(torch.ones(1, 3), torch.ones(2, 1)), "9": FactorPair(torch.ones(1, 2), torch.ones(2, 1))}
    with pytest.raises(ArtifactError) as caught:
        LiveOffset(model, {"0": layer}, wrong, "adapter")
    assert "0: the offset is for a layer of [2, 3], this one has [2, 2]" in str(caught.value)
    assert "9: there is an offset for this layer, and the model has no adapter on it" in str(caught.value)
    with nullcontext():
        assert not layer.module.lora_B["default"]._forward_hooks


def test_a_lora_b_that_runs_without_its_layer_is_an_error_not_a_wrong_number():
    model, layer = one_layer()
    LiveOffset(model, {"0": layer}, {"0": FactorPair(torch.ones(1, 2), torch.ones(2, 1))}, "adapter")
    with pytest.raises(ModelError, match="lora_B ran without"):
        layer.module.lora_B["default"](torch.ones(1, 1))


def test_a_model_that_is_moved_to_another_precision_takes_the_offset_along():
    model, layers, pairs = started()
    LiveOffset(model, layers, pairs, "adapter")
    model.double()
    with adapter_disabled(model):
        wanted = logits(model, causal_batch())
    assert torch.equal(logits(model, causal_batch()), wanted)


def test_a_deep_copy_has_hooks_of_its_own():
    model, layers, pairs = started()
    offset = LiveOffset(model, layers, pairs, "adapter")
    twin = copy.deepcopy(model)
    wanted = logits(model, causal_batch())
    offset.close()
    assert torch.equal(logits(twin, causal_batch()), wanted)


def test_a_compiled_layer_computes_the_same():
    model, layers, pairs = started()
    trained_on(layers)
    LiveOffset(model, layers, pairs, "adapter")
    layer = next(iter(layers.values()))
    x = drawn(4, layer.base.shape.in_features, seed=1)
    assert torch.allclose(torch.compile(layer.module, backend="eager", fullgraph=True)(x), layer.module(x), atol=1e-6)


def test_a_tiny_llama_is_only_a_base_model():
    with pytest.raises(ModelError, match="not a PEFT model"):
        LiveOffset(tiny_llama(), {}, {}, "adapter")
