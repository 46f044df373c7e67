"""The notebook: what is saved in it is what it says, and it runs from the first cell to the last."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"
STEPS = "STEPS = 5_000"


def check_outputs(notebook, least_return, largest_error):
    text, kinds = "", []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", output
            text += output.get("text", "")
            kinds += [kind for kind in output.get("data", {}) if kind.startswith("image/")]
    # a video, two figures
    assert sorted(kinds) == ["image/gif", "image/png", "image/png"]
    assert float(re.search(r"return (-?\d+) ±", text)[1]) > least_return
    assert "the same action: True" in text
    observations = re.findall(r"observation (\S+): (.*)", text)
    assert [x for x, _ in observations] == ["-0.9", "0.0", "0.9"]
    for x, modes in observations:
        found = [[float(value) for value in place.split()] for place in re.findall(r"at \[([^\]]*)\]", modes)]
        shares = [int(share) for share in re.findall(r"(\d+)%", modes)]
        assert 90 <= sum(shares) <= 102
        if largest_error is not None:
            assert sorted(found) == [
                pytest.approx(place, abs=largest_error) for place in ([-0.5, 0.4 * float(x)], [0.5, -0.4 * float(x)])
            ]
            assert shares == pytest.approx([50, 50], abs=12)


def execute(steps, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace(STEPS, f"STEPS = {steps}")
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    return notebook


def test_what_is_saved():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert STEPS in "".join(cell.source for cell in notebook.cells)
    check_outputs(notebook, least_return=-200, largest_error=0.1)
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_it_runs(tmp_path):
    check_outputs(execute(200, tmp_path), least_return=-2000, largest_error=None)
    assert (tmp_path / "pendulum.safetensors").exists()


@pytest.mark.slow
def test_it_learns(tmp_path):
    check_outputs(execute(5_000, tmp_path), least_return=-250, largest_error=0.1)
