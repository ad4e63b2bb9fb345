"""The run file: one strict schema, and a reader that reports every fault at once with its line.

Importing this module imports no torch; reading a run file does, because the training arguments and the methods'
settings are checked against the installed libraries.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from rankwise.errors import ConfigError
from rankwise.workflows.config_data import DataConfig
from rankwise.workflows.config_faults import describe
from rankwise.workflows.config_file import KeyPath, Source, nearest, read_config, read_overrides
from rankwise.workflows.config_training import DEFAULTS, OWNED, RENAMED, training_schema

if TYPE_CHECKING:
    from rankwise.methods.base import Method
    from rankwise.methods.recipe import Recipe

__all__ = ["CalibrationConfig", "DataConfig", "RunConfig", "Task", "build_recipe", "load_config", "parse_config"]

Task = Literal["causal-lm", "classification"]
_Text = Annotated[str, Field(min_length=1)]
_Names = _Text | list[_Text]
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


class CalibrationConfig(BaseModel):
    """The `calibration:` section.

    Args:
        batches: how many training batches, over all processes, the gradient statistics are taken from.
        memory: `exact`, `sampled`, `low`, or `auto` by the free memory.
        collector: `param`, `outer`, or `auto` by the base model.
        sample_share: the share of rows behind the importance under `sampled`.
        train_mode: whether dropout is active during calibration.
        on_unused: `min` allows targets that some batch does not reach; by default that is an error.
        on_zero: `uniform` goes on where every gradient is zero; by default that is an error.
        cache: whether statistics are kept in the output folder and read again when nothing that matters changed; whole
            gradients (lora-ga's exact statistics), which are as large as the model, never are.
    """

    model_config = _STRICT

    batches: Annotated[int, Field(ge=1)] = 64
    memory: Literal["auto", "exact", "sampled", "low"] = "auto"
    collector: Literal["auto", "outer", "param"] = "auto"
    sample_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    train_mode: bool = False
    on_unused: Literal["error", "min"] = "error"
    on_zero: Literal["error", "uniform"] = "error"
    cache: bool = True


class RunConfig(BaseModel):
    """Everything that decides a run; `model` and `data.train` are the only keys without a default.

    Args:
        model: a hub id or a local folder.
        dtype: `auto` is float32 on a CPU and bfloat16 on a device made for it.
        quantization: how the base model is loaded.
        task: what is trained.
        trust_remote_code: whether code that comes with the model may run.
        data: the rows (see DataConfig).
        method: one method id, or a list of methods whose slots do not collide.
        preset: `paper` or `official`, where a method has it.
        r: the budget: the parameters of a uniform LoRA of this rank.
        lora_alpha: alpha of the scaling rule.
        lora_dropout: dropout before lora_A.
        target_modules: `all-linear`, a regular expression, a list of names, or nothing for PEFT's default.
        exclude_modules: what is left out again.
        modules_to_save: modules trained whole and stored with the adapter.
        calibration: see CalibrationConfig.
        settings: the methods' own keys, by method id; in a run file they stand at the top, under the id.
        training: keys of TrainingArguments; what is not said is rankwise's default.
        output_dir: where the run is written; by default `runs/<model>-<method>`.
    """

    model_config = _STRICT

    model: _Text
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["none", "4bit", "8bit"] = "none"
    task: Task = "causal-lm"
    trust_remote_code: bool = False
    data: DataConfig
    method: _Text | Annotated[list[_Text], Field(min_length=1)] = "gora"
    preset: _Text | None = None
    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: _Names | None = "all-linear"
    exclude_modules: _Names | None = None
    modules_to_save: list[_Text] | None = None
    calibration: CalibrationConfig = CalibrationConfig()
    settings: dict[str, dict[str, Any]] = {}
    training: dict[str, Any] = Field(default={}, validate_default=True)
    output_dir: _Text = ""

    @model_validator(mode="before")
    @classmethod
    def _lift_settings(cls, values: Any) -> Any:
        """The methods' sections stand at the top of a run file; collects them under `settings`."""
        if not isinstance(values, Mapping):
            return values
        from rankwise.methods.recipe import METHODS

        found = {key: value for key, value in values.items() if key in METHODS}
        if not found:
            return values
        rest = {key: value for key, value in values.items() if key not in METHODS}
        return {**rest, "settings": {**rest.get("settings", {}), **found}}

    @field_validator("method", mode="after")
    @classmethod
    def _known_methods(cls, value: str | list[str]) -> str | list[str]:
        from rankwise.methods.recipe import method_class

        for name in [value] if isinstance(value, str) else value:
            method_class(name)
        return value

    @field_validator("settings", mode="after")
    @classmethod
    def _checked_settings(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Each section against its method's dataclass; a fault keeps its key."""
        from rankwise.methods.recipe import METHODS

        fields: dict[str, Any] = {_field_name(name): (_settings_schema(METHODS[name]), ...) for name in value}
        sections = create_model("MethodSettings", **fields)
        sections.model_validate({_field_name(name): _with_tuples(section) for name, section in value.items()})
        return value

    @field_validator("training", mode="after")
    @classmethod
    def _checked_training(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """The values by the installed TrainingArguments, over rankwise's defaults."""
        section = training_schema(info.data.get("task", "causal-lm")).model_validate(value)
        return {**DEFAULTS, **_unclipped(info.data.get("method")), **section.model_dump(exclude_unset=True)}

    @model_validator(mode="after")
    def _fits_task(self) -> "RunConfig":
        if self.task == "classification":
            only = ("packing", "completion_only_loss", "assistant_only_loss", "chat_template_path", "eos_token")
            said = [key for key in only if key in self.data.model_fields_set and getattr(self.data, key)]
            if said:
                raise PydanticCustomError("task", "data.{key} belongs to task causal-lm", {"key": said[0]})
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """The method ids, in order."""
        return (self.method,) if isinstance(self.method, str) else tuple(self.method)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.training["seed"])

    @property
    def learning_rate(self) -> float:
        """What the run file says, else the recommendation for these methods together."""
        said: float | None = self.training.get("learning_rate")
        return build_recipe(self).learning_rates[1] if said is None else said

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        if self.output_dir:
            return Path(self.output_dir)
        model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.model).name).strip("-.") or "model"
        return Path("runs") / "-".join([model.lower(), *self.methods])

    def to_dict(self) -> dict[str, Any]:
        """The resolved run file as plain values, every default written out."""
        values = self.model_dump(mode="json")
        del values["settings"]
        values["output_dir"] = str(self.folder)
        values["training"]["learning_rate"] = self.learning_rate
        return values | {method.id: _with_lists(dataclasses.asdict(method)) for method in build_recipe(self).methods}

    def hash(self) -> str:
        """A SHA-256 of everything that decides the result; `output_dir` does not."""
        values = self.to_dict()
        del values["output_dir"]
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _unclipped(methods: str | list[str] | None) -> dict[str, float]:
    """Trainer's clipping off, as a default, where a method clips what is invariant by itself."""
    from rankwise.methods.recipe import METHODS

    named = [methods] if isinstance(methods, str) else methods or []
    return {"max_grad_norm": 0.0} if any(METHODS[name].unclipped for name in named) else {}


def _with_tuples(section: Mapping[str, Any]) -> dict[str, Any]:
    """YAML knows lists only; settings are immutable."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}


def _with_lists(section: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values, as YAML and JSON hold them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}


def _field_name(method_id: str) -> str:
    """A method id as a Python name, for a schema's field."""
    return method_id.replace("-", "_")


def _settings_schema(method: "type[Method]") -> type[BaseModel]:
    """The strict schema of one method's settings: its dataclass's fields, then its own checks of ranges."""
    hints = get_type_hints(method)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], ... if _required(field) else None)
        for field in dataclasses.fields(method)
        if field.init
    }

    class Constructed(BaseModel):
        """Constructs the method once, so that its own checks run."""

        model_config = ConfigDict(extra="forbid", strict=True)

        @model_validator(mode="after")
        def _construct(self) -> "Constructed":
            method(**self.model_dump(exclude_unset=True))
            return self

    return create_model(f"{method.__name__}Settings", __base__=Constructed, **fields)


def _required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def build_recipe(config: RunConfig) -> "Recipe":
    """The methods of a run with their settings and preset.

    Raises:
        RecipeError: methods that must not be combined, or a preset that none of them has.
    """
    from rankwise.methods.recipe import METHODS, Recipe, method_from_id

    with_preset = [name for name in config.methods if config.preset in METHODS[name].presets]
    if config.preset is not None and not with_preset:
        raise ConfigError(_unknown_preset(config.methods, config.preset))
    return Recipe.of(
        [
            method_from_id(name, config.settings.get(name, {}), config.preset if name in with_preset else None)
            for name in config.methods
        ]
    )


def _unknown_preset(methods: tuple[str, ...], preset: str) -> str:
    from rankwise.methods.recipe import METHODS

    named = list(dict.fromkeys(name for method in methods for name in METHODS[method].presets))
    near = nearest(preset, named)
    known = f"use {' or '.join(named)}, or leave it out" if named else "leave it out"
    verb = "has" if len(methods) == 1 else "have"
    return f"preset: {' and '.join(methods)} {verb} no preset {preset!r}{near}; {known}"


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """A run file with `--set` overrides laid over it.

    Args:
        path: a YAML file.
        overrides: `key=value` or `key.sub=value`, the value in YAML.

    Raises:
        ConfigError: every fault of file and overrides at once, each with `file:line` or `--set`.
    """
    source = read_config(path)
    read_overrides(source, overrides)
    return parse_config(source)


def parse_config(source: Source) -> RunConfig:
    """The run file that `source` holds.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        config = RunConfig.model_validate(source.values)
    except ValidationError as error:
        from rankwise.methods.recipe import LORA_OPTIONS

        advice: dict[KeyPath, str] = {
            ("training", name): f"rankwise sets it: {reason}" for name, reason in OWNED.items()
        }
        advice |= {("training", name): f"write {instead}" for name, instead in RENAMED.items()}
        advice |= {(name,): reason for name, reason in LORA_OPTIONS.items()}
        faults = describe(error.errors(), source, _known_keys(source), advice)
        raise ConfigError([*source.faults, *faults]) from None
    if source.faults:
        raise ConfigError(source.faults)
    try:
        build_recipe(config)
    except ConfigError as error:
        places = [source.place(fault.partition(":")[0].split(".")) for fault in error.faults]
        raise type(error)([f"{place}: {fault}" for place, fault in zip(places, error.faults, strict=True)]) from None
    return config


def _known_keys(source: Source) -> dict[KeyPath, frozenset[str]]:
    """Section -> its keys, for the nearest name to a misspelt one."""
    from rankwise.methods.recipe import METHODS

    task = source.values.get("task", "causal-lm")
    training = training_schema(task if task in ("causal-lm", "classification") else "causal-lm")
    known: dict[KeyPath, frozenset[str]] = {
        (): (frozenset(RunConfig.model_fields) - {"settings"}) | frozenset(METHODS),
        ("data",): frozenset(DataConfig.model_fields),
        ("calibration",): frozenset(CalibrationConfig.model_fields),
        ("training",): frozenset(training.model_fields),
    }
    for name, method in METHODS.items():
        known[(name,)] = frozenset(field.name for field in dataclasses.fields(method) if field.init)
    return known
