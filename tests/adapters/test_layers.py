import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.layers import view_linear
from rankwise.errors import ModelError


class Linear8bitLt(nn.Linear):
    """What bitsandbytes 0.50 leaves after quantization: int8 rows in `weight`, their scales in `weight.SCB`."""

    def __init__(self, dense: torch.Tensor) -> None:
        super().__init__(dense.shape[1], dense.shape[0], bias=False)
        scales = dense.abs().amax(dim=1)
        codes = torch.round(dense * 127 / scales[:, None]).to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight.SCB = scales
        self.state = SimpleNamespace(CB=None, SCB=None)

    def move_to_state(self) -> None:
        """What the first forward pass does (init_8bit_state)."""
        self.state.SCB, self.weight.SCB = self.weight.SCB, None


class Linear4bit(nn.Linear):
    pass


def test_a_linear_layer_is_viewed_without_a_copy():
    module = nn.Linear(5, 3)
    view = view_linear("a.b", module)
    assert (view.kind, view.shape.out_features, view.shape.in_features, view.shape.name) == ("linear", 3, 5, "a.b")
    assert view.weight().data_ptr() == module.weight.data_ptr()
    assert not view.weight().requires_grad
    assert not view.quantized


def test_conv1d_is_viewed_as_out_by_in():
    module = Conv1D(3, 5)
    view = view_linear("c", module)
    assert (view.kind, view.shape.out_features, view.shape.in_features) == ("conv1d", 3, 5)
    inputs = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(inputs @ view.weight().T + module.bias, module(inputs))


def test_the_weight_comes_in_the_asked_dtype():
    view = view_linear("a", nn.Linear(5, 3).to(torch.bfloat16))
    assert view.weight().dtype == torch.float32
    assert view.weight(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "module", [nn.Embedding(3, 4), nn.LayerNorm(3), nn.Conv1d(1, 1, 1), nn.Sequential(nn.Linear(2, 2))]
)
def test_other_modules_are_not_linear_layers(module):
    assert view_linear("x", module) is None


def test_8_bit_rows_are_code_times_scale_over_127():
    module = Linear8bitLt(torch.tensor([[1.0, -0.5], [254.0, 2.0]]))
    view = view_linear("q", module)
    assert view.kind == "8bit"
    assert view.quantized
    # Row 1: scale 1, codes 127 and round(-63.5) = -64. Row 2: scale 254, codes 127 and 1.
    expected = torch.tensor([[1.0, -64 / 127], [254.0, 2.0]])
    torch.testing.assert_close(view.weight(), expected, rtol=1e-7, atol=0)
    module.move_to_state()
    torch.testing.assert_close(view.weight(), expected, rtol=1e-7, atol=0)


@given(st.integers(0, 10**6))
def test_8_bit_rows_are_within_half_a_step_of_the_dense_weight(seed):
    dense = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    step = dense.abs().amax(dim=1, keepdim=True) / 127
    assert ((view_linear("q", Linear8bitLt(dense)).weight() - dense).abs() <= step * 0.5001).all()


def test_8_bit_layers_before_quantization_are_read_as_they_are():
    module = Linear8bitLt(torch.eye(3))
    module.weight = nn.Parameter(torch.full((3, 3), 0.25, dtype=torch.float16))
    assert (view_linear("q", module).weight() == 0.25).all()


def test_8_bit_weights_without_scales_are_an_error():
    module = Linear8bitLt(torch.eye(3))
    module.weight.SCB = None
    with pytest.raises(ModelError, match=r"q: the 8-bit weight has no row scales \(SCB\)"):
        view_linear("q", module).weight()


def packed_4bit() -> Linear4bit:
    module = Linear4bit(4, 2, bias=False)
    module.weight = nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    return module


def test_4_bit_layers_without_bitsandbytes_name_the_extra(monkeypatch):
    module = packed_4bit()
    module.weight.quant_state = object()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ModelError, match=r"q is a bitsandbytes 4-bit layer .* pip install 'rankwise\[quantized\]'"):
        view_linear("q", module).weight()


def test_4_bit_layers_are_read_through_bitsandbytes(monkeypatch):
    module = packed_4bit()
    module.weight.quant_state = SimpleNamespace(shape=(2, 4))
    functional = ModuleType("bitsandbytes.functional")
    functional.dequantize_4bit = lambda data, state: torch.ones(state.shape, dtype=torch.bfloat16)
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    view = view_linear("q", module)
    assert (view.kind, view.shape.out_features, view.shape.in_features) == ("4bit", 2, 4)
    assert torch.equal(view.weight(), torch.ones(2, 4))


def test_4_bit_layers_that_were_never_packed_are_an_error():
    with pytest.raises(ModelError, match="q: the 4-bit weight has no quantization state"):
        view_linear("q", packed_4bit()).weight()


def test_a_weight_on_the_meta_device_is_an_error():
    with pytest.raises(ModelError, match="q: the weight is not in memory"):
        view_linear("q", nn.Linear(2, 2, device="meta")).weight()


def test_4_bit_layers_that_an_evaluation_reordered_are_put_back_on_a_copy(monkeypatch):
    # bitsandbytes on CPUs with AVX512-BF16; checked against bitsandbytes 0.50.2 itself, which is not installed here.
    module = packed_4bit()
    state = SimpleNamespace(shape=(2, 4), packing_format_for_cpu=True)
    module.weight.quant_state = state
    functional = ModuleType("bitsandbytes.functional")

    def invert(packed, given):
        given.packing_format_for_cpu = False
        return packed + 1, given

    def dequantize(data, given):
        assert not given.packing_format_for_cpu
        return data[0, 0] * torch.ones(given.shape)

    functional._convert_weight_packed_for_cpu_inverse = invert
    functional.dequantize_4bit = dequantize
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    assert torch.equal(view_linear("q", module).weight(), torch.ones(2, 4))
    assert state.packing_format_for_cpu
