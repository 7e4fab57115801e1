"""Runs a notebook and writes it with its outputs to OUTPUT: `python run_notebook.py NOTEBOOK OUTPUT CODE`.

The notebook runs in the working directory. CODE is Python source that changes the parameters: it runs after the cell
with the tag `parameters`.
"""

import sys

import nbformat
from nbclient import NotebookClient

source, output, code = sys.argv[1:]
notebook = nbformat.read(source, as_version=4)
position = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(code))
NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
nbformat.write(notebook, output)
