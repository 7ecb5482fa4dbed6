"""A served model answers HallusionBench, MMStar and CHAIR; an image is sent where the question has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.evaluate import main
from playground.tinycoco.benchmarks import write_benchmarks
from tests.openai_server import Call, ScriptedServer

SCENES = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_benchmarks(folder, SCENES, "test")
    return folder


def has_image(call: Call) -> bool:
    content = call.body["messages"][-1]["content"]
    return isinstance(content, list) and any(part["type"] == "image_url" for part in content)


def run(world: Path, out: Path, url: str, *words: str) -> dict[str, Any]:
    served = ["--backend", "openai", "--base-url", url, "--out", str(out)]
    assert main([words[0], "served-vlm", *served, *words[1:]]) == 0
    return json.loads((out / f"served-vlm/{words[0]}" / ("blind" * ("--blind" in words)) / "results.json").read_text())


@pytest.mark.parametrize(
    "words, reply, metric, shown, hidden",
    [
        (("chair",), "A dog and a dog.", "mean_words", 2, 0),
        (("mmstar", "--blind"), "A", "unparsed_share", 2, 2),
        (("hallusionbench",), "Yes.", "question_accuracy", None, None),
    ],
)
def test_a_served_model_answers(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    reply: str,
    metric: str,
    shown: int | None,
    hidden: int | None,
) -> None:
    """Asked once: the second run finds its answers complete and gives the same results."""
    monkeypatch.setenv("DAMA_BENCH_DATA", str(world))
    server = ScriptedServer(lambda call: reply)
    with server as url:
        found = run(world, tmp_path, url, *words)
        asked = len(server.calls)
        assert run(world, tmp_path, url, *words) == found and len(server.calls) == asked
    images = sum(map(has_image, server.calls))
    if shown is None:
        rows = json.loads((world / "hallusionbench/HallusionBench.json").read_text())
        shown, hidden = (sum((row["filename"] is None) is none for row in rows) for none in (False, True))
        yes = sum(row["gt_answer"] == "1" for row in rows)
        assert found["metrics"][metric] == pytest.approx(100 * yes / len(rows))
    assert (images, asked - images) == (shown, hidden) and found["metrics"][metric] is not None
    assert found["provenance"]["counts"]["missing"] == 0
