"""The kinds of files that are attacked; `make fuzz` and `make test` run all of them."""

from hostile import bundles, models, results
from hostile.harness import Kind
from hostile.mutations import mutate_bytes, mutate_json, mutate_lines

KINDS = (
    Kind(
        "result files",
        results.write_results,
        results.list_results,
        mutate_json,
        results.compare_results,
        alone=True,
        repair=results.repair_results,
    ),
    Kind(
        "result files, as a page",
        results.write_results,
        results.list_results,
        mutate_json,
        results.report_results,
        alone=True,
        repair=results.repair_results,
    ),
    Kind(
        "journals",
        results.write_journal,
        lambda folder: sorted((folder / "output").glob("*.journal")),
        mutate_lines,
        results.resume_journals,
        alone=True,
    ),
    Kind(
        "session files",
        results.write_session,
        lambda folder: [folder / "session.json"],
        mutate_json,
        results.read_session,
    ),
    Kind(
        "manifests",
        models.write_artifact,
        lambda folder: [folder / models.ARTIFACT / "manifest.json"],
        mutate_json,
        models.read_artifact,
        repair=models.seal_manifest,
    ),
    Kind(
        "files of an artifact",
        models.write_artifact,
        models.list_artifact,
        models.mutate_model_file,
        models.read_artifact,
        repair=models.seal_files,
    ),
    Kind(
        "checkpoints",
        models.write_checkpoint,
        models.list_files,
        models.mutate_model_file,
        models.import_folder,
    ),
    Kind(
        "adapters",
        models.write_adapter,
        models.list_files,
        mutate_json,
        models.read_adapter,
    ),
    Kind(
        "data files",
        models.write_data,
        models.list_data,
        models.mutate_data,
        models.read_data,
        alone=True,
    ),
    Kind(
        "records of a model",
        models.write_records,
        models.list_files,
        mutate_json,
        models.read_records,
    ),
    Kind(
        "searches",
        models.write_study,
        lambda folder: [folder / "output" / "search.journal"],
        mutate_lines,
        models.read_study,
    ),
    Kind(
        "ONNX graphs",
        models.write_graph,
        models.list_files,
        mutate_bytes,
        models.read_graph,
    ),
    Kind(
        "bundles",
        bundles.prepare_attack,
        bundles.list_attacked,
        mutate_json,
        bundles.use_bundle,
        repair=lambda folder: bundles.reseal(folder / "bundle"),
    ),
)
