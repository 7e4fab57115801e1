"""Tests of `recipe` and `build`: a recipe builds the same ids elsewhere, and says which step gave another one."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import jsonschema
import numpy as np
import pytest
from conftest import DEFAULT_VARIANTS, ROOT, make_checkpoint

import toolchain
from toolchain.artifacts.steps import Compile, Exits, Export, Import, Optimize, Prune, Quantize, Recover
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
from toolchain.data.inputs import TrainingSource
from toolchain.errors import ArtifactError, RecipeError, TamperedError, VerdictError
from toolchain.models.locations import LOCATION
from toolchain.recipes import record, writing
from toolchain.recipes.building import BuiltVariant, bench_request, repeats_on_any_processor, require_same_ids
from toolchain.recipes.json_schema import recipe_schema
from toolchain.recipes.planning import Overrides, Plan, make_plan
from toolchain.recipes.writing import recipe_of, to_toml
from toolchain.results.folder import ResultsFolder
from toolchain.system import hardware

STATIC = '[[variants]]\nname = "onnx-int8-static"\n'
INT8 = '[[variants]]\nname = "onnx-int8"\n'


def quiet(line):
    pass


@pytest.fixture
def recipe(tiny, tmp_path):
    """The recipe of onnx-int8, in a folder without the checkpoint."""
    path = tmp_path / "clone" / "recipe.toml"
    path.parent.mkdir()
    path.write_text(to_toml(recipe_of(tiny, "onnx-int8")))
    return path


@pytest.fixture
def rows(tmp_path):
    """A file of training data."""
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"a film of {i} words,{i % 2}\n" for i in range(40)))
    return path


def plan(path, exported, **overrides):
    return make_plan(path, Overrides(exported, **overrides))


def write(folder, text):
    path = folder / "hand.toml"
    path.write_text(f"schema = 1\n{text}")
    return path


def test_a_recipe_states_lineage_settings_and_ids(tiny, recipe, say):
    code, out, err = say("recipe", "onnx-int8", "--model", tiny.model, "--exported", tiny.exported)
    assert code == 0, err
    assert out == recipe.read_text()
    content = record.read(recipe)
    assert content == recipe_of(tiny, "onnx-int8")
    manifests = [tiny.load(name).manifest for name in DEFAULT_VARIANTS]
    assert [variant.id for variant in content.variants] == [manifest.id for manifest in manifests]
    assert [variant.parent for variant in content.variants] == [None, *DEFAULT_VARIANTS[:-1]]
    # The manifest of an export omits the exporter optimum, but a recipe states every exporter.
    assert content.variants[1].settings == {"opset": 18, "exporter": manifests[1].step.exporter}
    assert [record.step_of(recipe, variant) for variant in content.variants[1:]] == [m.step for m in manifests[1:]]
    assert content.model.revision == manifests[0].step.revision
    assert str(tiny.exported.parent) not in out  # no path of this machine
    assert content.releases == manifests[-1].environment["versions"]


def test_texts_of_a_recipe_survive_the_file(recipe):
    content = record.read(recipe)
    model = dataclasses.replace(content.model, ref='a "b" \\ c = é', revision="'''")
    releases = {"a.b c": "1", "x": ""}
    changed = dataclasses.replace(content, model=model, releases=releases)
    bench = record.BenchRecord(("onnx-int8",), ("cpu",), quick=True, threads=2)
    ship = record.ShipRecord("python", ("onnx-int8",), with_tokenizer=True)
    changed = dataclasses.replace(changed, bench=bench, ship=ship)
    recipe.write_text(to_toml(changed))
    assert record.read(recipe) == changed
    assert jsonschema.Draft202012Validator(recipe_schema()).is_valid(_toml(recipe))


def _toml(path):
    return tomllib.loads(path.read_text())


@pytest.mark.slow
def test_another_folder_gives_the_same_ids(tiny, recipe, tiny_checkpoint, tmp_path, say):
    shutil.copytree(tiny_checkpoint, recipe.parent / "tiny")
    code, out, err = say("build", recipe, "--exported", tmp_path / "other", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["same"]
    assert [(row["variant"], row["built"], row["same"]) for row in report["variants"]] == [
        (name, True, True) for name in DEFAULT_VARIANTS
    ]
    for name in DEFAULT_VARIANTS:
        assert (tmp_path / "other" / "tiny" / name / "model.onnx").exists() == (name != "torch-fp32")
    text = (ROOT / "docs" / "reference" / "json.md").read_text()
    assert not {key for key in [*report, *report["variants"][0]] if f"`{key}`" not in text}


def test_fresh_variants_are_not_built_again(tiny, recipe, say):
    code, out, err = say("build", recipe, "--exported", tiny.exported)
    assert code == 0, err
    assert re.findall(r"^(\S+): fresh, id [0-9a-f]{64}, same id$", out, re.MULTILINE) == DEFAULT_VARIANTS


def test_another_id_is_a_negative_verdict(tiny, recipe, say):
    content = record.read(recipe)
    int8 = dataclasses.replace(content.variants[-1], id="0" * 64)
    ship = record.ShipRecord("python", ("onnx-int8",), output="bundle")
    recipe.write_text(to_toml(dataclasses.replace(content, variants=(*content.variants[:-1], int8), ship=ship)))
    code, out, err = say("build", recipe, "--exported", tiny.exported)
    assert code == 3
    assert f"onnx-int8: fresh, id {content.variants[-1].id}, NOT the recipe's id {'0' * 64}" in out
    assert "1 of 4 ids differ from the recipe, first that of onnx-int8." in err
    assert "may have been edited, or it comes from another kind of processor" in err
    assert not (recipe.parent / "bundle").exists()
    code, out, _ = say("build", recipe, "--exported", tiny.exported, "--json")
    assert code == 3
    assert json.loads(out)["bundle"] is None


@pytest.mark.parametrize(
    ("row", "changes", "model", "hint"),
    [
        ({"same_version": False}, {"toolchain": "9.9"}, "m", "use the release 9.9 of the recipe"),
        ({}, {}, "other", "build with --as m"),
        ({}, {"releases": {"torch": "0.1"}}, "m", "built with other releases: install torch 0.1"),
        ({}, {"toolchain": "9.9"}, "m", "built with other releases: install toolchain 9.9"),
        (
            {},
            {"releases": {"no-library-of-the-toolchain": "1"}},
            "m",
            "may have been edited, or it comes from another kind of processor",
        ),
        ({"any_processor": False}, {}, "m", "The step prune gives the same files only on the same machine"),
        ({"any_processor": False}, {"toolchain": "9.9"}, "m", "install toolchain 9.9. The step prune gives"),
    ],
)
def test_a_verdict_names_the_likely_reason(tmp_path, row, changes, model, hint):
    fields = {"id": "1" * 64, "recipe_id": "2" * 64, "built": True, "same_version": True, "any_processor": True}
    built = BuiltVariant("torch-pruned50", "prune", **{**fields, **row})
    content = record.Recipe(1, (record.VariantRecord("torch-pruned50"),), record.ModelRecord(name="m"))
    content = dataclasses.replace(content, **{"releases": hardware.versions(), **changes})
    workspace = Workspace(tmp_path, model, None)
    with pytest.raises(VerdictError, match=hint):
        require_same_ids(Plan(content, tmp_path, workspace, {}, [], None), [built])
    require_same_ids(Plan(content, tmp_path, workspace, {}, [], None), [dataclasses.replace(built, recipe_id=built.id)])


def test_a_checkpoint_that_moved_needs_the_option_model(recipe, tiny, tiny_checkpoint, tmp_path):
    exported = tmp_path / "other"
    with pytest.raises(RecipeError, match=r"The folder tiny .* is not beside the recipe. .* --model FOLDER"):
        plan(recipe, exported)
    moved = shutil.copytree(tiny_checkpoint, tmp_path / "moved")
    items = plan(recipe, exported, model=str(moved)).items
    assert [(item.variant.name, item.reason) for item in items] == [(name, "missing") for name in DEFAULT_VARIANTS]
    # The name of the model's folder is that of the recipe, because ONNX files contain it.
    assert plan(recipe, exported, model=str(moved)).workspace.path("onnx-int8") == exported / "tiny" / "onnx-int8"
    assert not exported.exists()
    # Artifacts that are fresh need no checkpoint.
    (tiny.exported / tiny.model / LOCATION).unlink()
    assert not any(item.reason for item in plan(recipe, tiny.exported).items)


def test_another_checkpoint_is_refused(recipe, tmp_path):
    make_checkpoint(recipe.parent / "tiny", seed=2)
    with pytest.raises(RecipeError, match=r"The checkpoint is not that of the recipe: it is sha256:.* needs sha256:"):
        plan(recipe, tmp_path / "other")


@pytest.mark.parametrize(
    ("table", "cause"),
    [
        ('[model]\nkind = "folder"\nref = "../tiny"', "the checkpoint '../tiny', which is outside"),
        ('[model]\nkind = "folder"\nref = "/etc"', "the checkpoint '/etc', which is outside"),
        ('[model]\nkind = "hub"\nref = "../tiny"', "model '../tiny' is not a hub id"),
        ('[model]\nkind = "hub"\nref = "user/name"', "is a hub model, but here it is a folder one"),
        ('[model]\nbase = "./base"', "The folder ./base of the adapter's base is not beside the recipe"),
        ('[model]\nbase = "../base"', "base '../base' is not a hub id"),
        ('[model]\nbase = "./../base"', "the base './../base', which is outside"),
        ('[training]\nkind = "file"\nref = "../rows.csv"', "the training data '../rows.csv', which is outside"),
        ('[training]\nkind = "file"\nref = "x.csv"', "The training data x.csv is not beside the recipe"),
        ('[training]\nkind = "hub"\nref = "/etc/rows.csv"', "training data '/etc/rows.csv' is not a hub dataset"),
        ('[training]\nkind = "hub"\nref = "user/name"', "training data 'user/name' is not a hub dataset"),
        ('[ship]\ntarget = "python"\nvariants = ["onnx-int8-static"]\noutput = "../b"', "bundle '../b', which is out"),
    ],
)
def test_a_recipe_cannot_name_other_places(tmp_path, monkeypatch, table, cause):
    (tmp_path / "user" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "clone"
    folder.mkdir()
    with pytest.raises(RecipeError, match=re.escape(cause)):
        plan(write(folder, STATIC + table), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_data_of_a_benchmark_is_inside_the_folder(tmp_path, say):
    for data, cause in (("../x.csv", "outside the recipe's folder"), ("x.csv", "is not beside the recipe")):
        path = write(tmp_path, f'{INT8}[bench]\nvariants = ["onnx-int8"]\ndata = "{data}"')
        code, _, err = say("build", path, "--exported", tmp_path / "other")
        assert code == 1
        assert cause in err
        assert not (tmp_path / "other").exists()


def test_a_benchmark_measures_a_split_and_a_hub_dataset(tmp_path, rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = '[bench]\nvariants = ["onnx-int8"]\n'
    for keys, data, split in (
        ('data = "rows.csv"\nsplit = "held-out"', str(rows), "held-out"),
        ('kind = "hub"\ndata = "user/rows"', "user/rows", None),
    ):
        path = write(tmp_path, f"{INT8}{table}{keys}")
        request = bench_request(plan(path, tmp_path / "other"), ResultsFolder(tmp_path / "results"))
        assert (request.data, request.split) == (data, split)
    (tmp_path / "user" / "rows").mkdir(parents=True)
    for name in ("user/rows", "../rows.csv"):
        path = write(tmp_path, f'{INT8}{table}kind = "hub"\ndata = "{name}"')
        with pytest.raises(RecipeError, match=f"The benchmark's data '{re.escape(name)}' is not a hub dataset"):
            bench_request(plan(path, tmp_path / "other"), ResultsFolder(tmp_path / "results"))


def test_a_long_list_has_a_line_for_each_entry(recipe):
    names = ("onnx-int8", *(f"onnx-int8+{'x' * number}" for number in range(40, 60)))
    variants = tuple(record.VariantRecord(name) for name in names)
    content = record.Recipe(1, variants, bench=record.BenchRecord(names))
    recipe.write_text(to_toml(content, {"recipe": ["one", "", "two"], names[1]: ["a reason"]}))
    assert record.read(recipe) == content
    text = recipe.read_text()
    assert text.startswith("# one\n#\n# two\nschema = 1\n")
    assert f'\n\n# a reason\n[[variants]]\nname = "{names[1]}"\n' in text
    assert max(map(len, text.splitlines())) < 100


def test_a_bundle_is_checked_before_the_build(tmp_path, say):
    (tmp_path / "taken").mkdir()
    for variant, output, cause in (
        ("torch-fp32", "new", "torch-fp32 is a PyTorch variant and has no .onnx file"),
        ("onnx-int8", "taken", "taken exists and is not a bundle"),
    ):
        bundle = f'[ship]\ntarget = "python"\nvariants = ["{variant}"]\noutput = "{output}"'
        path = write(tmp_path, f'[[variants]]\nname = "{variant}"\n{bundle}')
        code, _, err = say("build", path, "--exported", tmp_path / "other")
        assert code == 1
        assert cause in err
        assert not (tmp_path / "other").exists()


def test_training_data_must_have_the_digest(tmp_path, rows):
    digest = TrainingSource(str(rows)).digest
    folder = tmp_path / "clone"
    folder.mkdir()
    path = write(folder, f'{STATIC}[training]\nkind = "file"\nref = "rows.csv"\ndigest = "{digest}"')
    with pytest.raises(RecipeError, match=r"needs the training data rows.csv with the digest .* --train-data FILE"):
        plan(path, tmp_path / "other")
    with pytest.raises(RecipeError, match=r"but the data of this command has sst2:"):
        plan(path, tmp_path / "other", train=TrainingSource())
    given = plan(path, tmp_path / "other", train=TrainingSource(str(rows)))
    shutil.copy(rows, folder)
    beside = plan(path, tmp_path / "other")
    for each in (given, beside):
        assert each.steps["onnx-int8-static"].train == digest
    rows.write_text(rows.read_text() + "one more row,1\n")
    with pytest.raises(RecipeError, match=r"but the data of this command has rows\.csv:"):
        plan(path, tmp_path / "other", train=TrainingSource(str(rows)))


def test_a_recipe_names_the_training_data(rows):
    for columns, split in ((None, None), ("text", None)):
        source = TrainingSource(str(rows), dataclasses.replace(TrainingSource().columns, text=columns), split)
        training = writing._training_record({"torch-pruned50": Prune(0.5, train=source.digest)})
        assert (training.kind, training.ref, training.digest) == ("file", "rows.csv", source.digest)
        assert (training.text_column, training.label_column) == (columns, "label")
    embedded = TrainingSource().digest
    assert writing._training_record({"onnx-int8": Quantize(scheme="static", train=embedded)}).kind == "embedded"
    hub = writing._training_record({"torch-pruned50": Prune(0.5, train=f"glue/sst2:{'0' * 64}::label")})
    assert (hub.kind, hub.ref) == ("hub", "glue/sst2")
    with pytest.raises(RecipeError, match="torch-pruned50 and onnx-exits used different training data"):
        writing._training_record({"torch-pruned50": Prune(0.5, train="a:1"), "onnx-exits": Exits(train="b:1")})


def test_a_corpus_must_be_given_again(tmp_path):
    corpus = f"words.txt:{'0' * 64}"
    text = f'[[variants]]\nname = "onnx-int8+trimmed"\nsettings = {{ trim_vocab = "{corpus}" }}'
    with pytest.raises(RecipeError, match=r"needs the corpus words.txt with the digest .* --trim-vocab CORPUS"):
        plan(write(tmp_path, text), tmp_path / "other")


def test_labelled_variants_keep_their_settings_and_parents(tiny, tmp_path):
    names = ("onnx-fp32+plain", "onnx-int8+plain-tables")
    steps = {names[0]: Optimize(passes=("fuse",)), names[1]: Quantize(passes=("quantize-embedding",))}
    ensure(tiny, names, steps, quiet)
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe_of(tiny, names[1])))
    planned = plan(path, tmp_path / "other", model=tiny.source.ref)
    assert [item.variant.name for item in planned.items] == ["torch-fp32", "onnx-std", *names]
    assert [planned.steps[name] for name in names] == list(steps.values())
    assert not any(item.reason for item in plan(path, tiny.exported).items)
    path.write_text(path.read_text().replace(f'parent = "{names[0]}"', 'parent = "onnx-std"'))
    with pytest.raises(RecipeError, match=r"the parent of onnx-int8\+plain-tables is onnx-fp32\+plain, not onnx-std"):
        plan(path, tiny.exported)


def test_settings_must_fit_the_name(tmp_path):
    text = '[[variants]]\nname = "torch-pruned50"\nsettings = { ratio = 0.3 }'
    with pytest.raises(RecipeError, match="the settings of torch-pruned50 do not fit its name"):
        plan(write(tmp_path, text), tmp_path / "other")


def test_unlisted_ancestors_have_default_settings(tiny):
    ensure(tiny, ["onnx-std"], {"onnx-std": Export(18)}, quiet)
    path = write(tiny.exported.parent, f'{INT8}[model]\nkind = "folder"\nref = "{tiny.model}"\nname = "{tiny.model}"')
    assert [(item.variant.name, item.reason) for item in plan(path, tiny.exported).items] == [
        (name, "") for name in DEFAULT_VARIANTS
    ]


def test_an_exporter_that_is_not_installed_is_refused_before_the_build(tmp_path, monkeypatch, say):
    monkeypatch.setattr("toolchain.exporters.EXPORTERS", {"optimum": ("no-such-package",), "torch": (), "dynamo": ()})
    text = '[[variants]]\nname = "onnx-std"\nsettings = { exporter = "optimum" }'
    code, _, err = say("build", write(tmp_path, text), "--exported", tmp_path / "other")
    assert code == 2
    assert "--exporter optimum is unavailable" in err
    assert not (tmp_path / "other").exists()


def test_a_lineage_that_is_not_complete_has_no_recipe(tiny):
    with pytest.raises(ArtifactError, match=r"onnx-int8-static is not built. Build onnx-int8-static first"):
        recipe_of(tiny, "onnx-int8-static")
    graph = tiny.path("onnx-int8") / "model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + b"x")
    with pytest.raises(TamperedError, match="does not have the sha256"):
        recipe_of(tiny, "onnx-int8")
    graph.write_bytes(content)
    ensure(tiny, ["onnx-fp32"], {"onnx-fp32": Optimize(passes=("fuse",))}, quiet)
    with pytest.raises(ArtifactError, match="onnx-int8 is stale: its parent changed"):
        recipe_of(tiny, "onnx-int8")


def test_options_of_build_exclude_each_other(recipe, say):
    for options in (["--text-column", "x"], ["--split", "x"], ["--json", "--dry-run"]):
        code, _, _ = say("build", recipe, *options)
        assert code == 2


def test_the_recipe_of_the_guide_has_a_plan(tmp_path, say):
    """Prints the plan of the recipe that docs/how-to/recipes.md shows."""
    page = (ROOT / "docs" / "how-to" / "recipes.md").read_text()
    path = tmp_path / "recipe.toml"
    path.write_text(re.search(r"```toml\n(schema = 1\n.*?)```", page, re.DOTALL)[1])
    assert jsonschema.Draft202012Validator(recipe_schema()).is_valid(_toml(path))
    code, out, err = say("build", path, "--dry-run", "--exported", tmp_path / "other")
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        *("torch-fp32", "onnx-std", "onnx-fp32", "onnx-int8", "onnx-int8+tables", "bench", "ship")
    ]
    assert lines[-3].startswith("onnx-int8+tables: build (missing); backend=ort, scheme=dynamic, passes=['quantize-emb")
    assert lines[-2] == "bench: onnx-int8@cpu, onnx-int8+tables@cpu"
    assert lines[-1] == f"ship: onnx-int8 for python to {tmp_path / 'app-model'}"
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_bench_and_ship_follow_the_build(tiny, tmp_path, short_bench, say):
    model = f'[model]\nkind = "folder"\nref = "{tiny.model}"\nname = "{tiny.model}"\n'
    bench = '[bench]\nvariants = ["onnx-int8"]\nquick = true\n'
    bundle = '[ship]\ntarget = "python"\nvariants = ["onnx-int8"]\noutput = "app"\nlicense = "MIT"\n'
    path = write(tmp_path, INT8 + model + bench + bundle)
    code, out, err = say("build", path, "--exported", tiny.exported, "--results", tmp_path / "results")
    assert code == 0, err
    ids, table = out.split("no id in the recipe\n")
    assert ids.startswith("onnx-int8: fresh, id ")
    assert "onnx-int8@cpu" in table
    assert len(list((tmp_path / "results" / "local").glob("*.json"))) == 1
    assert say("verify", tmp_path / "app")[0] == 0
    given = tmp_path / "given"
    path = write(tmp_path, INT8 + model + bundle)
    code, out, err = say("build", path, "--exported", tiny.exported, "--output", given, "--json")
    assert code == 0, err
    written = json.loads((given / "bundle.json").read_text())
    assert json.loads(out)["bundle"] == {"folder": str(given), "id": written["id"]}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (Import("sha256:0"), True),
        (Import("sha256:0", "sha256:1"), False),
        (Export(), True),
        (Optimize(), True),
        (Compile(), True),
        (Quantize(), True),
        (Quantize(reduce_range=True), True),
        (Quantize(trim_vocab="train"), True),
        (Quantize("torch", "bf16"), True),
        (Quantize("torch", "int8"), False),
        (Quantize("bnb", "nf4"), False),
        (Quantize(scheme="static"), False),
        (Quantize(scheme="int4"), False),
        (Quantize(embeddings="int4"), False),
        (Quantize(keep_fp32=2), False),
        (Prune(0.5), False),
        (Recover(1), False),
        (Exits(), False),
    ],
)
def test_which_steps_repeat_on_any_processor(step, expected):
    assert repeats_on_any_processor(step) == expected


# Builds the variants of which the documentation promises the same files on every x86-64 processor.
_BUILD = """
import sys
from pathlib import Path
from toolchain.build.pipeline import ensure
from toolchain.build.workspace import Workspace
workspace = Workspace.open(sys.argv[1], Path(sys.argv[2]), "tiny")
for name, artifact in ensure(workspace, sys.argv[3:], {}, lambda line: None).items():
    print(name, artifact.manifest.id)
"""


@pytest.mark.slow
def test_other_instructions_give_the_same_ids(built_tiny, tmp_path):
    """Compares ids with those of a process whose PyTorch and numpy use only the oldest vector instructions."""
    features = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": " ".join(features)}
    names = ["onnx-int8", "onnx-int8-portable", "torch-bf16", "onnx-fp16"]
    command = [sys.executable, "-c", _BUILD, built_tiny.source.ref, tmp_path / "other", *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    other_ids = dict(line.split() for line in run.stdout.splitlines())
    artifacts = ensure(built_tiny, names, {}, quiet)
    assert other_ids == {name: artifact.manifest.id for name, artifact in artifacts.items()}
    assert all(repeats_on_any_processor(artifact.manifest.step) for artifact in artifacts.values())


def test_the_recipe_of_the_reference_builds_the_same_ids(reference, tmp_path, say):
    code, out, err = say("recipe", "onnx-int8", "--exported", reference.exported)
    assert code == 0, err
    path = tmp_path / "recipe.toml"
    path.write_text(out)
    assert record.read(path).toolchain == toolchain.__version__
    code, out, err = say("build", path, "--exported", tmp_path / "exported")
    assert code == 0, err
    expected = {name: reference.load(name).manifest.id for name in DEFAULT_VARIANTS}
    assert dict(re.findall(r"^(\S+): built, id ([0-9a-f]{64}), same id$", out, re.MULTILINE)) == expected
