"""Tests of `init`: for all answers, it writes a recipe that `build` accepts; a wrong answer leaves no file."""

import dataclasses
import os
import pty
import re
import select
import shlex
import shutil
import sys
import time
import tomllib

import jsonschema
import pytest
from conftest import make_checkpoint

from toolchain.artifacts import variants
from toolchain.errors import RecipeError, SettingsError
from toolchain.models import hub
from toolchain.models.architectures import UNPRUNABLE
from toolchain.recipes import answers, record, starter
from toolchain.recipes.json_schema import recipe_schema
from toolchain.recipes.record import ModelRecord, TrainingRecord
from toolchain.recipes.starter import COMPARE, PLACES, Answers, draft, find_target, parse_drop
from toolchain.recipes.writing import to_toml
from toolchain.ship.targets import TARGETS

DROPS = (0.0, 0.5, 1.0, 2.5)
ROWS = 300


@pytest.fixture(scope="module")
def leaning_checkpoint(tmp_path_factory):
    """A checkpoint that nearly always answers POSITIVE, so that its exits are confident."""
    return make_checkpoint(tmp_path_factory.mktemp("leaning") / "checkpoint", leaning=30)


@pytest.fixture
def folder(tmp_path, leaning_checkpoint, monkeypatch):
    """A working folder with a checkpoint and a file of labelled rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("toolchain.exits.choice.EXIT_WEIGHTS", 0)  # exits of the tiny model would save no work
    shutil.copytree(leaning_checkpoint, tmp_path / "my-checkpoint")
    lines = [
        f"the film number {i} goes on and on for {i % 7} hours and some more,{int(i % 10 > 0)}" for i in range(ROWS)
    ]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,stars", *lines]) + "\n")
    return tmp_path


OWN = ("--model", "my-checkpoint", "--data", "reviews.csv", "--text-column", "review", "--label-column", "stars")
REFERENCE = ("--model", "reference", "--data", "sst2")
REST = ("--target", "python", "--max-drop", "1")


def answers_for(target, max_drop, **changes):
    known = Answers(ModelRecord(), TrainingRecord(), target, max_drop, bench_rows=872, layers=6)
    return dataclasses.replace(known, **changes)


@pytest.mark.parametrize("model", [REFERENCE, OWN], ids=["reference", "own"])
@pytest.mark.parametrize("target", PLACES)
def test_build_accepts_the_recipe_for_all_answers(folder, say, model, target):
    for number, drop in enumerate(DROPS):
        name = f"{number}.toml"
        code, out, err = say("init", *model, "--target", target, "--max-drop", drop, "--output", name)
        assert (code, out) == (0, f"{name}\n"), err
        assert jsonschema.Draft202012Validator(recipe_schema()).is_valid(tomllib.loads((folder / name).read_text()))
        code, out, err = say("build", name, "--dry-run", "--exported", "other")
        assert code == 0, err
        recipe = record.read(folder / name)
        assert ("ship: " in out) == (target != COMPARE) == (recipe.ship is not None)
        assert recipe.bench.variants[0] == "torch-fp32"
        if recipe.ship:
            assert recipe.ship.target == target
            assert set(recipe.ship.variants) <= set(recipe.bench.variants)
    assert not (folder / "other").exists()


@pytest.mark.parametrize(
    ("target", "max_drop", "changes", "expected"),
    [
        ("web", 0, {}, "onnx-fp32"),
        ("other", 0, {}, "onnx-std"),
        ("python", 0.5, {}, "onnx-int8-static"),
        ("other", 0.5, {}, "onnx-std-int8-static"),
        ("mobile", 1, {}, "onnx-pruned50-r1-exits-int8-static"),
        ("other", 1, {}, "onnx-std-pruned50-r1-exits-int8-static"),
        ("server", 3, {}, "onnx-pruned73-r4-exits-int8-static"),
        ("server", 3, {"can_exit": False}, "onnx-pruned73-r4-int8-static"),
        ("server", 3, {"can_prune": False}, "onnx-exits-int8-static"),
        ("server", 3, {"can_prune": False, "can_exit": False}, "onnx-int8-static"),
    ],
)
def test_the_bundle_fits_target_and_drop(target, max_drop, changes, expected):
    assert draft(answers_for(target, max_drop, **changes)).recipe.ship.variants == (expected,)


@pytest.mark.parametrize("target", PLACES)
@pytest.mark.parametrize("max_drop", DROPS)
def test_every_variant_fits_the_model_and_has_its_reason(target, max_drop):
    for can_prune in (True, False):
        for can_exit in (True, False):
            result = draft(answers_for(target, max_drop, can_prune=can_prune, can_exit=can_exit))
            for variant in result.recipe.variants:
                parts = variants.get(variant.name).name.parts
                assert result.comments[variant.name]
                assert not parts.pruned or (can_prune and max_drop > 0)
                assert not (parts.exits or "exits" in variant.settings) or can_exit
                assert not (target == "other" and parts.runtime == "onnx") or parts.std
                if parts.exits:
                    assert variant.settings["max_drop"] == pytest.approx(max_drop / 2)


def test_the_same_answers_give_the_same_text():
    texts = {to_toml(result.recipe, result.comments) for result in (draft(answers_for("web", 2.0)) for _ in range(3))}
    assert len(texts) == 1
    (text,) = texts
    assert max(map(len, text.splitlines())) <= starter.WIDTH + 2
    assert tomllib.loads(text)["bench"] == {
        "variants": list(draft(answers_for("web", 2.0)).recipe.bench.variants),
        "providers": ["cpu"],
        "quick": True,
    }


def test_a_deep_model_loses_layers_and_a_small_one_does_not():
    for layers, settings in ((12, {"layers": 8}), (6, {"layers": 4}), (1, {}), (0, {})):
        recipe = draft(answers_for("python", 2.0, layers=layers)).recipe
        assert {each.name: each.settings for each in recipe.variants}["torch-pruned73"] == settings


def test_the_targets_are_those_of_ship():
    assert list(PLACES) != sorted(PLACES)
    assert set(PLACES) == {*TARGETS, COMPARE}
    for text, target in ((" WEB", "web"), ("compare", COMPARE)):
        assert find_target(text) == target


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("wbe", "Did you mean web?"),
        ("browser", "Did you mean web?"),
        ("phone", "Did you mean mobile?"),
        ("triton", "Did you mean server?"),
        ("xbox", "The targets are web, python, "),
        ("", "The targets are web, python, "),
    ],
)
def test_an_unknown_target_has_a_suggestion(text, hint):
    with pytest.raises(SettingsError, match=hint.replace("?", r"\?")):
        find_target(text)


def test_a_drop_is_a_number_of_points():
    assert [parse_drop(text) for text in ("0", "0.5", " 50 ")] == [0, 0.5, 50]
    assert str(parse_drop("-0")) == "0.0"
    for text in ("-1", "51", "nan", "inf", "1%", "", "one", "1" * 5000):
        with pytest.raises(SettingsError, match=r"is not a number of points from 0 to 50. Pass a number such as 0"):
            parse_drop(text)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((*OWN, *REST, "--model", "no-such-folder/x/y"), 1, "There is no folder no-such-folder/x/y."),
        ((*OWN, *REST, "--model", "reviews.csv"), 1, "reviews.csv is a file. Pass the folder that holds config.json"),
        ((*OWN, *REST, "--model", "empty"), 1, "empty has no config.json."),
        ((*OWN, *REST, "--data", "none.csv"), 1, "There is no file none.csv."),
        (
            ("--model", "my-checkpoint", "--data", "reviews.csv", *REST),
            1,
            "Name the column of texts with --text-column",
        ),
        ((*OWN, *REST, "--label-column", "label"), 1, "has no column 'label'. Its columns: 'review', 'stars'."),
        ((*OWN, *REST, "--label-column", "review"), 1, "is not one of the model's labels (0 NEGATIVE, 1 POSITIVE)"),
        ((*OWN, *REST, "--data", "few.csv"), 1, "few.csv has 3 rows, which are too few"),
        ((*OWN, *REST, "--data", "../outside.csv"), 1, "../outside.csv is outside of the recipe's folder"),
        ((*OWN, *REST, "--target", "wbe"), 2, "There is no target 'wbe'. Did you mean web?"),
        ((*OWN, *REST, "--max-drop", "-1"), 2, "The accuracy drop '-1' is not a number of points from 0 to 50."),
        ((*OWN, *REST, "--max-drop", "90"), 2, "The accuracy drop '90' is not a number of points from 0 to 50."),
        ((*OWN, *REST, "--output", "reviews.csv"), 1, "reviews.csv exists. Name another file with --output"),
        ((*OWN, *REST, "--output", "reviews.csv/x.toml"), 1, "reviews.csv is not a folder."),
        ((*OWN, *REST, "--output", "link.toml"), 1, "link.toml exists."),
    ],
)
def test_a_wrong_answer_gives_one_sentence_and_no_file(folder, say, options, code, message):
    (folder / "empty").mkdir()
    (folder / "few.csv").write_text("review,stars\na,1\nb,0\nc,1\n")
    (folder.parent / "outside.csv").write_text((folder / "reviews.csv").read_text())
    (folder / "link.toml").symlink_to(folder / "nowhere")
    before = sorted(os.listdir(folder))
    got, out, err = say("init", *options)
    assert (got, out) == (code, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert sorted(os.listdir(folder)) == before


def test_a_folder_without_the_permission_to_write_is_refused(folder, monkeypatch):
    monkeypatch.setattr(answers.os, "access", lambda path, mode: False)
    with pytest.raises(RecipeError, match=r"cannot be written. Name a file in another folder with --output"):
        answers.check_output(folder / "new" / "recipe.toml")
    assert not (folder / "new").exists()


def test_a_recipe_that_another_program_writes_meanwhile_is_not_replaced(folder, say, monkeypatch):
    monkeypatch.setattr("toolchain.recipes.starter.draft", lambda known: _write_and_draft(folder, known))
    code, out, err = say("init", *OWN, *REST)
    assert (code, out) == (1, "")
    assert "recipe.toml exists." in err
    assert (folder / "recipe.toml").read_text() == "another program's"


def _write_and_draft(folder, known):
    (folder / "recipe.toml").write_text("another program's")
    return draft(known)


def test_without_a_terminal_the_command_names_the_missing_options(folder, say, monkeypatch):
    code, _, err = say("init", "--target", "web")
    assert code == 2
    assert "Missing options '--model', '--data', '--max-drop'. The command asks for them only in a terminal." in err
    code, _, err = say("init", *OWN, "--target", "web")
    assert code == 2
    assert "Missing option '--max-drop'." in err
    monkeypatch.setenv("TOOLCHAIN_INIT_MAX_DROP", "1")
    assert say("init", *OWN, "--target", "web")[0] == 0


def test_a_model_outside_of_the_folder_is_named_in_the_next_command(folder, say, tiny_checkpoint):
    options = (*OWN, *REST, "--model", tiny_checkpoint, "--exported", "all variants", "--output", "new/../recipe.toml")
    (folder / "new").mkdir()
    code, _, err = say("init", *options)
    assert code == 0, err
    command = shlex.split(err.split("`")[1])
    assert command[:2] == ["toolchain", "build"]
    assert ["--model", str(tiny_checkpoint)] == command[3:5]
    code, out, err = say(*command[1:])
    assert code == 0, err
    assert "all variants/tiny/bundle-python" in out
    code, _, err = say("build", "recipe.toml", "--dry-run")
    assert code == 1
    assert "Name the folder with --model FOLDER" in err


def test_an_imported_model_needs_no_folder(tiny, folder, say):
    options = ("--model", tiny.model, "--exported", tiny.exported, "--data", "sst2", *REST)
    code, _, err = say("init", *options)
    assert code == 0, err
    assert "--model" not in err
    code, out, err = say("build", "recipe.toml", "--dry-run", "--exported", tiny.exported)
    assert code == 0, err
    assert out.startswith("torch-fp32: skip (fresh)")


def test_an_adapter_is_imported_first(folder, say):
    (folder / "adapter").mkdir()
    settings = '{"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "user/base"}'
    (folder / "adapter" / "adapter_config.json").write_text(settings)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    code, _, err = say("init", *OWN, *REST, "--model", "adapter")
    assert code == 1
    assert "is a LoRA adapter" in err
    assert "toolchain export --model" in err


def test_a_hub_model_is_read_from_the_hub(folder, say, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda ref, revision, patterns: folder / "my-checkpoint")
    code, _, err = say("init", *OWN, *REST, "--model", "user/name")
    assert code == 0, err
    assert record.read(folder / "recipe.toml").model == ModelRecord("hub", "user/name")


def test_a_hub_dataset_is_measured_on_its_validation_split(folder, say, monkeypatch):
    read = answers.datasets.read_file
    monkeypatch.setattr(
        "toolchain.data.datasets.read_hub",
        lambda spec, columns, split: read(folder / "reviews.csv", spec, answers.Columns("review", "stars")),
    )
    code, _, err = say("init", *OWN, *REST, "--data", "user/rows:small")
    assert code == 0, err
    recipe = record.read(folder / "recipe.toml")
    assert (recipe.training.kind, recipe.training.ref) == ("hub", "user/rows:small")
    assert (recipe.bench.kind, recipe.bench.data, recipe.bench.split) == ("hub", "user/rows:small", None)
    code, _, err = say("build", "recipe.toml", "--dry-run")
    assert code == 0, err


def test_data_without_a_validation_split_is_measured_on_held_out_rows(folder, say):
    code, _, err = say("init", *OWN, *REST)
    assert code == 0, err
    bench = record.read(folder / "recipe.toml").bench
    assert (bench.data, bench.split) == ("reviews.csv", "held-out")
    text = (folder / "recipe.toml").read_text()
    assert "30 texts" in text
    assert "3.33 points" in text


def test_a_token_classifier_gets_no_exits_and_no_bundle_for_mlflow(folder, say, monkeypatch):
    config = folder / "my-checkpoint" / "config.json"
    text = config.read_text()
    text = text.replace("SequenceClassification", "TokenClassification").replace("NEGATIVE", "O")
    config.write_text(text.replace("POSITIVE", "B-CITY"))
    words = '{"text": "in Rome today and also tomorrow", "label": ["O", "B-CITY", "O", "O", "O", "O"]}\n'
    (folder / "words.jsonl").write_text(words * 30)
    options = ("--model", "my-checkpoint", "--data", "words.jsonl", "--max-drop", "1", "--target")
    for target in ("mlflow", "ray-serve", "server"):
        code, _, err = say("init", *options, target)
        assert code == 1
        assert "token classifier" in err
    code, _, err = say("init", *options, "python")
    assert code == 0, err
    text = (folder / "recipe.toml").read_text()
    assert "-exits" not in text
    assert "The recipe has no exits" in text.replace("\n# ", " ")


def test_an_architecture_that_cannot_be_pruned_gets_no_pruned_variants(folder, say):
    config = folder / "my-checkpoint" / "config.json"
    config.write_text(config.read_text().replace('"distilbert"', f'"{min(UNPRUNABLE)}"'))
    code, _, err = say("init", *OWN, *REST)
    assert code == 0, err
    text = (folder / "recipe.toml").read_text()
    assert "torch-pruned" not in text
    assert "pruning does not support this architecture" in text.replace("\n# ", " ")


class Terminal:
    """The command in a pseudo-terminal: `output` is the text that a person sees."""

    def __init__(self, *arguments):
        self.output = ""
        self.process, self.descriptor = pty.fork()
        if self.process == 0:  # the child process
            os.execv(sys.executable, [sys.executable, "-m", "toolchain", *arguments])

    def _read(self, seconds=60):
        if not select.select([self.descriptor], [], [], seconds)[0]:
            raise TimeoutError(self.output)
        try:
            text = os.read(self.descriptor, 4096).decode()
        except OSError:  # the process has ended
            return False
        self.output += text.replace("\r\n", "\n")
        return bool(text)

    def answer(self, text, question):
        """Waits for a question, and types an answer."""
        while not self.output.endswith(f"{question}: ") and self._read():
            pass
        time.sleep(0.2)  # an interrupt that arrives before the process waits for a key would wait for the next key
        os.write(self.descriptor, text.encode())

    def close(self):
        """Waits for the end of the process, and returns its exit code."""
        while self._read():
            pass
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def test_a_person_answers_the_questions_in_a_terminal(folder):
    terminal = Terminal("init")
    for question, text in (
        ("Model [reference]", "./my-chekpoint"),
        ("Model [reference]", "./my-checkpoint"),
        ("Data [sst2]", "reviews.csv"),
        ("Column", "text"),
        ("Column", "review"),
        ("Column", "stars"),
        ("Target [python]", "phone"),
        ("Target [python]", ""),
        ("Points [1]", "1%"),
        ("Points [1]", ""),
    ):
        terminal.answer(f"{text}\n", question)
    assert terminal.close() == 0, terminal.output
    for line in (
        "Error: There is no folder ./my-chekpoint.",
        "Which column has the texts? review, stars",
        "The data has no column 'text'.",
        "  mobile   a phone, with Android or iOS\n",
        "Error: There is no target 'phone'. Did you mean mobile?",
        "Error: The accuracy drop '1%' is not a number of points from 0 to 50.",
        "\nrecipe.toml\n6 variants, a benchmark, and a bundle of onnx-pruned50-r1-int8-static for python;",
        "next: `toolchain build recipe.toml --dry-run` shows the plan, and `toolchain build recipe.toml` builds it\n",
    ):
        assert line in terminal.output
    recipe = record.read(folder / "recipe.toml")
    assert recipe.training == TrainingRecord("file", "reviews.csv", text_column="review", label_column="stars")


@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_an_interrupt_at_a_question_leaves_nothing(folder, key):
    before = sorted(os.listdir(folder))
    terminal = Terminal("init", *OWN, "--target", "web")
    terminal.answer(key, "Points [1]")
    assert terminal.close() == 130
    assert "\nInterrupted." in terminal.output
    assert sorted(os.listdir(folder)) == before


def test_small_layers_get_no_exits(folder, say, monkeypatch):
    monkeypatch.setattr("toolchain.exits.choice.EXIT_WEIGHTS", 150_000)
    code, _, err = say("init", *OWN, *REST)
    assert code == 0, err
    assert "-exits" not in (folder / "recipe.toml").read_text()


@pytest.mark.slow
def test_the_recipe_builds_measures_and_ships(folder, say, short_bench):
    code, _, err = say("init", *OWN, "--target", "python", "--max-drop", "1")
    assert code == 0, err
    path = folder / "recipe.toml"
    (shipped,) = record.read(path).ship.variants
    assert "exits" in shipped
    # A benchmark of one variant is faster than one of six.
    text = re.sub(r"(?<=\[bench\]\nvariants = )\[.*?\]", f'["{shipped}"]', path.read_text(), flags=re.DOTALL)
    path.write_text(text)
    assert record.read(path).bench.variants == (shipped,)
    code, out, err = say("build", path.name)
    assert code == 0, err
    for name in record.read(path).names:
        assert f"{name}: built, id " in out
    assert f"{shipped}@cpu" in out
    assert "30 sentences" in out
    assert say("verify", folder / "exported" / "my-checkpoint" / "bundle-python")[0] == 0
    code, _, err = say("ship", shipped, "--target", "mobile", "--model", "my-checkpoint")
    assert code == 0, err


@pytest.mark.slow
def test_the_target_other_can_have_every_graph_of_its_recipe(folder, say):
    code, _, err = say("init", *OWN, "--target", "other", "--max-drop", "1")
    assert code == 0, err
    recipe = record.read(folder / "recipe.toml")
    graphs = tuple(name for name in recipe.bench.variants if name.startswith("onnx"))
    assert len(graphs) == 5
    recipe = dataclasses.replace(recipe, bench=None, ship=dataclasses.replace(recipe.ship, variants=graphs))
    (folder / "all.toml").write_text(to_toml(recipe))
    code, _, err = say("build", "all.toml")
    assert code == 0, err
    assert say("verify", folder / "exported" / "my-checkpoint" / "bundle-other")[0] == 0
