"""Tests of recipe files: each wrong recipe is refused with its cause, and the JSON Schema agrees with the reader."""

import json
import tomllib

import jsonschema
import pytest

from toolchain.artifacts.steps import STEP_TYPES
from toolchain.errors import RecipeError
from toolchain.recipes import record
from toolchain.recipes.bounds import BOUNDS, setting_names
from toolchain.recipes.json_schema import recipe_schema

INT8 = '[[variants]]\nname = "onnx-int8"\n'
PRUNED = '[[variants]]\nname = "torch-pruned50"\nstep = "prune"\n[variants.settings]\n'


@pytest.fixture
def write(tmp_path):
    def write_recipe(text):
        path = tmp_path / "recipe.toml"
        path.write_text(f"schema = 1\n{text}" if "schema" not in text else text)
        return path

    return write_recipe


@pytest.mark.parametrize(
    ("text", "cause", "hint"),
    [
        ("schema = 2\nnew_key = 1\n", "has the schema 2, but this release reads schema 1", "or a newer one"),
        ("[schema", "is not TOML: Expected ']'", "Correct the file"),
        ("schema = " + "9" * 5000, "is not TOML: Exceeds the limit", "Correct the file"),
        ("schema = 1\nx = " + "[" * 5000, "is not TOML", "Correct the file"),
        ("schema = 1979-05-27\n" + INT8, "is not a valid recipe: Object of type date", "--schema"),
        ("# schema\n" + INT8, "is not a valid recipe: schema: ", "--schema"),
        ("", "is not a valid recipe: variants: ", "--schema"),
        ("variants = []", "the recipe has 0 variants", "--schema"),
        (INT8 * 2, "two variants have the same name", "--schema"),
        (f"varaints = 1\n{INT8}", "the recipe has the unknown key 'varaints'", "Did you mean variants?"),
        (f"{INT8}nmae = 1", "[[variants]] has the unknown key 'nmae'", "Did you mean name?"),
        (f"{INT8}[model]\nkid = 1", "[model] has the unknown key 'kid'", "Did you mean kind?"),
        (
            f'{INT8}[bench]\nvariants = ["onnx-int8"]\nkind = "hub"',
            "the kind hub needs the name of a dataset",
            "--schema",
        ),
        (f"{INT8}[ship]\nxyz = 1", "[ship] has the unknown key 'xyz'", "The keys are target, variants"),
        (f"{PRUNED}sentnces = 9", "unknown key 'sentnces'", "Did you mean sentences?"),
        (f'{PRUNED}train = "sst2"', "have the key train", "in the table [training]"),
        (
            f"{PRUNED}sentences = 0",
            "the setting sentences of torch-pruned50 is 0, which is not from 1 to 1e+09",
            "Corr",
        ),
        (f"{PRUNED}ratio = nan", "is not a valid recipe", "--schema"),
        (f"{PRUNED}ratio = 1.5", "is 1.5, which is not from 0.01 to 0.99", "Correct this setting"),
        (f'{PRUNED}method = "luck"', "is 'luck', which is none of fisher, magnitude, mask", "Correct this setting"),
        (f'{PRUNED}layers = "four"', "a setting of torch-pruned50 has a wrong value: layers", "Correct this setting"),
        (f"{PRUNED}embedding_rank = 0", "embedding_rank of torch-pruned50 is 0, which is not from 1", "Correct this"),
        (
            f'{PRUNED}method = "mask"\nlayers = 2',
            "--method mask removes nothing",
            "Leave --layers, --cost and --embedding-rank out",
        ),
        (f'{INT8}settings = {{ passes = ["fuse"] }}', "is 'fuse', which is none of padding", "Correct this setting"),
        (f'{INT8}settings = {{ backend = "tvm" }}', "is 'tvm', which is none of ort", "Correct this setting"),
        (f'{INT8}step = "distil"', "onnx-int8 has the unknown step 'distil'", "The steps are import, prune"),
        (f'{INT8}step = "prune"', "the step prune does not build onnx-int8", "Use the step quantize"),
        ('[[variants]]\nname = "onnx-int9"', "There is no variant 'onnx-int9'", "Did you mean onnx-int8"),
        (f'{INT8}parent = "onnx-fp32"', "the parent 'onnx-fp32' of onnx-int8 is not in the recipe", "Add [[variants]]"),
        (f'{INT8}parent = "onnx-int8"', "form a cycle: onnx-int8 → onnx-int8", "each variant is built from its parent"),
        (
            f'{INT8}parent = "onnx-fp32"\n[[variants]]\nname = "onnx-fp32"\nparent = "onnx-int8"',
            "form a cycle: onnx-int8 → onnx-fp32 → onnx-int8",
            "each variant is built from its parent",
        ),
        (f'{INT8}id = "12"', "variants.0.id: this is not a sha256 in hex", "--schema"),
        (f'{INT8}[bench]\nvariants = ["torch-fp32"]', "[bench] names 'torch-fp32', which is not a variant", "--schema"),
        (f'{INT8}[bench]\nvariants = ["onnx-int8"]\nthreads = 0', "threads is 0, which is not from 1 to", "--schema"),
        (f'{INT8}[bench]\nvariants = ["onnx-int8"]\nbatch_size = 0', "batch_size is 0, which is not", "--schema"),
        (f"{INT8}[bench]\nvariants = []", "there is no variant to measure", "--schema"),
        (f'{INT8}[ship]\ntarget = "moon"\nvariants = ["onnx-int8"]', "the target 'moon' is none of web", "--schema"),
        (f'{INT8}[ship]\ntarget = "web"\nvariants = []', "there is no variant to ship", "--schema"),
        (f'{INT8}[model]\nname = "../x"', "model.name: the name is empty, is longer than 200", "--schema"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_cause(write, text, cause, hint):
    with pytest.raises(RecipeError) as refusal:
        record.read(write(text))
    assert cause in refusal.value.cause
    assert hint in refusal.value.hint


def test_a_file_that_is_no_recipe_is_refused(tmp_path):
    (tmp_path / "large").write_text("#" * (record.MAX_BYTES + 1))
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    for name, cause in (
        ("large", "has more than 256 KiB"),
        ("missing", "There is no recipe"),
        ("binary", "is not TOML"),
        (".", "cannot be read"),
    ):
        with pytest.raises(RecipeError, match=cause):
            record.read(tmp_path / name)


def test_a_missing_setting_has_the_default_for_the_name(write):
    recipe = record.read(write(f'{PRUNED}sentences = 500\n[[variants]]\nname = "onnx-int8-static"'))
    pruning, quantization = (record.step_of(None, variant) for variant in recipe.variants)
    assert (pruning.ratio, pruning.sentences, pruning.method) == (0.5, 500, "fisher")
    assert (quantization.scheme, quantization.backend) == ("static", "ort")


@pytest.mark.parametrize("path", ["/etc", "../x", "a/../../x", "link/x"])
def test_a_path_cannot_lead_out_of_the_folder(tmp_path, path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(RecipeError, match=r"outside the recipe's folder. If you trust the recipe, .* with --output"):
        record.path_inside(folder, path, "the folder of the bundle", "--output")
    assert record.path_inside(folder, "a/b", "the folder of the bundle", "--output") == folder / "a/b"


def test_every_bound_belongs_to_a_setting():
    assert set(BOUNDS) == set(STEP_TYPES)
    for step, bounds in BOUNDS.items():
        assert set(bounds) <= set(setting_names(step))


def validates(content):
    return jsonschema.Draft202012Validator(recipe_schema()).is_valid(content)


@pytest.mark.parametrize(
    "text",
    [
        INT8,
        f'{PRUNED}sentences = 500\nlayers = 2\nratio = 0.5\n[model]\nkind = "folder"\nref = "m"',
        '[[variants]]\nname = "onnx-fp32"\nstep = "optimize"\nsettings = { passes = ["fuse"] }',
        f'{INT8}[bench]\nvariants = ["onnx-int8"]\nquick = true\n[ship]\ntarget = "python"\nvariants = ["onnx-int8"]',
    ],
)
def test_the_schema_accepts_what_the_reader_accepts(write, text):
    path = write(text)
    record.read(path)
    assert validates(tomllib.loads(path.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "variants = []",
        f"varaints = 1\n{INT8}",
        f"{PRUNED}sentnces = 9",
        f"{PRUNED}ratio = 1.5",
        f'{PRUNED}train = "sst2"',
        f'{PRUNED}method = "luck"',
        '[[variants]]\nname = "onnx-fp32"\nstep = "optimize"\nsettings = { passes = ["smooth"] }',
        f'{INT8}step = "distil"',
        f'{INT8}[bench]\nvariants = ["onnx-int8"]\nthreads = 0',
        f'{INT8}[ship]\ntarget = "moon"\nvariants = ["onnx-int8"]',
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(write, text):
    path = write(text)
    with pytest.raises(RecipeError):
        record.read(path)
    assert not validates(tomllib.loads(path.read_text()))


def test_build_prints_the_schema(say):
    code, out, err = say("build", "--schema")
    assert code == 0, err
    schema = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema == recipe_schema()
    assert "null" not in out
    # An editor shows the descriptions.
    assert schema["$defs"]["ModelRecord"]["properties"]["ref"]["description"].startswith("Path of the folder, relative")
