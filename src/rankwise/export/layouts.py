"""The forms that one adapter can take on disk, each built exactly as specified.

| layout | factors | lora_alpha | patterns | right for |
|---|---|---|---|---|
| `uniform` | zero-padded to one rank r, lora_B times the scaling | r | none | everything |
| `compact` | own ranks, lora_B times the scaling | r | rank and alpha, scale 1 | PEFT, transformers, vLLM |
| `per_rank` | own ranks, lora_B times scaling * rank / alpha | one integer | rank only | llama.cpp, vLLM >= 0.32 |
| `merged` | full weights W + scaling * lora_B @ lora_A | - | - | anything; see `merge.py` |
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from rankwise.errors import ConfigError, ExportError
from rankwise.export.files import KEY_PREFIX, AdapterFiles, Pair
from rankwise.export.fold import FoldedAdapter, FoldedLayer
from rankwise.linalg.factors import balance

__all__ = ["LAYOUTS", "AdapterFiles", "Layout", "build", "check_layout", "smallest_vllm_rank", "target_names"]

Layout = Literal["uniform", "compact", "per_rank", "merged"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MUCH_ABOVE_MEAN = 4.0
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HALF_LOSS = 2.0**-10


def check_layout(layout: str) -> Layout:
    """The layout of that name.

    Raises:
        ConfigError: there is none.
    """
    for known in LAYOUTS:
        if layout == known:
            return known
    raise ConfigError(f"layout: {layout!r} is not one of {', '.join(LAYOUTS)}.")


def build(
    folded: FoldedAdapter,
    layout: Layout = "uniform",
    dtype: torch.dtype = torch.float32,
    *,
    rank: int | None = None,
    lora_alpha: int | None = None,
) -> AdapterFiles:
    """The files of one layout; the scaling goes into lora_B in float32, the cast to `dtype` comes last.

    Args:
        folded: the adapter.
        layout: uniform, compact or per_rank.
        dtype: float32, bfloat16 or float16 of the factors; saved modules keep theirs.
        rank: uniform only, the rank to pad to; at least the largest, which is the default.
        lora_alpha: per_rank only, an integer >= 1; by default the largest rank.

    Returns:
        Configuration, contiguous tensors on the CPU that share no memory, and notes for the user.

    Raises:
        ConfigError: an unknown layout, dtype, rank or alpha.
        ExportError: `merged`, which needs the base model.

    Source: serving.md section 3 of the project's specifications.
    """
    largest = max([layer.rank for layer in folded.layers.values()], default=0)
    _check_arguments(layout, dtype, rank, lora_alpha, largest)
    if largest == 0:
        return _all_empty(folded, layout, dtype)
    r = max(largest, rank or 0)
    alpha = lora_alpha if layout == "per_rank" and lora_alpha else r
    kept = {name: layer for name, layer in folded.layers.items() if layer.rank or layout == "uniform"}
    pairs = {name: _cast(name, _pair(layer, layout, r, alpha), dtype) for name, layer in kept.items()}
    targets, notes = target_names(folded, kept)
    config = _config(folded, r, alpha, targets)
    own = {_pattern_key(name): pair.rank for name, pair in pairs.items() if pair.rank != r}
    if layout in ("compact", "per_rank"):
        config["rank_pattern"] = own
    if layout == "compact":
        config["alpha_pattern"] = dict(own)
    return AdapterFiles(config, _tensors(pairs, folded.saved), folded.notes + notes + _size_notes(folded, layout, r))


def target_names(folded: FoldedAdapter, kept: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
    """The shortest list of names that selects exactly these layers by PEFT's suffix rule, and a note if it is long.

    Leaf names (`q_proj`) are used only where they are known to select nothing else; otherwise full names.
    """
    names = set(kept)
    leaves = {name.rsplit(".", 1)[-1] for name in names}
    if folded.module_names is not None:
        chosen = {name for name in folded.module_names if _selected(name, leaves, folded.saved_modules)}
        if chosen == names:
            return sorted(leaves), ()
        why = "leaf names would also select " + _few(chosen - names)
    elif folded.targets is not None and names == set(folded.layers):
        if not set(folded.targets) & names:
            return sorted(folded.targets), ()
        why = "without the base model it is unknown what else leaf names would select"
    else:
        why = "without the base model it is unknown what else leaf names would select"
    return sorted(names), (f"target_modules lists {len(names)} full names: {why}. Some servers match leaf names only.",)


def smallest_vllm_rank(r: int) -> int | None:
    """The smallest `max_lora_rank` of vLLM that holds rank `r`; None above 512."""
    return next((allowed for allowed in _VLLM_RANKS if allowed >= r), None)


def _selected(name: str, targets: Iterable[str], saved_modules: Iterable[str]) -> bool:
    """PEFT's suffix rule, with what `modules_to_save` takes out (PEFT 0.21.2, check_target_module_exists)."""
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved_modules):
        return False
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _pair(layer: FoldedLayer, layout: Layout, r: int, alpha: int) -> Pair:
    if layout == "per_rank":
        return Pair(layer.lora_A, layer.lora_B * (layer.scaling * layer.rank / alpha))
    lora_A, lora_B = layer.lora_A, layer.lora_B * layer.scaling
    if layout == "compact" or layer.rank == r:
        return Pair(lora_A, lora_B)
    padded_A, padded_B = torch.zeros(r, lora_A.shape[1]), torch.zeros(lora_B.shape[0], r)
    padded_A[: layer.rank] = lora_A
    padded_B[:, : layer.rank] = lora_B
    return Pair(padded_A, padded_B)


def _cast(name: str, pair: Pair, dtype: torch.dtype) -> Pair:
    """The pair in `dtype`, balanced first where float16 would lose bits of one factor."""
    if dtype == torch.float16 and max(_half_loss(pair.lora_A), _half_loss(pair.lora_B)) > _HALF_LOSS:
        pair = Pair(*balance(pair.lora_A, pair.lora_B))  # by powers of two: the product keeps every bit
    cast = Pair(pair.lora_A.to(dtype, copy=True).contiguous(), pair.lora_B.to(dtype, copy=True).contiguous())
    for side, factor in (("lora_A", cast.lora_A), ("lora_B", cast.lora_B)):
        if not bool(torch.isfinite(factor).all()):
            raise ExportError(f"{name}.{side} does not fit into {dtype}; export with bfloat16 or float32.")
    return cast


def _half_loss(factor: Tensor) -> float:
    norm = float(factor.norm())
    return float((factor.to(torch.float16).float() - factor).norm()) / norm if norm else 0.0


def _config(folded: FoldedAdapter, r: int, alpha: int, targets: list[str]) -> dict[str, object]:
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": folded.base_name,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": folded.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": list(folded.saved_modules) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {},
        "target_modules": targets,
        "task_type": folded.task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def _tensors(pairs: Mapping[str, Pair], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = pair.lora_A
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = pair.lora_B
    return tensors | {f"{KEY_PREFIX}{name}": tensor.contiguous() for name, tensor in saved.items()}


def _pattern_key(name: str) -> str:
    """Anchored and escaped: a bare name would match as a suffix, and its dots as wildcards (serving.md section 5)."""
    return "^" + re.escape(name)


def _all_empty(folded: FoldedAdapter, layout: Layout, dtype: torch.dtype) -> AdapterFiles:
    """PEFT refuses rank 0 and an adapter without layers, so zeros of rank 1 stand for "nothing learned"."""
    if not folded.layers:
        raise ExportError("the adapter has no layer; there is nothing to export. Check target_modules.")
    zeros = {
        name: FoldedLayer(
            layer.shape, torch.zeros(1, layer.shape.in_features), torch.zeros(layer.shape.out_features, 1), 1.0
        )
        for name, layer in folded.layers.items()
    }
    note = "warning: no layer has a rank: a rank-1 adapter of zeros is written, equal to the base model."
    return build(replace(folded, layers=zeros, notes=(*folded.notes, note)), layout, dtype)


def _size_notes(folded: FoldedAdapter, layout: Layout, r: int) -> tuple[str, ...]:
    ranks = [layer.rank for layer in folded.layers.values()]
    mean = sum(ranks) / len(ranks)
    notes = []
    if layout == "uniform" and r > _MUCH_ABOVE_MEAN * mean:
        notes.append(
            f"warning: every layer is padded to rank {r}, {r / mean:.1f} times the mean rank {mean:.2f}; the compact "
            "layout is smaller, where PEFT, transformers or vLLM serve it."
        )
    if folded.saved_modules and folded.saved:
        notes.append("modules_to_save is served by PEFT and transformers only.")
    allowed = smallest_vllm_rank(r)
    if allowed is None:
        notes.append(f"warning: rank {r} is above 512, the largest max_lora_rank of vLLM.")
    else:
        notes.append(f"vLLM needs max_lora_rank={allowed} or more (its default is 16).")
    return tuple(notes)


def _few(names: set[str], shown: int = 3) -> str:
    listed = sorted(names)
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "") or "nothing"


def _check_arguments(layout: str, dtype: torch.dtype, rank: int | None, alpha: int | None, largest: int) -> None:
    check_layout(layout)
    faults = []
    if dtype not in _DTYPES:
        faults.append(f"dtype: {dtype} is not one of float32, bfloat16, float16.")
    if rank is not None and (layout != "uniform" or rank < largest):
        faults.append(
            f"rank: {rank} is not allowed; only `uniform` is padded, to {largest} (its largest rank) or more."
        )
    if alpha is not None and (layout != "per_rank" or isinstance(alpha, bool) or alpha < 1):
        faults.append(f"lora_alpha: {alpha!r} is not allowed; only `per_rank` takes one, an integer >= 1.")
    if faults:
        raise ConfigError(faults)
    if layout == "merged":
        raise ExportError("merged weights are no adapter: they need the base model; use `export.merge.merge_weights`.")
