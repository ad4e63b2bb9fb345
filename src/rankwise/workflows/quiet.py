"""Keeps the libraries underneath from printing and drawing what rankwise reports itself; everything is put back."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

from rankwise.workflows.data_files import quiet_datasets
from rankwise.workflows.events import Listener, Note

__all__ = ["log_as_notes", "quiet_libraries"]


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, printed dictionaries or remarks of the libraries underneath, the hub's client among them."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in ("trl", "accelerate", "huggingface_hub")}
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with quiet_datasets(), warnings.catch_warnings():
            # PEFT 0.21 with transformers 5.23: raised by PEFT itself at every attach.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def log_as_notes(listener: Listener) -> Iterator[list[str]]:
    """Warnings that rankwise's own modules log reach the listener as notes, and nobody else; facts are collected."""
    facts: list[str] = []

    class Telling(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                listener(Note(text=record.getMessage(), level="warning"))
            else:
                facts.append(record.getMessage())

    logger, handler = logging.getLogger("rankwise"), Telling(logging.INFO)
    spread, level = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    try:
        yield facts
    finally:
        logger.removeHandler(handler)
        logger.propagate = spread
        logger.setLevel(level)
