"""Tests of the description of this machine."""

import cpuinfo
import psutil
import pytest

from toolchain import doctor
from toolchain.system import hardware, quota
from toolchain.system.quota import cpu_quota


def test_the_processor_of_proc_cpuinfo_is_that_of_the_library():
    name, flags = hardware._linux_processor()
    if not name or not flags:
        pytest.skip("/proc/cpuinfo names no processor")
    info = cpuinfo.get_cpu_info()
    assert name == info["brand_raw"]
    assert [flag in flags for flag in hardware.ISA_FLAGS] == [flag in info["flags"] for flag in hardware.ISA_FLAGS]
    assert hardware.processor() == {"cpu": name, "isa": [flag for flag in hardware.ISA_FLAGS if flag in flags]}


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Returns a function that writes the files of control groups, and the group of this process."""
    monkeypatch.setattr(quota, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(quota, "MEMBERSHIP", tmp_path / "membership")

    def write(membership, **contents):
        (tmp_path / "membership").write_text(membership)
        for name, content in contents.items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)

    return write


@pytest.mark.parametrize(
    ("membership", "contents", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/../../x\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "400000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 4.0),
        ("3:pids:/a\n", {"a/cpu.max": "50000 100000\n"}, None),
        ("0::/\n", {"cpu.max": "unreadable"}, None),
    ],
)
def test_the_cpu_quota_is_that_of_the_tightest_group(groups, membership, contents, expected):
    groups(membership, **contents)
    assert cpu_quota() == expected


@pytest.mark.parametrize(("cpus", "expected"), [(0.5, 1), (1.9, 1), (2, 2), (1000, None)])
def test_cores_are_within_the_quota(groups, monkeypatch, cpus, expected):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 64)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(64)))
    groups("0::/\n", **{"cpu.max": f"{round(cpus * 100_000)} 100000\n"})
    assert hardware.cores() == (expected or 64)


def test_doctor_reports_less_than_one_core(groups):
    groups("0::/\n", **{"cpu.max": "50000 100000\n"})
    assert "this container may use only 0.5 of one core" in doctor._processor()[-1].what
    groups("0::/\n", **{"cpu.max": "100000 100000\n"})
    assert not any("container" in finding.what for finding in doctor._processor())
