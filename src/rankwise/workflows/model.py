"""The base model and its tokenizer: loaded as the run file says, refused where something is missing or damaged."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import ConfigError, ModelError
from rankwise.linalg.random import derived_seed
from rankwise.workflows.config import RunConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LoadedModel", "load_model", "load_tokenizer", "model_dtype"]

_SHOWN = 5
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?\Z")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """A base model as it was found.

    Args:
        model: in evaluation mode, every weight finite.
        new_modules: modules that the files do not hold and that were drawn anew from the run's seed (a classifier).
    """

    model: "PreTrainedModel"
    new_modules: tuple[str, ...] = ()


def model_dtype(config: RunConfig) -> "torch.dtype":
    """The dtype of the base weights: `auto` is bfloat16 on a GPU made for it and float32 elsewhere."""
    import torch

    if config.dtype != "auto":
        found: torch.dtype = getattr(torch, config.dtype)
        return found
    capable = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if capable and not config.training.get("use_cpu") else torch.float32


def load_model(config: RunConfig, label_names: Sequence[str] = ()) -> LoadedModel:
    """The base model.

    Args:
        config: names the model, its dtype, quantization and task.
        label_names: the labels of a classification, in the order of their numbers.

    Raises:
        ModelError: no such model, damaged or incomplete files, weights that are NaN or infinite.
        ConfigError: a quantization that is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    _check_place(config.model, "config.json")
    _check_weight_files(config.model)
    options: dict[str, Any] = {"dtype": model_dtype(config), "trust_remote_code": config.trust_remote_code}
    if config.quantization != "none":
        options["quantization_config"] = _quantization(config)
    kind: Any = AutoModelForCausalLM
    if config.task == "classification":
        kind = AutoModelForSequenceClassification
        options["id2label"] = dict(enumerate(label_names))
        options["label2id"] = {name: number for number, name in enumerate(label_names)}
    with torch.random.fork_rng():
        # A head that the files do not hold is drawn from the global state: by the run's seed, so that a continued run
        # finds the same one.
        torch.manual_seed(derived_seed(config.seed, "new-head"))
        try:
            model, found = kind.from_pretrained(config.model, output_loading_info=True, **options)
        except Exception as error:
            raise _not_loaded(config.model, config.model, error) from error
    new = _new_modules(config, model, sorted(found["missing_keys"]))
    _check_finite(config.model, model)
    return LoadedModel(model=model, new_modules=new)


def load_tokenizer(config: RunConfig) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, with a token to pad with.

    Raises:
        ModelError: there is none, or it can neither pad nor end a text.
    """
    from transformers import AutoTokenizer

    _check_place(config.model, "config.json")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            config.model, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise _not_loaded(f"the tokenizer of {config.model}", config.model, error) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"model: the tokenizer of {config.model} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_place(name: str, needed: str) -> None:
    """Refuses a path that leads nowhere before the hub is asked for it."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / needed).is_file():
            raise ModelError(f"model: the folder {name} holds no {needed}; give a folder that transformers can load")
    elif path.is_file():
        raise ModelError(f"model: {name} is a file; give the folder that holds it, or a hub id")
    elif not _HUB_ID.match(name):
        raise ModelError(f"model: {name} does not exist; give a local folder or a hub id")


def _not_loaded(what: str, name: str, error: Exception) -> ModelError:
    """The error for a model that transformers could not load; a mistyped path reads as a hub id and is told as both."""
    if isinstance(error, OSError) and not Path(name).expanduser().is_dir():
        reason = _first_lines(error)
        return ModelError(f"model: {name} is no folder here, and the hub gave no model of that name: {reason}")
    return ModelError(f"model: cannot load {what}: {_first_lines(error)}")


def _check_weight_files(name: str) -> None:
    """Reads the header of every local weight file: a truncated file is told by its name."""
    from safetensors import SafetensorError, safe_open

    folder = Path(name).expanduser()
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model: {path} is corrupt or cut off ({error}); fetch it again") from error


def _quantization(config: RunConfig) -> object:
    """Bitsandbytes' settings."""
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization: {config.quantization} needs bitsandbytes; pip install 'rankwise[quantized]'")
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": model_dtype(config)}
    return BitsAndBytesConfig(load_in_4bit=True, **settings)  # type: ignore[no-untyped-call]


def _new_modules(config: RunConfig, model: "PreTrainedModel", missing: list[str]) -> tuple[str, ...]:
    """The names of modules drawn anew; anything but a classification's head must be in the files."""
    prefix = f"{model.base_model_prefix}."
    body = [key for key in missing if key.startswith(prefix) and ".pooler." not in key]
    if body or (missing and config.task != "classification"):
        lost = body or missing
        shown = ", ".join(lost[:_SHOWN]) + (" ..." if len(lost) > _SHOWN else "")
        raise ModelError(
            f"model: the files of {config.model} lack {len(lost)} weights of {type(model).__name__}: {shown}"
        )
    heads = [key.split(".")[1 if key.startswith(prefix) else 0] for key in missing]
    return tuple(dict.fromkeys(heads))


def _check_finite(name: str, model: "PreTrainedModel") -> None:
    """Every floating-point weight, not only those that will be adapted."""
    import torch

    bad = [
        key
        for key, parameter in model.named_parameters()
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter.detach().sum(dtype=torch.float32)))
    ]
    if bad:
        shown = ", ".join(bad[:_SHOWN]) + (" ..." if len(bad) > _SHOWN else "")
        raise ModelError(f"model: {len(bad)} weights of {name} hold NaN or infinite values: {shown}")


def _first_lines(error: Exception) -> str:
    """A library's message, shortened to what a user can act on."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:397]}..."
