"""What each rewrite brings: the graph with all of them against the graph without one, or with another in its place.

    python benchmarks/passes.py [--shape reference|base] [--full] [--save-as NAME]

Every graph is made of the same `onnx-std`, by the passes of `toolchain` and by a few that stand here only, because they
are what the toolchain decided against: fusions of ONNX Runtime that it leaves out, biases outside the quantised
products, attention in its parts, ONNX Runtime's `quantize_dynamic`. `onnx-fp32` and `onnx-int8` are built as always,
validated; the others are as good as the answers they give, which are counted. All are measured interleaved in one run,
under ONNX Runtime's default session options and with symbolic shapes: at load it fuses on top what it can. Without
known shapes that is not SkipLayerNormalization, so `residual-sum`, which keeps it out where an app fixes the
dimensions, can bring nothing here; the row with the fused operator shows what it keeps out. A ratio is the time without
(or instead) over the time of the graph with, and its 95 % interval over rounds; above 1 the rewrite makes it faster.
The result file goes to benchmarks/studies/.
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
from toolchain.artifacts.store import Artifact
from toolchain.artifacts.variants import CPU_PASSES, Quantize
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
from toolchain.results.measurements import Measurement, ResultFile

FP32, INT8 = "onnx-fp32", "onnx-int8"
SKIP_LAYER_NORM = ("skip_layer_norm", "bias_skip_layer_norm")


def bias_apart(model: ir.Model, data: Any, name: str, array: np.ndarray, bias: ir.Value | None) -> list[ir.Node]:
    """The toolchain's product with an Add of the bias behind it; an `attention.Product`."""
    product = build_fused_product(model, data, name, array, None)
    if bias is None:
        return product
    add = ir.node("Add", [product[-1].outputs[0], bias], name=f"{name}/biased")
    add.outputs[0].name = f"{name}/biased"
    return [*product, add]


def _fusing(*names: str) -> Callable[..., tuple[ir.Model, int]]:
    return partial(fuse, disabled_fusions=tuple(name for name in CPU_DISABLED_FUSIONS if name not in names))


# Passes that stand in for one of the toolchain's.
OTHERS = {
    "fuse-skip-layer-norm": _fusing(*SKIP_LAYER_NORM),
    "fuse-bias-gelu": _fusing("bias_gelu"),
    "fuse-embed-layer-norm": _fusing("embed_layer_norm"),
    "fuse-not-attention": partial(fuse, disabled_fusions=(*CPU_DISABLED_FUSIONS, "attention")),
    "quantize-linear-bias-apart": partial(
        quantize_linear, product=bias_apart, attend=partial(build_qattention, codes=run_time_codes)
    ),
    "quantize-linear-merged": partial(quantize_linear, product=build_fused_product),
}


@dataclass(frozen=True)
class Contender:
    """A graph made by `passes` of onnx-std, and by ONNX Runtime's `quantize_dynamic` with these options where there are
    any; it is compared with the graph `against`. `change` says what it has that the other has not."""

    name: str
    change: str
    passes: tuple[str, ...]
    against: str
    dynamic: dict[str, Any] | None = None


def _instead(name: str, *others: str, of: Sequence[str] = CPU_PASSES) -> tuple[str, ...]:
    """The passes with others in the place of one, or none."""
    return tuple(new for each in of for new in (others if each == name else (each,)))


def contenders() -> list[Contender]:
    """Everything that is compared with `onnx-fp32` and `onnx-int8`, or with another of these."""
    fp32 = [(f"no-{name}", f"without {name}", _instead(name)) for name in CPU_PASSES]
    fp32 += [
        (
            "skip-layer-norm",
            "SkipLayerNormalization for Sub + LayerNormalization",
            _instead("fuse", "fuse-skip-layer-norm"),
        ),
        ("bias-gelu", "BiasGelu for Gelu", _instead("fuse", "fuse-bias-gelu")),
        ("embed-layer-norm", "EmbedLayerNormalization for its parts", _instead("fuse", "fuse-embed-layer-norm")),
        ("attention-in-parts", "attention in its parts, three projections", _instead("fuse", "fuse-not-attention")),
    ]
    found = [Contender(f"{FP32}+{name}", change, passes, FP32) for name, change, passes in fp32]
    quantized = (*linear_passes(Quantize(), standard=False), "quantize-embedding")
    found += [Contender(f"{INT8}+{name}", change, (*passes, *quantized), INT8) for name, change, passes in fp32]
    every = (*CPU_PASSES, *quantized)
    found += [Contender(f"{INT8}+no-{name}", f"without {name}", _instead(name, of=every), INT8) for name in quantized]
    others = (
        ("merged", "one product, Split and MultiHeadAttention for QAttention"),
        ("bias-apart", "bias behind the quantised product"),
    )
    for name, change in others:
        graph = _instead("quantize-linear", f"quantize-linear-{name}", of=every)
        found.append(Contender(f"{INT8}+{name}", change, graph, INT8))
    # As optimum-cli gives them for VNNI. DefaultTensorType: fused operators' results have no type in the file.
    types = {"weight_type": "QInt8", "DefaultTensorType": 1}
    found.append(Contender(f"{INT8}+quantize-dynamic", "quantize_dynamic for these passes", CPU_PASSES, INT8, types))
    parts = _instead("fuse", "fuse-not-attention")
    name = f"{INT8}+quantize-dynamic-in-parts"
    found.append(Contender(name, "the same, attention in its parts", parts, INT8, {**types, "MatMulConstBOnly": True}))
    found.append(
        Contender(
            f"{INT8}+products-of-activations",
            "that, and QKᵀ and PV in int8",
            parts,
            name,
            {**types, "MatMulConstBOnly": False},
        )
    )
    return found


def build(contender: Contender, std: Artifact, scratch: Path) -> Artifact:
    """The contender's graph, config and tokenizer beside it."""
    folder = scratch / contender.name
    folder.mkdir()
    store.copy_companions(std, folder)
    model, _ = rewrite(read(std.onnx_path), contender.passes, context_of(std.path))
    target = folder / std.onnx_path.name
    write(model, target)
    if contender.dynamic is not None:
        _quantize_dynamic(target, **contender.dynamic)
    return peers.as_artifact(std, contender.name, folder, "benchmarks/passes.py")


def _quantize_dynamic(path: Path, weight_type: str, **extra: Any) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, path, weight_type=QuantType[weight_type], per_channel=True, extra_options=extra)


def summary(result: ResultFile) -> list[str]:
    """A line for each contender."""
    rows = {row.variant: row for row in result.rows}
    size = result.run["batch_size"]
    width = max(len(each.change) for each in contenders())
    lines = [f"{'':10} {'':{width}} {'batch 1':22} {f'batches of {size}':22} answered otherwise"]
    for each in contenders():
        other, base = rows[each.name], rows[each.against]
        single, batched = (
            peers.ratio(mine, theirs) for mine, theirs in zip(peers.measured(base), peers.measured(other), strict=True)
        )
        graph, flips = each.name.split("+")[0], f"{_flips(base, other):3} of {len(base.predictions)}"
        lines.append(f"{graph:10} {each.change:{width}} {single:22} {batched:22} {flips}")
    return lines


def _flips(one: Measurement, other: Measurement) -> int:
    return sum(a != b for a, b in zip(one.predictions, other.predictions, strict=True))


@click.command()
@click.option("--shape", type=click.Choice(["reference", "base"]), default="reference", show_default=True)
@click.option("--full", is_flag=True, help="About 60 s a cell instead of 20.")
@click.option("--save-as", help="[default: passes-SHAPE]")
def main(shape: str, full: bool, save_as: str | None) -> None:
    """Builds, measures, prints, saves."""
    PASSES.update(OTHERS)
    with tempfile.TemporaryDirectory() as folder, bar("passes") as progress:
        scratch = Path(folder)
        workspace = peers.open_shape(shape, scratch / "exported", scratch)
        built = ensure(workspace, (FP32, INT8), {}, say)
        graphs = {name: built[name] for name in (FP32, INT8)}
        asked = contenders()
        for done, each in enumerate(asked):
            progress(done, len(asked), f"building {each.name}")
            graphs[each.name] = build(each, built["onnx-std"], scratch)
        cells = [Cell(workspace.model, name, "onnx", "cpu", artifact) for name, artifact in graphs.items()]
        result = peers.measure_all(cells, built["torch-fp32"], full, progress)
    result.write(peers.STUDIES / f"{save_as or f'passes-{shape}'}.json")
    for line in summary(result):
        click.echo(line)


if __name__ == "__main__":
    main()
