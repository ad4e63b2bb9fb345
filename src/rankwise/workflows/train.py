"""`rankwise train`: from a run file to a verified adapter, in one folder that is never left in doubt.

Nothing is written before everything that can be refused has been: config, folder, data, model, tokens, plan, adapter.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import CheckpointError, HealthError, TrainingInterrupted, VerificationError
from rankwise.ranks.plan import RankPlan
from rankwise.workflows.config import RunConfig
from rankwise.workflows.events import Listener, Note, PlanReady, Result, ignore
from rankwise.workflows.job import (
    TASK_TYPES,
    Job,
    Phases,
    attach_options,
    calibration,
    calibration_total,
    load_job,
    validation_batches,
)
from rankwise.workflows.model_card import model_card
from rankwise.workflows.quiet import log_as_notes, quiet_libraries
from rankwise.workflows.recorder import Recorder
from rankwise.workflows.run_folder import CALIBRATION_FILE, Claim, claim, write_atomically, write_manifest
from rankwise.workflows.trainer import evaluate, make_trainer

if TYPE_CHECKING:
    from rankwise.training.callback import TrainingEvent
    from rankwise.training.session import Session
    from rankwise.training.signals import StopRequest

__all__ = ["TrainResult", "train"]

_LIBRARIES = ("rankwise", "torch", "transformers", "peft", "accelerate", "trl", "datasets", "safetensors", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """A run that ended well.

    Args:
        folder: the output folder: the final adapter and everything about the run.
        figures: the manifest's `result`.
        report: the HTML report.
        health: what health.json holds.
        plan: the ranks.
    """

    folder: Path
    figures: Mapping[str, object]
    report: Path
    health: Mapping[str, object]
    plan: RankPlan


def train(
    config: RunConfig, listener: Listener = ignore, *, resume: bool | Path = False, plan_file: Path | None = None
) -> TrainResult:
    """Plans, trains, exports, verifies and reports one run; the same call again goes on with an unfinished one.

    Args:
        config: the run file.
        listener: told of each phase, note and figure.
        resume: True insists on going on with an unfinished run, a path names the checkpoint.
        plan_file: a rank plan to use instead of allocating.

    Returns:
        Where everything is, and the figures.

    Raises:
        ConfigError, DataError, ModelError, OutputError, CheckpointError: found before the first step, nothing written.
        TrainingInterrupted: stopped by a signal.
        HealthError, VerificationError: the run failed after it began; the manifest says so.
    """
    from rankwise.training.signals import StopRequest

    if int(os.environ.get("RANK", "0")):  # set by torchrun and accelerate; the first process tells what all do
        listener = ignore
    claimed = claim(config, resume)
    given = None if plan_file is None else RankPlan.load(plan_file)
    phases = Phases(listener)
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        log = stack.enter_context(log_as_notes(listener))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rankwise-")))
        stop = stack.enter_context(StopRequest())
        job = load_job(config, phases)
        session = _session(job, claimed, given, phases, scratch)
        stack.callback(session.close)
        run = _Run(job, session, claimed, phases, listener, log)
        return run.through(stop, scratch)


def _session(job: Job, claimed: Claim, given: RankPlan | None, phases: Phases, scratch: Path) -> "Session":
    """The adapter, new or as a checkpoint holds it."""
    from rankwise.training.attach import attach
    from rankwise.training.state import resume

    listener = phases.listener
    if claimed.previous is not None:
        _same_data(job, claimed.previous)
        if claimed.checkpoint is None:
            text = f"{claimed.folder} holds no complete checkpoint of the run that was begun there: it starts anew"
            listener(Note(text=text))
    if claimed.checkpoint is not None:
        with phases.phase("resume", f"Going on from {claimed.checkpoint.name}"):
            session = resume(job.model, claimed.checkpoint, validation=validation_batches(job))
        if given is not None and given.ranks != session.plan.ranks:
            raise CheckpointError(
                f"--plan: {claimed.folder} began with other ranks and goes on with them; leave --plan out, or start a "
                "run in another output_dir"
            )
    else:
        kept = claimed.folder / CALIBRATION_FILE
        source = calibration(job, listener, kept if kept.is_file() else scratch / CALIBRATION_FILE)
        options: dict[str, Any] = {
            **attach_options(job),
            "lora_dropout": job.config.lora_dropout,
            "task_type": TASK_TYPES[job.config.task],
            "plan": given,
            "validation": validation_batches(job),
        }
        if source is None:
            session = attach(job.model, **options)
        else:
            with phases.phase("calibration", "Reading gradients", total=calibration_total(job), unit="batch") as detail:
                session = attach(job.model, calibration=source, **options)
                if session.calibration is not None and session.calibration.from_cache:
                    detail.append("kept from before")
    for note in (*session.plan.notes, *session.notes):
        listener(Note(text=note))
    listener(PlanReady(plan=session.plan))
    return session


def _same_data(job: Job, previous: Mapping[str, Any]) -> None:
    """A run goes on with the rows that it began with."""
    for part, source in job.data.sources.items():
        before = previous.get("data", {}).get(part, {}).get("sha256")
        if before != source.sha256:
            raise CheckpointError(
                f"data.{part}: {source.source} is not what the run began with (SHA-256 {source.sha256[:16]}..., then "
                f"{str(before)[:16]}...); put the data back, or start a run in another output_dir"
            )


class _Run:
    """One run from its first written byte to its report."""

    def __init__(
        self, job: Job, session: "Session", claimed: Claim, phases: Phases, listener: Listener, log: Sequence[str]
    ) -> None:
        self.job = job
        self.session = session
        self.claimed = claimed
        self.phases = phases
        self.listener = listener
        self.folder = claimed.folder
        self.manifest: dict[str, Any] = {}
        self._log = log
        self._told = set(session.notes)

    def through(self, stop: "StopRequest", scratch: Path) -> TrainResult:
        """Training, evaluation, export and report; the manifest always says how far it came."""
        self.session.on_remark = self._remarked
        trainer = self._trainer()
        self._begin(scratch)
        owner = self.session.recipe.schedule
        recorder = Recorder(
            self.folder,
            self.listener,
            step=self.session.step,
            writes=not self._elsewhere,
            schedule=None if owner is None else owner.id,
        )
        trainer.add_callback(self.session.callback(on_event=(recorder, self._begun), stop=stop))
        try:
            checkpoint = self.claimed.checkpoint
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            self.phases.seconds["training"] = round(recorder.seconds, 3)
            with self.phases.phase("evaluation", "Evaluating"):
                figures = evaluate(self.job, self.session, trainer, recorder)
            if not self._elsewhere:
                figures |= self._export(figures, scratch, recorder)
            return self._finish(figures)
        except (TrainingInterrupted, KeyboardInterrupt):
            self._status("interrupted")
            raise
        except (HealthError, VerificationError) as error:
            self._status("failed", str(error))
            self._report()
            raise
        except BaseException as error:
            self._status("failed", f"{type(error).__name__}: {error}")
            raise

    def _trainer(self) -> Any:
        """The trainer; transformers makes the output folder for it, which goes again if the trainer is refused."""
        existed = self.folder.exists()
        try:
            trainer = make_trainer(self.job, self.session)
        except BaseException:
            if not existed and self.folder.is_dir():
                self.folder.rmdir()
            raise
        self._tell_notes()
        return trainer

    def _begun(self, event: "TrainingEvent") -> None:
        if event.kind == "begin":
            self._tell_notes()

    def _tell_notes(self) -> None:
        """Notes that the session has had since the last time."""
        for text in self.session.notes:
            if text not in self._told:
                self.listener(Note(text=text))
        self._told |= set(self.session.notes)

    def _remarked(self, text: str) -> None:
        """A warning of the session, told as it comes."""
        self._told.add(text)
        self.listener(Note(text=text, level="warning"))

    def _begin(self, scratch: Path) -> None:
        """The first bytes of the run."""
        if self._elsewhere:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.claimed.checkpoint is None:
            for name in ("metrics.jsonl", "ranks.jsonl", "health.json"):
                (self.folder / name).unlink(missing_ok=True)
        kept = scratch / CALIBRATION_FILE
        if kept.is_file():
            self._keep(kept, self.folder / CALIBRATION_FILE)
        self.manifest = self._described()
        self.session.plan.save(self.folder / "plan.json")
        self.session.health.folder = self.folder
        self.session.health.record(_labels_check(self.job))
        self.session.health.save(self.folder / "health.json")
        write_manifest(self.folder, self.manifest)

    def _keep(self, made: Path, place: Path) -> None:
        """Copies the calibration cache into the run's folder; the run does not depend on it."""
        staged = place.with_name(f".{place.name}.part")
        try:
            shutil.copyfile(made, staged)
            staged.replace(place)
        except OSError as error:
            staged.unlink(missing_ok=True)
            self.listener(Note(text=f"the calibration cache {place} was not written: {error}", level="warning"))

    @property
    def _elsewhere(self) -> bool:
        """Whether another process writes."""
        from rankwise.calibration.processes import process_index

        return process_index() > 0

    def _described(self) -> dict[str, Any]:
        import torch

        job, plan = self.job, self.session.plan
        data: dict[str, Any] = {part: asdict(source) for part, source in job.data.sources.items()}
        for part, count in job.prepared.counts.items():
            data.setdefault(part, {}).update(asdict(count))
        calibrated = self.session.calibration
        return {
            "format": "rankwise-run",
            "version": 1,
            "status": "running",
            "config": job.config.to_dict(),
            "config_hash": job.config.hash(),
            "versions": _versions(),
            "threads": torch.get_num_threads(),
            "device": str(job.arguments.device),
            "seed": job.config.seed,
            "data": data,
            "label_names": list(job.data.label_names),
            "budget": {"parameters": plan.budget, "used": plan.parameters, "share": plan.parameters / plan.budget},
            "timings": dict(self.phases.seconds),
            "result": None,
            "export": None,
            "calibration": None if calibrated is None else asdict(calibrated),
            "log": [*(self.claimed.previous or {}).get("log", []), *self._log],
        }

    def _export(self, figures: Mapping[str, object], scratch: Path, recorder: Recorder) -> dict[str, object]:
        """The final adapter, with its card and tokenizer; what was measured of it goes into the manifest.

        Returns:
            The ranks and parameters of the adapter, where training moved them.
        """
        job, session = self.job, self.session
        folder = scratch / "tokenizer"
        job.tokenizer.save_pretrained(folder)
        card = partial(
            model_card,
            job.config,
            session.plan,
            session.recipe,
            label_names=job.data.label_names,
            sources=job.data.sources,
            figures=figures,
        )
        live = (session.schedule.live_ranks() if session.schedule is not None else {}) or session.plan.ranks
        extra: dict[str, str | Path] = {"README.md": card(live)}
        extra |= {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
        batch = {key: value.to(job.arguments.device) for key, value in job.prepared.sample().items()}
        with self.phases.phase("export", "Writing and verifying the adapter") as detail:
            exported = session.export(
                self.folder,
                batch=batch,
                extra_files=extra,
                failed_folder=self.folder / "failed-adapter",
                overwrite=True,
            )
            if exported.verification is not None:
                detail.append(f"update error {exported.verification.update_error:.1e}")
        self.manifest["export"] = exported.to_dict()
        lost = exported.compression
        if lost is not None and session.schedule is not None:
            recorder.cut(session.step, session.schedule.live_ranks(), lost.ranks)
        if lost is not None and lost.lossy:
            write_atomically(self.folder / "README.md", card(lost.ranks, left_out=lost.total))
            text = f"the exported adapter leaves out {lost.total:.3g} of the norm of what was trained"
            moved = "" if exported.logit_error is None else f", which changes the logits by {exported.logit_error:.3g}"
            self.listener(Note(text=f"{text}{moved}; every other figure is of the trained model", level="warning"))
        held, plan = live if lost is None else lost.ranks, session.plan
        if held == plan.ranks:
            return {}
        parameters = sum(held.get(layer.name, 0) * layer.shape.cost for layer in plan.layers)
        return {"adapter_ranks": sum(held.values()), "adapter_parameters": parameters}

    def _finish(self, figures: Mapping[str, object]) -> TrainResult:
        """The last files; the run counts as finished once its report is there."""
        health = self.session.health
        report = self.folder / "report.html"
        self.manifest["result"] = dict(figures)
        if not self._elsewhere:
            health.save(self.folder / "health.json")
            self._status("finished")
            with self.phases.phase("report", "Writing the report"):
                report = self._report()
            self._status("finished")  # with the time that the report took
        self.listener(Result(folder=self.folder, figures=figures, report=report))
        return TrainResult(
            folder=self.folder, figures=figures, report=report, health=health.to_dict(), plan=self.session.plan
        )

    def _report(self) -> Path:
        from rankwise.report.report import write_report

        return write_report(self.folder)

    def _status(self, status: str, error: str | None = None) -> None:
        if self._elsewhere:
            return
        self.manifest |= {"status": status, "timings": dict(self.phases.seconds)}
        if error is not None:
            self.manifest["error"] = error
        write_manifest(self.folder, self.manifest)


def _labels_check(job: Job) -> Any:
    """The guard's line about labels: none of the parts is all masked, and what was cut or left out is counted."""
    from rankwise.training.guard import HealthCheck

    count = job.prepared.counts["train"]
    return HealthCheck(
        id="labels",
        stage="before",
        status="passed",
        measured=count.labels,
        limit=1,
        message=f"{count.labels:,} labels of {count.rows:,} rows count; {count.truncated:,} rows were cut, "
        f"{count.dropped:,} left out",
    )


def _versions() -> dict[str, str]:
    import platform

    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
