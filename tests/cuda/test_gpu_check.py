"""scripts/gpu_check.sh on the null device: every block goes through, and the results have what docs will quote."""

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from llava.rehearsal.build import unavailable
from scripts.gpu import __main__ as runner
from scripts.gpu.block import Report

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"


def gpu_check(*words, **environment):
    command = ["bash", str(SCRIPT), *words]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """(printed lines, results, folder of the results) of the whole script."""
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("gpu_check")
    done = gpu_check("--rehearse", "--out", str(folder / "results.json"), REVISION="0123abc")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines(), json.loads((folder / "results.json").read_text()), folder


@pytest.fixture(scope="module")
def cases(rehearsed):
    return {name: block["cases"] for name, block in rehearsed[1]["blocks"].items()}


def test_results_name_the_machine_and_the_code(rehearsed):
    results = rehearsed[1]
    assert results["rehearsed"] is True and results["revision"] == "0123abc"
    assert results["card"] == "NVIDIA H100 80GB HBM3" and results["compute_capability"] == "9.0"
    assert results["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert results["date"].endswith("+00:00") and results["memory_gib"] == 79.25 and results["driver"] is None


@pytest.mark.parametrize("name", runner.BLOCKS)
def test_every_block_prints_one_line(rehearsed, name):
    lines, results, folder = rehearsed
    block = results["blocks"][name]
    assert block["status"] == "ok", (folder / "results" / f"{name}.log").read_text()[-3000:]
    assert block["line"] and (block["cases"] or block["left_out"]) and block["failed"] == 0
    assert [line for line in lines if line.startswith(name)] == [
        f"{name:<11}{'ok':<10}{block['seconds']:>6.1f} s  {block['line']}"
    ]
    assert "error" not in json.dumps(block)


def test_kernels_and_trainings(cases):
    assert len(cases["kernels"]) == 32
    assert {found["outcome"] for found in cases["kernels"].values()} == {"passed"}
    assert cases["tiny"].keys() == {"dpo plain", "dpo lora"}
    for found in cases["tiny"].values():
        assert found["steps"] == 2 and found["loss"] < 5e-6 and found["grad_norm"] < 5e-5


def test_the_step_is_measured_with_each_lever(rehearsed, cases):
    step = cases["step7b"]
    for name in ("1 pair", "4 pairs", "8 pairs", "4 pairs, gradient checkpointing", "4 pairs, bf16 logits"):
        assert step[name]["ms"].keys() == {"tower", "forward", "backward", "optimizer", "step"}
        assert step[name]["peak_bytes"] > step[name]["estimated_bytes"] > 0 and step[name]["mfu"] >= 0
    # What a checkpointed layer does not keep, and what fp32 logits save, differ in the estimates.
    estimates = {name: found["estimated_bytes"] for name, found in step.items() if "estimated_bytes" in found}
    assert estimates["4 pairs, gradient checkpointing"] < estimates["4 pairs"] < estimates["4 pairs, bf16 logits"]
    for optimizer in ("adamw_torch_fused", "adamw_torch"):
        assert step[f"1 pair, 8 layers, {optimizer}"]["ms"]["optimizer"] > 0
    assert step["4 pairs, padded rows"]["pairs_per_second"] > 0
    assert step["1 pair, padded rows"]["ms"]["step"] > 0
    left_out = rehearsed[1]["blocks"]["step7b"]["left_out"]
    assert left_out == dict.fromkeys(["4 pairs, compiled layers", "TRL"], "Triton's kernels cannot be rehearsed")


def test_the_forward_pass_never_waits(cases):
    assert cases["step7b"]["synchronizations in the forward pass"] == {"first": None}


def test_the_trace_lies_beside_the_results(rehearsed, cases):
    file = rehearsed[2] / "results" / cases["step7b"]["trace"]["file"]
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any("aten::mm" in event.get("name", "") for event in events)


def test_lora_and_zero2(cases):
    assert [found["pairs"] for found in cases["lora7b"].values()] == [1, 4, 1, 4, 16]
    assert len(cases["zero2"]) == 2
    for found in (*cases["lora7b"].values(), *cases["zero2"].values()):
        assert found["peak_bytes"] > 0 and found["estimated_bytes"] > 0 and found["ms"]["optimizer"] > 0


def test_noise_leads_to_limits(cases):
    """Both heads round somewhere: bf16 keeps 8 bits, so a token's log-prob of about -10 moves by 1e-3 to 1e-1."""
    for head in ("bf16", "fp32"):
        found = cases["noise"][f"{head} logits"]
        assert 1e-3 < found["nats_per_root_token"]["packed_against_fp32"] < 1e-1
        assert found["limits"]["reference_drift"] == pytest.approx(
            3 * max(value for name, value in found["nats_per_root_token"].items() if name.startswith("R_"))
        )
        assert (found["limits"]["tolerance_now"], found["limits"]["reference_drift_now"]) == (0.1, 0.2)


def test_generation_and_hardness(cases):
    assert cases["generation"]["batch 1"]["tokens"] == 8 and cases["generation"]["batch 16"]["tokens"] == 128
    for found in (*cases["hardness"].values(), *cases["generation"].values()):
        assert min(value for name, value in found.items() if name.endswith("per_second")) > 0


# --- What goes wrong -------------------------------------------------------------------------------------------------


def test_a_case_that_fails_is_recorded_and_the_next_one_runs(tmp_path):
    report = Report(tmp_path / "block.json")
    with report.case("too large") as found:
        found["pairs"] = 8
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    with report.case("wrong"):
        raise KeyError("head")
    with report.case("right") as found:
        found["pairs"] = 1
    written = json.loads((tmp_path / "block.json").read_text())
    assert written["failed"] == 1
    assert written["cases"] == {
        "too large": {"pairs": 8, "out_of_memory": "CUDA out of memory. Tried to allocate 2 GiB"},
        "wrong": {"error": "KeyError: 'head'"},
        "right": {"pairs": 1},
    }
    (tmp_path / "log").write_text("")
    assert runner.problem_of(written, tmp_path / "log").startswith("wrong: KeyError: 'head' (see ")


def test_a_block_that_takes_too_long_is_stopped(tmp_path):
    """No block starts within a tenth of a second."""
    block = runner.run_block("kernels", tmp_path / "results.json", limit=0.1, rehearse=False)
    assert block["status"] == "timed out" and block["line"] == "stopped after 0 s, 0 cases done"


def test_missing_packages_and_time_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(runner.BLOCKS, "zero2", runner.Block("", 1, ("no_such_package",)))
    out = tmp_path / "results.json"
    assert runner.run_block("zero2", out, 1, False)["line"] == "no_such_package not installed"
    assert runner.run_block("kernels", out, -1, False)["line"] == "no time left; see --blocks and --minutes"


def test_without_a_gpu_nothing_starts(tmp_path):
    done = gpu_check("--blocks", "kernels", "--out", str(tmp_path / "results.json"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert "expected one GPU" in done.stderr and "--rehearse runs without one" in done.stderr


def test_unknown_blocks_are_refused():
    done = gpu_check("--blocks", "kernels,speed")
    assert done.returncode == 2 and "got speed" in done.stderr


def test_help_is_the_head_of_the_script_and_starts_nothing(tmp_path):
    head = SCRIPT.read_text().split("\nset -euo")[0].splitlines()[1:]
    done = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in head]
    assert not done.stderr and not list(tmp_path.iterdir())
