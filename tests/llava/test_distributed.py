"""Two real ranks under DeepSpeed ZeRO-2 on CPUs: the steps of one rank, a second call that skips, an error seen."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.train import train, train_dpo
from llava.train.arguments import parse_arguments
from tests.conftest import GOLDEN, ROOT
from tests.llava.test_reference import reference, world  # noqa: F401  (a fixture)
from tests.llava.tiny import PAPER, arguments, flags

pytestmark = pytest.mark.distributed

COMMON = [*PAPER, "--num_train_epochs", "3", "--save_strategy", "no", "--eval_pairs", "1"]


def launch(words, zero=2, launcher="deepspeed"):
    """Two ranks of a training, by DeepSpeed's launcher or by torch's, which starts faster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    binaries = Path(sys.executable).parent
    launchers = {
        "deepspeed": [binaries / "deepspeed", "--quiet", "--num_gpus", "2"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"],
    }
    command = [*map(str, launchers[launcher]), "--master_port", str(port)]
    command += [str(ROOT / "llava/train/train_mem.py"), "--deepspeed", str(ROOT / f"scripts/zero{zero}.json")]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{binaries}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [*command, *words], cwd=GOLDEN, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=800)
    finally:
        with suppress(ProcessLookupError):  # the ranks of a launcher that was waited for in vain
            os.killpg(process.pid, signal.SIGKILL)
    done = subprocess.CompletedProcess(process.args, process.returncode, out, errors)
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))  # nothing is left behind, whatever came of it
    return done


def training_log(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]


@pytest.mark.parametrize("ratio", ["0.75", "0.25"])
def test_two_ranks_take_the_steps_of_one(in_golden, tmp_path, ratio):
    """7 pairs, 4 a step: 1 x 4 and 2 x 1 x 2, so that the last step is incomplete and a micro-batch stays empty.

    With a ratio of 0.25 one pair is selected and one of the ranks has none. DeepSpeed's launcher is run once.
    """
    common = [*COMMON, "--select_ratio", ratio]
    one = flags(tmp_path / "one", *common, "--per_device_train_batch_size", "4")
    train_dpo.run(parse_arguments(one))
    two = flags(tmp_path / "two", *common, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2")
    done = launch(two, launcher="deepspeed" if ratio == "0.75" else "torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [training_log(tmp_path / name / "out") for name in ("one", "two")]
    for single, double in zip(*rows, strict=True):
        for name in ("loss", "grad_norm", "dama/R_bar", "dama/alpha_M", "dama/selected"):
            assert double[name] == pytest.approx(single[name], rel=2e-4, abs=2e-5), name
    if ratio == "0.75":
        called_again(two)


def test_adapters_over_half_precision_under_zero3(in_golden, tmp_path):
    """DeepSpeed joins the shares of base and adapters in one buffer. Its steps are those of one rank."""
    common = [*COMMON, "--bf16", "True", "--lora_enable", "True", "--lora_r", "4", "--lora_dropout", "0"]
    train_dpo.run(parse_arguments(flags(tmp_path / "one", *common, "--per_device_train_batch_size", "4")))
    done = launch(flags(tmp_path / "two", *common, "--per_device_train_batch_size", "2"), 3, "torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [[row["loss"] for row in training_log(tmp_path / name / "out")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    adapters = load_file(tmp_path / "two" / "out" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapters.values()} == {torch.bfloat16}
    assert any(weight.any() for name, weight in adapters.items() if "lora_B" in name)  # zero before the first step


def test_two_ranks_with_all_kinds_of_views_and_reference_log_probs(world):  # noqa: F811
    """ZeRO-2: a running mean, a second image, and weights of tokens by a reference that is stored per token."""
    chosen = ["--loss", "mpo", "mdpo:0.5", "--token_weights", "segments:5", "--corruption", "mask_patches"]
    assert reference(world, *chosen) == 0
    assert (world / "reference" / "tokens.f32").stat().st_size > 0
    common = [*PAPER, "--max_steps", "3", "--save_strategy", "no", *chosen, "--data_path",
              str(world / "pairs.json"), "--reference", str(world / "reference"), "--strategy", "model"]  # fmt: skip
    train_dpo.run(parse_arguments(flags(world / "one", *common, "--per_device_train_batch_size", "4")))
    layout = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    done = launch(flags(world / "two", *common, *layout), launcher="torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [training_log(world / name / "out") for name in ("one", "two")]
    assert rows[0][-1]["loss"] < rows[0][0]["loss"]
    for single, double in zip(*rows, strict=True):
        for name in ("loss", "grad_norm", "dama/R_bar", "dama/alpha_M", "dama/selected"):
            assert double[name] == pytest.approx(single[name], rel=2e-4, abs=2e-5), name


def called_again(words):
    """The same call has nothing left to do, another is refused."""
    again = launch(words, launcher="torchrun")
    assert again.returncode == 0 and "training: complete" in again.stdout, again.stderr[-3000:]
    other = launch([*words, "--dpo_beta", "0.3"], launcher="torchrun")
    assert other.returncode != 0 and "--dpo_beta: 0.1 -> 0.3" in other.stderr


@pytest.mark.parametrize("zero", [2, 3])
def test_fine_tuning_on_two_ranks_takes_the_steps_of_one(in_golden, tmp_path, zero):
    """1 rank x 2 micro-batches of one row = 2 ranks x 1.

    Two of the six rows are text only, so that at times one rank has an image and the other has none.
    """
    common = ["--task", "LM", "--num_train_epochs", "2", "--save_strategy", "no", "--per_device_train_batch_size", "1",
              "--logging_steps", "1", "--learning_rate", "5e-4"]  # fmt: skip
    train.run(arguments(tmp_path / "one", *common, "--gradient_accumulation_steps", "2"))
    words = ["--model_name_or_path", "llava-v1.5-tiny", "--version", "v1", "--data_path", "sft/records.json",
             "--image_folder", "images", "--use_cpu", "True", "--disable_tqdm", "True", *common]  # fmt: skip
    done = launch([*words, "--output_dir", str(tmp_path / "two")], zero, "torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [[row["loss"] for row in training_log(tmp_path / name)] for name in ("one", "two")]
    deviations = [abs(a - b) for a, b in zip(*losses, strict=True)]
    sys.stdout.write(
        f"ZeRO-{zero}: max deviation {max(deviations):.1e}, mean {sum(deviations) / len(deviations):.1e}\n"
    )
    assert max(deviations) < 1e-4 and losses[0][-1] < losses[0][0]
