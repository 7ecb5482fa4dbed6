"""The TinyCOCO notebook runs in a kernel as docs/howto/notebook.md makes it, and shows what it says."""

import re

import jupytext
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT
from tests.howto import blocks

SCRIPT = ROOT / "examples/tinycoco.py"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """The notebook after its run in the folder of the script."""
    made = jupytext.read(SCRIPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("notebook")))
        patch.delenv("MPLBACKEND", raising=False)  # the kernel sets its own
        NotebookClient(made, timeout=300, resources={"metadata": {"path": str(SCRIPT.parent)}}).execute()
    return made


def outputs_of(notebook, kind):
    """All outputs of a MIME type, in order."""
    return [
        output["data"][kind]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if kind in output.get("data", {})
    ]


def test_it_draws_scenes_hardness_and_betas(notebook):
    assert len(outputs_of(notebook, "image/png")) == 3


def test_it_marks_what_is_not_in_the_scene(notebook):
    pages = outputs_of(notebook, "text/html")
    before, pairs, after = pages[0], pages[1:4], pages[-1]
    assert "crimson" in before and "green" in before and before.count("<img") == 5
    for pair in pairs:
        chosen, rejected = re.findall("<i>(?:chosen|rejected):</i>(.*?)</p>", pair)
        assert rejected.count("crimson") > chosen.count("crimson")
    first, second = ("".join(re.findall(f"<i>{name}:</i>(.*?)</p>", after)) for name in ("before", "after"))
    assert second.count("crimson") < first.count("crimson")


def test_the_aligned_model_names_fewer_missing_objects(notebook):
    """In the table that the last cell of code prints, whose first number is the response-level rate."""
    text = "".join(output["text"] for output in notebook.cells[-2].outputs)
    before, after = (re.search(rf"^{name} +\S+ +([\d.]+)", text, re.MULTILINE) for name in ("before", "after"))
    assert before and after and float(after[1]) < float(before[1]), text


def test_the_page_names_the_script():
    commands = "".join(blocks(ROOT / "docs/howto/notebook.md", "bash"))
    assert commands.count("examples/tinycoco.py") == 2
    assert not list((ROOT / "examples").glob("*.ipynb"))
