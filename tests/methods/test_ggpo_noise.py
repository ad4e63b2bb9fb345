"""GGPO in training: what the noise is, where it acts, and what it leaves alone."""

import logging
import math
import random as python_random

import numpy as np
import pytest
import torch

from rankwise.adapters.fingerprint import weights_fingerprint
from rankwise.adapters.offset import LiveOffset
from rankwise.adapters.state import FactorPair
from rankwise.errors import ModelError
from rankwise.linalg.random import generator
from rankwise.methods.ggpo import GGPO, MGPO
from rankwise.methods.lora_ga import LoRAGA
from rankwise.methods.perturbing import PerturbationSchedule
from rankwise.training.attach import attach
from tests.methods.perturbed import (
    BATCHES,
    adapted,
    merged,
    noise_on,
    std_of,
    surrogate,
    train,
    trajectory,
)
from tests.support.models import tiny_gpt2, tiny_llama

both = pytest.mark.parametrize("method", [GGPO(sigma=0.1, beta=1.0), MGPO(rho=0.2)], ids=["ggpo", "mgpo"])


@pytest.mark.parametrize("method", [GGPO(sigma=0.0, beta=5.0), MGPO(rho=0.0)], ids=["ggpo", "mgpo"])
def test_g1_without_size_20_steps_are_plain_lora_bit_for_bit(method: GGPO | MGPO) -> None:
    for plain, found in zip(trajectory(None, 20), trajectory(method, 20), strict=True):
        assert torch.equal(plain, found)


@both
def test_a_perturbed_run_is_not_plain_lora(method: GGPO | MGPO) -> None:
    plain, found = trajectory(None), trajectory(method)
    assert not torch.equal(plain[5], found[5])


@both
def test_g2_the_base_is_bit_equal_after_steps_and_after_an_exception(method: GGPO | MGPO) -> None:
    one = adapted(dropout=0.1)
    before = weights_fingerprint(one.model)
    optimizer = one.adamw()
    schedule = one.schedule(method)
    schedule.begin(optimizer, 10)
    train(one, schedule, optimizer, range(1, 4))
    assert weights_fingerprint(one.model) == before

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    *_, last = one.layers.values()
    handle = last.base.module.register_forward_pre_hook(broken)
    schedule.before_step(4)
    assert schedule.perturbations
    with pytest.raises(RuntimeError, match="out of memory"):
        one.model(**BATCHES[0])
    handle.remove()
    assert weights_fingerprint(one.model) == before
    train(one, schedule, optimizer, [5])  # and training goes on
    schedule.close()
    assert weights_fingerprint(one.model) == before


def test_g3_the_noise_has_the_standard_deviation_of_the_formula_row_by_row() -> None:
    one = adapted(tiny_llama(hidden=512, layers=1), targets=["v_proj"], spread=0.1)
    layer = one.first
    assert layer.base.shape.in_features == 512
    schedule = one.schedule(GGPO(sigma=0.1))
    schedule.begin(one.adamw(), 1000)
    squares, norms = torch.zeros(layer.base.shape.out_features, dtype=torch.float64), []
    for step in range(1, 201):
        schedule.before_step(step)
        E = noise_on(layer).double()
        squares += E.square().sum(dim=1)
        norms.append(E.norm(dim=1))
    std = std_of(schedule, layer.name).double()
    formula = 0.1 * merged(layer).norm(dim=1) / math.sqrt(512)
    assert float((std / formula - 1).abs().max()) < 1e-6
    pooled = (squares / (200 * 512)).sqrt()
    assert float((pooled / formula - 1).abs().max()) < 0.02
    spread = torch.stack(norms).std(dim=0) / torch.stack(norms).mean(dim=0)
    assert float(spread.mean()) == pytest.approx(1 / math.sqrt(2 * 512), rel=0.05)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_g4_the_norms_are_the_dense_ones_of_this_weight_and_the_last_clipped_gradient(kind: str) -> None:
    model = tiny_gpt2() if kind == "gpt2" else tiny_llama()
    one = adapted(model, targets=["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "up_proj", "down_proj"])
    optimizer = one.adamw()
    method = GGPO(sigma=0.3, beta=2.0)
    schedule = one.schedule(method)
    schedule.begin(optimizer, 10)
    schedule.before_step(1)
    for name, layer in one.layers.items():  # no gradient yet: the weight alone
        expected = 0.3 * merged(layer).norm(dim=1) / math.sqrt(layer.base.shape.in_features)
        torch.testing.assert_close(std_of(schedule, name).double(), expected, rtol=1e-6, atol=0)
    for step in (1, 2):
        schedule.before_step(step)
        one.model(**BATCHES[step]).loss.backward()
        torch.nn.utils.clip_grad_norm_(one.factors, 0.01)
        gradients = {name: surrogate(layer).square().sum(dim=1) for name, layer in one.layers.items()}
        schedule.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_step(step)
        schedule.before_step(step + 1)
        shares = []
        for name, layer in one.layers.items():
            squares = merged(layer).square().sum(dim=1)
            shares.append((2 * gradients[name].sum(), squares.sum()))
            expected = 0.3 * ((squares + 2 * gradients[name]) / layer.base.shape.in_features).sqrt()
            torch.testing.assert_close(std_of(schedule, name).double(), expected, rtol=2e-6, atol=0)
        ratio = float(sum(g for g, _ in shares) / sum(w for _, w in shares))
        assert schedule.figures()["ggpo_gradient_share"] == pytest.approx(ratio, rel=1e-5)
        assert schedule.figures()["ggpo_noise"] == pytest.approx(0.3 * math.sqrt(1 + ratio), rel=1e-5)


def test_g5_without_beta_it_is_flat_lora() -> None:
    one = adapted(spread=0.2)
    schedule = one.schedule(GGPO(sigma=0.05, beta=0.0))
    optimizer = one.adamw()
    schedule.begin(optimizer, 10)
    for step in (1, 2, 3):
        schedule.before_step(step)
        for name, layer in one.layers.items():  # rho |W'_i| / sqrt(n)
            flat = 0.05 * merged(layer).norm(dim=1) / math.sqrt(layer.base.shape.in_features)
            torch.testing.assert_close(std_of(schedule, name).double(), flat, rtol=1e-6, atol=0)
        train(one, schedule, optimizer, [step])
    assert set(schedule.state_dict()) == {"method", "step"}


def test_the_ramp_multiplies_sigma_and_its_first_step_is_plain() -> None:
    one = adapted(spread=0.2)
    layer = one.first
    schedule = one.schedule(GGPO(**GGPO.presets["flat-lora"]))  # type: ignore[arg-type]
    schedule.begin(one.adamw(), 8)
    schedule.before_step(1)
    assert not schedule.perturbations
    schedule.before_step(5)
    half = 0.025 * merged(layer).norm(dim=1) / math.sqrt(layer.base.shape.in_features)
    torch.testing.assert_close(std_of(schedule, layer.name).double(), half, rtol=1e-6, atol=0)


def test_norm_ema_smooths_the_squared_gradient_norms() -> None:
    one = adapted()
    optimizer = one.adamw()
    schedule = one.schedule(GGPO(norm_ema=0.75))
    schedule.begin(optimizer, 10)
    name, layer = next(iter(one.layers.items()))
    mean = None
    for step in (1, 2, 3):
        schedule.before_step(step)
        one.model(**BATCHES[step]).loss.backward()
        found = surrogate(layer).square().sum(dim=1)
        mean = found if mean is None else 0.75 * mean + 0.25 * found
        schedule.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
        kept = schedule.state_dict()[f"gradient_squares.{name}"]
        torch.testing.assert_close(kept.double(), mean, rtol=1e-5, atol=1e-12)


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_g7_checkpointing_changes_nothing(method: GGPO | MGPO, reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        one = adapted()
        if checkpointed:
            one.model.enable_input_require_grads()
            one.model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = one.adamw()
        schedule = one.schedule(method)
        schedule.begin(optimizer, 4)
        train(one, schedule, optimizer, [1, 2])
        schedule.before_step(3)
        loss = one.model(**BATCHES[3]).loss
        loss.backward()
        found.append([loss.detach(), *(factor.grad for factor in one.factors)])
        schedule.close()
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-6)
        assert plain.any()


@both
def test_g8_the_same_seed_gives_the_same_bits(method: GGPO | MGPO) -> None:
    for first, second in zip(trajectory(method, dropout=0.0), trajectory(method, dropout=0.0), strict=True):
        assert torch.equal(first, second)


def test_every_seed_step_and_layer_has_its_own_noise_and_micro_batches_share_it() -> None:
    one = adapted()
    schedule, other = one.schedule(GGPO(), seed=0), adapted().schedule(GGPO(), seed=1)
    optimizer = one.adamw()
    schedule.begin(optimizer, 4)
    other.begin(optimizer, 4)
    layer = one.layers["model.layers.0.self_attn.q_proj"]
    schedule.before_step(1)
    first = noise_on(layer)
    schedule.before_step(1)  # a loop that says so at every micro-batch
    assert torch.equal(noise_on(layer), first)
    seeds = {by.seed for by in schedule.perturbations.values()}
    assert len(seeds) == len(one.layers)
    schedule.before_step(2)
    assert not torch.equal(noise_on(layer), first)
    other.before_step(1)
    for found in (schedule, other):
        assert not seeds & {by.seed for by in found.perturbations.values()}


def test_noise_of_a_rank_of_its_own_differs_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for scope in ("shared", "rank"):
        for rank in (0, 1):
            monkeypatch.setattr("rankwise.methods.ggpo.process_index", lambda rank=rank: rank)
            one = adapted()
            schedule = one.schedule(GGPO(noise_scope=scope))  # type: ignore[arg-type]
            schedule.begin(one.adamw(), 4)
            schedule.before_step(1)
            found[scope, rank] = noise_on(one.first)
    assert torch.equal(found["shared", 0], found["shared", 1])
    assert not torch.equal(found["rank", 0], found["rank", 1])


@both
def test_g9_four_micro_batches_are_one_batch_and_the_norms_move_once(method: GGPO | MGPO) -> None:
    for whole, parts in zip(trajectory(method), trajectory(method, micro_batches=4), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@both
def test_g10_evaluation_is_plain_lora_bit_for_bit_within_and_between_steps(method: GGPO | MGPO) -> None:
    one = adapted(spread=0.2)
    optimizer = one.adamw()
    schedule = one.schedule(method)
    schedule.begin(optimizer, 9)
    train(one, schedule, optimizer, [1, 2])
    reference = adapted()
    for mine, other in zip(one.factors, reference.factors, strict=True):
        other.data.copy_(mine.data)
    reference.model.eval()
    tokens = BATCHES[0]["input_ids"]
    plain = reference.model(input_ids=tokens).logits
    one.model.eval()
    assert torch.equal(one.model(input_ids=tokens).logits, plain)
    schedule.before_step(3)
    assert torch.equal(one.model(input_ids=tokens).logits, plain)
    one.model.train()
    assert not torch.equal(one.model(input_ids=tokens).logits, plain)
    schedule.before_optimizer_step(3)
    assert torch.equal(one.model(input_ids=tokens).logits, plain)


@both
def test_g11_the_users_random_states_are_left_alone(method: GGPO | MGPO) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), python_random.getstate()
    trajectory(method)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert python_random.getstate() == states[2]


# --- failure cases ----------------------------------------------------------------------------------------------------


def test_a_layer_whose_norm_is_not_finite_is_not_perturbed_in_that_step_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = adapted()
    optimizer = one.adamw()
    schedule = one.schedule(GGPO(sigma=0.1))
    schedule.begin(optimizer, 9)
    name, layer = next(iter(one.layers.items()))
    kept = layer.lora_B.data.clone()
    layer.lora_B.data[0, 0] = float("inf")
    schedule.before_step(1)
    assert not std_of(schedule, name).any()
    assert all(std_of(schedule, other).all() for other in one.layers if other != name)
    layer.lora_B.data.copy_(kept)
    x = torch.ones(1, layer.base.shape.in_features)
    module = layer.base.module
    assert torch.equal(module(x), torch.nn.functional.linear(x, module.weight))  # type: ignore[arg-type]
    schedule.before_step(2)
    assert std_of(schedule, name).all()
    with caplog.at_level(logging.WARNING):
        schedule.after_step(2)
        schedule.end(2)
    told = [record.message for record in caplog.records if "NaN or infinite" in record.message]
    assert len(told) == 1
    assert told[0].startswith("ggpo: ")
    assert all(math.isfinite(value) for value in schedule.figures().values())


def test_non_finite_gradients_of_a_loss_scaler_keep_the_old_norms() -> None:
    one = adapted()
    optimizer = one.adamw()
    schedule = one.schedule(GGPO())
    schedule.begin(optimizer, 9)
    train(one, schedule, optimizer, [1])
    before = schedule.state_dict()
    schedule.before_step(2)
    one.model(**BATCHES[2]).loss.backward()
    name, layer = next(iter(one.layers.items()))
    assert layer.lora_A.grad is not None
    layer.lora_A.grad[0, 0] = float("inf")
    schedule.before_optimizer_step(2)
    after = schedule.state_dict()
    for key in before.keys() - {"method", "step"}:
        assert torch.equal(before[key], after[key]) == (key == f"gradient_squares.{name}")


def test_a_layer_with_zero_gradients_gets_the_weights_term_only_and_one_without_any_keeps_its_norms() -> None:
    one = adapted()
    optimizer = one.adamw()
    schedule = one.schedule(GGPO(sigma=0.1, beta=50.0))
    schedule.begin(optimizer, 9)
    train(one, schedule, optimizer, [1])
    names = list(one.layers)
    zero, absent = one.layers[names[0]], one.layers[names[1]]
    kept = schedule.state_dict()[f"gradient_squares.{names[1]}"]
    schedule.before_step(2)
    one.model(**BATCHES[2]).loss.backward()
    for factor in (zero.lora_A, zero.lora_B):
        factor.grad = torch.zeros_like(factor)
    absent.lora_A.grad = absent.lora_B.grad = None
    schedule.before_optimizer_step(2)
    assert torch.equal(schedule.state_dict()[f"gradient_squares.{names[1]}"], kept)
    schedule.before_step(3)
    weight_term = 0.1 * merged(zero).norm(dim=1) / math.sqrt(zero.base.shape.in_features)
    torch.testing.assert_close(std_of(schedule, names[0]).double(), weight_term, rtol=1e-6, atol=0)


def test_no_gradient_anywhere_is_said(caplog: pytest.LogCaptureFixture) -> None:
    one = adapted()
    schedule = one.schedule(GGPO())
    schedule.begin(one.adamw(), 9)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            schedule.before_step(step)
            schedule.before_optimizer_step(step)
    told = [record.message for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith("ggpo: no layer had a gradient before the optimizer's step")


def test_lora_gas_offset_counts_in_the_merged_weight_and_a_start_that_cancels_leaves_w() -> None:
    one = adapted(spread=0.3)
    pairs = {
        name: FactorPair(layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
        for name, layer in list(one.layers.items())[:-1]
    }
    offset = LiveOffset(one.model, one.layers, pairs, "adapter")
    schedule = one.schedule(GGPO(sigma=1.0, beta=0.0), offsets=offset.pairs)
    optimizer = one.adamw()
    schedule.begin(optimizer, 9)
    schedule.before_step(1)
    for name in pairs:  # step 0: W' = W
        layer = one.layers[name]
        norms = layer.base.weight().double().norm(dim=1) / math.sqrt(layer.base.shape.in_features)
        torch.testing.assert_close(std_of(schedule, name).double(), norms, rtol=1e-5, atol=0)
    train(one, schedule, optimizer, [1, 2])
    for layer in one.layers.values():  # far from the start
        layer.lora_B.data.normal_(std=0.3, generator=generator(5, "test", layer.name))
    schedule.before_step(3)
    for name, layer in one.layers.items():
        norms = merged(layer, pairs.get(name)).norm(dim=1) / math.sqrt(layer.base.shape.in_features)
        torch.testing.assert_close(std_of(schedule, name).double(), norms, rtol=1e-5, atol=0)
    schedule.close()
    offset.close()


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_in_a_session_with_lora_ga_the_norms_are_those_of_what_the_layer_computes(place: str) -> None:
    session = attach(
        tiny_llama(),
        [LoRAGA(offset=place), GGPO(sigma=1.0, beta=0.0)],  # type: ignore[arg-type]
        r=3,
        target_modules=["q_proj", "up_proj"],
        calibration=BATCHES[:2],
    )
    schedule = session.schedule
    assert isinstance(schedule, PerturbationSchedule)
    schedule.begin(torch.optim.AdamW(session.model.parameters(), lr=1e-2), 4)
    session.model.eval()
    schedule.before_step(1)
    for name, layer in session.layers.items():
        module = layer.module
        computed = module(torch.eye(layer.base.shape.in_features)).detach().double().T  # type: ignore[operator]
        norms = computed.norm(dim=1) / math.sqrt(layer.base.shape.in_features)
        torch.testing.assert_close(std_of(schedule, name).double(), norms, rtol=1e-4, atol=0)
    session.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, while it traces
def test_torch_compile_leaves_the_perturbation_as_it_is() -> None:
    for method in (GGPO(sigma=0.1), MGPO()):
        found = []
        for compiled in (False, True):
            one = adapted()
            optimizer = one.adamw()
            schedule = one.schedule(method)
            schedule.begin(optimizer, 4)
            if compiled:
                one.model = torch.compile(one.model, backend="eager")
            found.append(train(one, schedule, optimizer, range(1, 5)))
        for plain, again in zip(*found, strict=True):
            torch.testing.assert_close(again, plain)


def test_a_merged_weight_that_vanishes_has_no_noise_and_no_nan() -> None:
    one = adapted(targets=["q_proj"])
    layer = one.first
    with torch.no_grad():  # W' = 0 in the first rows
        layer.lora_A.copy_(layer.base.weight()[:3])
        layer.lora_B.zero_()
        layer.lora_B[:3] = -torch.eye(3) / layer.scaling
    schedule = one.schedule(GGPO(sigma=1.0))
    schedule.begin(one.adamw(), 2)
    schedule.before_step(1)
    std = std_of(schedule, layer.name)
    assert std.isfinite().all()
    assert float(std[:3].max()) < 1e-3 * float(std[3:].min())


def test_a_layer_that_is_sharded_before_attach_is_refused_and_nothing_is_left_on_the_model() -> None:
    one = adapted()
    *_, last = one.layers.values()
    last.base.module.weight.ds_id = 3  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="sharded already"):
        one.schedule(GGPO())
    assert not any("forward" in layer.base.module.__dict__ for layer in one.layers.values())


def test_packed_layers_take_a_second_product_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    one = adapted()
    for layer in one.layers.values():
        layer.base.module.forward = layer.base.module.forward  # type: ignore[method-assign]
    schedule = one.schedule(GGPO(sigma=0.1))
    with caplog.at_level(logging.INFO):
        schedule.begin(one.adamw(), 6)
    assert "the noise of 8 of 8 layers" in caplog.text
    added = train(one, schedule, one.adamw(), range(1, 4))
    other = adapted()
    swapped = other.schedule(GGPO(sigma=0.1))
    swapped.begin(other.adamw(), 6)
    for mine, its in zip(added, train(other, swapped, other.adamw(), range(1, 4)), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)  # the same E, added in another way


def test_16_bit_bases_and_autocast_train_with_exact_norms() -> None:
    for method in (GGPO(sigma=0.1, beta=0.0), MGPO()):
        for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
            one = adapted(tiny_llama(dtype=dtype))
            before = weights_fingerprint(one.model)
            optimizer = one.adamw()
            schedule = one.schedule(method)
            schedule.begin(optimizer, 4)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                losses = train(one, schedule, optimizer, range(1, 5))
                schedule.before_step(5)
            assert all(loss.isfinite() for loss in losses)
            assert weights_fingerprint(one.model) == before
            if isinstance(method, GGPO):
                for name, layer in one.layers.items():
                    norms = merged(layer).norm(dim=1) / math.sqrt(layer.base.shape.in_features)
                    torch.testing.assert_close(std_of(schedule, name).double(), 0.1 * norms, rtol=1e-4, atol=0)
            assert schedule.figures()
