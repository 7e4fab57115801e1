"""The kinds of files that are attacked; `make fuzz` and `make test` run all of them."""

from hostile import results
from hostile.harness import Kind
from hostile.mutations import mutate_json, mutate_lines

KINDS = (
    Kind(
        "result files",
        "`toolchain compare`, with limits and with an older run",
        results.write_results,
        results.list_results,
        mutate_json,
        results.compare_results,
    ),
    Kind(
        "result files, as a page",
        "`toolchain compare --format html`",
        results.write_results,
        results.list_results,
        mutate_json,
        results.report_results,
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
)
