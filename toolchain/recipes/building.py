"""Builds a recipe: the variants, the comparison of their ids with the recipe's ids, the benchmark and the bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toolchain
from toolchain.artifacts.steps import Compile, Export, Import, Optimize, Quantize, Step, step_name
from toolchain.bench import run
from toolchain.build.pipeline import ensure
from toolchain.data.datasets import Columns, hub_dataset
from toolchain.errors import RecipeError, VerdictError
from toolchain.progress import Bar, Say
from toolchain.recipes import record
from toolchain.recipes.planning import Plan
from toolchain.recipes.record import BenchRecord
from toolchain.results.folder import ResultsFolder
from toolchain.results.result_file import ResultFile
from toolchain.results.saving import Saver
from toolchain.ship import shipping
from toolchain.ship.shipping import Order
from toolchain.ship.targets import TARGETS
from toolchain.system import hardware


@dataclass(frozen=True)
class BuiltVariant:
    """The result of building one variant of a recipe.

    Attributes:
        variant: Name of the variant.
        step: Name of its step.
        id: Id of the artifact.
        recipe_id: Id in the recipe; None if the recipe states none.
        built: Whether this command built the artifact; False if it was fresh.
        same_version: Whether the recipe states no version of the step, or the version of this release.
        any_processor: Whether the step gives the same files on every x86-64 processor; see `repeats_on_any_processor`.
    """

    variant: str
    step: str
    id: str
    recipe_id: str | None
    built: bool
    same_version: bool
    any_processor: bool

    @property
    def same(self) -> bool | None:
        """Returns whether the id is that of the recipe; None if the recipe states none."""
        return None if self.recipe_id is None else self.id == self.recipe_id

    def to_json(self) -> dict[str, Any]:
        """Returns the fields for JSON output."""
        return {**dataclasses.asdict(self), "same": self.same}


def repeats_on_any_processor(step: Step) -> bool:
    """Returns whether a step gives the same files on every x86-64 processor, with the same releases of all libraries.

    Such a step copies, casts or rounds single numbers. All other steps add numbers, for example when they run the model
    on data. Processors add numbers in different orders, so the sums differ in their last digits. Other steps promise
    the same files only on the same machine.
    """
    match step:
        case Import():
            return step.base is None  # the merge of an adapter multiplies matrices
        case Export() | Optimize() | Compile():
            return True
        case Quantize():
            is_dynamic = (step.backend, step.scheme) == ("ort", "dynamic") and step.embeddings != "int4"
            return (is_dynamic and not step.keep_fp32) or (step.backend == "torch" and step.scheme in ("bf16", "fp16"))
        case _:
            return False


def build(plan: Plan, say: Say, bar: Bar) -> list[BuiltVariant]:
    """Builds the variants of a recipe and returns them, parents first; see `pipeline.ensure` for the errors."""
    artifacts = ensure(plan.workspace, plan.steps, plan.steps, say, bar)
    records = {variant.name: variant for variant in plan.recipe.variants}
    rows = []
    for item in plan.items:
        if listed := records.get(item.variant.name):
            manifest = artifacts[item.variant.name].manifest
            rows.append(
                BuiltVariant(
                    variant=item.variant.name,
                    step=step_name(manifest.step),
                    id=manifest.id,
                    recipe_id=listed.id,
                    built=bool(item.reason),
                    same_version=listed.version in (None, manifest.step_version),
                    any_processor=repeats_on_any_processor(manifest.step),
                )
            )
    return rows


def require_same_ids(plan: Plan, rows: Sequence[BuiltVariant]) -> None:
    """Requires that each artifact has the id that the recipe states.

    Raises:
        VerdictError: An id differs; the error names the first such variant, whose descendants differ too.
    """
    different = [row for row in rows if row.same is False]
    if not different:
        return
    count = sum(row.same is not None for row in rows)
    raise VerdictError(
        f"{len(different)} of {count} ids differ from the recipe, first that of {different[0].variant}.",
        _difference_hint(plan, different[0]),
    )


def _difference_hint(plan: Plan, row: BuiltVariant) -> str:
    """Returns the most likely reason for another id, and what to do."""
    recipe = plan.recipe
    if not row.same_version:
        release = f" {recipe.toolchain}" if recipe.toolchain else ""
        return f"The step {row.step} has another version in this release: use the release{release} of the recipe."
    if recipe.model.name and plan.workspace.model != recipe.model.name:
        return f"ONNX files contain the name of the model's folder: build with --as {recipe.model.name}."
    versions = {**hardware.versions(), "toolchain": toolchain.__version__}
    recorded = {**recipe.releases, **({"toolchain": recipe.toolchain} if recipe.toolchain else {})}
    known = ("python", "toolchain", *hardware.STACK)
    changes = [
        f"{name} {recorded[name]}" for name in known if name in recorded and recorded[name] != versions.get(name)
    ]
    hints = [f"The recipe was built with other releases: install {', '.join(changes)}."] if changes else []
    if not row.any_processor:
        hints.append(
            f"The step {row.step} gives the same files only on the same machine: build there, or accept this build."
        )
    other = f"The recipe of {row.variant} may have been edited, or it comes from another kind of processor."
    return " ".join(hints) or f"{other} Write a new recipe with `toolchain recipe`."


def measure(plan: Plan, request: run.Request, say: Say, bar: Bar) -> tuple[ResultFile, Path]:
    """Runs a benchmark, and returns the result and its file; see `bench.run.measure` for the errors."""
    saver = Saver(request.results, plan.workspace.model, None, False, say)
    return run.measure_and_save(plan.workspace, request, saver, say, bar)


def bench_request(plan: Plan, results: ResultsFolder) -> run.Request | None:
    """Returns the request for the recipe's benchmark, after a check of its data and cells; None if there is none."""
    bench = plan.recipe.bench
    if bench is None:
        return None
    data = _bench_data(plan, bench) if bench.data else None
    run.planned_pairs(bench.variants, bench.providers)
    protocol = run.make_protocol(bench.quick, bench.threads, batch_size=bench.batch_size)
    columns = Columns(bench.text_column, bench.label_column, bench.text_pair_column)
    return run.Request(bench.variants, bench.providers, protocol, data, columns, bench.split, results=results)


def _bench_data(plan: Plan, bench: BenchRecord) -> str:
    """Returns the value of ``--data`` for the recipe's benchmark."""
    ref = bench.data or ""
    if bench.kind == "hub":
        if hub_dataset(ref) is None or Path(ref).exists():
            raise RecipeError(f"The benchmark's data {ref!r} is not a hub dataset.", "Correct the key data in [bench].")
        return ref
    path = record.path_inside(plan.folder, ref, "the data", "`toolchain bench --data`")
    if not path.exists():
        raise RecipeError(f"The data {ref} of the benchmark is not beside the recipe.", "Copy the file there.")
    return str(path.resolve())


def ship(plan: Plan, results: ResultsFolder, say: Say, bar: Bar) -> tuple[dict[str, Any], Path] | None:
    """Writes the recipe's bundle, and returns its bundle.json and its folder; None if the recipe has no bundle."""
    order, output = plan.recipe.ship, bundle_folder(plan)
    if order is None or output is None:
        return None
    bundle = shipping.ship(
        plan.workspace,
        Order(order.variants, order.target, order.license, order.demo, order.with_tokenizer, results=results),
        output,
        say,
        bar,
    )
    return bundle, output


def bundle_folder(plan: Plan) -> Path | None:
    """Returns the folder of the recipe's bundle, after a check of its variants and the folder; None without a bundle.

    Raises:
        ShippingError: The target cannot have one of the variants.
        ArtifactError: The folder exists and has no bundle, or a modified bundle.
    """
    order = plan.recipe.ship
    if order is None:
        return None
    shipping.check_names(order.variants, TARGETS[order.target])
    output = plan.output or shipping.default_output(plan.workspace, order.target)
    shipping.check_output(output)
    return output
