"""The soak tool itself, on toy jobs: its moments, its kills, and that it sees what does not continue as it should."""

import json
import random
import sys
import time
from dataclasses import replace

import pytest

from scripts.soak import (
    OUT,
    START,
    Job,
    Run,
    Sign,
    SoakError,
    comparable,
    compare,
    jobs,
    kill_once,
    members,
    plan_kills,
    soak,
    stage,
    training_signs,
    typical_gaps,
)

pytestmark = pytest.mark.kill

# Writes 40 records and a manifest; started again, it goes on (or, told so, forgets to or does it wrong).
COUNTER = """
import json, pathlib, sys, time
how, out = sys.argv[1], pathlib.Path("out")
out.mkdir(exist_ok=True)
records, manifest = out / "toy.jsonl", out / "manifest.json"
if manifest.exists():
    sys.exit(print("toy: complete in", out))
done = len(records.read_text().splitlines()) if records.exists() else 0
if how == "anew":
    records.unlink(missing_ok=True)
elif done:
    print("toy: continues at record", done)
first = done + (how == "skips" and done > 0) if how != "anew" else 0
with open(records, "a") as file:
    for i in range(first, 40):
        print(i, file=file, flush=True)
        time.sleep(0.01)
fresh = out / ".manifest"
fresh.write_text(json.dumps({"complete": True, "time": time.time()}))
fresh.replace(manifest)
time.sleep(0.3)
"""


def toy(how="well"):
    return stage("toy", [], [sys.executable, "-c", COUNTER, how])


def test_a_job_that_continues_passes(tmp_path, capsys):
    verdict = soak(toy(), tmp_path, kills=4, seed=1)
    assert verdict == "4 kills (2 start, 1 chunk, 1 complete; 0 left something cut short): 2 files as undisturbed, " \
        "bit by bit"  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("undisturbed: ")
    assert [line.split()[:2] for line in lines[1:]] == [["kill", f"{number}/4"] for number in range(1, 5)]
    assert "ms into the end; on disk: 40 records" in lines[-1]


def test_a_job_that_loses_a_record_fails(tmp_path):
    with pytest.raises(SoakError, match=r"1 of 2 files differ:\ntoy.jsonl: differs"):
        soak(toy("skips"), tmp_path, kills=4, seed=1)


def test_a_job_that_begins_anew_fails(tmp_path):
    """Its bytes are right in the end, but what a kill costs is all that was done."""
    with pytest.raises(SoakError, match="expected a line 'continues at record' in the log"):
        soak(toy("anew"), tmp_path, kills=4, seed=1)


def test_a_job_that_gives_no_signs_fails(tmp_path):
    with pytest.raises(SoakError, match="gave no sign of chunk, complete"):
        soak(replace(toy(), command=[sys.executable, "-c", ""]), tmp_path, kills=2, seed=0)


def test_a_job_that_has_ended_cannot_be_killed(tmp_path):
    with Run(toy(), tmp_path) as run:
        run.wait_for(None)
    assert kill_once(toy(), tmp_path, "chunk", 0.1, random.Random(0), limit=60) is None


ERROR = ("raise SystemExit('no room')", 60, "(?s)ended with exit code 1.*no room")
HANG = ("import time; time.sleep(60)", 0.5, "hung for 0.5 s")


@pytest.mark.parametrize("code, limit, said", [ERROR, HANG], ids=["error", "hang"])
def test_errors_and_hangs_are_failures(tmp_path, code, limit, said):
    job = Job([], [sys.executable, "-c", code], lambda _: {}, {}, lambda _: "", lambda _: "")
    with pytest.raises(SoakError, match=said), Run(job, tmp_path) as run:
        run.wait_for(None, limit=limit)
    assert members(run.process.pid) == []


def test_a_kill_leaves_nobody(tmp_path):
    """A launcher with a rank and the rank's worker: grandchildren are of the same group."""
    command = ["bash", "-c", "bash -c 'sleep 60 & sleep 60' & sleep 60"]
    with Run(Job([], command, lambda _: {}, {}, lambda _: "", lambda _: ""), tmp_path) as run:
        while len(members(run.process.pid)) < 5:
            time.sleep(0.01)
    assert members(run.process.pid) == [] and run.process.returncode == -9


def test_a_kill_comes_within_its_phase(tmp_path):
    """However long it was to wait: the next sign ends the phase."""
    told = kill_once(toy(), tmp_path, "chunk", gap=30.0, draw=random.Random(3), limit=60)
    assert told is not None and float(told.split("ms into")[0].split(",")[1]) < 5000


def test_kills_are_spread_over_the_phases():
    kinds = plan_kills(["start", "step", "save", "final"], 10, random.Random(0))
    assert kinds[-1] == "final" and sorted(kinds[:-1]) == ["save"] * 3 + ["start"] * 3 + ["step"] * 3
    assert kinds != plan_kills(["start", "step", "save", "final"], 10, random.Random(1))


def test_gaps_on_paper():
    """Start 0-4; steps 4-5 and 6-9: median 2; the save 5-6."""
    signs = [(0.0, START), (4.0, Sign("step", 1)), (5.0, Sign("save", 1)), (6.0, Sign("step", 2))]
    assert typical_gaps(signs, end=9.0) == {"start": 4.0, "step": 2.0, "save": 1.0}


def test_signs_of_a_training(tmp_path):
    (tmp_path / "log.txt").write_text("\r 50%|##   | step     1 training: loss 0.69\nstep     2 training: loss 0.68\n")
    checkpoint = tmp_path / OUT / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    assert training_signs(tmp_path).keys() == {Sign("step", 2), Sign("evaluation", 2), Sign("save", 2)}
    (checkpoint / "trainer_state.json").write_text("{}")
    (tmp_path / OUT / "model.safetensors").write_text("")
    signs = training_signs(tmp_path)
    assert signs.keys() > {Sign("rotation", 2), Sign("final")}
    assert signs[Sign("save", 2)] == signs[Sign("rotation", 2)] > 0


def test_time_is_not_compared():
    history = [{"loss": 0.5, "speed/pairs_per_second": 3.0}, {"train_runtime": 9, "train_samples_per_second": 1}]
    assert comparable({"log_history": history, "time": 4}) == {"log_history": [{"loss": 0.5}, {}]}
    assert comparable({"target_modules": ["v", "k"]}) == {"target_modules": ["k", "v"]}


def test_comparison(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / "checkpoint-2").mkdir(parents=True)
        (tmp_path / name / "weights").write_text("same")
        (tmp_path / name / "manifest.json").write_text(json.dumps({"records": 2, "time": name}))
    (tmp_path / "one" / ".weights.x1").write_text("temporary")
    (tmp_path / "one" / "checkpoint-2" / "weights").write_text("of an interrupted save")
    assert compare(tmp_path / "one", tmp_path / "other") == (2, [])
    (tmp_path / "other" / "weights").write_text("Same")
    (tmp_path / "other" / "more").write_text("")
    _, faults = compare(tmp_path / "one", tmp_path / "other")
    assert faults == [f"more: only in {tmp_path / 'other'}", "weights: differs"]


def test_the_table_has_work_for_every_kill():
    """Each kill takes a stage at most two chunks further (the awaited one and the next), a training three steps."""
    for kills in (2, 20):
        command = jobs(kills)["train"].command
        assert int(command[command.index("--max_steps") + 1]) == 3 * kills
        pairs = jobs(kills)["reference"].prepare[0]
        assert int(pairs[pairs.index("--pairs") + 1]) / 4 > 2 * kills
