"""Import: converts a checkpoint, or an adapter and its base, to a folder of fp32 safetensors, config and tokenizer."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.artifacts.manifest import TensorSpec
from toolchain.artifacts.steps import Import
from toolchain.backends import lora
from toolchain.backends.pytorch import check_finite, describe, load_model
from toolchain.build.job import Job, StepResult
from toolchain.data.encoding import REQUIRED, TOKEN_TYPES
from toolchain.data.labels import SINGLE, TOKENS, LabelSet
from toolchain.errors import CheckpointError
from toolchain.models.checkpoints import (
    CARD,
    OWN_WEIGHTS,
    SHAPES,
    WEIGHTS,
    config_of,
    has_tokenizer,
    label_set,
)
from toolchain.models.hub import HUB_ID
from toolchain.models.model_card import languages_of, license_of
from toolchain.models.tokenizers import load_tokenizer, save_tokenizer
from toolchain.system.decoding import check_line, decode_object, read_bytes
from toolchain.system.files import writing_in_rust

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 2


def import_checkpoint(job: Job[Import]) -> StepResult:
    """Loads the checkpoint and saves it in fp32, so that all imported models have the same dtype and layout.

    If the checkpoint is an adapter, the step first merges the adapter into its base model.

    Raises:
        CheckpointError: Weights, classification head or tokenizer are missing, or do not fit together.
    """
    if job.checkpoint is None:
        raise CheckpointError("An import needs a checkpoint's folder.")
    model = lora.load_merged(job.checkpoint, job.base) if job.base else load_model(job.checkpoint)
    check_finite(model.state_dict(), job.checkpoint)
    tokenizer = load_tokenizer(job.checkpoint if job.base is None or has_tokenizer(job.checkpoint) else job.base)
    rows = int(model.config.vocab_size)
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"The tokenizer has {len(tokenizer)} tokens, but the embedding table has {rows} rows.",
            "Find the tokenizer that the training of the model used, and save this tokenizer in the model's folder.",
        )
    if len(model.config.id2label or {}) == 1:
        # Without a problem_type, one output also means a regression.
        model.config.problem_type = "regression"
    # Weights of any size go into one file, because every later step reads exactly one file.
    with writing_in_rust(job.folder / WEIGHTS):
        model.save_pretrained(job.folder, safe_serialization=True, max_shard_size="1TB")
    names = _input_names(model, tokenizer)
    # Input names are stored, because the tokenizer class may by default give inputs that this model does not accept.
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    save_tokenizer(tokenizer, job.folder)
    if (job.checkpoint / SHAPES).is_file():
        shutil.copyfile(job.checkpoint / SHAPES, job.folder / SHAPES)
        (job.folder / WEIGHTS).rename(job.folder / OWN_WEIGHTS)
    if not set(REQUIRED) <= set(names):
        raise CheckpointError(
            "The tokenizer does not give both input_ids and attention_mask.", "Correct its model_input_names."
        )
    if not 0 <= (model.config.pad_token_id or 0) < rows:
        raise CheckpointError(
            f"The embedding table has no row for the pad_token_id {model.config.pad_token_id}.", "Correct config.json."
        )
    labels = label_set(job.folder, config_of(job.folder))
    return StepResult(
        step=job.step,
        inputs=tuple(TensorSpec(name, "int64", ("batch_size", "sequence_length")) for name in names),
        outputs=(TensorSpec("logits", "float32", _output_shape(labels)),),
        labels=labels.names,
        max_length=_max_length(model, tokenizer),
        facts={
            **describe(model, model.state_dict()),
            **({} if labels.task == SINGLE else {"task": labels.task}),
            **license_facts(job.checkpoint, job.base),
            **_language_facts(job.checkpoint),
            **_training_facts(job.checkpoint),
        },
    )


def _output_shape(labels: LabelSet) -> tuple[str | int, ...]:
    """Returns the shape of the logits; a token classifier gives logits for each token."""
    tokens = ("sequence_length",) if labels.task == TOKENS else ()
    return ("batch_size", *tokens, len(labels.names))


def license_facts(checkpoint: Path, base: Path | None) -> dict[str, str]:
    """Returns the fact ``license``; empty if checkpoint or base model states no licence, or if their licences differ.

    Args:
        checkpoint: Folder of the checkpoint.
        base: Folder of the base model if the checkpoint is an adapter; None otherwise.
    """
    licenses = {license_of(folder) for folder in (checkpoint, base) if folder}
    license_name = licenses.pop() if len(licenses) == 1 else None
    return {"license": license_name} if license_name else {}


def _language_facts(checkpoint: Path) -> dict[str, list[str]]:
    languages = languages_of(checkpoint)
    return {"languages": languages} if languages else {}


def _training_facts(checkpoint: Path) -> dict[str, str]:
    """Returns the facts from training.json; empty if `finetune` did not make the checkpoint.

    The fact ``trained_on`` is the training data's digest: by default, a benchmark on the training data of the model
    runs only on the held-out rows. The fact ``base_model`` is the hub id of the base; it is missing for other bases.
    """
    try:
        card = decode_object(read_bytes(checkpoint / CARD))
        facts = {"trained_on": check_line(card["train"])}
        base = card.get("base")
        if isinstance(base, dict) and base.get("kind") == "hub" and HUB_ID.fullmatch(base["ref"]):
            facts["base_model"] = check_line(base["ref"])
    except (OSError, ValueError, LookupError, TypeError):  # training.json is missing, or `finetune` did not write it
        return {}
    return facts


def _input_names(model: PreTrainedModel, tokenizer: Any) -> list[str]:
    """Returns the names of the inputs that the tokenizer gives and the model accepts, in the model's order.

    The result omits token types if the model knows fewer than two token types. DeBERTa-v2 has no embedding table for
    token types, and the table of RoBERTa has one row, but their tokenizers may still give token types.
    """
    input_names = tokenizer.model_input_names
    if not isinstance(input_names, list) or not all(isinstance(name, str) for name in input_names):
        raise CheckpointError("The model_input_names of the tokenizer are not names.", "Correct tokenizer_config.json.")
    tokenizer_inputs = set(input_names) & {*REQUIRED, TOKEN_TYPES}
    if getattr(model.config, "type_vocab_size", 2) < 2:
        tokenizer_inputs.discard("token_type_ids")
    return [name for name in inspect.signature(model.forward).parameters if name in tokenizer_inputs]


def _max_length(model: PreTrainedModel, tokenizer: Any) -> int:
    """Returns the smaller length limit of tokenizer and position embeddings, in tokens; 512 if neither has a limit."""
    limits = [tokenizer.model_max_length]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            # RoBERTa gives the first token the position `padding_idx` + 1.
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    if not all(isinstance(limit, int | float) and limit > 2 for limit in limits):
        raise CheckpointError(
            f"The length limits {limits} of tokenizer and model leave no room for a word.", "Correct model_max_length."
        )
    return int(min(limits)) if min(limits) < 1e6 else 512
