"""BeamLoRA against the numbers of its official code, a test a case that the manifest names (beamlora.md section 8)."""

import hashlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW

from rankwise.adapters.attach import AdaptedLayer, adapted_layers, write_factors
from rankwise.export.fold import fold
from rankwise.methods.beamlora import BeamLoRA, BeamLoRASchedule, due_after, kept_share, pruned_masks, scores
from rankwise.methods.schedule import Scene
from tests.golden.manifest import case_parameters, golden_folder, load_tensors, read_manifest, relative_error

FOLDER = golden_folder()
MANIFEST = read_manifest(FOLDER, "beamlora") or {}
MOMENTS = ("exp_avg", "exp_avg_sq")
SAME_TORCH = torch.__version__.split("+")[0] == str(MANIFEST.get("torch", "")).split("+")[0]


def cases(prefix: str) -> list[Any]:
    found = ((name, case) for name, case in MANIFEST.get("cases", {}).items() if name.startswith(prefix))
    return case_parameters(FOLDER, "beamlora", prefix, found)


def tensors_of(case: dict[str, Any]) -> dict[str, Tensor]:
    """The case's file, which must be the one that the manifest describes."""
    assert hashlib.sha256((FOLDER / case["file"]).read_bytes()).hexdigest() == case["sha256"]
    tensors = load_tensors(FOLDER, case["file"])
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == case["tensors"]
    return tensors


def assert_same(found: Tensor, recorded: Tensor, bound: float = 1e-6) -> None:
    """Bit for bit on the torch that recorded it."""
    if SAME_TORCH:
        assert torch.equal(found, recorded)
    else:
        assert relative_error(found, recorded) <= bound


def network(weights: Sequence[Tensor], *, r: int, lora_alpha: float) -> tuple[Any, dict[str, AdaptedLayer]]:
    """The adapted layers with a tanh after every one."""
    with torch.random.fork_rng(devices=[]):
        modules: list[nn.Module] = []
        for weight in weights:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.clone()
            modules += [linear, nn.Tanh()]
        names = [str(2 * index) for index in range(len(weights))]
        config = LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=0.0, target_modules=names)
        model = get_peft_model(nn.Sequential(*modules), config)
    return model, adapted_layers(model)


def schedule_of(
    method: BeamLoRA, model: Any, layers: dict[str, AdaptedLayer], permutations: Sequence[Tensor] = ()
) -> BeamLoRASchedule:
    scene = Scene(model=model, layers=layers, seed=0)
    return BeamLoRASchedule(method, scene, permutation=lambda step, module, count: permutations[module])


def adamw(schedule: BeamLoRASchedule, layers: dict[str, AdaptedLayer]) -> AdamW:
    factors = [factor for layer in layers.values() for factor in (layer.lora_A, layer.lora_B)]
    return AdamW([{"params": factors}, *schedule.owned_groups(1e-3, 0.0)], lr=1e-3)


@pytest.mark.parametrize("case", cases("layer_"))
def test_a_gated_layer_its_gradients_and_its_export_equal_the_official_code(case: dict[str, Any]) -> None:
    tensors, params = tensors_of(case), case["params"]
    model, layers = network([tensors["W"]], r=params["r"], lora_alpha=params["lora_alpha"])
    layer = layers["0"]
    write_factors(layer, tensors["A"], tensors["B"])
    assert layer.scaling == params.get("scaling", params["lora_alpha"] / params["r"])
    x = tensors["x"].clone().requires_grad_()
    module: Any = layer.module
    plain = module(x)
    schedule = schedule_of(BeamLoRA(tau=params.get("temperature", 0.05)), model, layers)
    if "gate" not in tensors:  # z = 0: exactly plain LoRA
        assert torch.equal(module(x), plain)
        assert relative_error(plain, tensors["y"]) <= 1e-6
        return
    schedule.gates.write("0", tensors["gate"][0])
    y = module(x)
    assert relative_error(y, tensors["y"]) <= 1e-6
    (y * tensors["upstream"]).sum().backward()
    z = schedule.gates.value("0")
    grads = {"A": layer.lora_A.grad, "B": layer.lora_B.grad, "gate": None if z.grad is None else z.grad[None]}
    for name, grad in {**grads, "x": x.grad}.items():
        assert grad is not None
        assert relative_error(grad, tensors[f"grad_{name}"]) <= 1e-5, name
    assert abs(float(z.grad.sum())) <= 1e-5 * float(z.grad.abs().max())  # type: ignore[union-attr]
    state = schedule.fold_state()
    assert relative_error(state.gates["0"][None], tensors["importance"]) <= 1e-6
    exported = fold(model, state).layers["0"]
    delta = exported.scaling * exported.lora_B @ exported.lora_A
    assert relative_error(delta, tensors["delta_weight"]) <= 1e-6
    schedule.close()


@pytest.mark.parametrize("case", cases("top_p_masks"))
def test_the_global_cut_prunes_the_same_ranks(case: dict[str, Any]) -> None:
    tensors, params = tensors_of(case), case["params"]
    importance = scores(tensors["gates"][:, 0], params["temperature"])
    assert relative_error(importance, tensors["importance"]) <= 1e-6
    for share in params["thresholds"]:
        mask, recorded = pruned_masks(importance, share), tensors[f"mask_p{round(100 * share)}"].bool()
        assert mask.sum() == recorded.sum()
        for row, found, wanted in zip(importance, mask, recorded, strict=True):
            if len(row.unique()) == len(row):  # the order of ties is that of the recording machine's sort
                assert torch.equal(found, wanted)
            else:
                assert found.sum() == wanted.sum()


@pytest.mark.parametrize("case", cases("reset_"))
def test_a_reset_of_the_official_preset_equals_the_official_code_bit_for_bit(case: dict[str, Any]) -> None:
    """The whole schedule: the snapshot after step 3, the reset after step 4, with the recorded permutations."""
    tensors, params = tensors_of(case), case["params"]
    count = len(params["module_order"])
    model, layers = network([tensors[f"W.{k}"] for k in range(count)], r=params["r"], lora_alpha=params["lora_alpha"])
    method = BeamLoRA(
        **{
            **BeamLoRA.presets["official"],
            "cumsum_threshold": params["cumsum_threshold"],
            "reset_optimizer": params["reset_optimizer"],
            "reset_every": 4,
            "reset_end_step": 10**12,  # so that p at step 4 is the threshold itself
        }  # type: ignore[arg-type]
    )
    schedule = schedule_of(method, model, layers, [tensors[f"perm.{k}"] for k in range(count)])
    optimizer = adamw(schedule, layers)
    schedule.begin(optimizer, 8)

    def live(k: int) -> dict[str, Tensor]:
        name = schedule.gates.names[k]
        return {"A": layers[name].lora_A, "B": layers[name].lora_B, "gate": schedule.gates.value(name)}

    def put(when: str) -> None:
        for k in range(count):
            for part, parameter in live(k).items():
                parameter.data.copy_(tensors[f"{when}.{k}.{part}"].view_as(parameter))
                optimizer.state[parameter] = {
                    key: tensors[f"{when}.{k}.{part}.{key}"].clone().view_as(parameter) for key in MOMENTS
                } | {"step": torch.tensor(params["steps"]["A0"])}

    put("cached")
    for step in (1, 2, 3):
        schedule.after_step(step)
    put("before")
    with torch.no_grad():
        assert relative_error(model(tensors["X"]), tensors["y_before"]) <= 1e-6
    schedule.after_step(4)
    (event,) = schedule.events()
    for k, name in enumerate(schedule.gates.names):
        recorded = tensors[f"mask.{k}"].flatten().nonzero().flatten().tolist()
        assert event.layers.get(name, {"pruned": []})["pruned"] == recorded
        assert len(recorded) == params["pruned_per_module"][k]
        if recorded:
            best = torch.topk(tensors[f"importance.{k}"].flatten(), len(recorded)).indices[tensors[f"perm.{k}"]]
            assert event.layers[name]["sources"] == best.tolist()
        for part, parameter in live(k).items():
            state = optimizer.state[parameter]
            assert_same(parameter.detach(), tensors[f"after.{k}.{part}"].view_as(parameter))
            for key in MOMENTS:
                assert_same(state[key], tensors[f"after.{k}.{part}.{key}"].view_as(parameter))
            assert float(state["step"]) == params["steps"]["A0"]
    with torch.no_grad():
        assert relative_error(model(tensors["X"]), tensors["y_after"]) <= 1e-6


@pytest.mark.parametrize(
    ("name", "events"),
    [pytest.param(*item, id=item[0]) for item in MANIFEST.get("callback_schedule", {}).items()]
    or [pytest.param("", [], marks=pytest.mark.skip(reason=f"no callback_schedule of beamlora in {FOLDER}"))],
)
def test_m8_snapshots_and_resets_come_when_the_official_callback_has_them(name: str, events: list[Any]) -> None:
    """The official counter never meets half of an odd period, so that it records no snapshot there."""
    period, end, max_steps, first = (float(part.lstrip("Tendmaxp")) for part in name.split("_"))
    found: list[list[Any]] = []
    for step in range(1, int(max_steps) + 1):
        for event in due_after(step, period=int(period), max_steps=int(max_steps)):
            if event == "reset":
                found.append(["prune", step, kept_share(step, first=first, end_step=int(end))])
            elif period % 2 == 0:
                found.append(["cache_after_optimizer_step", step])
    assert [event[:2] for event in found] == [event[:2] for event in events]
    assert [event[2:] for event in found] == [pytest.approx(event[2:], rel=1e-14) for event in events]
    model, layers = network([torch.eye(6)], r=4, lora_alpha=4)
    settings = {"reset_every": int(period), "reset_end_step": int(end), "cumsum_threshold": first}
    schedule = BeamLoRASchedule(BeamLoRA(**settings), Scene(model=model, layers=layers, seed=0))  # type: ignore[arg-type]
    schedule.begin(adamw(schedule, layers), int(max_steps))
    for step in range(1, int(max_steps) + 1):
        schedule.after_step(step)
    made = [["prune", event.step, event.figures["kept_share"]] for event in schedule.events()]
    assert made == [event for event in found if event[0] == "prune"]


def test_the_official_run_has_the_resets_that_its_settings_give() -> None:
    """T 3000, E 24688, 37031 steps (beamlora.md section 3.4)."""
    preset = BeamLoRA(**BeamLoRA.presets["paper"])  # type: ignore[arg-type]
    assert (preset.reset_every, preset.reset_end_step) == (3000, 24688)
    table = [(event, t) for t in range(1, 37032) for event in due_after(t, period=3000, max_steps=37031)]
    resets = [step for event, step in table if event == "reset"]
    assert resets == list(range(3000, 33001, 3000))
    assert [step for event, step in table if event == "snapshot"][:2] == [1501, 4501]
    shares = [kept_share(step, first=preset.cumsum_threshold, end_step=24688) for step in resets]
    known = [0.951799, 0.956937, 0.964677, 0.973903, 0.983287, 0.991477, 0.997296, 0.999904, 1.0, 1.0, 1.0]
    assert shares == pytest.approx(known, abs=1e-6)
