"""Shortens benchmarks in child processes of tests; Python imports this file at its start, since it is in PYTHONPATH.

A quick benchmark measures a cell for 20 seconds. If a test sets `SHORT_BENCH` in the environment, child processes
measure each cell for a fraction of a second. In the process of the tests, the fixture `short_bench` does the same.
"""

import os

if os.environ.get("SHORT_BENCH"):
    from toolchain.bench import roofline, scenarios

    scenarios.QUICK = scenarios.Protocol(passes=1, min_s=0.1, pass_s=5.0, starts=1, threads=1)
    roofline.SECONDS = 0.02
    roofline.MEBIBYTES = 4
