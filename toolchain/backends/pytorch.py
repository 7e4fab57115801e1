"""The PyTorch backend: eager mode with scaled-dot-product attention, the baseline of comparisons."""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.backends import reduced
from toolchain.data.labels import SEQUENCE_HEAD, TOKEN_HEAD, TOKENS
from toolchain.errors import ArtifactError, CheckpointError, DeviceMemoryError, ProviderError, first_line
from toolchain.models import architectures
from toolchain.models.checkpoints import OWN_WEIGHTS, SHAPES, WEIGHTS, config_of, weights_of
from toolchain.models.heads import auto_class
from toolchain.system import files

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

    from toolchain.backends import Place

# Weights of the linear layer of a `LowRankEmbedding`, which a model reads for each sentence, unlike an embedding table.
_EMBEDDING_LINEAR = re.compile(r"\.word_embeddings\.linear\.")


def load_model(folder: Path) -> PreTrainedModel:
    """Loads the sequence classifier in `folder`, in fp32 or in its quantised precision, and sets it to eval mode.

    Raises:
        CheckpointError: The weights do not match the config, or transformers cannot load the model.
        ProviderError: The installed PyTorch or torchao cannot run the int8 layers of the model.
    """
    silence_transformers()
    shapes, precision = architectures.read_shapes(folder), reduced.Precision.read(folder)
    try:
        _require_known_architecture(folder)
        model, missing = (
            _load_dense(folder) if shapes is None and not precision else _assemble(folder, shapes, precision)
        )
    except (CheckpointError, ProviderError):
        raise
    except Exception as error:  # an invalid config can make transformers raise any class of error
        cause = first_line(error)
        raise CheckpointError(
            f"{folder} cannot be loaded: {cause}", "Check config.json against the weights."
        ) from error
    if missing:
        listed_names = ", ".join(missing[:4]) + (" …" if len(missing) > 4 else "")
        raise CheckpointError(
            f"{folder} has no weights for {listed_names}, so its head is untrained.",
            "Pass a fine-tuned classifier.",
        )
    heads = getattr(model.config, "num_attention_heads", 1)
    if not isinstance(heads, int) or heads < 1:
        raise CheckpointError(
            f"The config of {folder} states {heads} attention heads.", "Check config.json against the weights."
        )
    model.eval()
    return model


def _load_dense(folder: Path) -> tuple[PreTrainedModel, list[str]]:
    import torch

    model_class = auto_class(config_of(folder).get("architectures"))
    result: tuple[PreTrainedModel, dict[str, Any]] = model_class.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        # With `ignore_mismatched_sizes`, a weight of a wrong shape does not stop the loading. transformers lists such
        # weights in `info`, and the error message below names the first of these weights.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, info = result
    for name in mismatched_weights(info):
        shape = " × ".join(map(str, model.state_dict()[name].shape))
        raise CheckpointError(
            f"{folder} cannot be loaded: config.json gives {name} the shape {shape}, but the stored weights have "
            "another shape.",
            "Correct config.json (id2label sets the number of classes), or save the model again.",
        )
    return model, sorted(info["missing_keys"])


def _require_known_architecture(folder: Path) -> None:
    """Checks that transformers knows the model type in config.json.

    Raises:
        CheckpointError: transformers does not know the model type, which a newer release may have added.
    """
    import transformers

    kind = config_of(folder).get("model_type")
    if isinstance(kind, str) and kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{folder} has the model type {kind!r}, which transformers {transformers.__version__} does not know.",
            "Install the release of transformers that saved the model, or pass a model of another architecture.",
        )


def mismatched_weights(info: Mapping[str, Any]) -> list[str]:
    """Returns the sorted names of the weights whose stored shape differs from the shape in the config.

    Args:
        info: The loading info of ``from_pretrained``. transformers 4 lists the names of the weights; transformers 5
            lists a tuple of the name and two shapes for each weight.
    """
    return sorted(entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"])


def load_base(folder: Path, names: Sequence[str], task: str, keep: bool) -> PreTrainedModel:
    """Loads the model in `folder` as an fp32 classifier that can be trained; returns it in eval mode.

    Args:
        folder: Folder of the base model.
        names: Names of the labels, by index.
        task: Task of the classifier, one of `toolchain.data.labels.TASKS`.
        keep: Whether to keep the stored classification head. If `keep` is false, PyTorch's random generator
            initialises a new head.

    Raises:
        CheckpointError: transformers cannot load the base model, or weights are missing or have the wrong shape. Only
            the weights of the encoder and of a kept head are checked.
    """
    import torch

    silence_transformers()
    _require_known_architecture(folder)
    try:
        model, info = auto_class([TOKEN_HEAD if task == TOKENS else SEQUENCE_HEAD]).from_pretrained(
            folder,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            problem_type=None if task == TOKENS else task,
            dtype=torch.float32,
            ignore_mismatched_sizes=not keep,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # an invalid config can make transformers raise any class of error
        cause = first_line(error)
        raise CheckpointError(
            f"{folder} cannot be trained: {cause}", "Pass the folder of an encoder with its weights."
        ) from error
    missing_names = [*info["missing_keys"], *mismatched_weights(info)]
    head = {name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")}
    # BERT's pooler counts as a part of the head and may be missing, because language models are saved without a pooler.
    encoder_names = [name for name in missing_names if name not in head and ".pooler." not in f".{name}"]
    if encoder_names or (keep and missing_names):
        listed_names = ", ".join(sorted(encoder_names or missing_names)[:4])
        raise CheckpointError(
            f"{folder} has no weights of the right shape for {listed_names}.", "Check config.json against the weights."
        )
    if not keep:
        kept_modules = {model, *getattr(model, model.base_model_prefix).modules()}
        for module in model.modules():  # the order of modules is fixed, so the same seed gives the same head
            if module not in kept_modules:
                model._init_weights(module)
    eval_model: PreTrainedModel = model.eval()
    return eval_model


def _assemble(
    folder: Path, shapes: architectures.PrunedShapes | None, precision: reduced.Precision | None
) -> tuple[PreTrainedModel, list[str]]:
    """Builds the model from its config, reduces it to its stored shapes and loads the stored weights."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model: PreTrainedModel = auto_class(config.architectures).from_config(config, dtype=torch.float32)
    if shapes is not None:
        architectures.reshape(model, shapes.layers, shapes.embedding_rank)
    if precision:
        reduced.restore(model, load_file(weights_of(folder)), precision)
    else:
        model.load_state_dict(load_file(weights_of(folder)))
    return model, []


def check_finite(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Checks that no tensor contains NaN or infinity.

    Args:
        tensors: Tensor name → tensor.
        folder: Folder of the checkpoint, for the error message.

    Raises:
        CheckpointError: A tensor contains NaN or infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                f"{folder}: {name} contains NaN or infinity.", "Pass a checkpoint from before the training diverged."
            )


def save_weights(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes the tensors to one safetensors file in `folder`.

    The file name is `OWN_WEIGHTS` for a pruned or int8 model, which transformers cannot build, and `WEIGHTS` for every
    other model.

    Raises:
        OSError: The file cannot be written.
    """
    from safetensors.torch import save_file

    precision = reduced.Precision.read(folder)
    is_own_format = (folder / SHAPES).is_file() or (precision is not None and precision.layers)
    contiguous_tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    file = folder / (OWN_WEIGHTS if is_own_format else WEIGHTS)
    with files.writing_in_rust(file):
        save_file(contiguous_tensors, file, metadata={"format": "pt"})


def describe(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Returns facts of a PyTorch variant for its manifest.

    Args:
        model: The model of the variant.
        tensors: The tensors that the variant stores, by name.

    Returns:
        The architecture, the number of parameters, and the bytes of `tensors` by dtype and by part.
    """
    base = model.base_model_prefix
    by_part, by_dtype = {"embeddings": 0, "encoder": 0, "head": 0}, Counter[str]()
    for name, tensor in tensors.items():
        is_inside = name.startswith(f"{base}.")
        is_table = ".embeddings." in name and not _EMBEDDING_LINEAR.search(name)
        part = ("embeddings" if is_table else "encoder") if is_inside else "head"
        size = tensor.numel() * tensor.element_size()
        by_part[part] += size
        by_dtype[str(tensor.dtype).removeprefix("torch.")] += size
    return {
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_by_dtype": dict(by_dtype),
        "bytes_by_part": by_part,
    }


def check_stored(model: PreTrainedModel, folder: Path, names: Sequence[str]) -> None:
    """Checks that the model stored in `folder` and the model in memory give bit-identical logits.

    Args:
        model: The model in memory.
        folder: Folder of the stored model.
        names: Names of the model's inputs.

    Raises:
        ArtifactError: The logits differ.
    """
    import torch

    ids = torch.tensor([[(7 * token) % model.config.vocab_size for token in range(25)]])
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = {name: values.get(name, torch.zeros_like(ids)) for name in names}
    with torch.inference_mode():
        # The last bits of a product can depend on the address of a weight, and a file does not align its weights. The
        # weights of a copy are aligned.
        stored, expected = (copy.deepcopy(each.eval())(**batch).logits for each in (load_model(folder), model))
        if not torch.equal(stored, expected):
            raise ArtifactError("The stored model gives other logits than the model in memory.")


def device(place: Place) -> torch.device:
    """Returns the PyTorch device for the execution provider of `place`.

    Raises:
        ProviderError: PyTorch finds no CUDA device, or PyTorch has no kernels for this device.
    """
    import torch

    if place.provider == "cpu":
        return torch.device("cpu")
    cuda = torch.version.cuda
    if not torch.cuda.is_available():
        build = f"built for CUDA {cuda} but finds no GPU" if cuda else "a CPU build"
        raise ProviderError(f"PyTorch {torch.__version__} is {build}.", "Install a CUDA build for this driver.")
    gpu = torch.device("cuda", place.device_id)
    capability = torch.cuda.get_device_capability(gpu)
    if not _has_kernels(capability, torch.cuda.get_arch_list()):
        raise ProviderError(
            f"PyTorch {torch.__version__} has no kernels for {torch.cuda.get_device_name(gpu)}, "
            f"compute capability {'.'.join(map(str, capability))}.",
            "Install the packages for older GPUs: `make install RUNTIME=cuda12`.",
        )
    return gpu


def _has_kernels(capability: tuple[int, int], targets: Sequence[str]) -> bool:
    """Returns whether kernels built for the GPU architectures `targets` run on a GPU with this compute capability.

    Kernels for ``sm_86`` run on capability 8.6 and higher minor versions. Kernels for ``compute_90`` run on capability
    9.0 and every higher capability.
    """
    for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(targets)):
        major, minor = divmod(int(number), 10)
        if capability >= (major, minor) and (kind == "compute" or capability[0] == major):
            return True
    return not targets


@contextmanager
def translate_memory_error(device: torch.device) -> Iterator[None]:
    """Converts PyTorch's out-of-memory error to `DeviceMemoryError` with the requested size."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        match = re.search(r"Tried to allocate ([\d.]+) (KiB|MiB|GiB|bytes)", str(error))
        units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
        size = int(float(match[1]) * units[match[2]]) if match else None
        torch.cuda.empty_cache()
        raise DeviceMemoryError.failed_allocation(size) from error


@contextmanager
def _translate_errors(batch: dict[str, np.ndarray]) -> Iterator[None]:
    """Converts an error that PyTorch raises for a batch to `ArtifactError`."""
    try:
        yield
    except (IndexError, RuntimeError) as error:  # for example, a token id of a foreign tokenizer is too large
        shape = " × ".join(map(str, batch["input_ids"].shape))
        raise ArtifactError(
            f"The model fails on a batch of {shape} tokens: {first_line(error)}.", "Build the variant again."
        ) from error


def silence_transformers() -> None:
    """Disables the progress bars and warnings of transformers and torchao, so that a command does not print them."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # If torchao is installed, transformers imports it. torchao then logs warnings about libraries that only a GPU
    # needs, and PyTorch logs deprecation warnings about torchao's own code.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


class TorchSession:
    """A `Session` that runs on PyTorch."""

    def __init__(self, folder: Path, place: Place) -> None:
        import torch

        self._device = device(place)
        torch.set_num_threads(place.threads)
        with translate_memory_error(self._device):
            self._model = self._load(folder)
        self._threads = place.threads
        self._folder = folder

    def _load(self, folder: Path) -> PreTrainedModel:
        """Loads the model on the session's device."""
        model = load_model(folder)
        model.to(self._device)  # type: ignore[arg-type]
        return model

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """See `Session.run`."""
        import torch

        with torch.inference_mode(), _translate_errors(batch), translate_memory_error(self._device):
            logits: np.ndarray = self._call(self._to_device(batch)).float().cpu().numpy()
        return logits

    def _call(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Runs the model, and returns its logits."""
        logits: torch.Tensor = self._model(**inputs).logits
        return logits

    def resident(self, batch: dict[str, np.ndarray]) -> Callable[[], object]:
        """See `Session.resident`."""
        import torch

        inputs = self._to_device(batch)

        def run_model() -> torch.Tensor:
            with torch.inference_mode(), translate_memory_error(self._device):
                logits = self._call(inputs)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
            return logits

        return run_model

    def _to_device(self, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        import torch

        return {name: torch.from_numpy(array).to(self._device) for name, array in batch.items()}

    def facts(self) -> dict[str, Any]:
        """Returns device, attention implementation, threads and precision, and for int8 PyTorch's quantized engine."""
        import torch

        precision = reduced.Precision.read(self._folder)
        return {
            "provider": next(self._model.parameters()).device.type,
            "attention": self._model.config._attn_implementation,
            "threads": self._threads,
            "precision": precision.number_format if precision else "fp32",
            **({"engine": torch.backends.quantized.engine} if precision and precision.scheme == "int8" else {}),
        }

    def close(self) -> None:
        """See `Session.close`."""
        del self._model
