"""Shortens benchmarks in child processes of tests whose environment has the variable `SHORT_BENCH`.

Python imports this file when it starts, because the folder of the tests is in PYTHONPATH.
"""

import os

if os.environ.get("SHORT_BENCH"):
    from short_bench import SETTINGS

    for module, name, value in SETTINGS:
        setattr(module, name, value)
