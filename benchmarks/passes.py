"""Measures the time that each pass saves, by comparison with graphs that lack the pass or use an alternative.

    python benchmarks/passes.py [--shape reference|base] [--full] [--save-as NAME]

Every graph is built from the same `onnx-std`, with the passes of `toolchain` and a few passes of this script. Each
pass of this script replaces one pass of the toolchain. Some passes of this script enable fusions of ONNX Runtime that
the toolchain disables. The pass `quantize-linear-bias-apart` adds biases after the quantised products. The pass
`fuse-not-attention` leaves attention in separate operators. As an alternative to the int8 passes, the script calls
ONNX Runtime's `quantize_dynamic`.

The toolchain builds and validates `onnx-fp32` and `onnx-int8`. The script does not validate the graphs that lack a
pass or use an alternative; it counts their flips instead. All graphs are measured interleaved in one run, with ONNX
Runtime's default session options and symbolic shapes.

When ONNX Runtime loads a graph, it fuses operators that the toolchain has not fused. ONNX Runtime creates
SkipLayerNormalization only if the graph has fixed shapes. In apps that give the model inputs of a fixed shape, the pass
`residual-sum` prevents the fusion to SkipLayerNormalization. This script uses symbolic shapes, so `residual-sum` has no
fusion to prevent and cannot save time. In the printed table, the row with SkipLayerNormalization shows the time that
the fusion to this operator costs.

Each ratio is the time without a pass, or with an alternative to the pass, divided by the time with the pass. A ratio
above 1 means that the pass makes the graph faster. Each ratio has a 95 % interval over the rounds of the benchmark. The
script writes the result file to benchmarks/studies/.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import peers

from toolchain.artifacts import store
from toolchain.artifacts.steps import CPU_PASSES, Quantize
from toolchain.artifacts.store import Artifact
from toolchain.bench.cells import Cell
from toolchain.build.pipeline import ensure
from toolchain.build.steps.quantize import linear_passes
from toolchain.cli.progress import bar, say
from toolchain.passes import PASSES, read, rewrite, write
from toolchain.passes.attention import build_qattention
from toolchain.passes.fuse import CPU_DISABLED_FUSIONS, fuse
from toolchain.passes.int8 import run_time_codes
from toolchain.passes.model_shape import context_of
from toolchain.passes.quantize_linear import build_fused_product, quantize_linear
from toolchain.results.measurements import Measurement
from toolchain.results.result_file import ResultFile

FP32, INT8 = "onnx-fp32", "onnx-int8"
SKIP_LAYER_NORM = ("skip_layer_norm", "bias_skip_layer_norm")


def add_bias_after(model: ir.Model, data: Any, name: str, array: np.ndarray, bias: ir.Value | None) -> list[ir.Node]:
    """Returns the nodes of a quantised product and of an Add for its bias.

    This function has the type `attention.Product`.
    """
    product = build_fused_product(model, data, name, array, None)
    if bias is None:
        return product
    add = ir.node("Add", [product[-1].outputs[0], bias], name=f"{name}/biased")
    add.outputs[0].name = f"{name}/biased"
    return [*product, add]


def _fuse_also(*names: str) -> Callable[..., tuple[ir.Model, int]]:
    return partial(fuse, disabled_fusions=tuple(name for name in CPU_DISABLED_FUSIONS if name not in names))


# Each experimental pass replaces one pass of the toolchain.
EXPERIMENTAL_PASSES = {
    "fuse-skip-layer-norm": _fuse_also(*SKIP_LAYER_NORM),
    "fuse-bias-gelu": _fuse_also("bias_gelu"),
    "fuse-embed-layer-norm": _fuse_also("embed_layer_norm"),
    "fuse-not-attention": partial(fuse, disabled_fusions=(*CPU_DISABLED_FUSIONS, "attention")),
    "quantize-linear-bias-apart": partial(
        quantize_linear, product=add_bias_after, attend=partial(build_qattention, codes=run_time_codes)
    ),
    "quantize-linear-merged": partial(quantize_linear, product=build_fused_product),
}


@dataclass(frozen=True)
class Contender:
    """A graph that the script compares with another graph.

    Attributes:
        name: Name of this graph.
        change: Description of the difference between this graph and the graph `against`.
        passes: Passes that build this graph from onnx-std.
        against: Name of the graph that the script compares this graph with.
        dynamic: Options of ONNX Runtime's `quantize_dynamic`, which runs after the passes; None to skip this step.
    """

    name: str
    change: str
    passes: tuple[str, ...]
    against: str
    dynamic: dict[str, Any] | None = None


def _replace_pass(name: str, *replacements: str, passes: Sequence[str] = CPU_PASSES) -> tuple[str, ...]:
    """Returns `passes` with `replacements` instead of the pass `name`."""
    return tuple(new for each in passes for new in (replacements if each == name else (each,)))


def contenders() -> list[Contender]:
    """Returns all graphs that are compared with `onnx-fp32`, with `onnx-int8` or with each other."""
    fp32 = [(f"no-{name}", f"without {name}", _replace_pass(name)) for name in CPU_PASSES]
    fp32 += [
        (
            "skip-layer-norm",
            "SkipLayerNormalization instead of Sub + LayerNormalization",
            _replace_pass("fuse", "fuse-skip-layer-norm"),
        ),
        ("bias-gelu", "BiasGelu instead of Gelu", _replace_pass("fuse", "fuse-bias-gelu")),
        (
            "embed-layer-norm",
            "EmbedLayerNormalization instead of separate operators",
            _replace_pass("fuse", "fuse-embed-layer-norm"),
        ),
        (
            "attention-in-parts",
            "attention in separate operators, with three projections",
            _replace_pass("fuse", "fuse-not-attention"),
        ),
    ]
    entries = [Contender(f"{FP32}+{name}", change, passes, FP32) for name, change, passes in fp32]
    quantized = (*linear_passes(Quantize(), is_standard=False), "quantize-embedding")
    entries += [Contender(f"{INT8}+{name}", change, (*passes, *quantized), INT8) for name, change, passes in fp32]
    all_passes = (*CPU_PASSES, *quantized)
    entries += [
        Contender(f"{INT8}+no-{name}", f"without {name}", _replace_pass(name, passes=all_passes), INT8)
        for name in quantized
    ]
    replacements = (
        ("merged", "one product, Split and MultiHeadAttention instead of QAttention"),
        ("bias-apart", "bias added after each quantised product"),
    )
    for name, change in replacements:
        graph = _replace_pass("quantize-linear", f"quantize-linear-{name}", passes=all_passes)
        entries.append(Contender(f"{INT8}+{name}", change, graph, INT8))
    # The weights are QInt8, as in optimum-cli's settings for VNNI. The graph has no types for results of fused
    # operators, so `quantize_dynamic` needs the option DefaultTensorType. DefaultTensorType = 1 means float.
    types = {"weight_type": "QInt8", "DefaultTensorType": 1}
    entries.append(
        Contender(f"{INT8}+quantize-dynamic", "quantize_dynamic instead of the int8 passes", CPU_PASSES, INT8, types)
    )
    parts = _replace_pass("fuse", "fuse-not-attention")
    name = f"{INT8}+quantize-dynamic-in-parts"
    entries.append(
        Contender(
            name,
            "quantize_dynamic, with attention in separate operators",
            parts,
            INT8,
            {**types, "MatMulConstBOnly": True},
        )
    )
    entries.append(
        Contender(
            f"{INT8}+products-of-activations",
            "QKᵀ and PV also in int8, compared with the row above",
            parts,
            name,
            {**types, "MatMulConstBOnly": False},
        )
    )
    return entries


def build(contender: Contender, std: Artifact, scratch: Path) -> Artifact:
    """Builds the graph that `contender` describes, and copies config and tokenizer into the folder of the graph."""
    folder = scratch / contender.name
    folder.mkdir()
    store.copy_companions(std, folder)
    model, _ = rewrite(read(std.onnx_path), contender.passes, context_of(std.path))
    target = folder / std.onnx_path.name
    write(model, target)
    if contender.dynamic is not None:
        _quantize_dynamic(target, **contender.dynamic)
    return peers.make_artifact(std, contender.name, folder, "benchmarks/passes.py")


def _quantize_dynamic(path: Path, weight_type: str, **extra: Any) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, path, weight_type=QuantType[weight_type], per_channel=True, extra_options=extra)


def summary(result: ResultFile) -> list[str]:
    """Returns a header and, for each graph of `contenders`, a line with its ratios and flips."""
    rows = {row.variant: row for row in result.rows}
    size = result.run["batch_size"]
    width = max(len(each.change) for each in contenders())
    lines = [f"{'':10} {'':{width}} {'batch 1':22} {f'batches of {size}':22} flips"]
    for each in contenders():
        other, base = rows[each.name], rows[each.against]
        latency, throughput = (
            peers.ratio(own, other)
            for own, other in zip(peers.require_samples(base), peers.require_samples(other), strict=True)
        )
        graph, flips = each.name.split("+")[0], f"{_flips(base, other):3} of {len(base.predictions)}"
        lines.append(f"{graph:10} {each.change:{width}} {latency:22} {throughput:22} {flips}")
    return lines


def _flips(one: Measurement, other: Measurement) -> int:
    return sum(a != b for a, b in zip(one.predictions, other.predictions, strict=True))


@click.command()
@click.option("--shape", type=click.Choice(["reference", "base"]), default="reference", show_default=True)
@click.option("--full", is_flag=True, help="Measure each cell for about 60 s instead of 20 s.")
@click.option("--save-as", help="[default: passes-SHAPE]")
def main(shape: str, full: bool, save_as: str | None) -> None:
    """Builds the graphs, measures them, saves the result file and prints the ratios."""
    PASSES.update(EXPERIMENTAL_PASSES)
    with tempfile.TemporaryDirectory() as folder, bar("passes") as progress:
        scratch = Path(folder)
        workspace = peers.open_shape(shape, scratch / "exported", scratch)
        artifacts = ensure(workspace, (FP32, INT8), {}, say)
        graphs = {name: artifacts[name] for name in (FP32, INT8)}
        entries = contenders()
        for done, each in enumerate(entries):
            progress(done, len(entries), f"building {each.name}")
            graphs[each.name] = build(each, artifacts["onnx-std"], scratch)
        cells = [Cell(workspace.model, name, "onnx", "cpu", artifact) for name, artifact in graphs.items()]
        result = peers.measure_all(cells, artifacts["torch-fp32"], full, progress)
    result.write(peers.STUDIES / f"{save_as or f'passes-{shape}'}.json")
    for line in summary(result):
        click.echo(line)


if __name__ == "__main__":
    main()
