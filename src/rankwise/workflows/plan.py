"""`rankwise plan`: what a run would spend and where, before paying for it."""

from rankwise.ranks.plan import RankPlan
from rankwise.workflows.config import RunConfig
from rankwise.workflows.cost import measure_cost
from rankwise.workflows.events import CostReady, Listener, PlanReady, ignore
from rankwise.workflows.job import Phases, attach_options, calibration, calibration_total, load_job
from rankwise.workflows.quiet import log_as_notes, quiet_libraries
from rankwise.workflows.run_folder import CALIBRATION_FILE

__all__ = ["plan"]


def plan(config: RunConfig, listener: Listener = ignore) -> RankPlan:
    """The ranks that `train` would give this run, and what it would cost; nothing is trained or written.

    Args:
        config: the run file.
        listener: told of each phase.

    Raises:
        RankwiseError: whatever `train` would refuse before its first step.
    """
    from rankwise.training.attach import plan as make_plan

    phases = Phases(listener)
    with quiet_libraries(), log_as_notes(listener):
        job = load_job(config, phases)
        kept = config.folder / CALIBRATION_FILE
        source = calibration(job, listener, kept if kept.is_file() else None)
        if source is None:
            made = make_plan(job.model, **attach_options(job))
        else:
            total = calibration_total(job)
            with phases.phase("calibration", "Reading gradients", total=total, unit="batch"):
                made = make_plan(job.model, calibration=source, **attach_options(job))
        listener(PlanReady(plan=made))
        with phases.phase("cost", "Measuring a step"):
            cost = measure_cost(job, made, listener)
    listener(CostReady(cost=cost.to_dict()))
    return made
