"""What each consumer of adapters would compute from a file, emulated without running any of them.

Consumers differ in one number, the multiplier of lora_B @ lora_A, and in what they refuse to load:

| rule | multiplier | who |
|---|---|---|
| a | PEFT's own: alpha and rank by layer, alpha / sqrt(rank) under use_rslora | PEFT, transformers, vLLM >= 0.32 |
| b | one for all layers: lora_alpha / r, or / sqrt(r) under use_rslora | vLLM <= 0.31, TGI and LoRAX |
| c | one for all layers: lora_alpha / r whatever use_rslora says | SGLang |
| d | lora_alpha / rank of the tensor whatever use_rslora says; lora_alpha 0 means 1 | llama.cpp, Ollama |
| e | (a condition) every tensor has rank r | SGLang, TGI and LoRAX, vllm-omni |

Source: the engines were run on CPU or their sources read; which one is said in each consumer's `evidence`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from rankwise.errors import ConfigError, ExportError
from rankwise.export.files import Pair, number, peft_rank, peft_scaling, split_tensors
from rankwise.export.layouts import Layout, smallest_vllm_rank
from rankwise.linalg.factors import product_norm

__all__ = [
    "CONSUMERS",
    "EXPORT_TARGETS",
    "RULES",
    "Consumer",
    "ConsumerVerdict",
    "Facts",
    "Rule",
    "Status",
    "audit_files",
    "consumer_layout",
    "consumers_of",
    "refuse_consumers",
    "rule_errors",
    "tgi_rank",
]

Status = Literal["ok", "wrong", "refuses"]
Rule = Literal["a", "b", "c", "d"]

ERROR_BOUND = 1e-5
"""The largest relative error of an update that counts as the same."""


@dataclass(frozen=True)
class Facts:
    """What a consumer looks at.

    Args:
        config: adapter_config.json.
        pairs: the stored factors by layer.
        saved: names of tensors that are no factors.
    """

    config: Mapping[str, object]
    pairs: Mapping[str, Pair]
    saved: tuple[str, ...]

    @classmethod
    def of(cls, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> "Facts":
        """The facts of an adapter's files (ArtifactError where they are no LoRA)."""
        pairs, saved = split_tensors(tensors)
        return cls(config, pairs, tuple(saved))

    @property
    def r(self) -> int:
        """The configuration's rank."""
        return int(number(self.config, "r"))

    @property
    def alpha(self) -> float:
        """The configuration's alpha."""
        return number(self.config, "lora_alpha")

    @property
    def uneven(self) -> bool:
        """Whether some tensor's rank is not r."""
        return any(pair.rank != self.r for pair in self.pairs.values())

    @cached_property
    def live(self) -> tuple[str, ...]:
        """The layers whose lora_B @ lora_A is not zero: on the others no multiplier can be wrong."""
        return tuple(name for name, pair in self.pairs.items() if product_norm(pair.lora_A, pair.lora_B) > 0)


def _rule_a(facts: Facts) -> dict[str, float]:
    return {name: peft_scaling(facts.config, name) for name in facts.pairs}


def _rule_b(facts: Facts) -> dict[str, float]:
    divisor = facts.r**0.5 if facts.config.get("use_rslora") else facts.r
    return dict.fromkeys(facts.pairs, facts.alpha / divisor)


def _rule_c(facts: Facts) -> dict[str, float]:
    return dict.fromkeys(facts.pairs, facts.alpha / facts.r)


def _rule_d(facts: Facts) -> dict[str, float]:
    return {name: facts.alpha / pair.rank if facts.alpha else 1.0 for name, pair in facts.pairs.items()}


def _tgi(facts: Facts) -> dict[str, float]:
    """Rule b, but layers are loaded by projection type and r becomes the padded rank after the first type.

    A type that lacks a tensor in some layer is dropped whole.
    """
    types, padded = _types(facts.pairs), tgi_rank(facts.r)
    later = facts.alpha / (padded**0.5 if facts.config.get("use_rslora") else padded)
    scalings = _rule_b(facts)
    for kind in list(types)[1:]:
        scalings |= dict.fromkeys(types[kind], later)
    for kind in _dropped_types(facts):
        scalings |= dict.fromkeys(types[kind], 0.0)
    return scalings


RULES: Mapping[Rule, Callable[[Facts], dict[str, float]]] = {"a": _rule_a, "b": _rule_b, "c": _rule_c, "d": _rule_d}


def tgi_rank(r: int) -> int:
    """The rank that TGI and LoRAX pad to on one device: 8, else the next multiple of 16."""
    return 8 if r <= 8 else -(-r // 16) * 16


def _type(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _types(names: Mapping[str, object]) -> dict[str, list[str]]:
    types: dict[str, list[str]] = {}
    for name in names:
        types.setdefault(_type(name), []).append(name)
    return types


def _dropped_types(facts: Facts) -> set[str]:
    """Types without a tensor in some layer index that another type has."""
    indices = {
        kind: {tuple(re.findall(r"\.(\d+)\.", name)) for name in names} for kind, names in _types(facts.pairs).items()
    }
    stacks: dict[str, set[tuple[str, ...]]] = {}
    for kind, seen in indices.items():
        stacks.setdefault(kind.rpartition("#")[0], set()).update(seen)
    return {kind for kind, seen in indices.items() if seen != stacks[kind.rpartition("#")[0]]}


def _rank_mismatch(facts: Facts) -> str | None:
    for name, pair in facts.pairs.items():
        rank = peft_rank(facts.config, name)
        if rank != pair.rank:
            return f"{name} has rank {pair.rank} in the file and {rank} by the configuration"
    return None


def _uneven(facts: Facts) -> str | None:
    ranks = sorted({pair.rank for pair in facts.pairs.values()})
    return f"ranks {ranks} are not all r={facts.r}" if facts.uneven else None


def _patterns(facts: Facts) -> str | None:
    found = [key for key in ("rank_pattern", "alpha_pattern") if facts.config.get(key)]
    return f"{' and '.join(found)} present" if found else None


def _saved_modules(facts: Facts) -> str | None:
    return f"modules_to_save is not supported ({facts.saved[0]}, ...)" if facts.saved else None


def _head(facts: Facts) -> str | None:
    heads = ("lm_head", "embed_tokens", "embed_out", "wte")
    found = next((name for name in facts.pairs if name.rsplit(".", 1)[-1] in heads), None)
    return f"LoRA on {found} (embedding or output head) is not supported" if found else None


def _regular_expression(facts: Facts) -> str | None:
    targets = facts.config.get("target_modules")
    return f"target_modules is a regular expression ({targets!r})" if isinstance(targets, str) else None


def _vllm_rank(facts: Facts) -> str | None:
    largest = max(facts.r, *(pair.rank for pair in facts.pairs.values()))
    return f"rank {largest} is above 512, the largest max_lora_rank" if smallest_vllm_rank(largest) is None else None


def _float_alpha(facts: Facts) -> str | None:
    return None if isinstance(facts.config["lora_alpha"], int) else f"lora_alpha {facts.alpha} is not an integer"


def _uneven_within_type(facts: Facts) -> str | None:
    for kind, names in _types(facts.pairs).items():
        ranks = sorted({facts.pairs[name].rank for name in names})
        if len(ranks) > 1:
            return f"ranks {ranks} within {kind} cannot be stacked"
    return None


@dataclass(frozen=True, slots=True)
class Consumer:
    """One reader of PEFT adapter folders.

    Args:
        name: what people call it.
        version: the version that the rule holds for.
        evidence: whether it was run or its source was read.
        scaling: the multiplier that it would use for each layer.
        refusals: conditions under which it loads nothing; each returns the reason or None.
    """

    name: str
    version: str
    evidence: Literal["run", "read"]
    scaling: Callable[[Facts], dict[str, float]]
    refusals: tuple[Callable[[Facts], str | None], ...]


_SERVER = (_saved_modules, _head)

CONSUMERS: Mapping[str, Consumer] = {
    "peft": Consumer("PEFT", "0.21", "run", _rule_a, (_rank_mismatch,)),
    "transformers": Consumer("transformers", "5.23", "run", _rule_a, (_rank_mismatch,)),
    "vllm": Consumer("vLLM", ">= 0.32", "run", _rule_a, (_rank_mismatch, *_SERVER, _vllm_rank)),
    "vllm<=0.31": Consumer("vLLM", "<= 0.31", "run", _rule_b, (*_SERVER, _vllm_rank)),
    "sglang": Consumer("SGLang", "0.5.23", "run", _rule_c, (_uneven, _regular_expression, *_SERVER)),
    "llama.cpp": Consumer("llama.cpp", "2026-10", "run", _rule_d, (_saved_modules,)),
    "ollama": Consumer("Ollama", "2026-10", "read", _rule_d, (_float_alpha, _saved_modules)),
    "tgi": Consumer("TGI, LoRAX", "3.x", "read", _tgi, (_uneven_within_type, *_SERVER)),
    "vllm-omni": Consumer("vllm-omni", "#6994", "read", _rule_a, (_patterns, _uneven, *_SERVER)),
}


@dataclass(frozen=True, slots=True)
class ConsumerVerdict:
    """What one consumer makes of an adapter.

    Args:
        consumer: its key in `CONSUMERS`.
        version: the version that this holds for.
        status: computes the same, computes something else without a word, or loads nothing.
        error: the worst relative error of a layer's update, >= 0; None where nothing is loaded.
        reason: the worst layer and its multipliers, or why it refuses; empty where all is well.
        evidence: whether the rule comes from a run of the consumer or from its source.
    """

    consumer: str
    version: str
    status: Status
    error: float | None
    reason: str = ""
    evidence: Literal["run", "read"] = "run"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values; an infinite error (right is 0, another multiplier is used) becomes a text."""
        return {**asdict(self), "error": "inf" if self.error == math.inf else self.error}


def audit_files(config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> list[ConsumerVerdict]:
    """What every consumer would compute from these files, against PEFT's own rule.

    Args:
        config: adapter_config.json of a plain LoRA.
        tensors: adapter_model.safetensors.

    Returns:
        One verdict a consumer, in the order of `CONSUMERS`.

    Raises:
        ArtifactError: the tensors are no LoRA factors.
    """
    facts = Facts.of(config, tensors)
    return [_verdict(key, consumer, facts) for key, consumer in CONSUMERS.items()]


def rule_errors(config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> dict[Rule, float]:
    """The worst relative error of an update under each scaling rule, refusals aside."""
    facts = Facts.of(config, tensors)
    return {rule: _worst(scaling(facts), facts)[0] for rule, scaling in RULES.items()}


def _verdict(key: str, consumer: Consumer, facts: Facts) -> ConsumerVerdict:
    reason = next((why for refusal in consumer.refusals if (why := refusal(facts))), None)
    if reason:
        return ConsumerVerdict(key, consumer.version, "refuses", None, reason, consumer.evidence)
    scalings = consumer.scaling(facts)
    error, name = _worst(scalings, facts)
    if error <= ERROR_BOUND:
        return ConsumerVerdict(key, consumer.version, "ok", error, "", consumer.evidence)
    true = peft_scaling(facts.config, name)
    reason = f"{name}: multiplier {scalings[name]:.6g}, right is {true:.6g}"
    return ConsumerVerdict(key, consumer.version, "wrong", error, reason, consumer.evidence)


def _worst(scalings: Mapping[str, float], facts: Facts) -> tuple[float, str]:
    """The largest |multiplier / PEFT's - 1| over layers with an update: both updates share the product of factors."""
    worst, layer = 0.0, ""
    for name in facts.live:
        true = peft_scaling(facts.config, name)
        error = abs(scalings[name] / true - 1) if true else (math.inf if scalings[name] else 0.0)
        if error > worst:
            worst, layer = error, name
    return worst, layer


EXPORT_TARGETS: Mapping[str, tuple[str, ...]] = {
    "peft": ("peft", "transformers"),
    "vllm": ("vllm", "vllm<=0.31"),
    "sglang": ("sglang",),
    "tgi": ("tgi",),
    "gguf": ("llama.cpp",),
    "ollama": ("ollama", "llama.cpp"),
    "merged": (),
}
"""The values of `export --for` and the consumers that each must satisfy."""


def consumers_of(target: str) -> tuple[str, ...]:
    """The consumers behind a value of `export --for`.

    Raises:
        ConfigError: an unknown value.
        ExportError: mlx, which reads no PEFT folder.
    """
    if target == "mlx":
        raise ExportError(
            "mlx: mlx-lm reads its own format and no PEFT adapter folder. Export --for merged and give mlx-lm the "
            "full weights."
        )
    if target not in EXPORT_TARGETS:
        raise ConfigError(f"--for: {target!r} is not one of {', '.join((*EXPORT_TARGETS, 'mlx'))}.")
    return EXPORT_TARGETS[target]


def consumer_layout(target: str) -> Layout:
    """The layout that fits a value of `export --for`: `merged` for itself, `uniform` for all others."""
    consumers_of(target)
    return "merged" if target == "merged" else "uniform"


def refuse_consumers(targets: tuple[str, ...], config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Raises unless every consumer asked for would load these files and compute the same.

    Raises:
        ConfigError: an unknown consumer.
        ExportError: each consumer that would not, and why.
    """
    wanted = {key for target in targets for key in consumers_of(target)}
    faults = []
    for verdict in audit_files(config, tensors):
        if verdict.consumer in wanted and verdict.status != "ok":
            size = "" if verdict.error is None else f" (updates wrong by {verdict.error:.2g} of their size)"
            faults.append(f"{verdict.consumer} {verdict.version}: {verdict.status}{size}: {verdict.reason}")
    if faults:
        raise ExportError(
            "the adapter cannot be written for the consumers asked for:\n  " + "\n  ".join(faults) + "\n"
            "Layout `uniform` scales alike everywhere; `merged` also holds modules_to_save."
        )
