"""The `data:` section of a run file: what is read, and TRL's SFTConfig keys for how it is prepared."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

__all__ = ["SFT_DATA_KEYS", "DataConfig"]

_Share = Annotated[float, Field(gt=0, lt=1)]
_Text = Annotated[str, Field(min_length=1)]


class DataConfig(BaseModel):
    """Where the rows come from and how they become tokens.

    Args:
        train: a file (.jsonl, .json, .csv, .parquet, also compressed), a folder of such files, or a hub id.
        validation: the same, or the share of `train` to set aside (0 < share < 1), or nothing.
        test: the same, evaluated once at the end, or nothing.
        subset: the configuration of a hub data set that has several.
        max_length: tokens a row, the rest is cut off (and counted); with packing the length of a block.
        dataset_text_field: the column that holds the text.
        label_field: the column that holds the label (classification).
        packing: whether several rows share one block (causal-lm; needs an attention that keeps them apart).
        packing_strategy: TRL's `bfd` (overflow is cut) or `bfd_split`; both keep documents apart.
        eval_packing: the same for the validation rows; by default as `packing`.
        completion_only_loss: whether only the completion is learned; by default yes where there is one.
        assistant_only_loss: whether only the assistant's messages are learned.
        eos_token: the end-of-text token, by default the tokenizer's.
        chat_template_path: a Jinja file with the chat template, by default the tokenizer's own.
        pad_to_multiple_of: pads each batch to a multiple of this many tokens.
        dataset_num_proc: processes that prepare the data.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    train: _Text
    validation: _Text | _Share | None = None
    test: _Text | None = None
    subset: _Text | None = None
    max_length: Annotated[int, Field(ge=1)] = 1024
    dataset_text_field: _Text = "text"
    label_field: _Text = "label"
    packing: bool = False
    packing_strategy: Literal["bfd", "bfd_split"] = "bfd"
    eval_packing: bool | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    eos_token: _Text | None = None
    chat_template_path: _Text | None = None
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None
    dataset_num_proc: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _loss_is_one(self) -> "DataConfig":
        if self.assistant_only_loss and self.completion_only_loss:
            raise PydanticCustomError(
                "one_loss", "assistant_only_loss and completion_only_loss are both on; set one of them"
            )
        return self


SFT_DATA_KEYS = frozenset(
    {
        "max_length",
        "dataset_text_field",
        "packing",
        "packing_strategy",
        "eval_packing",
        "completion_only_loss",
        "assistant_only_loss",
        "eos_token",
        "chat_template_path",
        "pad_to_multiple_of",
        "dataset_num_proc",
        # Keys of SFTConfig that are rankwise's own business, or that a run file says elsewhere.
        "dataset_kwargs",
        "model_init_kwargs",
        "trust_remote_code",
        "truncation_mode",
        "shuffle_dataset",
        "padding_free",
        "pad_token",
    }
)
"""SFTConfig's keys that do not belong under `training:`."""
