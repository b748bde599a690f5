"""Run the notebooks of jobs/notebooks. `python -m tests.support.notebooks` also writes what they show into them."""

import argparse
import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[2] / "jobs/notebooks"
NOTEBOOKS = sorted(file.name for file in FOLDER.glob("*.ipynb"))
SECONDS = 300
"""For a cell."""
TERMINAL = re.compile(r".*\r(?!\n)|\x1b\[[\d;]*m")
TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w+")


def executed(name: str, folder: Path, run: str) -> NotebookNode:
    """Return the notebook after all its cells have run in a folder; raises nbclient's error of a cell that fails.

    `run` is the one that a notebook reads.
    """
    notebook = nbformat.read(FOLDER / name, as_version=4)
    root = str(FOLDER.parents[1])
    variables = {"RUN": run, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "COLUMNS": "110"}
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}})
    return client.execute(env=os.environ | variables)


def _tidied(notebook: NotebookNode) -> NotebookNode:
    """Remove what differs from run to run or shows only in a terminal: times, progress, colours, temporary folders."""
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        cell.outputs = [one for one in cell.get("outputs", []) if one.get("name") != "stderr"]
        for output in cell.outputs:
            for holder, key in [(output, "text"), *((output.get("data", {}), kind) for kind in output.get("data", {}))]:
                if isinstance(holder.get(key), str) and not key.startswith("image/"):
                    holder[key] = TEMPORARY.sub("/tmp/notebook", TERMINAL.sub("", holder[key]))
        if cell.cell_type != "code":
            del cell["outputs"]
    notebook.metadata.language_info = NotebookNode(name="python")
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", required=True, help="the run that read_from_s3.ipynb reads, such as s3://bucket/runs/demo"
    )
    given = parser.parse_args()
    for name in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(_tidied(executed(name, Path(folder), given.run)), FOLDER / name)


if __name__ == "__main__":
    main()
