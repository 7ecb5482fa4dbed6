"""Ten DAMA steps are the same on 1 x 16, 2 x 8, 1 x 4 x 4 and 2 x 4 x 2, and as in the committed trajectory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_trajectory_does_not_depend_on_the_hardware(tmp_path):
    """Deviations from 1 x 16 as committed: loss at most 3.0e-7, gradient norm 3.8e-6, R_bar 1.0e-6, R 1.8e-5."""
    script = ROOT / "scripts/bench/invariance.py"
    done = subprocess.run(
        [sys.executable, script, "--json", tmp_path / "now.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    now = json.loads((tmp_path / "now.json").read_text())
    committed = json.loads(Path(__file__).with_name("invariance.json").read_text())
    assert now["deviations"]["selected pairs"] == {"runs that differ": 0}
    for figure in ("loss", "grad_norm", "dama/R_bar", "dama/alpha_M"):
        assert now["deviations"][figure]["max"] < 5e-5, figure
    assert now["runs"].keys() == committed["runs"].keys()
    for name, run in committed["runs"].items():
        for figure in ("loss", "grad_norm", "dama/R_bar", "dama/alpha_M", "dama/selected"):
            assert now["runs"][name][figure] == pytest.approx(run[figure], rel=1e-3, abs=1e-4), (name, figure)
