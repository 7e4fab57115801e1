"""LoRA adapters through PEFT: applies an adapter to its base model, or merges it into the base model.

If an adapter's tensors do not match the model, this module raises an error. PEFT itself would skip unknown tensors and
initialise missing tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.backends import Place
from toolchain.backends.pytorch import TorchSession, check_finite, mismatched_weights, silence_transformers
from toolchain.errors import CheckpointError, first_line
from toolchain.models import adapters
from toolchain.models.checkpoints import check_config, config_of, read_config
from toolchain.system.extras import install_hint

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

_PREFIX = "base_model.model."  # start of every tensor name in an adapter's weights file


def load_merged(adapter: Path, base: Path) -> PreTrainedModel:
    """Merges the adapter into its base and returns the fp32 classifier in eval mode.

    Args:
        adapter: Folder of the adapter.
        base: Folder of the base model.

    Raises:
        CheckpointError: The adapter does not match the base; see `load_unmerged`.
    """
    model: PreTrainedModel = load_unmerged(adapter, base).merge_and_unload(safe_merge=True)
    model.eval()
    return model


def load_unmerged(adapter: Path, base: Path) -> PeftModel:
    """Applies the adapter to its fp32 base without a merge, and returns PEFT's model in eval mode.

    Args:
        adapter: Folder of the adapter.
        base: Folder of the base model.

    Raises:
        CheckpointError: PEFT is missing, the adapter's tensors do not match the LoRA parameters of PEFT's model one to
            one, or the classification head has no weights.
    """
    from safetensors.torch import load_file

    _require_peft()
    silence_transformers()
    settings = adapters.settings(adapter)
    tensors = {name: tensor.float() for name, tensor in load_file(adapter / adapters.WEIGHTS).items()}
    check_finite(tensors, adapter)
    try:
        model, untrained_names = _load_base(base, _build_config(adapter, base, tensors))
        peft_model = _apply_adapter(model, settings)
    except CheckpointError:
        raise
    except Exception as error:  # wrong settings can make PEFT or transformers raise any error
        cause = first_line(error)
        raise CheckpointError(f"The adapter {adapter} cannot be applied to {base}: {cause}", _HINT) from error
    _load_tensors(peft_model, tensors, f"The adapter {adapter} does not fit the base {base}")
    if missing_names := [name for name in untrained_names if _PREFIX + name not in tensors]:
        raise CheckpointError(
            f"Neither the adapter {adapter} nor its base contains the weights of {_list_some(missing_names)}.",
            f"Train the adapter with modules_to_save={sorted({name.rsplit('.', 1)[0] for name in missing_names})}, or "
            "name a base that contains the missing weights: --base FOLDER|ID.",
        )
    peft_model.eval()
    return peft_model


_HINT = "Name the base that the adapter was trained on: `toolchain export --model … --base FOLDER|ID`."


class LoraSession(TorchSession):
    """A `Session` that applies a LoRA adapter to its base model without merging the two."""

    def __init__(self, adapter: Path, base: Path, place: Place) -> None:
        self._base = base
        super().__init__(adapter, place)

    def _load(self, folder: Path) -> PreTrainedModel:
        model = load_unmerged(folder, self._base)
        model.to(self._device)
        return model  # type: ignore[return-value]  # a PeftModel has the same call interface


def _require_peft() -> None:
    """Raises `CheckpointError` if PEFT cannot be imported."""
    import logging

    # If PEFT imports bitsandbytes, bitsandbytes may log a warning about a missing kernel. The toolchain does not need
    # that kernel, so this line hides the warning.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import peft  # noqa: F401
    except Exception as error:  # an incompatible release of a dependency can raise any error during the import
        raise CheckpointError(
            f"A LoRA adapter needs PEFT, which cannot be imported: {error}.",
            install_hint("lora"),
        ) from error


def _build_config(adapter: Path, base: Path, tensors: Mapping[str, torch.Tensor]) -> PretrainedConfig:
    """Returns the base model's config, with as many classes as the adapter's classification head has.

    The class names come from the adapter's config, or else from the base model's config if the numbers of classes are
    equal. If neither the adapter nor the base model names the classes, the names are LABEL_0, LABEL_1, …
    """
    from transformers import AutoConfig

    config_of(base)  # refuses a config of a far larger model than the base's weights
    config: PretrainedConfig = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    adapter_config = read_config(adapter) if (adapter / "config.json").is_file() else {}
    rows = [len(tensors[_PREFIX + name]) for name in _class_sized_weights(config) if _PREFIX + name in tensors]
    base_names = config.id2label or {}
    count = rows[0] if rows else len(base_names)
    names = base_names if len(base_names) == count else {index: f"LABEL_{index}" for index in range(count)}
    labels = adapter_config.get("id2label") or {str(index): name for index, name in names.items()}
    task = adapter_config.get("problem_type") or config.problem_type
    check_config(adapter, {"architectures": ["ForSequenceClassification"], "id2label": labels, "problem_type": task})
    if len(labels) != count:
        raise CheckpointError(
            f"{adapter / 'config.json'} names {len(labels)} classes, but the head has {count}.",
            "Correct id2label, or remove the file.",
        )
    config.id2label = {int(index): name for index, name in labels.items()}
    config.label2id = {name: index for index, name in config.id2label.items()}
    config.problem_type = task
    return config


def _class_sized_weights(config: PretrainedConfig) -> list[str]:
    """Returns the names of the weights whose first axis is the number of classes."""
    import copy

    import torch
    from transformers import AutoModelForSequenceClassification

    shapes = []
    for count in (2, 3):
        config = copy.deepcopy(config)
        config.num_labels = count
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        shapes.append({name: tensor.shape for name, tensor in model.state_dict().items()})
    return [name for name, shape in shapes[0].items() if shape != shapes[1][name]]


def _load_base(base: Path, config: PretrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    """Loads the base model as a classifier with `config`; returns it and the names of missing or mismatched weights."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        base,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return model, sorted({*info["missing_keys"], *mismatched_weights(info)})


def _apply_adapter(model: PreTrainedModel, settings: Mapping[str, Any]) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    options = {key: settings[key] for key in adapters.MERGED if settings.get(key) is not None}
    with warnings.catch_warnings(action="ignore"):
        peft_model: PeftModel = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", inference_mode=True, **options))
    return peft_model


def _load_tensors(peft_model: PeftModel, tensors: Mapping[str, torch.Tensor], problem: str) -> None:
    """Loads the adapter's tensors into the model; raises `CheckpointError` unless names and shapes match one to one."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    parameters = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    _require_empty(f"{problem}: the base has no parameters for", tensors.keys() - parameters.keys())
    _require_empty(f"{problem}: the adapter has no tensors for", parameters.keys() - tensors.keys())
    _require_empty(
        f"{problem}: the shapes of these tensors differ:",
        [name for name in parameters if parameters[name].shape != tensors[name].shape],
    )
    result: Any = set_peft_model_state_dict(peft_model, dict(tensors))
    _require_empty(
        f"{problem}: PEFT did not load", [name for name in result.unexpected_keys if not _is_duplicate(name, tensors)]
    )


def _is_duplicate(name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether the tensor duplicates another tensor; PEFT saves trained biases of the head twice."""
    original = tensors.get(name.replace(".modules_to_save.", "."))
    return original is not None and bool((original == tensors[name]).all())


def _require_empty(problem: str, names: Iterable[str]) -> None:
    if names := sorted(names):
        raise CheckpointError(f"{problem} {_list_some(names)}.", _HINT)


def _list_some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
