"""The table of attacks: for each kind of file, what reads it, and the number of cases in `make test`.

This module imports nothing, because docs/readme_parts.py also reads the table.
"""

ATTACKS = {
    "result files": ("`compare`: all formats, limits, an older run; the attacker corrects all figures", 200),
    "result files, as a page": ("`compare --format html`", 20),
    "result files, for a plan": ("`plan`: rows and queries; the attacker corrects all figures", 100),
    "journals": ("`bench --resume`", 200),
    "session files": ("`ship --session`", 200),
    "manifests": ("`variants` and `predict` on a folder of artifacts; the attacker corrects id and seal", 200),
    "files of an artifact": ("`predict`; the attacker corrects all digests of the manifest", 200),
    "checkpoints": ("the import of `export`: config, tokenizer, weights, training.json", 200),
    "adapters": ("the import of `export`: adapter_config.json", 200),
    "data files": ("`predict`, `bench`, `finetune`: CSV, TSV, JSON lines, gzip, Parquet, saved datasets", 200),
    "records of a model": ("layer shapes, number formats, latency tables, and the location of a checkpoint", 200),
    "searches": ("`tune`, when it continues", 200),
    "recipes": ("`build --dry-run`", 200),
    "ONNX graphs": ("the passes of `export` and `quantize`", 200),
    "bundles": ("`verify` and `predict`; the attacker corrects all digests", 200),
}
