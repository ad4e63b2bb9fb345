"""What a run is told of and what it refuses, at the command line's own level: notes, the kept log, early refusals."""

import json
import logging
from pathlib import Path

import pytest

from rankwise.errors import ConfigError, RecipeError
from rankwise.workflows.config import load_config
from rankwise.workflows.events import Event, Note
from rankwise.workflows.plan import plan
from rankwise.workflows.quiet import log_as_notes
from rankwise.workflows.train import train
from tests.workflows.conftest import MakeConfig

LAYERS = 12
"""Linear layers of the tiny BERT."""


def notes(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


def test_what_shows_when_training_begins_is_told_once(causal: MakeConfig) -> None:
    events: list[Event] = []
    train(causal(method="mgpo", mgpo={"own_momentum": "always"}, training={"max_steps": 2}), events.append)
    assert sum("momentum of our own, decay 0.9, stands in for one of AdamW" in text for text in notes(events)) == 1
    assert len(notes(events)) == len(set(notes(events)))


def test_what_is_logged_before_the_first_step_is_kept_with_the_run(classification: MakeConfig) -> None:
    training = {"max_steps": 2}
    result = train(classification(method="lora-ga", training=training))
    logged = json.loads((result.folder / "rankwise.json").read_text())["log"]
    errors = [line for line in logged if line.startswith("lora-ga: ") and ": relative error 0." in line]
    assert len(errors) == len(result.plan.layers) == LAYERS
    assert all(any(layer.name in line for line in errors) for layer in result.plan.layers)


def test_the_log_of_a_run_that_goes_on_begins_with_what_it_had(classification: MakeConfig) -> None:
    class Killed(BaseException):
        pass

    def listener(event: Event) -> None:
        if type(event).__name__ == "PhaseProgress" and event.phase == "training" and event.done == 3:  # type: ignore[union-attr]
            raise Killed

    config = classification(method="lora-ga", training={"max_steps": 4})
    with pytest.raises(Killed):
        train(config, listener)
    before = json.loads((config.folder / "rankwise.json").read_text())["log"]
    assert len(before) >= LAYERS
    after = json.loads((train(config).folder / "rankwise.json").read_text())["log"]
    assert after[: len(before)] == before


def test_facts_are_collected_and_the_loggers_level_is_put_back() -> None:
    logger, events = logging.getLogger("rankwise"), []  # type: ignore[var-annotated]
    level = logger.level
    with log_as_notes(events.append) as log:
        logging.getLogger("rankwise.methods.x").info("a fact of %d", 1)
        logging.getLogger("rankwise.methods.x").warning("beware")
        logging.getLogger("rankwise.methods.x").debug("no")
    assert log == ["a fact of 1"]
    assert events == [Note(text="beware", level="warning")]
    assert logger.level == level


NEVER = {"method": "mgpo", "mgpo": {"own_momentum": "never"}}


@pytest.mark.parametrize("optim", ["adafactor", "adamw_bnb_8bit", "sgd"])
def test_an_optimizer_without_a_momentum_to_read_is_refused_before_anything_is_loaded_or_written(
    classification: MakeConfig, optim: str
) -> None:
    config = classification(**NEVER, training={"optim": optim})
    for job in (plan, train):
        events: list[Event] = []
        with pytest.raises(RecipeError, match=rf"mgpo\.own_momentum: never, and {optim} keeps no momentum .* use auto"):
            job(config, events.append)
        assert not any(getattr(event, "phase", "") == "model" for event in events)
    assert not config.folder.exists()


@pytest.mark.parametrize(
    "training", [{"optim": "adamw_torch"}, {"optim": "sgd", "optim_args": "momentum=0.9"}], ids=["adamw", "sgd"]
)
def test_an_optimizer_with_a_momentum_to_read_trains(classification: MakeConfig, training: dict[str, str]) -> None:
    result = train(classification(**NEVER, training={**training, "max_steps": 2}))
    assert result.health["status"] == "passed"


def test_a_pair_optimizer_whose_momentum_nobody_may_stand_in_for_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = "model: tiny\ndata: {train: rows.jsonl}\nmethod: [lora-rite, mgpo]\nmgpo: {own_momentum: never}\n"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml:4: mgpo\.own_momentum: never, and lora-rite keeps no momentum"):
        load_config(path)
    path.write_text(text.replace("never", "auto"))
    load_config(path)
