"""The notebook runs from its first cell to its last, and shows what it says."""

import ast
import os
import re
import tempfile

import nbclient
import nbformat
import pytest
from helpers import root

pytestmark = pytest.mark.slow


def test_the_notebook_runs_and_slm_learns_more_than_clm(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(root()))
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as a reader has
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "rho1_jax_test_cache"))
    notebook = nbformat.read(root() / "docs" / "tutorials" / "first_run.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    results = [output.data for output in outputs if "data" in output]
    assert any("image/png" in data for data in results)
    assert any('class="selected"' in data.get("text/html", "") for data in results)
    (losses,) = [ast.literal_eval(data["text/plain"]) for data in results if data["text/plain"].startswith("{")]
    assert losses["reference"] < losses["slm"] < losses["clm"]
    (printed,) = [output.text for output in outputs if output.get("text", "").startswith("in a sum:")]
    selected, eligible = map(int, re.findall(r"(\d+)%", printed))
    assert selected > eligible
