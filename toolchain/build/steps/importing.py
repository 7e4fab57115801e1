"""Import: a checkpoint from anywhere, or an adapter merged into its base, to fp32 safetensors, config and tokenizer in
one folder."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.artifacts.store import TensorSpec
from toolchain.backends import lora
from toolchain.backends.pytorch import check_finite, describe, load_model
from toolchain.build.job import Built, Job
from toolchain.data.labels import MULTI
from toolchain.errors import ArtifactError, CheckpointError
from toolchain.models.checkpoints import CARD, OWN_WEIGHTS, SHAPES, WEIGHTS, has_tokenizer, license_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 2


def import_checkpoint(job: Job) -> Built:
    """Loads the checkpoint in fp32 and saves it anew, so that its size is honest and its layout known.

    Raises `CheckpointError` where weights, head or tokenizer are missing or do not fit.
    """
    from safetensors import SafetensorError

    if job.checkpoint is None:
        raise CheckpointError("An import needs a checkpoint's folder.")
    model = lora.merged(job.checkpoint, job.base) if job.base else load_model(job.checkpoint)
    check_finite(model.state_dict(), job.checkpoint)
    tokenizer = _tokenizer(job.checkpoint if job.base is None or has_tokenizer(job.checkpoint) else job.base)
    rows = int(model.config.vocab_size)
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"The tokenizer has {len(tokenizer)} tokens, the embedding table {rows} rows.",
            "Pass the tokenizer the model was trained with.",
        )
    # One file whatever the size: every later step reads exactly one.
    try:
        model.save_pretrained(job.folder, safe_serialization=True, max_shard_size="1TB")
    except SafetensorError as error:  # so it names a full disk
        mend = "Free the space, or choose another place with --exported DIR."
        raise ArtifactError(f"{job.folder} cannot be written: {error}.", mend) from error
    names = _inputs(model, tokenizer)
    # Stored, because the class's own default may name inputs that this model refuses.
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    tokenizer.save_pretrained(job.folder)
    if (job.checkpoint / SHAPES).is_file():
        shutil.copyfile(job.checkpoint / SHAPES, job.folder / SHAPES)
        (job.folder / WEIGHTS).rename(job.folder / OWN_WEIGHTS)
    if not (job.folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"The tokenizer of {job.checkpoint} has no fast form.", "Convert it to a tokenizer.json first."
        )
    if not {"input_ids", "attention_mask"} <= set(names):
        raise CheckpointError("The tokenizer gives no input_ids with attention_mask.", "Correct its model_input_names.")
    if not 0 <= (model.config.pad_token_id or 0) < rows:
        raise CheckpointError(
            f"pad_token_id {model.config.pad_token_id} is no row of the embedding table.", "Correct it."
        )
    id2label = model.config.id2label or {}
    labels = tuple(str(id2label[index]) for index in range(model.config.num_labels))
    return Built(
        step=job.step,
        inputs=tuple(TensorSpec(name, "int64", ("batch_size", "sequence_length")) for name in names),
        outputs=(TensorSpec("logits", "float32", ("batch_size", len(labels))),),
        labels=labels,
        max_length=_max_length(model, tokenizer),
        facts={
            **describe(model, model.state_dict()),
            **({"multi_label": True} if model.config.problem_type == MULTI else {}),
            **license_facts(job.checkpoint, job.base),
            **_trained_on(job.checkpoint),
        },
    )


def license_facts(checkpoint: Path, base: Path | None) -> dict[str, str]:
    """The licence; of an adapter, only one that its base states as well."""
    stated = {license_of(folder) for folder in (checkpoint, base) if folder}
    found = stated.pop() if len(stated) == 1 else None
    return {"license": found} if found else {}


def _trained_on(checkpoint: Path) -> dict[str, str]:
    """The training data's digest where `finetune` made the checkpoint, so that nothing is judged by what it learnt."""
    try:
        found = json.loads((checkpoint / CARD).read_text(encoding="utf-8"))["train"]
    except (OSError, ValueError, LookupError, TypeError):  # none, or somebody else's
        return {}
    return {"trained_on": found} if isinstance(found, str) else {}


def _tokenizer(folder: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers and transformers raise whatever their parsers do
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be loaded: {cause}", "Save it beside the model again."
        ) from error


def _inputs(model: PreTrainedModel, tokenizer: Any) -> list[str]:
    """What the tokenizer offers and the model takes, in the model's order; token types only where there are several.

    DeBERTa-v2 has no table of them and RoBERTa one of one row, whatever their tokenizers offer.
    """
    offered = set(tokenizer.model_input_names)
    if getattr(model.config, "type_vocab_size", 2) < 2:
        offered.discard("token_type_ids")
    return [name for name in inspect.signature(model.forward).parameters if name in offered]


def _max_length(model: PreTrainedModel, tokenizer: Any) -> int:
    """Tokens the tokenizer allows and the position table holds; 512 where neither says."""
    limits = [tokenizer.model_max_length]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            # RoBERTa counts positions from the one after the padding's.
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    if not all(isinstance(limit, int | float) and limit > 2 for limit in limits):
        raise CheckpointError(f"The longest text of {limits} tokens holds no word.", "Correct model_max_length.")
    return int(min(limits)) if min(limits) < 1e6 else 512
