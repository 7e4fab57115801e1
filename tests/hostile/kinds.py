"""The kinds of files that are attacked; `make fuzz` and `make test` run all of them."""

from hostile import models, results
from hostile.harness import Kind
from hostile.mutations import mutate_bytes, mutate_json, mutate_lines

KINDS = (
    Kind(
        "result files",
        "`toolchain compare`, with limits and with an older run",
        results.write_results,
        results.list_results,
        mutate_json,
        results.compare_results,
        repair=results.repair_results,
    ),
    Kind(
        "result files, as a page",
        "`toolchain compare --format html`",
        results.write_results,
        results.list_results,
        mutate_json,
        results.report_results,
        repair=results.repair_results,
        cases=4,
    ),
    Kind(
        "journals",
        "`toolchain bench --resume`",
        results.write_journal,
        lambda folder: sorted((folder / "output").glob("*.journal")),
        mutate_lines,
        results.resume_journals,
    ),
    Kind(
        "manifests",
        "`toolchain variants` and `predict` on a folder of artifacts; the attacker computes the id again",
        models.write_artifact,
        lambda folder: [folder / models.ARTIFACT / "manifest.json"],
        mutate_json,
        models.read_artifact,
        repair=models.seal_manifest,
    ),
    Kind(
        "files of an artifact",
        "`toolchain predict`; the attacker computes the digests of the manifest again",
        models.write_artifact,
        models.list_artifact,
        models.mutate_model_file,
        models.read_artifact,
        repair=models.seal_files,
    ),
    Kind(
        "checkpoints",
        "the import of `toolchain export`",
        models.write_checkpoint,
        models.list_files,
        models.mutate_model_file,
        models.import_folder,
    ),
    Kind(
        "adapters",
        "the import of `toolchain export`",
        models.write_adapter,
        models.list_files,
        mutate_json,
        models.read_adapter,
    ),
    Kind(
        "data files",
        "`toolchain predict`, `bench` and `finetune`",
        models.write_data,
        models.list_files,
        models.mutate_data,
        models.read_data,
    ),
    Kind(
        "records of a model",
        "layer shapes, number formats and latency tables",
        models.write_records,
        models.list_files,
        mutate_json,
        models.read_records,
    ),
    Kind(
        "searches",
        "`toolchain tune`, when it continues",
        models.write_study,
        lambda folder: [folder / "output" / "search.journal"],
        mutate_lines,
        models.read_study,
    ),
    Kind(
        "ONNX graphs",
        "the passes of `toolchain export` and `quantize`",
        models.write_graph,
        models.list_files,
        mutate_bytes,
        models.read_graph,
    ),
    # Bundles: tests/hostile/bundles.py
)
