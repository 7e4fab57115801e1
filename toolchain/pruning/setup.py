"""A model to prune, with the sentences for ranking its units, refitting its weights and measuring its accuracy."""

from __future__ import annotations

import functools
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.artifacts.store import Artifact
from toolchain.backends.pytorch import load_model
from toolchain.data import encoding, inputs
from toolchain.data.inputs import Data, TrainingSource
from toolchain.data.labels import LabelSet
from toolchain.errors import PruningError
from toolchain.models import architectures
from toolchain.pruning.depth import dispensable_layers
from toolchain.pruning.importance import LayerImportance, fisher, magnitude
from toolchain.training.batches import Batch, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 32
COUNTED_ROWS = 100_000


@dataclass(frozen=True)
class PruningSetup:
    """Inputs of pruning, and the results that are computed from these inputs.

    A process computes results such as the importances only once, for all pruning ratios that the process tries. Use the
    function `shared_setup` to get the shared instance.

    Attributes:
        folder: Folder of the unpruned model.
        artifact_id: Id of the unpruned model's artifact.
        names: Names of the model's inputs.
        labels: Names of the model's labels, in order.
        max_length: Largest number of tokens of a sentence.
        source: Training data.
        sentences: Largest number of training sentences for ranking the units and refitting the weights.
        seed: Random seed for the choice of the training sentences.
    """

    folder: Path
    artifact_id: str
    names: tuple[str, ...]
    labels: tuple[str, ...]
    max_length: int
    source: TrainingSource
    sentences: int
    seed: int

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """Loads the unpruned model.

        Raises:
            PruningError: The model is already pruned, or pruning does not support its architecture.
        """
        if (self.folder / architectures.SHAPES).is_file():
            raise PruningError(
                f"The model in {self.folder} is already pruned.",
                "Prune the unpruned parent of this model at a higher ratio.",
            )
        model = load_model(self.folder)
        architectures.layout_of(model)
        return model

    @functools.cached_property
    def encoder(self) -> encoding.Encoder:
        """Opens the `Encoder`, which converts texts to token ids."""
        return encoding.Encoder.open(self.folder, self.names, self.max_length)

    @functools.cached_property
    def _data(self) -> Data:
        return self.source.load(LabelSet(self.labels, self.encoder.task))

    @functools.cached_property
    def ranking(self) -> list[Batch]:
        """Returns training sentences for ranking the units and refitting the weights; none of them is held out."""
        rows, _ = inputs.hold_out(self._data)
        shuffled = random.Random(self.seed).sample(rows, len(rows))
        return self._batches(inputs.sentence_rows(self._data, shuffled, min(self.sentences, len(shuffled))))

    @functools.cached_property
    def held_out(self) -> list[Batch]:
        """Returns batches of the held-out rows, on which the search for a pruning ratio measures accuracy."""
        return self._batches(inputs.hold_out(self._data)[1])

    def _batches(self, rows: list[int]) -> list[Batch]:
        data = self._data.select(rows)
        ids = self.encoder.encode(data.texts)
        return batches(ids, data.targets(ids), self.encoder, BATCH)

    @functools.cached_property
    def _fisher(self) -> list[LayerImportance]:
        return fisher(self.model, self.ranking)

    def require_embedding_rank(self, rank: int | None) -> None:
        """Checks that the model's embedding table can have this rank; None passes.

        Raises:
            PruningError: `architectures.require_embedding_rank` raises it.
        """
        if rank is not None:
            architectures.require_embedding_rank(self.model, rank)

    @functools.cached_property
    def token_counts(self) -> Counter[int]:
        """Counts each token id in the training rows that are not held out, in at most `COUNTED_ROWS` rows."""
        rows, _ = inputs.hold_out(self._data)
        sample = random.Random(self.seed).sample(rows, min(len(rows), COUNTED_ROWS))
        encoded = self.encoder.encode(self._data.select(sample).texts)
        return Counter(token for row in encoded for token in row)

    def dispensable_layers(self, layers: int) -> list[int]:
        """Returns the indices of the layers to remove so that `layers` remain; see `depth.dispensable_layers`."""
        return dispensable_layers(self.model, layers, self.ranking)

    def importances(self, method: str) -> list[LayerImportance]:
        """Returns the importance of every layer's units, measured by ``fisher`` or ``magnitude``."""
        return self._fisher if method == "fisher" else magnitude(self.model)


@functools.lru_cache(maxsize=1)
def _share(setup: PruningSetup) -> PruningSetup:
    return setup


def shared_setup(artifact: Artifact, source: TrainingSource, sentences: int, seed: int) -> PruningSetup:
    """Returns the `PruningSetup` of an artifact.

    Calls with equal arguments return the same instance, until a call with different arguments replaces it.
    """
    manifest = artifact.manifest
    names = tuple(spec.name for spec in manifest.inputs)
    setup = PruningSetup(
        artifact.path, manifest.id, names, manifest.labels, manifest.max_length, source, sentences, seed
    )
    return _share(setup)
