"""The other tools that `peers.py` measures: one module a tool, and the packages of each tool in `requirements/`.

A tool's module is a script, `python -m engines.NAME_peer SOURCES.json OUT`, which builds the tool's models in folders
below OUT; see `engines.sources`. A tool that does not run its models on the toolchain's ONNX Runtime has a `Session`
class in the same module. `engines.table` lists the tools.
"""
