"""eval.compare --curve: differences at equal recall on paper, what is refused, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import benchmarks
from eval.compare import main
from eval.compare_curves import compare_curves
from eval.core import curves
from eval.core.statistics import RESAMPLES
from tests.eval.test_compare import item, results

pytestmark = pytest.mark.fast


def checkpoint(folder: Path, name: str, recall: float, wrong: float, images: int = 40, **changes: Any) -> Path:
    """Results in which every image has this recall, in percent, and this error rate."""
    parts = {"object_recall": [recall, 1.0], "mean_words": [recall / 2, 1.0]}
    parts |= {name: [wrong, 1.0] for name in ("response_level", "chairs", "mention_level")}
    return results(folder, name, [item(number, parts) for number in range(images)], **changes)


def run(folder: Path, name: str, *points: tuple[float, float]) -> list[str]:
    return [str(checkpoint(folder, f"{name}-{step}", *point)) for step, point in enumerate(points, 1)]


@pytest.fixture()
def dpo(tmp_path: Path) -> list[str]:
    return run(tmp_path, "dpo", (95, 37), (91, 17))


@pytest.fixture()
def dama(tmp_path: Path) -> list[str]:
    return run(tmp_path, "dama", (93, 22), (89, 9))


@pytest.fixture()
def start(tmp_path: Path) -> str:
    return str(checkpoint(tmp_path, "sft", 97, 57))


# ------------------------------------------------------------------------------------------------------- on paper


def test_a_gap_on_paper(dpo: list[str], dama: list[str], start: str) -> None:
    """DAMA goes from (97, 57) over (93, 22) to (89, 9).

    At 93 DPO has 27, at 89 nothing: -5. At DPO's 95 and 91, DAMA
    has 39.5 and 15.5 against 37 and 17: +2.5, -1.5. The mean is -4/3; all images are alike, and so are resamples.
    Without the start DAMA's line does not reach 95: (-5 - 1.5) / 2.
    """
    compared = compare_curves([dpo, dama], start)
    gap = compared.gap(compared.runs[1], "response_level")
    assert gap.difference == pytest.approx((-4 / 3,) * 3) and gap.points == (1, 2)
    compared = compare_curves([dpo, dama])
    gap = compared.gap(compared.runs[1], "response_level")
    assert gap.difference == pytest.approx((-3.25,) * 3) and gap.points == (1, 1)


def test_a_single_result_against_a_curve(tmp_path: Path, dpo: list[str]) -> None:
    """At a recall of 92 DPO's line from (95, 37) to (91, 17) has 22; 12 is 10 less."""
    compared = compare_curves([dpo, run(tmp_path, "one", (92, 12))])
    gap = compared.gap(compared.runs[1], "response_level")
    assert gap.difference == pytest.approx((-10,) * 3) and gap.points == (1, 0)


def test_images_are_resampled_together_for_all_checkpoints(tmp_path: Path) -> None:
    """Half of the images are named wrongly, by all models: rates vary from resample to resample, their gap does not.

    The curve is 100 * [image is hard] + 2 * (recall - 90) and the other's is 3 less, so the gap is -3 in each.
    """

    def uneven(name: str, recall: float, less: float) -> str:
        rates = [(100.0 if n % 2 else 0.0) + 2 * (recall - 90) - less for n in range(40)]
        metrics = ("response_level", "chairs", "mention_level")
        rows = [
            item(n, {"object_recall": [recall, 1.0]} | dict.fromkeys(metrics, [rate, 1.0]))
            for n, rate in enumerate(rates)
        ]
        return str(results(tmp_path, name, rows))

    compared = compare_curves([[uneven(f"a{r}", r, 0) for r in (90, 94)], [uneven(f"b{r}", r, 3) for r in (91, 93)]])
    own = compared.runs[0].values[0]["response_level"]
    assert own[1:].std() > 5
    assert compared.gap(compared.runs[1], "response_level").difference == pytest.approx((-3,) * 3)


def test_curves_that_do_not_meet_have_no_difference(tmp_path: Path, dpo: list[str]) -> None:
    compared = compare_curves([dpo, run(tmp_path, "terse", (60, 5), (55, 2))], names=["DPO", "terse"])
    assert compared.gap(compared.runs[1], "chairs").difference.value is None
    text = compared.report()
    assert "not comparable" in text and "DPO 91.0 to 95.0, terse 55.0 to 60.0" in text


def test_a_curve_of_one_point_and_equal_coverages() -> None:
    """One point is a curve at its own coverage alone; of two points at one coverage the later stays reachable."""
    point = curves.Curve(np.full((1, 1 + RESAMPLES), 90.0), np.full((1, 1 + RESAMPLES), 20.0))
    assert (point.at(np.full(1 + RESAMPLES, 90.0)) == 20).all()
    assert np.isnan(point.at(np.full(1 + RESAMPLES, 90.1))).all()
    twice = curves.Curve(np.full((2, 1 + RESAMPLES), 90.0), np.repeat([[20.0], [30.0]], 1 + RESAMPLES, axis=1))
    assert (twice.at(np.full(1 + RESAMPLES, 90.0)) == 30).all()


def test_intervals_need_nine_tenths_of_the_resamples() -> None:
    values = np.arange(1.0 + RESAMPLES)
    values[1 : 1 + RESAMPLES // 10] = np.nan
    assert curves.interval_of(values).value == 0
    values[1 + RESAMPLES // 10] = np.nan
    assert curves.interval_of(values).value is None


# ------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_compared_is_named(tmp_path: Path, dpo: list[str], dama: list[str], start: str) -> None:
    with pytest.raises(ValueError, match="expected two runs or more, got 1"):
        compare_curves([dpo])
    with pytest.raises(ValueError, match="expected a run of two checkpoints or more, or --start, got one result"):
        compare_curves([dpo[:1], dama[:1]])
    with pytest.raises(ValueError, match="(?s)dpo-1/results.json: given 2 times; .*Remedy: give --curve once for each"):
        compare_curves([dpo, [*dama, str(Path(dpo[0]).parent)]], start)
    with pytest.raises(ValueError, match="protocol: 'objhal-rules' in dpo-1, 'mine' in odd"):
        compare_curves([dpo, [str(checkpoint(tmp_path, "odd", 90, 1, protocol="mine"))]])
    silent = results(tmp_path, "silent", [item(n, {"object_recall": [0.0, 0.0]}) for n in range(40)])
    with pytest.raises(ValueError, match="silent: object_recall is undefined"):
        compare_curves([dpo, [str(silent)]])
    with pytest.raises(ValueError, match="--names: expected 2 different ones, one for each --curve, got A"):
        compare_curves([dpo, dama], names=["A"])


def test_a_benchmark_without_coverage_is_refused(tmp_path: Path) -> None:
    paths = [str(results(tmp_path, n, [item(0, {"total": [1.0, 1.0]})], benchmark="mmstar")) for n in "abc"]
    with pytest.raises(ValueError, match=r"measures how much is said \(.*objhal.*\), got MMStar\nRemedy: compare"):
        compare_curves([paths[:2], paths[2:]])


def test_every_benchmark_of_free_answers_on_hallucination_has_coverage() -> None:
    having = {each.name: each.trade_off.coverage for each in benchmarks.BENCHMARKS if each.trade_off is not None}
    assert having == {"objhal": "object_recall", "amber": "cover", "mmhal": "mean_words", "chair": "recall"}


# -------------------------------------------------------------------------------------------------------- command


def test_checkpoints_of_two_runs_are_named_by_their_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trainer calls both checkpoint-20; the folder above tells them apart."""
    paths = [
        checkpoint(tmp_path, f"{name}{step}", 90 + step, 20, checkpoint=f"runs/{name}/checkpoint-{step}")
        for name in ("dpo", "dama")
        for step in (1, 2)
    ]
    assert main(["--curve", *map(str, paths[:2]), "--curve", *map(str, paths[2:])]) == 0
    text = capsys.readouterr().out
    assert "dama - dpo at equal object recall " in text and ["dama", "dama_checkpoint-2"] in [
        line.split()[:2] for line in text.splitlines()
    ]


def test_the_command(dpo: list[str], dama: list[str], start: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs are named by what their checkpoints' names begin with; folders stand for the results in them."""
    folders = [str(Path(path).parent) for path in dama]
    assert main(["--curve", *dpo, "--curve", *folders, "--start", start]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["dama", "dama-1", "93.0", "46.5", "22.0", "22.0", "22.0"] in lines
    assert ["start", "sft", "97.0", "48.5", "57.0", "57.0", "57.0"] in lines
    assert text.count("dama - dpo at equal object recall") == 1
    assert ["CHAIRs", "%", "dama", "better", "-1.3", "[-1.3,", "-1.3]", "1", "of", "2", "2", "of", "2"] in lines


def test_beside_the_plain_comparison(
    dpo: list[str], dama: list[str], start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [dpo[1], dama[1], "--curve", *dpo, "--curve", *dama, "--start", start]
    assert main([*flags, "--names", "before", "after", "DPO", "DAMA"]) == 0
    text = capsys.readouterr().out
    assert text.index("after - before") < text.index("DAMA - DPO at equal object recall")
    assert main([*flags, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in record["runs"]] == ["dpo-2", "dama-2"]
    (row,) = (row for row in record["curve"]["rows"] if row["metric"] == "mention_level")
    assert row["differences"][0]["value"] == pytest.approx(-4 / 3)
    assert row["differences"][0]["points_compared"] == [1, 2] and row["differences"][0]["verdict"] == "dama better"


def test_errors_of_the_command(dpo: list[str], start: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--start", start]) == 2
    assert "--start: expected --curve beside it" in capsys.readouterr().err
    assert main([]) == 2
    assert "expected two results.json or more, got 0" in capsys.readouterr().err
    assert main(["--curve", *dpo, "--curve", "absent"]) == 2
    assert "absent: cannot be read" in capsys.readouterr().err
