"""Both collectors see exactly the gradient that autograd forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankwise.adapters.layers import view_linear
from rankwise.calibration.collect import collect
from rankwise.errors import CalibrationError, ConfigError, TargetError
from tests.calibration.support import GRADIENT, label_tokens, reference, targets, worst_gradient_error
from tests.support.models import (
    causal_batch,
    classification_batch,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)

COLLECTORS = ["outer", "param"]


class Toy(nn.Module):
    """Linear layers used in unusual ways; the loss is a mean of squares."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.again = nn.Linear(8, 8, bias=False)
        self.rectify = nn.ReLU(inplace=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.rectify(self.first(input=x))
        for _ in range(3):
            hidden = self.again(hidden).mul_(0.5)
        return self.last(hidden)


def squares(model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
    return model(batch).square().mean(), float(len(batch))


@pytest.fixture(autouse=True)
def _keep_random_state():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("collector", COLLECTORS)
def test_one_linear_layer_gives_the_hand_worked_gradient(collector):
    # loss = mean(y), y = W x, W [2, 2]: dL/dy = 1/2 each, dL/dW = [[x1, x2], [x1, x2]] / 2.
    # Batch 1: x = (1, 2), weight 1. Batch 2: x = (5, 4), weight 3. Mean: (1*x1 + 3*x2) / 4 = (4, 3.5), halved.
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    batches = [(torch.tensor([[1.0, 2.0]]), 1.0), (torch.tensor([[5.0, 4.0]]), 3.0)]
    found = collect(
        model, targets(model), batches, GRADIENT, collector=collector, loss=lambda m, b: (m(b[0]).mean(), b[1])
    )
    assert torch.equal(found.layers["0"].gradient, torch.tensor([[2.0, 1.75], [2.0, 1.75]]))
    assert (found.batches, found.skipped, found.tokens) == (2, 0, 4.0)


@pytest.mark.parametrize("collector", COLLECTORS)
@pytest.mark.parametrize("checkpointing", [None, "non-reentrant", "reentrant"])
@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_t5])
def test_gradients_equal_autograds_under_both_kinds_of_checkpointing(build, checkpointing, train_mode, collector):
    batches = [causal_batch(seed, masked=seed) for seed in range(3)]
    if build is tiny_t5:
        batches = [{**batch, "decoder_attention_mask": batch["attention_mask"]} for batch in batches]
    weight = (lambda batch: float((batch["labels"] != -100).sum())) if build is tiny_t5 else label_tokens
    wanted = reference(build(), batches, weight)
    model = build()
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    found = collect(model, targets(model), batches, GRADIENT, collector=collector, train_mode=train_mode)
    assert worst_gradient_error(found, wanted) <= 1e-6
    assert all(layer.batches == 3 for layer in found.layers.values())


def test_the_collectors_order_and_sizes_are_the_targets():
    model = tiny_gpt2()
    layers = targets(model)
    found = collect(model, layers, [causal_batch()], GRADIENT)
    assert list(found.layers) == [layer.name for layer in layers]
    for layer in layers:
        gradient = found.layers[layer.name].gradient
        assert gradient.shape == (layer.shape.out_features, layer.shape.in_features)
        assert (gradient.dtype, gradient.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("collector", COLLECTORS)
def test_a_layer_used_several_times_a_step_gets_the_sum_over_its_uses(collector):
    batches = [torch.randn(5, 6), torch.randn(2, 6)]
    wanted = reference(Toy(), batches, lambda batch: float(len(batch)), loss=lambda m, b: squares(m, b)[0])
    model = Toy()
    found = collect(model, targets(model), batches, GRADIENT, collector=collector, loss=squares)
    assert worst_gradient_error(found, wanted) <= 1e-6
    assert found.layers["again"].batches == 2


@pytest.mark.parametrize("collector", COLLECTORS)
def test_two_modules_that_share_a_weight_give_the_sum_over_both(collector):
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
        model[2].weight = model[0].weight
        return model

    torch.manual_seed(1)
    model, batches = tied(), [torch.randn(3, 4)]
    wanted = torch.autograd.grad(squares(model, batches[0])[0], model[0].weight)[0]
    found = collect(model, targets(model)[:1], batches, GRADIENT, collector=collector, loss=squares)
    assert float((found.layers["0"].gradient - wanted).norm() / wanted.norm()) <= 1e-6
    with pytest.raises(TargetError, match="2 and 0 share one weight"):
        collect(model, targets(model), batches, GRADIENT, collector=collector, loss=squares)


def test_a_head_tied_to_the_embedding_is_seen_by_param_alone():
    model, batch = tiny_llama(tied=True), causal_batch()
    head = view_linear("lm_head", model.lm_head)
    wanted = torch.autograd.grad(model(**batch).loss, model.lm_head.weight)[0]
    found = collect(model, [head], [batch], GRADIENT)
    assert found.collector == "param"
    assert float((found.layers["lm_head"].gradient - wanted).norm() / wanted.norm()) <= 1e-6
    with pytest.raises(CalibrationError, match=r"lm_head: its weight is tied to model.embed_tokens"):
        collect(model, [head], [batch], GRADIENT, collector="outer")


@pytest.mark.parametrize("collector", COLLECTORS)
def test_a_bfloat16_base_gives_autograds_rounded_gradients_summed_in_float32(collector):
    batches = [causal_batch(seed) for seed in range(3)]
    wanted = reference(tiny_llama(dtype=torch.bfloat16), batches, label_tokens)
    model = tiny_llama(dtype=torch.bfloat16)
    found = collect(model, targets(model), batches, GRADIENT, collector=collector)
    assert worst_gradient_error(found, wanted) <= 1e-6


@pytest.mark.parametrize("collector", COLLECTORS)
def test_autocast_is_the_trainings_own(collector):
    batch = causal_batch()
    model = tiny_llama()

    def under_autocast(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m(**b).loss

    wanted = reference(tiny_llama(), [batch], label_tokens, loss=under_autocast)
    plain = reference(tiny_llama(), [batch], label_tokens)
    found = collect(model, targets(model), [batch], GRADIENT, collector=collector, autocast_dtype=torch.bfloat16)
    assert worst_gradient_error(found, wanted) <= 1e-6
    assert worst_gradient_error(found, plain) > 1e-4


class Linear8bitLt(nn.Linear):
    """Stands for bitsandbytes' layer: int8 rows that take no gradient, float scales beside them."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=False)
        scales = dense.weight.detach().abs().amax(1)
        packed = (dense.weight.detach() / scales[:, None] * 127).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight.SCB = scales

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.weight.SCB[:, None] / 127).T


def test_a_quantized_layer_gives_the_gradient_of_its_dequantized_copy():
    torch.manual_seed(2)
    model = nn.Sequential(Linear8bitLt(nn.Linear(6, 5)), nn.Tanh(), Linear8bitLt(nn.Linear(5, 4)))
    dense = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4, bias=False))
    for packed, plain in ((model[0], dense[0]), (model[2], dense[2])):
        plain.weight.data = packed.weight.float() * packed.weight.SCB[:, None] / 127
    batches = [torch.randn(7, 6)]
    wanted = reference(dense, batches, lambda batch: 7.0, loss=lambda m, b: squares(m, b)[0])
    layers = targets(model)
    assert [layer.kind for layer in layers] == ["8bit", "8bit"]
    found = collect(model, layers, batches, GRADIENT, loss=squares)
    assert found.collector == "outer"
    assert worst_gradient_error(found, wanted) <= 1e-6
    with pytest.raises(ConfigError, match="0 holds a quantized weight"):
        collect(model, layers, batches, GRADIENT, collector="param", loss=squares)


def test_a_classifier_with_a_frozen_base_is_estimated_all_the_same():
    batches = [classification_batch(seed) for seed in range(2)]
    wanted = reference(tiny_bert_classifier(), batches, lambda batch: 4.0)
    model = tiny_bert_classifier().requires_grad_(False)
    found = collect(model, targets(model), batches, GRADIENT)
    assert worst_gradient_error(found, wanted) <= 1e-6
    assert found.tokens == 8.0


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    collector=st.sampled_from(COLLECTORS),
    token_weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_mean_over_batches_is_weighted_as_asked(rows, collector, token_weighted, seed):
    rng = torch.Generator().manual_seed(seed)
    batches = [torch.randn(count, 6, generator=rng) for count in rows]
    wanted = reference(
        Toy(), batches, lambda b: float(len(b)) if token_weighted else 1.0, loss=lambda m, b: squares(m, b)[0]
    )
    model = Toy()
    found = collect(
        model, targets(model), batches, GRADIENT, collector=collector, token_weighted=token_weighted, loss=squares
    )
    assert worst_gradient_error(found, wanted) <= 2e-6
    assert found.tokens == sum(rows)
