"""A model, whose methods train it, and build, measure and ship its variants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from toolchain.artifacts.steps import OPTIMIZE_PASSES, QUANTIZED, Exits, Step
from toolchain.artifacts.store import Artifact
from toolchain.bench import run
from toolchain.build import pipeline
from toolchain.build.states import VariantState, list_states
from toolchain.build.trimming import corpus_of
from toolchain.build.workspace import Workspace
from toolchain.data.datasets import Columns
from toolchain.data.inputs import TrainingSource
from toolchain.errors import BenchError, SettingsError
from toolchain.exporters import EXPORTERS
from toolchain.finetune import FinetuneRequest, make_recipe, summary
from toolchain.finetune import finetune as run_finetune
from toolchain.interface.arguments import (
    Variant,
    as_tuple,
    check_choice,
    check_label,
    check_number,
    task_of,
    variant_name,
    variant_names,
)
from toolchain.interface.bundle import Bundle
from toolchain.interface.calls import calling
from toolchain.interface.progress import ignore_event, print_event, show_bar
from toolchain.interface.result import Result
from toolchain.progress import Bar, Say, no_bar
from toolchain.results.folder import ResultsFolder, require_measured
from toolchain.results.providers import PROVIDERS
from toolchain.results.saving import Saver
from toolchain.ship import shipping
from toolchain.ship.targets import TARGETS
from toolchain.step_requests import (
    NO_OPTIMIZATION,
    ExportRequest,
    PruneRequest,
    QuantizeRequest,
    exits_steps,
    isa_of,
)


class Model:
    """A model under work, and its folder of artifacts. `open` returns it.

    Each method that builds returns the artifact of the new variant. It builds only missing and stale variants, with
    their ancestors. Where a method takes a variant, it takes a name or an artifact. An interrupted call leaves only
    complete files, and the same call continues or repeats the work.

    Attributes:
        name: Name of the model's folder.
        folder: The folder of the model's artifacts.
    """

    def __init__(self, workspace: Workspace, results: ResultsFolder, progress: bool) -> None:
        self._workspace = workspace
        self._results = results
        self._say: Say = print_event if progress else ignore_event
        self._bar: Bar = show_bar if progress else no_bar
        self.name = workspace.model
        self.folder = workspace.exported / workspace.model

    def __repr__(self) -> str:
        """Returns one line with the model's folder."""
        return f"<Model {self.name}, in {self.folder}>"

    @calling()
    def finetune(
        self,
        output: str | Path,
        *,
        epochs: int = 3,
        lr: float = 5e-5,
        batch_size: int = 32,
        max_length: int | None = None,
        labels: Iterable[str] = (),
        multi_label: bool = False,
        regression: bool = False,
        entities: bool = False,
        teacher: str | Path | None = None,
        seed: int = 20,
        data: str | Path | None = None,
        revision: str | None = None,
    ) -> Model:
        """Trains this model on the training data that `open` names, and writes the trained checkpoint.

        The model need not have a classification head. A tenth of the rows, at most 2000, are held out, and the
        checkpoint has the weights of the epoch that is best on them. A second call with the same settings trains
        nothing.

        Args:
            output: Folder of the new checkpoint.
            epochs: Number of epochs.
            lr: Peak learning rate.
            batch_size: Rows in a training step.
            max_length: Truncate texts to this number of tokens; None for the model's maximum.
            labels: Class labels of a new classification head, in order; empty for the labels of the model or the data.
            multi_label: Whether each text has any number of labels, written as ``a|b`` in the label column.
            regression: Whether the label column holds scores.
            entities: Whether the label column holds a label for each word.
            teacher: Also learn from the logits of this classifier.
            seed: Random seed of the new classification head, the row order and dropout.
            data: Data for the final evaluation; None for the held-out rows, or for the validation set of SST-2.
            revision: Branch, tag or commit of a hub model.

        Returns:
            The trained model, with the same training data. So `prune` holds out the same rows.

        Raises:
            DataError: The training data are not usable.
            ArtifactError: The output folder has other content, or a model that was trained with other settings.

        Examples:
            >>> model = tc.open("my-checkpoint", train_data="train.csv")
            >>> model.finetune("my-films", epochs=1)
            <Model my-films, in exported/my-films>
        """
        for argument, value, high in (("epochs", epochs, 99), ("batch_size", batch_size, 1024)):
            check_number(argument, value, 1, high, whole=True)
        check_number("lr", lr, 1e-9, 1)
        check_number("seed", seed, 0, whole=True)
        if max_length is not None:
            check_number("max_length", max_length, 8, whole=True)
        names = as_tuple(labels)
        if len(set(names)) < len(names) or not all(names):
            raise SettingsError("`labels` has an empty name, or a name twice.", "Give different names.")
        request = FinetuneRequest(
            self._workspace.source.ref,
            self._workspace.train,
            make_recipe(epochs, lr, batch_size, seed, has_teacher=teacher is not None),
            Path(output),
            revision,
            None if teacher is None else str(teacher),
            names,
            task_of(multi_label=multi_label, regression=regression, entities=entities),
            max_length,
            None if data is None else str(data),
        )
        self._say(summary(run_finetune(request, self._say, self._bar)))
        workspace = Workspace.open(str(output), self._workspace.exported, train=self._workspace.train)
        return Model(workspace, self._results, self._bar is show_bar)

    @calling()
    def build(self, variant: str) -> Artifact:
        """Builds a variant by its name, with the settings of its existing artifact, or with default settings.

        Raises:
            UnknownVariantError: There is no such variant; the error suggests similar names.
            VerdictError: The new artifact fails validation, so it is not published.

        Examples:
            >>> artifact = tc.open("my-checkpoint").build("onnx-int8")
            >>> artifact.name, artifact.path.name
            ('onnx-int8', 'onnx-int8')
        """
        return self._build(self._workspace, {}, variant_name(variant, self.folder))

    @calling()
    def export(
        self,
        parent: Variant = "torch-fp32",
        *,
        optimize: str = "cpu",
        no_pass: str | Iterable[str] = (),
        opset: int = 18,
        exporter: str | None = None,
        revision: str | None = None,
        base: str | None = None,
        name: str = "",
    ) -> Artifact:
        """Exports a PyTorch variant to ONNX, and optimises the graph.

        Args:
            parent: The variant to export.
            optimize: Execution provider for which the graph is optimised: ``cpu``, ``cuda`` or ``webgpu``; ``none`` for
                the graph as exported.
            no_pass: Passes to leave out of the optimisation.
            opset: ONNX opset, 17 to 20.
            exporter: Library that converts the model; None for the default.
            revision: Branch, tag or commit of a hub model.
            base: Base model of a LoRA adapter.
            name: Label of the new variant.

        Returns:
            The optimised graph, such as onnx-fp32.

        Examples:
            >>> tc.open("my-checkpoint").export().name
            'onnx-fp32'
        """
        check_choice("optimize", optimize, [*OPTIMIZE_PASSES, NO_OPTIMIZATION])
        check_number("opset", opset, 17, 20, whole=True)
        if exporter is not None:
            check_choice("exporter", exporter, list(EXPORTERS))
        parents, passes = (variant_name(parent, self.folder),), as_tuple(no_pass)
        request = ExportRequest(parents, optimize, passes, opset, exporter, revision, check_label(name))
        return self._build(self._workspace.with_base(base) if base else self._workspace, request.steps())

    @calling()
    def prune(
        self,
        ratio: float | None = None,
        *,
        max_drop: float | None = None,
        method: str = "fisher",
        cost: str = "parameters",
        layers: int | None = None,
        embedding_rank: int | None = None,
        recover: int | None = None,
        exits: bool = False,
        parent: Variant = "torch-fp32",
        name: str = "",
    ) -> Artifact:
        """Removes attention heads and FFN neurons from a PyTorch variant.

        Args:
            ratio: Share of the encoder's linear parameters to remove, 0.01 to 0.99, in steps of 0.01.
            max_drop: Instead of `ratio`: the largest accuracy drop on held-out rows, in percentage points.
            method: Importance measure, ``fisher`` or ``magnitude``; ``mask`` only sets weights to zero.
            cost: Cost that pruning reduces: ``parameters``, or ``latency`` on this machine.
            layers: Number of layers to keep; None for all.
            embedding_rank: Store this number of values for each token, and compute the token's embedding from them
                with one linear layer; None keeps the embedding table.
            recover: After pruning, train the pruned model for at most this number of epochs.
            exits: Also train the early layers for exits; needs `recover`.
            parent: The variant to prune.
            name: Label of the new variant.

        Returns:
            The pruned PyTorch variant, such as torch-pruned50; with `recover`, the trained one, such as
            torch-pruned50-r1.

        Examples:
            >>> tc.open("my-checkpoint", train_data="train.csv").prune(0.5).name
            'torch-pruned50'
        """
        check_choice("method", method, ("fisher", "magnitude", "mask"))
        check_choice("cost", cost, ("parameters", "latency"))
        for argument, value, high in (("ratio", ratio, 1), ("max_drop", max_drop, 100)):
            if value is not None:
                check_number(argument, value, 0, high)
        for argument, value, high in (
            ("layers", layers, 99),
            ("recover", recover, 99),
            ("embedding_rank", embedding_rank, 65536),
        ):
            if value is not None:
                check_number(argument, value, 1, high, whole=True)
        ratios = () if ratio is None else (float(ratio),)
        parent_name = variant_name(parent, self.folder)
        label = check_label(name)
        request = PruneRequest(
            ratios, max_drop, method, cost, layers, recover, exits, parent_name, label, embedding_rank
        )
        return self._build(self._workspace, request.steps(self._workspace, self._say, self._bar))

    @calling()
    def quantize(
        self,
        parent: Variant | None = None,
        *,
        backend: str = "ort",
        scheme: str | None = None,
        isa: str = "vnni",
        embeddings: str | None = None,
        keep_fp32: int | None = None,
        max_drop: float | None = None,
        no_pass: str | Iterable[str] = (),
        trim_vocab: str | Path | None = None,
        name: str = "",
    ) -> Artifact:
        """Builds a variant with fewer bits.

        Args:
            parent: The variant to quantise; None for onnx-fp32 with the backend ``ort``, else for torch-fp32.
            backend: Library that quantises: ``ort``, ``torch``, ``bnb`` or ``torchao``.
            scheme: Scheme of the backend, such as ``static``; None for its first scheme.
            isa: Processors on which int8 sums must not saturate: ``vnni``, ``portable``, or ``auto`` for this one.
            embeddings: Bits of the embedding tables, ``int8`` or ``int4``; None for the scheme's bits.
            keep_fp32: Number of sensitive linear layers that stay in fp32.
            max_drop: Instead of `keep_fp32`: the largest accuracy drop on held-out rows, in percentage points.
            no_pass: Passes to leave out.
            trim_vocab: Drop tokens that do not occur in this file or folder of texts, or in ``train``.
            name: Label of the new variant.

        Returns:
            The quantised variant, such as onnx-int8.

        Examples:
            >>> model = tc.open("my-checkpoint")
            >>> int8 = model.quantize("onnx-fp32")
            >>> int8.name, int8.size_bytes < model.build("onnx-fp32").size_bytes
            ('onnx-int8', True)
        """
        check_choice("backend", backend, list(QUANTIZED))
        check_choice("isa", isa, ("vnni", "portable", "auto"))
        if scheme is not None:
            check_choice("scheme", scheme, list(QUANTIZED[backend]))
        if embeddings is not None:
            check_choice("embeddings", embeddings, ("int8", "int4"))
        if keep_fp32 is not None:
            check_number("keep_fp32", keep_fp32, 1, whole=True)
        if max_drop is not None:
            check_number("max_drop", max_drop, 0)
        parents = () if parent is None else (variant_name(parent, self.folder),)
        corpus_name = None if trim_vocab is None else str(trim_vocab)
        corpus = corpus_of(corpus_name, self._workspace.train.columns.text)
        request = QuantizeRequest(
            parents,
            backend,
            scheme,
            isa_of(isa, self._say),
            embeddings,
            keep_fp32,
            max_drop,
            as_tuple(no_pass),
            corpus.digest if corpus else corpus_name,
            check_label(name),
        )
        workspace = replace(self._workspace, corpus=corpus)
        return self._build(workspace, request.steps(workspace, self._say, self._bar))

    @calling()
    def exits(
        self,
        parent: Variant = "onnx-int8",
        *,
        layers: Iterable[int] | None = None,
        max_drop: float = 0.5,
        name: str = "",
    ) -> Artifact:
        """Adds exits: a text with a confident early prediction skips the later layers.

        Args:
            parent: The ONNX variant that gets exits.
            layers: Numbers of the layers before the exits, ascending; None lets the build choose them.
            max_drop: Largest accuracy drop below `parent` on held-out rows, in percentage points.
            name: Label of the new variant.

        Returns:
            The variant with exits, such as onnx-exits-int8.

        Examples:
            >>> tc.open("my-checkpoint", train_data="train.csv").exits("onnx-int8", max_drop=1.0).name
            'onnx-exits-int8'
        """
        check_number("max_drop", max_drop, 0)
        numbers = None if layers is None else tuple(layers)
        for number in numbers or ():
            check_number("layers", number, 0, whole=True)
        step = Exits(numbers, float(max_drop))
        return self._build(self._workspace, exits_steps([variant_name(parent, self.folder)], step, check_label(name)))

    @calling()
    def bench(
        self,
        variants: Variant | Iterable[Variant] | None = None,
        *,
        quick: bool = False,
        provider: str | Iterable[str] = (),
        data: str | Path | None = None,
        text_column: str | None = None,
        text_pair_column: str | None = None,
        label_column: str | None = None,
        split: str | None = None,
        threads: int | None = None,
        batch_size: int = 32,
        by_length: bool = False,
        service_times: bool = False,
        device_id: int = 0,
        allow_fallback: bool = False,
        save_as: str | None = None,
        force: bool = False,
        resume: bool = False,
    ) -> Result:
        """Measures accuracy, latency, throughput, memory and size, and saves the result file.

        Args:
            variants: The variants to measure; None for the default variants.
            quick: Whether to measure each variant for about 20 seconds instead of 60 seconds.
            provider: Execution providers, ``cpu``, ``cuda``, ``cuda-graphs`` or ``tensorrt``; empty for all. ``cuda``
                includes ``cuda-graphs``.
            data: Evaluation data; None for the embedded SST-2.
            text_column: Column of texts; None for the column that `open` names.
            text_pair_column: Column of second texts; None for the column that `open` names.
            label_column: Column of labels; None for the column that `open` names.
            split: Split of a data set, or ``held-out``; None for ``validation``.
            threads: Number of CPU threads; None for the number of physical cores.
            batch_size: Largest number of sentences in a batch.
            by_length: Whether to also measure the latency at 16, 32, … 512 tokens.
            service_times: Whether to also measure batches of 2, 4, 8, … random sentences, and single sentences after
                pauses.
            device_id: Number of the GPU.
            allow_fallback: Whether the CPU may run operators that the provider cannot run.
            save_as: Name of a result file to commit; None for a local file.
            force: Whether `save_as` may replace a file.
            resume: Whether to continue the interrupted run of the same call.

        Raises:
            BenchError: A named variant cannot be measured. The other measurements are in the result file.
            SettingsError: The list of variants is empty.

        Examples:
            >>> model = tc.open("my-checkpoint", results="my-results")
            >>> result = model.bench(["onnx-fp32", "onnx-int8"], provider="cpu", data="validation.csv", quick=True)
            >>> [row["baseline"] for row in result.compare(baseline="onnx-fp32").rows]
            ['onnx-fp32@cpu', 'onnx-fp32@cpu']
        """
        providers = as_tuple(provider)
        for each in providers:
            check_choice("provider", each, PROVIDERS)
        for argument, value, low in (
            ("threads", threads, 1),
            ("batch_size", batch_size, 1),
            ("device_id", device_id, 0),
        ):
            if value is not None:
                check_number(argument, value, low, whole=True)
        if save_as is not None and Path(save_as).name != save_as:
            raise SettingsError(f"`save_as` is {save_as!r}.", "Give a name, not a path.")
        if force and not save_as:
            raise SettingsError("`force` needs `save_as`.", "Give the name of the result file.")
        names = () if variants is None else variant_names(variants, self.folder)
        columns = self._workspace.train.columns
        columns = Columns(text_column or columns.text, label_column or columns.label, text_pair_column or columns.pair)
        protocol = run.make_protocol(
            quick,
            threads,
            batch_size=batch_size,
            by_length=by_length,
            service_times=service_times,
            device_id=device_id,
            allow_fallback=allow_fallback,
        )
        file = None if data is None else str(data)
        request = run.Request(names, providers, protocol, file, columns, split, resume, self._results)
        saver = Saver(self._results, self.name, save_as, force, self._say)
        saver.require_free([None])
        result, path = run.measure_and_save(self._workspace, request, saver, self._say, self._bar)
        try:
            require_measured(result)
        except BenchError as error:
            raise BenchError(f"{error.cause} The result of this run is in {path}.", error.hint) from error
        if saver.error:
            raise saver.error
        return Result([result], [path], self._workspace.exported)

    @calling()
    def result(self) -> Result:
        """Returns the newest result of this model.

        Raises:
            BenchError: No run measured the model.

        Examples:
            >>> tc.open("my-checkpoint", results="no-results").result()
            Traceback (most recent call last):
            ...
            toolchain.errors.BenchError: There is no result of my-checkpoint in no-results. ...
        """
        return Result([self._results.read_newest(self.name, self._say)], [], self._workspace.exported)

    @calling()
    def ship(
        self,
        variants: Variant | Iterable[Variant],
        *,
        target: str,
        output: str | Path | None = None,
        license: str | None = None,
        demo: bool = True,
        with_tokenizer: bool = False,
        exit_confidence: float | None = None,
    ) -> Bundle:
        """Writes variants to a bundle: a folder that an app loads without this toolchain.

        Args:
            variants: The variants, in order.
            target: Kind of app: ``web``, ``python``, ``mobile``, ``server``, ``ray-serve``, ``mlflow`` or ``other``.
            output: Folder of the bundle; None for ``bundle-TARGET`` beside the variants.
            license: Licence of the bundle; None for the model's licence.
            demo: Whether a web bundle has a demo page; the first demo page needs npm.
            with_tokenizer: Whether to put the tokenizer into the graph; for python, mobile, server and ray-serve only.
            exit_confidence: Confidence threshold of variants with exits; None for the build's choice.

        Raises:
            ShippingError: The target cannot run a variant.
            ArtifactError: The output folder holds something else, or a modified bundle.

        Examples:
            >>> bundle = tc.open("my-checkpoint").ship("onnx-int8", target="python", output="app/model")
            >>> bundle.variants, (bundle.path / "README.md").exists()
            (('onnx-int8',), True)
        """
        check_choice("target", target, list(TARGETS))
        if exit_confidence is not None:
            check_number("exit_confidence", exit_confidence, 0, 1)
        names = variant_names(variants, self.folder)
        folder = shipping.default_output(self._workspace, target) if output is None else Path(output)
        order = shipping.Order(
            names,
            target,
            license,
            demo,
            with_tokenizer,
            results=self._results,
            exit_confidence=exit_confidence,
        )
        content = shipping.ship(self._workspace, order, folder, self._say, self._bar)
        return Bundle(folder, str(content["id"]), target, names)

    @calling()
    def variants(self) -> list[VariantState]:
        """Returns the states of the default variants, of all variants with a folder, and of their ancestors.

        Examples:
            >>> states = {item.variant: item.state for item in tc.open("my-checkpoint").variants()}
            >>> states["onnx-int8"], states["onnx-pruned30"]
            ('built', 'missing')
        """
        return list_states(self._workspace)

    def _build(self, workspace: Workspace, steps: Mapping[str, Step], name: str | None = None) -> Artifact:
        """Builds variants, and returns the artifact of the named one, or of the last one in `steps`."""
        wanted = name or list(steps)[-1]
        return pipeline.ensure(workspace, [*steps, wanted], steps, self._say, self._bar)[wanted]


@calling()
def open(
    model: str | Path = "reference",
    *,
    exported: str | Path = "exported",
    folder: str | None = None,
    train_data: str | Path | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str = "label",
    split: str | None = None,
    results: str | Path = "benchmarks/results",
    progress: bool = True,
) -> Model:
    """Opens a model. The call reads no weights and downloads nothing; the first build does.

    Args:
        model: ``reference`` (embedded), a folder, a model under `exported`, or a hub id.
        exported: Folder of the artifacts.
        folder: Name of the model's folder under `exported`; None for the model's own name.
        train_data: Data for fine-tuning, pruning, recovery, exits and calibration; None for the embedded SST-2.
        text_column: Column of texts; None for ``sentence``, ``text`` or ``tokens``.
        text_pair_column: Column of second texts, if each row is a pair.
        label_column: Column of labels.
        split: Split of the training data; None for ``train``.
        results: Folder of the result files.
        progress: Whether to show bars and events.

    Raises:
        CheckpointError: No source matches `model`, or the folder belongs to another model.

    Examples:
        >>> tc.open("reference")
        <Model reference, in exported/reference>
    """
    columns = Columns(text_column, label_column, text_pair_column)
    train = TrainingSource(None if train_data is None else str(train_data), columns, split)
    workspace = Workspace.open(str(model), Path(exported), folder, train)
    return Model(workspace, ResultsFolder(Path(results)), progress)
