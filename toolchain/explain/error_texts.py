"""The explanation of every error: its meaning, its usual causes, and hints that solve it.

The command `toolchain explain CODE` and the reference page of errors both show these texts.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolchain import errors
from toolchain.errors import ToolchainError


@dataclass(frozen=True)
class ErrorText:
    """The explanation of an error.

    Attributes:
        meaning: Sentences that say what failed.
        causes: The usual causes, one sentence each.
        hints: What to do, one or two sentences each.
    """

    meaning: str
    causes: tuple[str, ...]
    hints: tuple[str, ...]


TEXTS: dict[type[ToolchainError], ErrorText] = {
    ToolchainError: ErrorText(
        "The command failed for a reason that has no error of its own. The message states the cause and a hint.",
        (
            "`toolchain doctor` found a problem of this machine or of the installation.",
            "`toolchain explain` does not know the error code.",
        ),
        (
            "Follow the hint in the message.",
            "Run `toolchain doctor`: each problem that it finds comes with a command that solves it.",
        ),
    ),
    errors.SettingsError: ErrorText(
        "A setting has no valid value, or two settings exclude each other. Nothing was built.",
        (
            "An option has a value out of its range, such as `--ratio 1.5`.",
            "An option does not apply to the backend, the scheme or the method, such as `--embeddings` with "
            "`--backend torch`.",
            "`--no-pass` names a pass that the scheme does not have.",
        ),
        (
            "Correct the option that the message names, or leave it out.",
            "`toolchain COMMAND --help` lists the options with their values and defaults.",
        ),
    ),
    errors.UnknownVariantError: ErrorText(
        "No variant has this name, or no step builds such a variant from this parent.",
        (
            "The name has a spelling mistake.",
            "The parts of the name are in the wrong order, or the combination does not exist, such as `bnb-bf16`.",
            "A labelled variant, such as `onnx-int8+small`, is missing, because no command has built it.",
            "`--from` names a variant that the step cannot use, such as `quantize --from onnx-int8`.",
        ),
        (
            "Use the name that the message suggests.",
            "`toolchain variants` lists the variants of a model.",
            "Build a labelled variant with its own settings and `--name LABEL`.",
        ),
    ),
    errors.CheckpointError: ErrorText(
        "The checkpoint cannot be read, is unsafe to read, or is not a text classifier that the toolchain supports.",
        (
            "`--model` names a folder that does not exist, or a folder without `config.json` or weights.",
            "The weights are a pickle file, which could run foreign code, or the checkpoint needs its own code.",
            "The model has another head than a text or token classifier.",
            "The folder under `--exported` belongs to another checkpoint of the same name.",
            "A LoRA adapter needs its base model, which is missing, or settings that cannot be merged.",
        ),
        (
            "Pass a folder that `save_pretrained` wrote, or a hub id such as `user/name`.",
            "Convert pickled weights to safetensors with the command that the message states.",
            "Give the model another folder with `--as NAME`.",
            "Name the base of an adapter with `--base`.",
        ),
    ),
    errors.HubError: ErrorText(
        "The model hub does not answer, or refuses the request.",
        (
            "This machine has no connection to the hub, or `HF_HUB_OFFLINE` is set and the files are not in the cache.",
            "The id has a spelling mistake, or the repository is private.",
            "The repository is gated, and your account has not accepted its terms.",
            "The token of your account is missing, or may not write to the repository.",
        ),
        (
            "Check the id on the hub's website.",
            "Log in with `hf auth login`; for a gated model, accept its terms on the website first.",
            "Download the model on another machine, and pass its folder: `--model PATH`.",
        ),
    ),
    errors.DataError: ErrorText(
        "Texts or labels cannot be used: they are missing, unreadable, or do not fit the model.",
        (
            "The file or folder does not exist, or has a format that the toolchain does not read.",
            "The storage behind a URL does not exist, or refuses the credentials.",
            "The data lacks the column of texts or labels, or the columns have other names.",
            "A label does not occur in the model, or a row has no label.",
            "The model has other labels than the embedded SST-2, and the command names no data.",
            "There are too few rows for training.",
            "A variant must be built again, but the command names other training data than the first build.",
        ),
        (
            "Correct the row or the column that the message names.",
            "Name the columns with `--text-column` and `--label-column`, and a split with `--split`.",
            "Pass data with the model's labels: `--data FILE` to measure, `--train-data FILE` to train.",
        ),
    ),
    errors.ArtifactError: ErrorText(
        "A folder under `--exported` cannot be read, written or replaced, or the variant is not built.",
        (
            "No command has built the variant.",
            "A folder with the name of a variant has no manifest, because another program made it.",
            "The manifest comes from a newer release, or its file is damaged.",
            "The disk is full, or the folder is read-only.",
            "Another command changed the parent while this command read it.",
        ),
        (
            "Build the variant: `toolchain validate VARIANT` builds it and its ancestors.",
            "Move a foreign folder away, or delete a damaged folder and build the variant again.",
            "Free space, correct the permissions, or choose another folder with `--exported DIR`.",
        ),
    ),
    errors.TamperedError: ErrorText(
        "The files of an artifact do not match its manifest. The toolchain does not use modified artifacts.",
        (
            "A file of the artifact was edited, deleted or added after the build.",
            "A copy of the folder is incomplete, or its files were converted, for example by Git.",
            "The manifest itself was edited, so that it does not match its id or its seal.",
        ),
        (
            "Delete the folder, or move it away. Then build the variant again.",
            "Copy the folder again from its origin, with all its files.",
        ),
    ),
    errors.PruningError: ErrorText(
        "The model cannot be pruned with this method, by this ratio, or at this cost.",
        (
            "The architecture shares its layers, or keeps its heads in a way that the toolchain does not know.",
            "The ratio would remove the entire encoder, or the model is already pruned.",
            "No ratio keeps the accuracy drop below `--max-drop`.",
            "A file of latencies is invalid, or belongs to a model of other sizes.",
            "The `--embedding-rank` is so large that the model would not become smaller.",
        ),
        (
            "Choose a smaller `--ratio`, or a larger `--max-drop`.",
            "Prune `torch-fp32` instead of a pruned variant.",
            "Train the pruned model with `--recover EPOCHS`, which lowers the accuracy drop.",
        ),
    ),
    errors.GraphError: ErrorText(
        "An ONNX graph cannot be read or run, or a pass cannot rewrite it without changing its results.",
        (
            "The file is damaged, or is not an ONNX model.",
            "The graph has an operator that the installed ONNX Runtime does not have.",
            "A pass needs a pattern that this architecture does not have, such as one look-up in the embedding table.",
            "Nothing is left to quantise, because the settings keep all layers fp32.",
        ),
        (
            "Build the variant again.",
            "Leave out the option that needs the pass, or leave out the pass with `--no-pass`.",
            "Export with another exporter or opset: `toolchain export --exporter NAME --opset NUMBER`.",
        ),
    ),
    errors.ProviderError: ErrorText(
        "The execution provider or a package of the runtime is unavailable, or a session would run elsewhere.",
        (
            "The package of the runtime is not installed, or was built for another CUDA version.",
            "There is no GPU, or its driver is too old.",
            "The provider has no kernel for an operator, so the operator would silently run on the CPU.",
            "The variant needs instructions that this processor does not have.",
        ),
        (
            "`toolchain doctor` names the problem, and the command that solves it.",
            "Install the set of packages for this machine: `make install`, or `make install RUNTIME=gpu`.",
            "Measure on the CPU, or permit a fallback with `toolchain bench --allow-fallback`.",
        ),
    ),
    errors.DeviceMemoryError: ErrorText(
        "The device has too little memory for the model or for a batch.",
        (
            "Other programs use the memory of the GPU or of the machine.",
            "The batch is too large, or its texts are too long.",
            "The model is too large for the device.",
        ),
        (
            "Close other programs that use the device.",
            "Choose a smaller batch with `--batch-size`, or fewer variants with `--variant`.",
            "Use a smaller variant, such as an int8 or a pruned one.",
        ),
    ),
    errors.ShippingError: ErrorText(
        "No bundle can be built from these variants, for this target, or in this folder.",
        (
            "The target cannot run an operator of the variant, such as fused operators outside ONNX Runtime.",
            "The variants of one bundle have different tokenizers.",
            "The tokenizer cannot be part of the graph, because its rules cannot be expressed there.",
            "The bundle exceeds a limit, or the folder exists and is not a bundle.",
            "The file of a key or of a certificate is unusable.",
        ),
        (
            "Ship the variant that the message suggests: often one with standard operators, such as `onnx-std`.",
            "Leave out the option that puts the tokenizer into the graph.",
            "Choose another folder with `--output DIR`.",
        ),
    ),
    errors.BenchError: ErrorText(
        "A benchmark cannot measure a cell, or a comparison has no usable result.",
        (
            "No run measured the model yet.",
            "The variant does not run on the requested execution provider.",
            "A process of the benchmark crashed, or ran out of memory.",
            "The model returned a value that is not finite.",
            "The result file lacks the samples that `plan` needs.",
        ),
        (
            "Measure the model with `toolchain bench`.",
            "Measure only the failing cell with `--variant`, and read the reason in its row.",
            "Name the provider on which the variant runs with `--provider`.",
        ),
    ),
    errors.RecipeError: ErrorText(
        "A recipe cannot be read or written, contradicts itself, or needs a checkpoint or data that is not there.",
        (
            "The recipe has an unknown key, a value out of bounds, or a variant whose parent is missing.",
            "A newer release of the toolchain wrote the recipe.",
            "The checkpoint or the training data is at another place, or has another content.",
            "`init` would replace a file, or its data is outside of the recipe's folder.",
        ),
        (
            "Correct the key that the message names; `toolchain build --schema` prints all keys.",
            "Use the release of the toolchain that the recipe names.",
            "Name the checkpoint with `--model` or the data with `--train-data`.",
            "Name a new file beside the data with `init --output`.",
        ),
    ),
    errors.ClusterError: ErrorText(
        "The Ray cluster is unreachable, was lost, or has a node that cannot be used.",
        (
            "The address is wrong, or no cluster runs there.",
            "The machines have different versions of Ray, Python or the toolchain.",
            "A node stopped, or the connection to it broke off.",
        ),
        (
            "Start the cluster with `ray start --head`, and pass the address that it prints.",
            "Install the same packages on every machine.",
            "Run the command again: `predict --output` continues its work.",
            "Leave `--engine ray` out: one machine needs no cluster.",
        ),
    ),
    errors.ResultFileError: ErrorText(
        "A result file or a session file cannot be read or written, or its figures contradict each other.",
        (
            "The file does not exist, is truncated, or comes from a newer release.",
            "A figure was edited, so that it does not follow from its samples.",
            "A file with this name exists.",
            "The disk is full, or the folder is read-only.",
        ),
        (
            "Measure again with `toolchain bench`.",
            "Choose another name with `--save-as`, or replace the file with `--force`.",
            "Free space, or correct the permissions.",
        ),
    ),
    errors.SystemRefusalError: ErrorText(
        "The operating system refuses to read or write a file.",
        (
            "The disk is full, or a quota is exhausted.",
            "The file or folder is read-only, or belongs to another user.",
            "A path names a file where a folder is needed, or a folder where a file is needed.",
        ),
        (
            "Free space, or choose another place.",
            "Correct the path or its permissions.",
            "If the folder for temporary files is full, set `TMPDIR` to another folder.",
        ),
    ),
    errors.VerdictError: ErrorText(
        "The command worked, and its answer is no. The exit code is 3, so that scripts can tell this from a failure.",
        (
            "A new variant failed its validation: its logits differ too much from PyTorch's, and it was not published.",
            "No row of the comparison is within all limits.",
            "A figure is worse than in the old run by more than `--max-regression` allows.",
            "A bundle was modified, has another id or signature than expected, or computes other logits.",
            "No variant of the result file can reach the goal of `plan`.",
        ),
        (
            "For a failed validation, use the settings that the message suggests, such as more layers in fp32.",
            "For a limit, choose another variant or a looser limit.",
            "For a regression, measure again on an idle machine, and then look for the cause.",
            "For a bundle, do not use it. Get it again from its author, or build it again.",
            "For a plan, allow more time or a larger p99, or measure a faster variant.",
        ),
    ),
}


@dataclass(frozen=True)
class ErrorExplanation:
    """The explanation of an error code.

    Attributes:
        code: The code, such as ``E-DATA``.
        error: Name of the class in Python.
        exit_code: Exit code of a command that fails with this error.
        text: The explanation.
    """

    code: str
    error: str
    exit_code: int
    text: ErrorText

    def to_json(self) -> dict[str, Any]:
        """Returns the explanation as JSON values."""
        fields = dataclasses.asdict(self)
        return {**fields, **fields.pop("text")}


def all_explanations() -> list[ErrorExplanation]:
    """Returns the explanations of all errors, in the order of the exception tree."""
    return [ErrorExplanation(kind.code, kind.__name__, kind.exit_code, text) for kind, text in TEXTS.items()]


def is_code(text: str) -> bool:
    """Returns whether a text has the form of an error code, which no name of a variant has."""
    return bool(re.match("E-", text, re.IGNORECASE))


def explain_code(code: str) -> ErrorExplanation:
    """Returns the explanation of an error code; upper and lower case are equal.

    Raises:
        ToolchainError: No error has this code; the error suggests similar codes.
    """
    explanations = {explanation.code: explanation for explanation in all_explanations()}
    if explanation := explanations.get(code.upper()):
        return explanation
    similar_codes = difflib.get_close_matches(code.upper(), explanations, n=2, cutoff=0.7)
    hint = f"Did you mean {' or '.join(similar_codes)}?" if similar_codes else f"Codes: {', '.join(explanations)}."
    raise ToolchainError(f"There is no error code {code!r}.", hint)


def error_lines(explanation: ErrorExplanation) -> Iterator[str]:
    """Yields the explanation as lines of plain text."""
    yield f"{explanation.code}: {explanation.error}, exit code {explanation.exit_code}"
    yield explanation.text.meaning
    for title, sentences in (("Usual causes", explanation.text.causes), ("What to do", explanation.text.hints)):
        yield ""
        yield title
        yield from (f"  * {sentence}" for sentence in sentences)


def error_page() -> str:
    """Returns the explanations of all errors in Markdown, for the reference page."""
    sections = []
    for explanation in all_explanations():
        causes, hints = (
            "\n".join(f"* {sentence}" for sentence in sentences)
            for sentences in (explanation.text.causes, explanation.text.hints)
        )
        title = f"### {explanation.code}"
        meaning = f"`{explanation.error}`, exit code {explanation.exit_code}. {explanation.text.meaning}"
        sections.append(f"{title}\n\n{meaning}\n\nUsual causes:\n\n{causes}\n\nWhat to do:\n\n{hints}")
    return "\n\n".join(sections)
