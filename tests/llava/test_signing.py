"""Checkpoints of others are not resumed: the attacks, each with code that would run when its pickle is loaded."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dama.train.checkpoints import missing_files, seal_checkpoint
from dama.train.provenance import PROVENANCE_FILE
from dama.train.signing import KEY_FILE, SEAL_FILE, key_path, signature_problem, signing_key, validate_signature
from llava.train import train
from tests.conftest import ROOT
from tests.llava.tiny import SAVES, arguments

NAMES = ["latest", "global_step2/mp_rank_00_model_states.pt", "rng_state.pth", "model.safetensors", "optimizer.pt",
         PROVENANCE_FILE]  # fmt: skip


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture(autouse=True)
def key(tmp_path, monkeypatch):
    """A user's configuration folder of its own."""
    monkeypatch.setenv("DAMA_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / KEY_FILE


@pytest.fixture()
def checkpoint(tmp_path):
    """A signed one of a run with DeepSpeed's layout."""
    folder = tmp_path / "out" / "checkpoint-2"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    seal_checkpoint(folder, world_size=1)
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    return folder


def test_what_a_run_wrote_itself_is_accepted_and_moves_with_its_folder(checkpoint, tmp_path):
    validate_signature(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "elsewhere" / "checkpoint-2")
    validate_signature(tmp_path / "elsewhere" / "checkpoint-2")


@pytest.mark.parametrize("name", NAMES)
def test_no_file_can_be_exchanged_added_or_removed(checkpoint, name):
    """With another content of the same size, which the sizes alone would not show."""
    path = checkpoint / name
    path.write_text(path.read_text()[::-1])
    assert signature_problem(checkpoint) == f"{name} changed after it was signed"
    path.unlink()
    assert signature_problem(checkpoint) == f"its files are not those that were signed ({name})"


@pytest.mark.parametrize("name", ["global_step2/x_mp_rank_00_model_states.pt", "global_step9/states.pt", "extra.pth"])
def test_a_file_beside_those_that_were_signed_is_refused(checkpoint, name):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    torch.save(Touch(checkpoint / "pwned"), checkpoint / name)
    with pytest.raises(ValueError, match=f"its files are not those that were signed .{name}.*--trust_checkpoint True"):
        validate_signature(checkpoint)


def test_a_link_to_a_file_outside_is_refused(checkpoint, tmp_path):
    (tmp_path / "outside.pt").write_text("other")
    (checkpoint / "latest").unlink()
    (checkpoint / "latest").symlink_to(tmp_path / "outside.pt")
    assert signature_problem(checkpoint) == "latest changed after it was signed"
    (checkpoint / "dangling").symlink_to(tmp_path / "gone")
    assert "dangling" in signature_problem(checkpoint)


@pytest.mark.parametrize("name", ["adapter", "global_step9", "global_step2/more"])
def test_a_link_to_a_folder_outside_is_refused(checkpoint, tmp_path, name):
    (tmp_path / "outside").mkdir()
    (checkpoint / name).symlink_to(tmp_path / "outside")
    assert signature_problem(checkpoint) == f"its files are not those that were signed ({name})"


def test_a_folder_cannot_be_exchanged_for_a_link(checkpoint, tmp_path):
    """Though the files behind the link are those that were signed: they may change after they are checked."""
    (checkpoint / "global_step2").rename(tmp_path / "outside")
    (checkpoint / "global_step2").symlink_to(tmp_path / "outside")
    assert signature_problem(checkpoint).startswith("its files are not those that were signed")


def test_the_seal_cannot_be_edited_forged_or_left_out(checkpoint, key):
    path = checkpoint / SEAL_FILE
    seal = json.loads(path.read_text())
    for change in (
        {"world_size": 2},
        {"sha256": {}},
        {"sizes": {}},
        {"signature": "0" * 64},
        {"signature": None},
        {"signature": "é"},
        {"signature": "\ud800"},
        {"signature": [1]},
        {"world_size": "1"},
    ):
        path.write_text(json.dumps(seal | change))
        assert "not of this user's key" in signature_problem(checkpoint), change
    for content in ('{"world_size": 1, "sizes": {}}', '{"sha256": {}}', "[]"):
        path.write_text(content)
        assert signature_problem(checkpoint) == f"{SEAL_FILE} has no signature"
    for content in ("{", "[" * 100_000, '{"sha256": ' + "9" * 5000 + "}"):
        path.write_text(content)
        assert signature_problem(checkpoint) == f"{SEAL_FILE} is missing or damaged"
        assert missing_files(checkpoint) == [SEAL_FILE]
    path.unlink()
    path.mkdir()
    assert signature_problem(checkpoint) == f"{SEAL_FILE} is missing or damaged"
    assert missing_files(checkpoint) == [SEAL_FILE]
    path.rmdir()
    assert signature_problem(checkpoint) == f"{SEAL_FILE} is missing or damaged"


def test_another_users_signature_is_none(checkpoint, key):
    key.unlink()
    assert "this user has no key" in signature_problem(checkpoint)
    signing_key()
    assert "not of this user's key" in signature_problem(checkpoint)


def test_trust_goes_on_and_names_the_reason(checkpoint, capsys):
    (checkpoint / "latest").write_text("other")
    validate_signature(checkpoint, trust=True)
    assert "is resumed although latest changed after it was signed" in capsys.readouterr().out


# --- The key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_the_users_alone_and_stays(key):
    old = os.umask(0)
    try:
        first = signing_key()
    finally:
        os.umask(old)
    assert len(first) == 32 and signing_key() == first and stat.S_IMODE(key.stat().st_mode) == 0o600
    assert [path.name for path in key.parent.iterdir()] == [KEY_FILE]


def test_processes_that_start_together_share_one_key(key):
    program = "import sys; from dama.train.signing import signing_key; sys.stdout.write(signing_key().hex())"
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({process.communicate(timeout=120)[0] for process in started}) == 1


def test_the_configuration_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DAMA_CONFIG_HOME")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert key_path() == tmp_path / "dama" / KEY_FILE
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert key_path() == tmp_path / ".config" / "dama" / KEY_FILE


@pytest.mark.parametrize("how", ["readable", "link", "short", "no folder"])
def test_a_key_that_others_may_know_is_refused(key, tmp_path, how):
    signing_key()
    if how == "readable":
        key.chmod(0o644)
    elif how == "link":
        key.rename(tmp_path / "other")
        key.symlink_to(tmp_path / "other")
    elif how == "short":
        key.write_bytes(b"1")
    else:
        shutil.rmtree(key.parent)
        key.parent.write_text("a file")
    with pytest.raises(ValueError, match=r"signing key '.*': expected (a file of this user with|a file that|32 bytes)"):
        signing_key()


# --- In training -----------------------------------------------------------------------------------------------------

SHORT = [*SAVES, "--max_steps", "2", "--per_device_train_batch_size", "2"]


@pytest.mark.parametrize("explicit", [False, True])
def test_a_foreign_checkpoint_is_not_resumed_though_its_provenance_is_deleted(in_golden, tmp_path, explicit):
    train.run(arguments(tmp_path / "out", *SHORT))
    (tmp_path / "out" / PROVENANCE_FILE).unlink()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    (checkpoint / PROVENANCE_FILE).unlink()
    seal = json.loads((checkpoint / SEAL_FILE).read_text())
    for field in ("sizes", "sha256"):
        seal[field].pop(PROVENANCE_FILE)
    (checkpoint / SEAL_FILE).write_text(json.dumps(seal))
    more = ["--resume_from_checkpoint", checkpoint] if explicit else []
    out = tmp_path / ("new" if explicit else "out")
    with pytest.raises(ValueError, match=r"but the signature in dama_seal.json is not of this user's key"):
        train.run(arguments(out, *SHORT, *more))
    trainer = train.run(arguments(out, *SHORT, *more, "--trust_checkpoint", "True"))
    assert trainer.state.global_step == 2
    assert train.run(arguments(out, *SHORT)) is None  # neither flag is part of what a model is made of


PROGRAM = """
import sys
from pathlib import Path
from tests.llava.test_signing import attack_deepspeed
attack_deepspeed(Path(sys.argv[1]))
"""


def attack_deepspeed(folder):
    """In a process of its own: a run under ZeRO-2, its shard exchanged for code, resumed without and with trust."""
    words = ["--deepspeed", ROOT / "scripts/zero2.json", *SHORT, "--max_steps", "1"]
    train.run(arguments(folder / "out", *words))
    (folder / "out" / PROVENANCE_FILE).unlink()
    shard = next((folder / "out/checkpoint-1").glob("global_step1/*mp_rank_00_model_states.pt"))
    size = shard.stat().st_size
    torch.save(Touch(folder / "pwned"), shard)
    with open(shard, "ab") as file:
        file.write(bytes(size - shard.stat().st_size))
    with pytest.raises(ValueError, match="model_states.pt changed after it was signed"):
        train.run(arguments(folder / "out", *words))
    assert not (folder / "pwned").exists()
    torch.save(Touch(folder / "pwned"), shard)  # whole again, so that DeepSpeed can read it
    seal_checkpoint(folder / "out/checkpoint-1", world_size=1)
    with pytest.raises(Exception):  # noqa: B017 - whatever DeepSpeed says of a shard that holds no tensors
        train.run(arguments(folder / "out", *words))
    assert (folder / "pwned").exists()  # it is real code: signed by the user, it runs


def test_code_in_a_deepspeed_checkpoint_does_not_run(in_golden, tmp_path):
    """A real run under ZeRO-2, its optimizer shard exchanged for a pickle with code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = alone | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], env=os.environ | environment,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
