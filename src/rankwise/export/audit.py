"""What `rankwise check` says of any PEFT LoRA folder: who computes something else, by how much, and what mends it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rankwise.errors import ArtifactError
from rankwise.export.consumers import ConsumerVerdict, Rule, audit_files, rule_errors
from rankwise.export.files import AdapterFiles, number, read_adapter, split_tensors, undeclared_tensors
from rankwise.export.layouts import smallest_vllm_rank
from rankwise.export.stored import what_to_fold

__all__ = ["Audit", "check_folder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What consumers make of an adapter folder.

    Args:
        folder: the folder.
        base_model: the base model's name, if the configuration says it.
        layers: adapted layers in the file.
        ranks: smallest, mean and largest rank of a tensor.
        r: the configuration's rank.
        lora_alpha: the configuration's alpha.
        use_rslora: whether PEFT divides by sqrt(rank).
        parameters: elements of all factors.
        dtype: of the factors.
        verdicts: one a consumer.
        rule_errors: the worst relative error of an update under each scaling rule (see `consumers`), refusals aside.
        vllm_max_lora_rank: the smallest `max_lora_rank` of vLLM that holds the adapter; None above 512.
        faults: what is wrong with the file whoever reads it, or that the factors alone are another function (a method
            keeps an offset, gates or boosters beside them).
        advice: what to do; empty where nothing is wrong.
        command: the command that mends it; None where nothing is wrong or nothing can be mended.
    """

    folder: Path
    base_model: str | None
    layers: int
    ranks: tuple[int, float, int]
    r: int
    lora_alpha: float
    use_rslora: bool
    parameters: int
    dtype: str
    verdicts: tuple[ConsumerVerdict, ...]
    rule_errors: Mapping[Rule, float]
    vllm_max_lora_rank: int | None
    faults: tuple[str, ...]
    advice: str
    command: str | None

    @property
    def served_alike(self) -> bool:
        """Whether every consumer that was run for real computes what PEFT computes; rules only read are not counted."""
        return not self.faults and all(v.status == "ok" for v in self.verdicts if v.evidence == "run")

    def to_dict(self) -> dict[str, object]:
        """The audit as plain JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {
            **values,
            "folder": str(self.folder),
            "ranks": list(self.ranks),
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            "rule_errors": {rule: min(error, 1e308) for rule, error in self.rule_errors.items()},
            "faults": list(self.faults),
            "served_alike": self.served_alike,
        }


def check_folder(folder: str | Path) -> Audit:
    """Audits any PEFT LoRA folder from its files alone: no base model, no accelerator, nothing is written.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ArtifactError: a file is missing, damaged or truncated, or the adapter is not a plain LoRA.
    """
    folder = Path(folder)
    files = read_adapter(folder)
    try:
        pairs, saved = split_tensors(files.tensors)
    except ArtifactError as fault:
        raise ArtifactError(f"{folder}: {fault}") from fault
    ranks = [pair.rank for pair in pairs.values()]
    verdicts = tuple(audit_files(files.config, files.tensors))
    faults, beside = _faults(files, saved), " and ".join(what_to_fold(folder))
    named = files.config.get("base_model_name_or_path")
    base = named if isinstance(named, str) and named else None
    advice, command = _advice(folder, verdicts, faults, saved, base, beside=bool(beside))
    if beside:
        faults += (f"trained beside {beside}: served as it is, it computes something else",)
    return Audit(
        folder=folder,
        base_model=base,
        layers=len(pairs),
        ranks=(min(ranks), sum(ranks) / len(ranks), max(ranks)),
        r=int(number(files.config, "r")),
        lora_alpha=number(files.config, "lora_alpha"),
        use_rslora=bool(files.config.get("use_rslora")),
        parameters=sum(pair.lora_A.numel() + pair.lora_B.numel() for pair in pairs.values()),
        dtype=str(next(iter(pairs.values())).lora_A.dtype).removeprefix("torch."),
        verdicts=verdicts,
        rule_errors=rule_errors(files.config, files.tensors),
        vllm_max_lora_rank=smallest_vllm_rank(max(ranks)),
        faults=faults,
        advice=advice,
        command=command,
    )


def _faults(files: AdapterFiles, saved: Mapping[str, Tensor]) -> tuple[str, ...]:
    faults = [
        f"{key} holds NaN or Inf"
        for key, tensor in files.tensors.items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    declared = files.config.get("modules_to_save")
    names = [str(name) for name in declared] if isinstance(declared, list) else []
    faults += [f"{name}: neither a factor nor declared in modules_to_save" for name in undeclared_tensors(saved, names)]
    return tuple(faults)


def _advice(
    folder: Path,
    verdicts: tuple[ConsumerVerdict, ...],
    faults: tuple[str, ...],
    saved: Mapping[str, Tensor],
    base: str | None,
    *,
    beside: bool,
) -> tuple[str, str | None]:
    if faults:
        return "The file itself is faulty; save it again from the trained model.", None
    source, target = shlex.quote(str(folder)), shlex.quote(f"{folder}-uniform")
    if beside:
        advice = "Export it: that folds what lies beside the factors into them."
        return advice, f"rankwise export {source} -o {target} --layout uniform"
    by_name = {verdict.consumer: verdict for verdict in verdicts}
    if by_name["peft"].status == "refuses":
        return "PEFT itself cannot load this; correct r or rank_pattern in adapter_config.json.", None
    if all(verdict.status == "ok" for verdict in verdicts):
        return "", None
    if saved:
        return (
            "modules_to_save is served by PEFT and transformers only; other servers need merged weights.",
            f"rankwise export {source} -o {shlex.quote(f'{folder}-merged')} --layout merged "
            f"--base {shlex.quote(base or 'BASE_MODEL')}",
        )
    if any(verdict.status != "ok" for verdict in verdicts if verdict.consumer != "tgi"):
        return "One rank and a folded scaling are read alike everywhere.", (
            f"rankwise export {source} -o {target} --layout uniform"
        )
    return "TGI and LoRAX pad ranks to 8 or a multiple of 16 while loading.", (
        f"rankwise export {source} -o {shlex.quote(f'{folder}-tgi')} --for tgi"
    )
