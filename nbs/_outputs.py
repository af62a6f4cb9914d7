"""Run notebooks from the top and store their outputs, without what went to stderr (progress bars, warnings with
local paths).

    python nbs/_outputs.py nbs/method/01_critique.ipynb ...
"""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

for path in map(Path, sys.argv[1:]):
    print(path, flush=True)
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    nbformat.write(nb, path)
