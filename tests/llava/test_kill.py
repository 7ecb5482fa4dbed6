"""Real `kill -9` of a tiny training and of each stage: started again, they end bit by bit as if undisturbed."""

import json
import os
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from dama import cli
from dama.train.checkpoints import last_complete_checkpoint, missing_files, seal_checkpoint
from dama.train.provenance import PROVENANCE_FILE
from llava.eval import generate
from llava.train import train_mem
from llava.train.checkpoints import is_finished, keep_tower_inside
from playground.tinycoco import __main__ as tinycoco
from scripts.soak import OUT, Run, compare, free_port, jobs, make_folder, remove_shared_memory

KILLS = 2  # of the job table: sets how large its jobs are


@pytest.fixture(autouse=True)
def one_thread():
    """As in the killed processes: sums in another order would be other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_here(command, folder, monkeypatch):
    """The same command in this process, where the imports are paid for."""
    monkeypatch.chdir(folder)
    mains = {"dama": cli.main, "llava.eval.generate": generate.main, "playground.tinycoco": tinycoco.main}
    is_module = command[1] == "-m"
    main = mains[command[2]] if is_module else train_mem.main
    assert main(command[3:] if is_module else command[2:]) == 0


def prepare(job, folder, monkeypatch):
    inputs = make_folder(folder / "inputs")
    for command in job.prepare:
        run_here(command, inputs, monkeypatch)
    return make_folder(folder / "undisturbed"), make_folder(folder / "killed")


def kill_at(job, folder, kind, count=1):
    """Starts the job and kills it at the `count`-th such sign."""
    with Run(job, folder) as run:
        assert run.wait_for(kind, count, limit=300) is not None, f"ended before: {run.log()}"


def run_to_the_end(job, folder):
    """Starts the job and waits for it; its log."""
    with Run(job, folder) as run:
        run.process.wait(300)  # without a look at its signs every millisecond
        run.wait_for(None)
    return run.log()


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """(folder with an undisturbed training of one rank, its job)."""
    job, folder = jobs(KILLS)["train"], tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as monkeypatch:
        undisturbed, _ = prepare(job, folder, monkeypatch)
        run_here(job.command, undisturbed, monkeypatch)
    return folder, job


@pytest.mark.kill
def test_training_killed_at_a_save(training, monkeypatch, capsys):
    """The second save, so that there is a whole checkpoint beside the one that is cut short."""
    folder, job = training
    kill_at(job, folder / "killed", "save", 2)
    whole = last_complete_checkpoint(folder / "killed" / OUT)
    capsys.readouterr()
    run_here(job.command, folder / "killed", monkeypatch)
    assert f"continuing from {OUT}/{whole.name}\n" in capsys.readouterr().out
    files, errors = compare(folder / "undisturbed" / OUT, folder / "killed" / OUT)
    assert files > 20 and not errors


@pytest.mark.distributed
@pytest.mark.kill
def test_two_ranks_killed_in_a_step(training, tmp_path):
    """Under DeepSpeed ZeRO-2; torch's launcher, which starts faster, takes the runs that are not killed."""
    port = free_port()
    deepspeed = jobs(KILLS, ranks=2, port=port)["train"]
    script = next(i for i, word in enumerate(deepspeed.command) if word.endswith("train_mem.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    quick = replace(deepspeed, command=torchrun + deepspeed.command[script:])
    (tmp_path / "inputs").symlink_to(training[0] / "inputs")
    undisturbed, killed = make_folder(tmp_path / "undisturbed"), make_folder(tmp_path / "killed")
    try:
        run_to_the_end(quick, undisturbed)
        kill_at(deepspeed, killed, "step", 2)
        log = run_to_the_end(quick, killed)
    finally:
        remove_shared_memory(port)
    assert f"continuing from {OUT}/checkpoint-2\n" in log
    files, errors = compare(undisturbed / OUT, killed / OUT)
    assert files > 20 and not errors


STATE = ["--loss", "mpo", "--token_weights", "segments:5"]  # a running mean over all steps so far


@pytest.mark.kill
def test_an_objective_with_state_killed_in_a_step(training, tmp_path, monkeypatch, capsys):
    """The running mean of the steps before comes from the checkpoint, the token weights' reference from the stage."""
    folder, job = training
    shutil.copytree(folder / "inputs", tmp_path / "inputs")
    *_, logps = [command for command in job.prepare if "reference" in command]
    run_here([*logps, "--per_token"], tmp_path / "inputs", monkeypatch)
    job = replace(job, command=[*job.command, *STATE])
    undisturbed, killed = make_folder(tmp_path / "undisturbed"), make_folder(tmp_path / "killed")
    run_here(job.command, undisturbed, monkeypatch)
    kill_at(job, killed, "step", 2)
    capsys.readouterr()
    run_here(job.command, killed, monkeypatch)
    assert f"continuing from {OUT}/checkpoint-2\n" in capsys.readouterr().out
    state = json.loads((killed / OUT / "checkpoint-6" / "dama_state.json").read_text())
    assert state["loss"]["count"] > 6 * 8 and state["loss"]["mean"] != 0
    files, errors = compare(undisturbed / OUT, killed / OUT)
    assert files > 20 and not errors


@pytest.mark.kill
@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [("hardness", [], 2), ("reference", [], 2), ("reference", ["--per_token"], 3), ("generate", [], 2)],
)
def test_stage_killed_twice(name, more, expected, tmp_path, monkeypatch, capsys):
    job = jobs(KILLS)[name]
    job = replace(job, command=[*job.command, *more])
    undisturbed, killed = prepare(job, tmp_path, monkeypatch)
    run_here(job.command, undisturbed, monkeypatch)
    for _ in range(2):
        kill_at(job, killed, "chunk")
    capsys.readouterr()
    run_here(job.command, killed, monkeypatch)
    assert "continues at record" in capsys.readouterr().out
    files, errors = compare(undisturbed / OUT, killed / OUT)
    assert files == expected and not errors


@pytest.mark.kill
def test_a_kill_in_the_final_save_costs_no_step_too_many(training, tmp_path, monkeypatch):
    """6 steps of 7 an epoch: what is left of the epoch is not trained on when only the save is repeated."""
    folder, job = training
    (tmp_path / "inputs").symlink_to(folder / "inputs")
    again = tmp_path / "again"
    shutil.copytree(folder / "undisturbed", again)
    (again / OUT / PROVENANCE_FILE).unlink()
    weights = again / OUT / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    run_here(job.command, again, monkeypatch)
    _, errors = compare(folder / "undisturbed" / OUT, again / OUT)
    assert not errors


# --- What a whole checkpoint is --------------------------------------------------------------------------------------

SHARDS = [
    "model.safetensors", "dama_state.json", "latest", "global_step4/mp_rank_00_model_states.pt",
    "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt", "global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "rng_state_0.pth", "rng_state_1.pth",
]  # fmt: skip


def write_checkpoint(folder, step, names=SHARDS, world_size=2):
    checkpoint = folder / f"checkpoint-{step}"
    for name in names:
        path = checkpoint / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} of step {step}")
    seal_checkpoint(checkpoint, world_size)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


@pytest.mark.parametrize("name", [*SHARDS, "dama_seal.json", "trainer_state.json"])
@pytest.mark.parametrize("how", ["missing", "cut short"])
def test_every_rank_file_must_be_there_and_complete(tmp_path, capsys, name, how):
    older, newer = write_checkpoint(tmp_path, 4), write_checkpoint(tmp_path, 10)
    assert last_complete_checkpoint(tmp_path) == newer
    if how == "missing":
        (newer / name).unlink()
    else:
        os.truncate(newer / name, (newer / name).stat().st_size // 2)
    assert missing_files(newer) == [name]
    assert last_complete_checkpoint(tmp_path) == older
    assert f"checkpoint-10 is incomplete (its save or its removal was interrupted; no whole {name})" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("names", [["adapter_model.safetensors", "non_lora_trainables.bin"], ["mm_projector.bin"]])
def test_adapters_and_projectors_are_held_to_the_same(tmp_path, names):
    checkpoint = write_checkpoint(tmp_path, 2, [*names, "optimizer.pt", "rng_state.pth"], world_size=1)
    assert last_complete_checkpoint(tmp_path) == checkpoint
    (checkpoint / names[-1]).write_text("")
    assert last_complete_checkpoint(tmp_path) is None


def test_a_save_repeated_over_an_interrupted_one(tmp_path):
    """A seal, the trainer's state and a temporary file from before do not get into the new seal."""
    first = write_checkpoint(tmp_path, 4)
    (first / ".dama_state.json.x1y2").write_text("{")
    write_checkpoint(tmp_path, 4)
    (first / ".dama_state.json.x1y2").unlink()
    (first / "trainer_state.json").write_text('{"global_step": 4, "longer": true}')
    assert missing_files(first) == []


def test_another_number_of_ranks_is_refused(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 4)
    assert "WORLD_SIZE" not in os.environ
    with pytest.raises(ValueError, match=r"checkpoint-4: expected the 2 rank\(s\) that saved it .* got 1"):
        is_finished(tmp_path, {})
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_finished(tmp_path, {})


class Tower:
    inside_checkpoint = True

    def __init__(self, folder):
        self.folder = folder


def test_a_tower_copied_in_part_is_copied_again(tmp_path):
    """A kill between two files of the copy leaves nothing that passes for the tower."""
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "base" / name).write_text(name)
    saved = tmp_path / "saved"
    (saved / ".vision_tower.partial").mkdir(parents=True)
    (saved / ".vision_tower.partial" / "config.json").write_text("conf")
    model = type("Model", (), {"config": type("Config", (), {"mm_vision_tower": "vision_tower"})})()
    model.get_vision_tower = lambda: Tower(tmp_path / "base")
    keep_tower_inside(model, saved)
    assert sorted(path.name for path in saved.iterdir()) == ["vision_tower"]
    assert (saved / "vision_tower" / "model.safetensors").read_text() == "model.safetensors"
    assert (saved / "vision_tower" / "config.json").read_text() == "config.json"
