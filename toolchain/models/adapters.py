"""Checks of a LoRA adapter in PEFT's format: its settings, its weights file and the base it names.

The toolchain merges only plain LoRA adapters into their base. An unknown setting of an adapter raises an error, because
a merge without that setting would give a wrong model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.errors import CheckpointError
from toolchain.models import pickles
from toolchain.models.hub import HUB_ID
from toolchain.system.decoding import decode_object, read_bytes

SETTINGS, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FILES = (SETTINGS, WEIGHTS)
# Adapter settings that the toolchain passes to PEFT to merge an adapter into its base.
MERGED = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "lora_bias",
)
# Adapter settings that the merge ignores. Each ignored adapter setting is checked elsewhere, is used only in training,
# or works only together with a setting that the toolchain rejects.
_IGNORED = (
    "base_model_name_or_path",
    "revision",
    "peft_type",
    "task_type",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "init_lora_weights",
    "megatron_core",
    "qalora_group_size",
)
# Values of `init_lora_weights` that leave the base unchanged; with any other value, PEFT changes the base before
# training.
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
NAME_BASE = "Name the base with `toolchain export --model … --base FOLDER|ID`."


def settings(folder: Path) -> dict[str, Any]:
    """Returns the settings in `adapter_config.json` after checking each of them.

    Raises:
        CheckpointError: The file is unreadable or names code to run, or the adapter is not plain LoRA for a sequence
            classifier.
    """
    config = _read(folder)
    if config.get("auto_mapping") or config.get("auto_map"):
        raise CheckpointError(
            f"The adapter {folder} needs its own code to load (auto_mapping).",
            "Train the adapter on a model that transformers contains, and save it with task_type='SEQ_CLS'.",
        )
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"The adapter {folder} has the type {config.get('peft_type')}, not LORA.",
            "Merge the adapter with the program that trained it, and pass the merged model.",
        )
    if config.get("task_type") != "SEQ_CLS":
        raise CheckpointError(
            f"The adapter {folder} is for the task {config.get('task_type')}, not SEQ_CLS.",
            "Pass an adapter of a classifier of texts, or merge the adapter and pass the merged model.",
        )
    known_names = (*MERGED, *_IGNORED)
    if unknown_names := sorted(key for key, value in config.items() if key not in known_names and value):
        raise CheckpointError(
            f"The adapter {folder} uses settings that the merge does not support: {', '.join(unknown_names)}.",
            "Merge the adapter with the program that trained it, and pass the merged model.",
        )
    initialisation = config.get("init_lora_weights")
    if not isinstance(initialisation, bool | str | None) or initialisation not in _INITIALISATIONS:
        raise CheckpointError(
            f"The adapter {folder} was trained with init_lora_weights={initialisation!r}, which changes the base.",
            "Save the adapter as plain LoRA: save_pretrained(DIR, path_initial_model_for_weight_conversion=START). "
            "START is the folder of the initialised adapter, saved before training.",
        )
    return config


def check(folder: Path) -> None:
    """Checks that the adapter is plain LoRA with safetensors weights.

    Raises:
        CheckpointError: The adapter is not plain LoRA, or has no readable settings or no safetensors weights.
    """
    settings(folder)
    if (folder / WEIGHTS).is_file():
        return
    if (folder / PICKLED).is_file():
        raise pickles.adapter_pickle_error(folder / PICKLED, folder / WEIGHTS)
    raise CheckpointError(
        f"The adapter {folder} has no {WEIGHTS}.", "Pass the folder that PEFT's `save_pretrained` wrote."
    )


def base(folder: Path) -> tuple[str, str | None]:
    """Returns the hub id of the base that the adapter names, and the base's revision or None.

    The function never follows a path in the settings, because the adapter's author chose that path.

    Raises:
        CheckpointError: The adapter names no base, or names its base by a path. The error's hint asks the user to name
            the base.
    """
    config = settings(folder)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        cause = f"The adapter {folder} does not name its base."
        if name:
            cause = f"The adapter {folder} names a path as its base ({name})."
        raise CheckpointError(cause, NAME_BASE)
    return name, revision if isinstance(revision, str) else None


def _read(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    try:
        return decode_object(read_bytes(file))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.", "Save the adapter again.") from error
