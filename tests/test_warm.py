"""Commands that fork from a warm process are what a real Python would make of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.rehearsal.build import unavailable
from llava.rehearsal.launch import environment
from tests import warm
from tests.conftest import ROOT
from tests.warm.protocol import PYTHON, SERVERS, SOCKET, at_import, is_command


@pytest.fixture(scope="module")
def stand_in():
    """The stand-in, of the servers that run or of new ones."""
    before = sys.executable
    warm.start()
    yield str(Path(os.environ[SOCKET]).with_name("bin") / "python")
    sys.executable = before


def run(python, *words, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [python, "-m", "tests.warm.echo", *words], input="said", capture_output=True, text=True, check=False,
        env=environment, timeout=300,
    )  # fmt: skip


def test_a_fork_has_the_callers_arguments_folder_streams_and_environment(stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    done = run(stand_in, "", "a b", GIVEN="this", TMPDIR=str(tmp_path / "scratch"))
    about = json.loads(done.stdout)
    mask = os.umask(0)
    os.umask(mask)
    assert about.pop("pid") != os.getpid()
    assert about == {"words": ["", "a b"], "folder": str(tmp_path), "umask": mask, "said": "said", "warm": True,
                     "given": "this", "gpus": 0, "scratch": str(tmp_path / "scratch")}  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("devices", [1, 3])
def test_a_fork_on_the_null_device_has_the_devices_that_it_asks_for(stand_in, devices):
    if (reason := unavailable()) is not None:
        pytest.skip(reason)
    done = run(stand_in, "", **environment(gib=2, devices=devices))
    assert json.loads(done.stdout)["warm"] is True and json.loads(done.stdout)["gpus"] == devices


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [("exit 3", 3, ""), ("message", 1, "a message\n"), ("error", 1, "ValueError: an error\n"),
     ("term", -signal.SIGTERM, ""), ("interrupt", -signal.SIGINT, "KeyboardInterrupt\n")],
)  # fmt: skip
def test_it_ends_as_a_real_python_does(stand_in, how, code, message):
    for python in (stand_in, os.environ[PYTHON]):
        done = run(python, how)
        assert done.returncode == code and done.stderr.endswith(message), (python, done.stderr)
        assert json.loads(done.stdout)["warm"] is (python == stand_in)


def test_stand_ins_killed_at_any_moment_leave_the_servers_alive(stand_in):
    """Before their request is whole, before and after they read the answer: every later command still forks."""
    words = ["-m", "tests.warm.echo", ""]
    for server in range(SERVERS):
        for part in (0, 1, 2000, None):
            caller = socket.socket(socket.AF_UNIX)
            caller.connect(f"{os.environ[SOCKET]}{server}")
            with open(os.devnull, "r+") as null:
                request = {"words": words, "folder": "/", "environment": dict(os.environ), "ignored": [], "limits": {},
                           "umask": 0, "at_import": at_import(dict(os.environ))}  # fmt: skip
                line = json.dumps(request).encode() + b"\n"
                if part != 0:
                    socket.send_fds(caller, [line[:part]], [null.fileno()] * 3)
            caller.close()
    for rank in range(SERVERS):
        for _ in range(2):
            assert json.loads(run(stand_in, "", LOCAL_RANK=str(rank)).stdout)["warm"], warm.counts()


@pytest.mark.parametrize("changed", [{"OMP_NUM_THREADS": "3"}, {"PYTHONHASHSEED": "1"}, {"DAMA_COLD": "1"}])
def test_what_only_a_new_process_can_follow_gets_one(stand_in, changed):
    assert json.loads(run(stand_in, "", **changed).stdout)["warm"] is False


def test_a_killed_stand_in_takes_its_fork_with_it(stand_in):
    process = subprocess.Popen(
        [stand_in, "-m", "tests.warm.echo", "sleep"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    fork = json.loads(process.stdout.readline())["pid"]
    assert fork != process.pid and Path(f"/proc/{fork}").exists()
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while Path(f"/proc/{fork}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.fast
def test_only_commands_of_the_repository_and_launchers_fork():
    yes = (["-m", "dama", "train"], ["-u", str(ROOT / "llava/train/train_mem.py")], ["-m", "torch.distributed.run"])
    no = (["-c", "import dama"], ["-m", "pip"], ["-m"], [], ["-u"], ["-X", "dev", "-m", "dama"], ["/tmp/script.py"])
    assert all(map(is_command, yes)) and not any(map(is_command, no))
