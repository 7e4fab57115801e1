"""Settings that make a quick benchmark of a cell take a fraction of a second instead of 20 seconds."""

from toolchain.bench import roofline, scenarios

SHORT = scenarios.Protocol(passes=1, min_s=0.1, pass_s=5.0, starts=1, threads=1)
# Each entry names a module, one of its settings, and the value of this setting in a short benchmark.
SETTINGS = [(scenarios, "QUICK", SHORT), (roofline, "SECONDS", 0.02), (roofline, "MEBIBYTES", 4)]
