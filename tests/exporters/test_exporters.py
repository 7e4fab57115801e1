"""Tests of exporters: the default exporter, the exporter in a manifest, and the error for a missing exporter."""

import pytest

from toolchain import exporters
from toolchain.artifacts.steps import Export, decode_step, settings_of
from toolchain.build.pipeline import ensure, plan
from toolchain.errors import SettingsError
from toolchain.system import extras

OPTIMUM_IS_UNAVAILABLE = exporters.unmet_requirement("optimum")


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Returns a function that installs metadata of a package `fake-package`; its arguments are the requirements."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(*requirements):
        folder = tmp_path / "fake_package-1.0.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", "Name: fake-package", "Version: 1.0"]
        (folder / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {text}" for text in requirements]) + "\n")

    return install


@pytest.mark.parametrize(
    ("requirements", "cause"),
    [
        ([], ""),
        (["numpy>=1", "click"], ""),
        (["no-such-package; extra == 'all'"], ""),
        (["numpy<0.1"], "fake-package needs numpy <0.1, but "),
        (["no-such-package>=2"], "fake-package needs no-such-package, which is not installed"),
    ],
)
def test_a_package_works_only_beside_the_packages_that_it_needs(distribution, requirements, cause):
    distribution(*requirements)
    found_cause = extras.unmet_requirement("fake-package")
    assert found_cause.startswith(cause)
    assert bool(found_cause) == bool(cause)


def test_a_package_that_is_not_installed_does_not_work():
    assert extras.unmet_requirement("no-such-package") == "no-such-package is not installed"


def test_optimum_is_the_default_where_it_works():
    assert exporters.default_exporter() == ("torch" if OPTIMUM_IS_UNAVAILABLE else "optimum")


def test_a_missing_exporter_gives_an_error_before_anything_is_built(say, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(exporters, "EXPORTERS", {"optimum": ("no-such-package",), "torch": ()})
    options = ("--model", tiny_checkpoint, "--exported", tmp_path / "exported", "--exporter", "optimum")
    code, _, err = say("export", *options)
    assert code == 2
    assert "--exporter optimum is unavailable: no-such-package is not installed." in err
    assert "Use --exporter torch" in err
    assert not (tmp_path / "exported").exists()
    assert exporters.default_exporter() == "torch"


def test_the_remaining_exporter_builds_its_variant_although_the_other_one_is_missing(tiny, monkeypatch):
    monkeypatch.setattr(exporters, "EXPORTERS", {"optimum": ("no-such-package",), "torch": ()})
    steps = {f"onnx-std+{exporter}": Export(exporter=exporter) for exporter in ("torch", "optimum")}
    message = "--exporter optimum is unavailable: no-such-package is not installed"
    with pytest.raises(SettingsError, match=message) as error:
        ensure(tiny, list(steps), steps, lambda event: None)
    assert "Use --exporter torch" in error.value.hint
    assert tiny.load("onnx-std+torch").manifest.step == Export(exporter="torch")
    assert not tiny.path("onnx-std+optimum").exists()


@pytest.fixture
def other(tiny):
    """Builds onnx-std with the exporter torch, and returns its workspace."""
    ensure(tiny, ["onnx-std"], {"onnx-std": Export(exporter="torch")}, lambda event: None)
    return tiny


def test_an_artifact_keeps_its_exporter_until_another_one_is_requested(other, monkeypatch):
    assert other.load("onnx-std").manifest.step == Export(exporter="torch")
    monkeypatch.setattr("toolchain.build.pipeline.default_exporter", lambda: "optimum")
    for steps in ({}, {"onnx-std": Export()}, {"onnx-std": Export(exporter="torch")}):
        assert [item.reason for item in plan(other, ["onnx-std"], steps)] == ["", ""]
    step = Export(exporter="optimum")
    assert plan(other, ["onnx-std"], {"onnx-std": step})[-1].reason == "other settings: exporter torch → optimum"


def test_a_rebuild_uses_the_recorded_exporter_only_where_it_works(other, monkeypatch):
    def step_of_rebuild():
        (item,) = [item for item in plan(other, ["onnx-std"], {"onnx-std": Export(17)}) if item.variant.parent]
        assert item.reason
        return item.step

    assert step_of_rebuild() == Export(17, "torch")
    monkeypatch.setattr(exporters, "EXPORTERS", {"optimum": (), "torch": ("no-such-package",)})
    monkeypatch.setattr("toolchain.build.pipeline.default_exporter", lambda: "optimum")
    assert step_of_rebuild() == Export(17, "optimum")


def test_manifests_of_earlier_releases_name_no_exporter():
    assert decode_step("export", {"opset": 18}) == Export(18, "optimum")
    assert settings_of(Export(18, "optimum")) == {"opset": 18}
    assert decode_step("export", settings_of(Export(18, "torch"))) == Export(18, "torch")
