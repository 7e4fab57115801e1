"""Tests of `make install`: the set of packages for each machine, the pinned versions, and the pip commands."""

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from toolchain.doctor import RUNTIME_EXTRAS, constraints_file
from toolchain.system import hardware

ROOT = Path(hardware.__file__).parent.parent.parent
MACHINES = [
    ([], "", "cpu"),
    ([], "580.65.06", "cpu"),
    (["7.5"], "580.65.06", "gpu"),  # T4.
    (["9.0"], "590.48.01", "gpu"),  # H100.
    (["10.0"], "580", "gpu"),  # B200.
    (["7.5"], "535.183.01", "cuda12"),
    (["9.0"], "570.124.06", "cuda12"),
    (["6.1"], "580.65.06", "cuda12"),  # GTX 1050 Ti
    (["6.1"], "535.183.01", "cuda12"),
    (["9.0", "6.1"], "580.65.06", "cuda12"),
    (["6.1", "9.0"], "580.65.06", "cuda12"),
]


def device(capability):
    return {"name": "A GPU", "memory_bytes": 2**34, "compute_capability": capability}


@pytest.mark.parametrize(("capabilities", "driver", "runtime"), MACHINES)
def test_driver_and_capability_choose_the_set_of_packages(capabilities, driver, runtime):
    assert hardware.runtime_set([device(capability) for capability in capabilities], driver) == runtime


def test_an_unknown_driver_or_capability_counts_as_old():
    assert hardware.runtime_set([device("")], "580.65.06") == "cuda12"
    assert hardware.runtime_set([device("9.0")], "") == "cuda12"


@pytest.fixture
def make(tmp_path):
    """Returns a function that runs make in a folder with the files that `make install` reads.

    `answer` is the output of the machine's nvidia-smi; None means a machine without nvidia-smi.
    """
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("awk", "cat", "rm", "sed", "xargs"):
        (commands / name).symlink_to(shutil.which(name))
    for path in (ROOT / "Makefile", ROOT / "setup.cfg", ROOT / "pyproject.toml"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    program = shutil.which("make")

    def run(*arguments, answer=None, code=0, check=True):
        if answer is not None:
            write(commands / "nvidia-smi", f"cat <<'END'\n{answer}\nEND\nexit {code}")
        return subprocess.run(
            [program, *arguments],
            cwd=tmp_path,
            # `env` has only PATH. If `make test` runs these tests, then `make test` puts its own variables into
            # MAKEFLAGS. The make command under test must not read MAKEFLAGS, because it would use these variables.
            env={"PATH": str(commands)},
            capture_output=True,
            text=True,
            check=check,
        )

    return run


def write(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("capabilities", "driver", "runtime"), MACHINES)
def test_make_chooses_the_same_set_as_the_toolchain(make, capabilities, driver, runtime):
    answer = "\n".join(f"{driver}, {capability}" for capability in capabilities) or "No devices were found"
    output = make("-n", "install", answer=answer, code=0 if capabilities else 6).stdout
    assert f'-c {constraints_file(runtime, False)} -e ".[{RUNTIME_EXTRAS[runtime]}]"' in output


@pytest.mark.parametrize(
    ("answer", "code", "runtime"),
    [
        (None, 0, "cpu"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, "cpu"),
        ("580.65.06, [N/A]", 0, "cuda12"),
    ],
)
def test_make_accepts_the_messages_of_a_faulty_driver(make, answer, code, runtime):
    assert f"-c {constraints_file(runtime, False)} " in make("-n", "install", answer=answer, code=code).stdout


def test_a_named_runtime_overrides_the_choice(make):
    for runtime, extras in RUNTIME_EXTRAS.items():
        output = make("-n", "install", f"RUNTIME={runtime}", answer="580.65.06, 9.0").stdout
        assert f'-c {constraints_file(runtime, False)} -e ".[{extras}]"' in output
        output = make("-n", "install", f"RUNTIME={runtime}", "SET=optimum").stdout
        assert f'-c {constraints_file(runtime, True)} -e ".[{extras},optimum]"' in output


@pytest.mark.parametrize(
    ("setting", "message"),
    [("RUNTIME=tpu", "RUNTIME is cpu, gpu or cuda12, not tpu"), ("SET=old", "SET is current or optimum, not old")],
)
def test_an_unknown_runtime_or_set_is_refused(make, setting, message):
    failed_run = make("-n", "install", setting, check=False)
    assert failed_run.returncode == 2
    assert message in failed_run.stderr


# `make install` can install another runtime (such as gpu) or another package set (such as optimum). Before this
# installation, `make install` removes old packages. The pip command for the removal has these arguments.
REMOVED = "uninstall -q -y optimum optimum-onnx onnxruntime onnxruntime-gpu nvidia-cudnn-cu13 torch"


@pytest.fixture
def environment(make, tmp_path):
    """Makes a .venv with a fake pip, which answers `pip list` and records every other pip command.

    Returns a function that runs `make install` and returns the recorded commands.
    """
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    log = tmp_path / "said"
    versions = {"onnx": 1, "optimum": 2, "optimum-onnx": 0, "onnxruntime": 1, "onnxruntime-gpu": 1}
    versions |= {"nvidia-cudnn-cu13": 9, "torch": 2, "torchvision": 0}
    packages = "".join(f"{name}=={version}\\n" for name, version in versions.items())
    write(folder / "pip", f'[ "$1" = list ] && printf "{packages}" || echo "$@" >> {log}')

    def install(*arguments):
        log.write_text("")
        make("install", "PYTHON=:", *arguments)
        return log.read_text().splitlines()

    return install


def test_another_runtime_replaces_the_installed_one(environment, tmp_path):
    marker = tmp_path / ".venv" / ".installed"
    install_command = environment("RUNTIME=cpu")
    for runtime, previous in (("gpu", "cpu"), ("cuda12", "gpu"), ("cpu", "cuda12")):
        assert marker.read_text() == f"{previous} current\n"
        uninstall_command, install_command = environment(f"RUNTIME={runtime}")
        assert uninstall_command == REMOVED
        assert f"-c {constraints_file(runtime, False)} -e .[{RUNTIME_EXTRAS[runtime]}]" in install_command
    assert environment() == []


def test_another_set_replaces_the_installed_one_and_stays(environment, tmp_path):
    environment("RUNTIME=cpu")
    uninstall_command, install_command = environment("SET=optimum")
    assert uninstall_command == REMOVED
    assert "-c constraints/optimum-cpu.txt -e .[cpu,bnb,optimum]" in install_command
    assert (tmp_path / ".venv" / ".installed").read_text() == "cpu optimum\n"
    assert environment() == []


def test_without_a_named_runtime_an_environment_keeps_its_own(environment, tmp_path):
    environment("RUNTIME=cuda12")
    assert environment() == []
    # A file system may store times in whole seconds, so setup.cfg gets a time one second after the installation.
    later_time = (tmp_path / ".venv" / ".installed").stat().st_mtime + 1
    os.utime(tmp_path / "setup.cfg", (later_time, later_time))
    (install_command,) = environment()
    assert "-c constraints/cuda12.txt" in install_command


def test_a_named_runtime_reinstalls_and_an_incomplete_installation_starts_again(environment, tmp_path):
    environment("RUNTIME=gpu")
    assert len(environment("RUNTIME=gpu")) == 2
    (tmp_path / ".venv" / ".installed").write_text("")
    assert len(environment()) == 2


def pins(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


@pytest.mark.parametrize("with_optimum", [False, True])
@pytest.mark.parametrize("runtime", RUNTIME_EXTRAS)
def test_the_pins_satisfy_every_requirement(runtime, with_optimum):
    extras = RUNTIME_EXTRAS[runtime] + (",optimum" if with_optimum else "")
    extras += "" if runtime == "cuda12" else ",torchao"  # the PyTorch of this set is too old for torchao
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    requirements = setup["options"]["install_requires"].splitlines()
    for extra in (*extras.split(","), "test"):
        requirements += setup["options.extras_require"][extra].splitlines()
    versions = pins(constraints_file(runtime, with_optimum))
    for requirement in map(Requirement, filter(None, requirements)):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
    assert ("onnxruntime" in versions) != ("onnxruntime-gpu" in versions)
    assert ("onnxruntime-gpu" in versions) == ("gpu" in extras)
    assert ("torchao" in versions) == ("torchao" in extras)


@pytest.mark.parametrize("with_optimum", [False, True])
def test_a_set_has_one_cuda_version_and_otherwise_equal_pins(with_optimum):
    cpu, gpu, cuda12 = (pins(constraints_file(runtime, with_optimum)) for runtime in RUNTIME_EXTRAS)
    assert any(name.endswith("-cu13") for name in gpu)
    assert not any(name.endswith("-cu12") for name in gpu)
    assert any(name.endswith("-cu12") for name in cuda12)
    assert not any(name.endswith("-cu13") for name in cuda12)
    for name in set(cpu) & set(gpu) & set(cuda12) - {"torch"}:
        assert cpu[name] == gpu[name] == cuda12[name], name
