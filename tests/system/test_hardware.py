"""Tests of the description of this machine."""

import cpuinfo
import pytest

from toolchain.system import hardware


def test_the_processor_of_proc_cpuinfo_is_that_of_the_library():
    name, flags = hardware._linux_processor()
    if not name or not flags:
        pytest.skip("/proc/cpuinfo names no processor")
    info = cpuinfo.get_cpu_info()
    assert name == info["brand_raw"]
    assert [flag in flags for flag in hardware.ISA_FLAGS] == [flag in info["flags"] for flag in hardware.ISA_FLAGS]
    assert hardware.processor() == {"cpu": name, "isa": [flag for flag in hardware.ISA_FLAGS if flag in flags]}
