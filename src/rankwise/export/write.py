"""Writing an adapter: folded, laid out, staged beside its destination, verified, and only then put in place."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from rankwise.adapters.attach import adapted_layers
from rankwise.adapters.checkpoint import write_safetensors
from rankwise.adapters.offset import LiveOffset, live_offset
from rankwise.adapters.state import FoldState
from rankwise.errors import ConfigError, ExportError, OutputError, VerificationError
from rankwise.export.compress import CompressedAdapter, compress_adapter
from rankwise.export.consumers import ConsumerVerdict, consumers_of, refuse_consumers, tgi_rank
from rankwise.export.files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, number, split_tensors
from rankwise.export.fold import FoldedAdapter, base_module_names, fold, fold_folder
from rankwise.export.layouts import Layout, build, check_layout, smallest_vllm_rank
from rankwise.export.live import adapter_on_base, base_as_found, computed_logits, refuse_other_base
from rankwise.export.merge import merge_weights, save_merged, verify_merged
from rankwise.export.staging import (
    ExtraFiles,
    keep_as,
    put_in_place,
    refuse_existing,
    staged_folder,
    sync_folder,
    write_extra_files,
)
from rankwise.export.stored import is_checkpoint, refuse_unfinished, stored_budget, stored_cast_errors, stored_state
from rankwise.export.truncate import truncate_adapter
from rankwise.export.verify import Batch, Verification, cast_notes, compare_logits, verify
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.shapes import LayerShape

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["ExportReport", "export_adapter", "export_folder"]

_Checked = TypeVar("_Checked")

_MERGED_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")
_DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written, and the proof that it is right.

    Args:
        folder: where it is.
        layout: its form.
        dtype: of the factors, or of the merged weights.
        files: names written, relative to `folder`.
        bytes: their size together.
        layers: layers with factors in the file (or merged).
        ranks: the ranks of the trained layers: smallest, mean, largest.
        r: the configuration's rank, None for merged weights.
        vllm_max_lora_rank: the smallest `max_lora_rank` of vLLM that holds the adapter; None if there is none.
        verification: the measured figures; None for merged weights, which are compared bit for bit instead.
        logit_error: the largest difference of logits relative to the largest logit, None if not measured.
        notes: what the user should know.
        compression: what `max_rank` or `budget` discarded, None if nothing had to be. The verification is then against
            the compressed update, while `logit_error` is still against the trained model, without a bound.
    """

    folder: Path
    layout: Layout
    dtype: str
    files: tuple[str, ...]
    bytes: int
    layers: int
    ranks: tuple[int, float, int]
    r: int | None
    vllm_max_lora_rank: int | None
    verification: Verification | None
    logit_error: float | None
    notes: tuple[str, ...]
    compression: CompressedAdapter | None = None

    @property
    def verdicts(self) -> tuple[ConsumerVerdict, ...]:
        """What each consumer would compute from the file; empty for merged weights."""
        return () if self.verification is None else self.verification.verdicts

    def to_dict(self) -> dict[str, object]:
        """The report as plain JSON values."""
        values = asdict(self)
        verdicts = [verdict.to_dict() for verdict in self.verdicts]
        if self.verification is not None:
            values["verification"] = {**asdict(self.verification), "verdicts": verdicts}
        return {**values, "folder": str(self.folder), "verdicts": verdicts}


def export_adapter(
    model: "PeftModel",
    folder: str | Path,
    *,
    layout: Layout = "uniform",
    state: FoldState | None = None,
    offset: LiveOffset | None = None,
    max_rank: int | None = None,
    budget: int | None = None,
    dtype: torch.dtype | str | None = None,
    consumers: Sequence[str] = (),
    batch: Batch | None = None,
    extra_files: ExtraFiles | None = None,
    plan: RankPlan | None = None,
    adapter_name: str = "default",
    fresh: nn.Module | None = None,
    overwrite: bool = False,
    failed_folder: str | Path | None = None,
) -> ExportReport:
    """Writes the adapter of a live model as one plain LoRA adapter, or as merged weights, and proves it right.

    The model is left exactly as found.

    Args:
        model: a PEFT model with a trained LoRA adapter.
        folder: where to write. Other files in it stay.
        layout: uniform (serves right everywhere), compact, per_rank or merged.
        state: what the method keeps beside the adapter.
        offset: the live offset of a start that is subtracted again, if there is one: where it moved the base weights,
            they are as found while the written file is held against them.
        max_rank: the most ranks a layer may have in the file; what that discards is measured and told.
        budget: without `max_rank`, the most parameters that lora_A and lora_B of all layers may have together: the
            smallest singular values for their parameters go first, measured and told alike. `merged` keeps every rank.
        dtype: float32, bfloat16 or float16 of the factors (default float32), or of the merged weights (default: the
            base's own).
        consumers: values of `export --for` that must load the file and compute the same.
        batch: keyword arguments of the model's forward; if given, logits are compared too.
        extra_files: more files for the folder: text, bytes, or the path of a file to copy, by relative name.
        plan: the rank plan; its layers of rank 0 are written as zeros by `uniform`; the trained ranks are held to it.
        adapter_name: which adapter of the model.
        fresh: an unadapted base model of its own to load the file on, in place of the live base; `merged` compares
            logits only with one.
        overwrite: whether files of an adapter that is already there may be replaced.
        failed_folder: where the staged folder is kept if it is not the trained adapter; None discards it.

    Returns:
        What was written and the measured figures.

    Raises:
        OutputError: the destination holds an adapter (nothing is written).
        ConfigError: an unknown layout, dtype or consumer, or a max_rank that cannot be.
        ExportError: something that the layout or a consumer cannot hold, a value that is not finite, or a live offset
            that was given neither as `offset` nor in `state`.
        VerificationError: the written file is not the trained adapter, or rounding of a 16-bit base that the offset
            moved is larger than what was trained; the destination is untouched.
    """
    job = _job(folder, layout, dtype, consumers, extra_files, failed_folder, overwrite=overwrite)
    _check_max_rank(job, max_rank)
    if state is None and offset is not None:
        state = FoldState(offsets=offset.pairs)
    folded = fold(model, state, adapter_name, empty_layers=_empty_layers(plan))
    offset = offset or live_offset(model, adapter_name)
    folded = _with_cast_notes(folded, {} if offset is None else offset.cast_errors)
    _check_plan(folded, plan, gated=bool(state))
    if job.layout == "merged":
        reference = None if batch is None or fresh is None else computed_logits(model, batch)
        with base_as_found(model, offset):
            return _write_merged(job, folded, model.get_base_model(), fresh, batch, reference)
    folded, compression = _compressed(folded, max_rank, budget)

    def check(stage: Path) -> Verification:
        return verify(
            stage,
            folded,
            model,
            batch,
            fresh,
            adapter_name=adapter_name,
            consumers=job.consumers,
            offset=offset,
            lossy=compression is not None and compression.lossy,
        )

    return _write_adapter(job, folded, check, compression)


def export_folder(
    source: str | Path,
    destination: str | Path,
    *,
    layout: Layout = "uniform",
    state: FoldState | None = None,
    max_rank: int | None = None,
    budget: int | None = None,
    dtype: torch.dtype | str | None = None,
    consumers: Sequence[str] = (),
    base: nn.Module | None = None,
    batch: Batch | None = None,
    extra_files: ExtraFiles | None = None,
    plan: RankPlan | None = None,
    fresh: nn.Module | None = None,
    overwrite: bool = False,
    failed_folder: str | Path | None = None,
) -> ExportReport:
    """`export_adapter` from an adapter folder: a native checkpoint, a finished run or any plain PEFT LoRA.

    Without `base` everything but `merged` works; updates are compared, logits are not.

    Args:
        source: holds adapter_config.json and adapter_model.safetensors, and rankwise_state.safetensors where a method
            keeps state.
        destination: where to write; not `source`.
        layout: uniform (serves right everywhere), compact, per_rank or merged.
        state: replaces what rankwise_state.safetensors says.
        max_rank: the most ranks a layer may have in the file; what that discards is measured and told.
        budget: as `export_adapter`; by default what the checkpoint's method keeps its exports to, if it does.
        dtype: float32, bfloat16 or float16 of the factors (default float32), or of the merged weights (default: the
            base's own).
        consumers: values of `export --for` that must load the file and compute the same.
        base: the base model, without adapters; left as found.
        batch: keyword arguments of the model's forward; with `base`, logits are compared too.
        extra_files: more files for the folder: text, bytes, or the path of a file to copy, by relative name.
        plan: the rank plan; its layers of rank 0 are written as zeros by `uniform`.
        fresh: a second base model of its own to load the file on; it keeps what is loaded.
        overwrite: whether files of an adapter that is already there may be replaced.
        failed_folder: where the staged folder is kept if it is not the trained adapter; None discards it.

    Raises:
        ArtifactError: the source is missing, damaged or no plain LoRA, an unfinished checkpoint, or one without the
            state that its adapter cannot do without.
        ModelError: `base` is not the adapter's base model.
        OutputError, ConfigError, ExportError, VerificationError: as `export_adapter`.
    """
    source = Path(source)
    job = _job(destination, layout, dtype, consumers, extra_files, failed_folder, overwrite=overwrite)
    if job.folder.resolve() == source.resolve():
        raise OutputError(f"{destination} is the source itself; name another folder.")
    _check_max_rank(job, max_rank)
    told = refuse_unfinished(source)
    state = stored_state(source) if state is None else state
    folded = _with_cast_notes(_source_adapter(source, state, base, plan), stored_cast_errors(source))
    folded = replace(folded, notes=(*folded.notes, *told))
    if state and (state.gates or state.boosters) and batch is not None:
        batch = None  # stock PEFT on the base knows nothing of gates and boosters
        folded = replace(folded, notes=(*folded.notes, "logits were not compared: the method's state is folded."))
    with ExitStack() as stack:
        model = None
        if base is not None and batch is not None:
            model = stack.enter_context(adapter_on_base(base, source))
            if state and state.offsets:
                stack.callback(LiveOffset(model, adapted_layers(model), state.offsets, "adapter").close)
        reference = None if model is None or batch is None else computed_logits(model, batch)
        if job.layout == "merged":
            stack.close()  # the base carries the merged weights next
            return _write_merged(job, folded, base, fresh or base, batch, reference)
        budget = stored_budget(source) if budget is None else budget
        if budget is None and max_rank is None and state and state.boosters and not is_checkpoint(source):
            text = "no budget is recorded beside these boosters, so that every rank is kept; cut them with max_rank."
            folded = replace(folded, notes=(*folded.notes, text))
        folded, compression = _compressed(folded, max_rank, budget)

        def check(stage: Path) -> Verification:
            return verify(
                stage,
                folded,
                model,
                batch,
                fresh,
                consumers=job.consumers,
                reference=reference,
                lossy=compression is not None and compression.lossy,
            )

        return _write_adapter(job, folded, check, compression)


def _with_cast_notes(folded: FoldedAdapter, cast_errors: Mapping[str, float]) -> FoldedAdapter:
    known = {name: error for name, error in cast_errors.items() if name in folded.layers}
    return replace(folded, notes=(*folded.notes, *cast_notes(folded, known)))


def _check_max_rank(job: "_Job", max_rank: int | None) -> None:
    if max_rank is not None and job.layout == "merged":
        raise ConfigError("max_rank: merged weights hold every rank; leave max_rank out, or export an adapter layout.")


def _compressed(
    folded: FoldedAdapter, max_rank: int | None, budget: int | None
) -> tuple[FoldedAdapter, CompressedAdapter | None]:
    if max_rank is not None:
        return compress_adapter(folded, max_rank)
    return (folded, None) if budget is None else truncate_adapter(folded, budget)


def _source_adapter(
    source: Path, state: FoldState | None, base: nn.Module | None, plan: RankPlan | None
) -> FoldedAdapter:
    folded = fold_folder(source, state, empty_layers=_empty_layers(plan))
    _check_plan(folded, plan, gated=bool(state))
    if base is None:
        return folded
    refuse_other_base(base, folded, source)
    return replace(folded, module_names=base_module_names(base))


@dataclass(frozen=True, slots=True)
class _Job:
    folder: Path
    layout: Layout
    dtype: torch.dtype | None
    consumers: tuple[str, ...]
    extra_files: ExtraFiles
    failed_folder: Path | None


def _job(
    folder: str | Path,
    layout: str,
    dtype: torch.dtype | str | None,
    consumers: Sequence[str],
    extra_files: ExtraFiles | None,
    failed_folder: str | Path | None,
    *,
    overwrite: bool,
) -> _Job:
    """Everything that can be refused before the adapter is read."""
    chosen, folder, extra = check_layout(layout), Path(folder), dict(extra_files or {})
    for consumer in consumers:
        consumers_of(consumer)
    own = list(_MERGED_FILES) if chosen == "merged" else [CONFIG_FILE, WEIGHTS_FILE]
    refuse_existing(folder, [*own, *extra], overwrite=overwrite)
    if chosen == "merged" and (folder / CONFIG_FILE).exists():
        raise OutputError(
            f"{folder} holds an adapter, which transformers would load on top of merged weights. Name another."
        )
    kept = None if failed_folder is None else Path(failed_folder)
    return _Job(folder, chosen, _dtype(dtype), tuple(consumers), extra, kept)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPE_NAMES:
        raise ConfigError(f"dtype: {dtype!r} is not one of {', '.join(_DTYPE_NAMES)}.")
    return _DTYPE_NAMES[dtype]


def _empty_layers(plan: RankPlan | None) -> list[LayerShape]:
    return [] if plan is None else [layer.shape for layer in plan.layers if layer.rank == 0]


def _check_plan(folded: FoldedAdapter, plan: RankPlan | None, *, gated: bool) -> None:
    """Every planned layer has the planned rank; folded gates may leave fewer, folded offsets and boosters more."""
    if plan is None or gated:
        return
    ranks = folded.ranks
    faults = [
        f"{name}: rank {ranks.get(name, 0)}, planned {rank}"
        for name, rank in plan.ranks.items()
        if ranks.get(name, 0) != rank
    ]
    faults += [f"{name}: not in the plan" for name in ranks if name not in plan.ranks]
    if faults:
        raise ExportError("the adapter is not the plan's:\n  " + "\n  ".join(faults[:10]))


def _write_adapter(
    job: _Job,
    folded: FoldedAdapter,
    check: Callable[[Path], Verification],
    compression: CompressedAdapter | None,
) -> ExportReport:
    files = _built(job, folded)

    def write(stage: Path) -> None:
        write_safetensors(stage / WEIGHTS_FILE, files.tensors, {"format": "pt"})
        text = json.dumps(files.config, indent=2, sort_keys=True)
        (stage / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    verification, sizes = _stage(job, write, check)
    r = int(number(files.config, "r"))
    return _report(
        job,
        folded,
        sizes,
        dtype=job.dtype or torch.float32,
        layers=len(split_tensors(files.tensors)[0]),
        r=r,
        vllm_max_lora_rank=smallest_vllm_rank(r),
        verification=verification,
        logit_error=verification.logit_error,
        notes=files.notes,
        compression=compression,
    )


def _built(job: _Job, folded: FoldedAdapter) -> AdapterFiles:
    largest = max([layer.rank for layer in folded.layers.values()], default=0)
    rank = tgi_rank(max(largest, 1)) if "tgi" in job.consumers and job.layout == "uniform" else None
    files = build(folded, job.layout, job.dtype or torch.float32, rank=rank)
    refuse_consumers(job.consumers, files.config, files.tensors)
    return files


def _write_merged(
    job: _Job,
    folded: FoldedAdapter,
    base: nn.Module | None,
    plain: nn.Module | None,
    batch: Batch | None,
    reference: Tensor | None,
) -> ExportReport:
    """`plain` is an unadapted base model: it computes with the merged weights, and keeps its own."""
    if base is None:
        raise ExportError("merged weights need the base model; give it (--base), or export layout uniform.")
    if job.consumers and set(job.consumers) != {"merged"}:
        raise ConfigError(f"layout merged writes no adapter; it cannot be checked for {', '.join(job.consumers)}.")
    merged = merge_weights(folded, base, job.dtype)
    model, notes = base, folded.notes + merged.notes
    if reference is not None and merged.rounds_base:
        reference = None
        notes += (f"logits were not compared: rounding the whole base model to {merged.dtype} changes them too.",)

    def check(stage: Path) -> float | None:
        verify_merged(stage, merged, {name for name, layer in folded.layers.items() if layer.rank})
        if plain is None or batch is None or reference is None:
            return None
        return compare_logits(stage, computed_logits(plain, batch, merged.tensors), reference, half=merged.half)

    logit_error, sizes = _stage(job, lambda stage: save_merged(merged, model, stage), check)
    return _report(job, folded, sizes, dtype=merged.dtype, layers=merged.layers, logit_error=logit_error, notes=notes)


def _stage(
    job: _Job, write: Callable[[Path], None], check: Callable[[Path], _Checked]
) -> tuple[_Checked, dict[str, int]]:
    """Writes, checks and puts in place; what the check returned, and the size of each file."""
    with staged_folder(job.folder) as stage:
        write(stage)
        try:
            checked = check(stage)
        except VerificationError as fault:
            if job.failed_folder is None:
                raise
            keep_as(stage, job.failed_folder)
            raise VerificationError(f"{fault}\nThe failed files are kept in {job.failed_folder}.") from fault
        write_extra_files(stage, job.extra_files)
        sizes = {str(p.relative_to(stage)): p.stat().st_size for p in sorted(stage.rglob("*")) if p.is_file()}
        sync_folder(stage)
        put_in_place(stage, job.folder)
    return checked, sizes


def _report(
    job: _Job,
    folded: FoldedAdapter,
    sizes: Mapping[str, int],
    *,
    dtype: torch.dtype,
    layers: int,
    r: int | None = None,
    vllm_max_lora_rank: int | None = None,
    verification: Verification | None = None,
    logit_error: float | None,
    notes: tuple[str, ...],
    compression: CompressedAdapter | None = None,
) -> ExportReport:
    ranks = [layer.rank for layer in folded.layers.values()]
    return ExportReport(
        folder=job.folder,
        layout=job.layout,
        dtype=str(dtype).removeprefix("torch."),
        files=tuple(sizes),
        bytes=sum(sizes.values()),
        layers=layers,
        ranks=(min(ranks), sum(ranks) / len(ranks), max(ranks)),
        r=r,
        vllm_max_lora_rank=vllm_max_lora_rank,
        verification=verification,
        logit_error=logit_error,
        notes=notes,
        compression=compression,
    )
