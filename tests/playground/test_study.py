"""The study of DPO and DAMA: its declaration, its draws, figures on paper, and small cells for real."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dama.pairs import read_pairs
from eval.core import curves
from playground.tinycoco.__main__ import main
from playground.tinycoco.study import analysis, grid, mechanism, runner
from playground.tinycoco.study.analysis import RECALL, RESPONSE, Curve, Point, Study, verdict
from playground.tinycoco.study.claims import CONTRARY, HOLDS, NONE, OPEN, VERDICTS, borne_out, claims_of, summary
from playground.tinycoco.study.data import THIRDS, Pool, draw_ids, given_row, rows_of
from playground.tinycoco.study.findings import Findings
from playground.tinycoco.study.grid import CONDITIONS, DAMA, DPO, SEEDS, Cell, Scale, declare
from playground.tinycoco.study.page import SIGNS, marks_of, tone_of, write_study

ROOT = Path(__file__).resolve().parents[2]
SMALL = Scale(steps=4, stops=(2, 4), pool=96, pairs=24, small=8, probes=4, test=6, validation=4)


# --- The declaration --------------------------------------------------------------------------------------------------


def test_every_cell_is_declared_once_and_quick_is_a_part() -> None:
    cells = declare()
    assert len({cell.name for cell in cells}) == len(cells)
    per_seed = len(grid.RATES) * (len(grid.METHODS) + 2 * (len(CONDITIONS) - 1)) + len(grid.VARIATIONS)
    assert len(cells) == len(SEEDS) * per_seed and len(SEEDS) >= 5
    assert set(declare(quick=True)) < set(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)  # whole seeds first


# --- Draws ------------------------------------------------------------------------------------------------------------


def pool_of(count: int = 300) -> Pool:
    """Pairs whose delta is 0.01 times their number: two statements against one."""
    same, scale = {"question": "What?", "chosen": "A cat."}, Scale(pairs=100, small=25, probes=10)
    rows = {f"p{n}": {"idx": f"p{n}", "image_path": f"{n}.png", "rejected": f"{n}."} | same for n in range(count)}
    scores = {f"p{n}": ([0.01 * n, 0.2], [0.2]) for n in range(count)}
    return Pool(rows, scores, {f"p{n}": (-1.0 - n, -2.0 - n) for n in range(count)}, 50.0, scale)


def test_conditions_are_what_they_are_called() -> None:
    pool = pool_of()
    held_out = {id for ids in pool.probes.values() for id in ids}
    assert {third: len(ids) for third, ids in pool.probes.items()} == dict.fromkeys(THIRDS, 10)
    drawn = {condition: draw_ids(pool, condition, 3) for condition in CONDITIONS}
    for condition, ids in drawn.items():
        assert len(set(ids)) == len(ids) == (25 if condition == "small" else 100)
        assert not held_out & set(ids)
        assert ids == draw_ids(pool, condition, 3) != draw_ids(pool, condition, 4)
    assert drawn["small"] == drawn["clean"][:25] and drawn["flipped"] == drawn["clean"]
    rest = [id for id in pool.by_delta if id not in held_out]
    harder = set(rest[: len(rest) // 2])
    assert len(harder & set(drawn["hard"])) == 80 and len(harder & set(drawn["easy"])) == 20


def test_flipped_pairs_prefer_what_was_rejected(tmp_path: Path) -> None:
    pool = pool_of()
    rows = {row["idx"]: row for row in rows_of(pool, Cell("flipped", DPO, 1e-5, 0))}
    flipped = [id for id, row in rows.items() if row["flipped"]]
    assert len(flipped) == 20
    for id, row in rows.items():
        answers = (row["chosen"], row["rejected"])
        assert answers == (f"{id[1:]}.", "A cat.") if row["flipped"] else ("A cat.", f"{id[1:]}.")
    (tmp_path / "pairs.json").write_text(json.dumps(list(rows.values())))
    for pair in read_pairs(tmp_path / "pairs.json"):
        assert pair.clip_scores is not None and pair.reference is not None
        delta, sign = sum(pair.clip_scores[0]) - sum(pair.clip_scores[1]), -1 if pair.id in flipped else 1
        assert delta == pytest.approx(sign * pool.delta(pair.id))
        assert pair.reference.chosen - pair.reference.rejected == sign


@pytest.mark.parametrize(
    ("hardness", "chosen", "rejected"),
    [(("cosine", "sum"), [0.3, 0.2], [0.2]), (("cosine", "mean"), [0.25], [0.2]), (("logit", "sum"), [15, 10], [10]),
     (("logit", "mean"), [12.5], [10])],
)  # fmt: skip
def test_kinds_of_delta(hardness: tuple[str, str], chosen: list[float], rejected: list[float]) -> None:
    row = given_row(pool_of(), "p30", hardness)
    assert row["chosen_logits"] == pytest.approx(chosen) and row["rejected_logits"] == pytest.approx(rejected)


# --- Figures on paper -------------------------------------------------------------------------------------------------


def point(rate: float, step: int, recall: float, response: float, work: float = 0.0) -> Point:
    """The same in every resample."""
    values = np.zeros((4, 1 + analysis.RESAMPLES))
    values[RECALL], values[RESPONSE] = recall, response
    return Point(rate, step, work, values)


def curve(method: str, *points: Point, rate: float = 1e-5) -> Curve:
    return Curve(method, "clean", point(0, 0, 97, 57), points, rate)


DPO_CURVE = curve(DPO, point(1e-5, 2, 95, 37, work=100), point(1e-5, 4, 91, 17, work=200))


def test_a_curve_is_linear_between_its_points_and_ends_with_them() -> None:
    """From (97, 57) over (95, 37) to (91, 17): at 96 the middle, 47; at 93, 27; at 90 and 98 there is nothing."""
    levels = {96: 47, 93: 27, 95: 37, 91: 17}
    for recall, response in levels.items():
        assert DPO_CURVE.at_recall(np.full(1 + analysis.RESAMPLES, recall))[0] == pytest.approx(response)
    for recall in (90, 98):
        assert np.isnan(DPO_CURVE.at_recall(np.full(1 + analysis.RESAMPLES, recall))).all()


def test_gaps_on_paper() -> None:
    """Ours goes from (97, 57) over (93, 22) to (89, 9). At 93 theirs has 27, at 89 nothing: -5.

    Where theirs was measured, at 95 and 91, ours has 39.5 and 15.5 against 37 and 17: +2.5, -1.5.
    """
    ours = curve(DAMA, point(1e-5, 2, 93, 22), point(1e-5, 4, 89, 9))
    assert analysis.mean_gap(ours, DPO_CURVE) == pytest.approx((-4 / 3,) * 3)
    assert analysis.mean_gap(DPO_CURVE, ours) == pytest.approx((4 / 3,) * 3)
    assert analysis.mean_gap(ours, ours) == pytest.approx((0, 0, 0))
    assert analysis.gap_at(ours, DPO_CURVE, 4.0) == pytest.approx((-5, -5, -5))
    assert analysis.gap_at(ours, DPO_CURVE, 7.0).value is None
    assert DPO_CURVE.response_at(4.0) == pytest.approx((27, 27, 27)) and DPO_CURVE.response_at(7.0).value is None


def test_conditions_together_are_their_mean() -> None:
    better, worse = (curve(DAMA, point(1e-5, 2, 93, response)) for response in (22, 28))
    alone = [analysis.mean_gap(ours, DPO_CURVE)[0] for ours in (better, worse)]
    assert alone == pytest.approx([(-5 + 2.5) / 2, (1 + 5.5) / 2])
    assert analysis.pooled_gap([(better, DPO_CURVE), (worse, DPO_CURVE)])[0] == pytest.approx(1)


def test_noise_favours_neither_side() -> None:
    """Two noisy views of one convex trade-off: one way the gap leans to the side that is not interpolated."""
    rng, one_way, both_ways = np.random.default_rng(0), [], []

    def seen(recalls: list[float]) -> Curve:
        noisy = [point(1e-5, n, 0, 0) for n in range(len(recalls))]
        for true, p in zip(recalls, noisy):
            p.values[RECALL] = true + 0.5 * rng.normal(size=p.values.shape[1])
            p.values[RESPONSE] = 10 + 0.6 * (true - 88) ** 2
        return curve(DPO, *noisy)

    for _ in range(3):
        ours, theirs = seen([95, 93, 91, 89.5]), seen([94.5, 92.5, 91, 89])
        one_way.append(np.nanmean(ours.trade_off.above(theirs.trade_off)))
        both_ways.append(np.nanmean(curves.mean_gaps(ours.trade_off, theirs.trade_off)))
    assert np.mean(one_way) < -0.5 and abs(np.mean(both_ways)) < 0.3


def test_equal_work_ends_their_curve_where_ours_ends() -> None:
    """After work 150 theirs is half-way from (95, 37) to (91, 17)."""
    cut = analysis.cut_at(DPO_CURVE, 150)
    assert [(p.work, p.values[RECALL, 0], p.values[RESPONSE, 0]) for p in cut.points] == [(100, 95, 37), (150, 93, 27)]
    assert list(analysis.cut_at(DPO_CURVE, 300).points) == list(DPO_CURVE.points)  # ours worked more than theirs
    ours = curve(DAMA, point(1e-5, 2, 92, 20, work=150))  # from (97, 57): 42.2 at 95, 27.4 at 93
    assert analysis.mean_gap(ours, DPO_CURVE)[0] == pytest.approx((-2 + 5.2) / 2)
    assert analysis.at_equal_work(ours, DPO_CURVE)[0] == pytest.approx((5.2 + 0.4) / 2)


def test_verdicts_follow_the_interval() -> None:
    told = {(-3, -1): "clearly better", (1, 3): "clearly worse", (-3, 1): "no clear difference"}
    for (low, high), words in told.items():
        assert verdict(analysis.Interval((low + high) / 2, low, high)) == words
    assert verdict(analysis.Interval(None, None, None)) == "not comparable"


def test_claims_are_borne_out_by_intervals_alone() -> None:
    told = {(1, 3): "holds", (-3, -1): "the contrary holds", (-1, 3): "not shown either way", (0, 3): OPEN}
    for (low, high), words in told.items():
        assert borne_out(analysis.Interval((low + high) / 2, low, high)) == words
    assert borne_out(analysis.Interval(None, None, None)) == OPEN


def run_of(cell: Cell, wrong: float, found: float, **changes: Any) -> dict[str, Any]:
    """A cell's file: of ten scenes so many have an invention, and so many of their ten objects are found."""
    scored = {
        "response_level": [[100 * (n < wrong), 1] for n in range(10)],
        "mention_level": [[100, 5]] * 10,
        "object_recall": [[100 * found, 10]] * 10,
        "mean_words": [[20, 1]] * 10,
    }
    probe = {"loss": 0.6, "accuracy": 0.8, "margin": 0.1}
    probes = {f"held_out_{third}": probe for third in THIRDS}
    pairs = [
        {"step": step, "id": f"p{n}", "R": float(step + n), "delta": 0.1 * n, "alpha_D": 1.0 + n, "beta": 0.1}
        | {"selected": n < 12}
        for step in range(3)
        for n in range(16)
    ]
    stop = {"test": scored, "validation": scored, "probes": probes}
    log = [{"step": step + 1, "loss": 0.5, "dama/alpha_M": 1.0, "dama/R_bar": 0.1} for step in range(3)]
    return {"cell": vars(cell), "stops": {"3": stop}, "pairs": pairs, "log": log, "flipped": ["p14", "p15"],
            "seconds": 1.0} | changes  # fmt: skip


def study_of(runs: dict[Cell, dict[str, Any]], declared: Sequence[Cell] | None = None) -> Study:
    start = run_of(Cell("", "", 0, 0), wrong=9, found=9.6)["stops"]["3"]
    sft = {"test": start["test"], "validation": start["validation"]}
    return Study(runs, list(runs) if declared is None else declared, sft)


def test_resamples_draw_the_same_scenes_and_seeds_for_all() -> None:
    """Each resample's figure is what adding up its draws one by one gives; so is the spread that they ought to have."""
    rng = np.random.default_rng(1)
    cells = [Cell("clean", DPO, 2e-5, seed) for seed in range(3)]
    runs = {cell: run_of(cell, 5, 9.5) for cell in cells}
    wrong = rng.integers(0, 2, size=(3, 10))
    for run, row in zip(runs.values(), wrong):
        run["stops"]["3"]["test"] = run["stops"]["3"]["test"] | {"response_level": [[100 * int(w), 1] for w in row]}
    study = study_of(runs)
    found = study.curve("clean", DPO).points[0].values[RESPONSE]
    for draw in (0, 1, 17):
        top = bottom = 0.0
        for seed in range(3):
            for scene in range(10):
                weight = study.draws.seeds[draw, seed] * study.draws.scenes[draw, scene]
                top, bottom = top + weight * 100 * wrong[seed, scene], bottom + weight
        assert found[draw] == pytest.approx(top / bottom)
    by_seed = mechanism.over_seeds(study, [1.0, 2.0, 6.0])
    assert by_seed[0] == 3 and np.std(by_seed[1:]) == pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3), rel=0.05)


def test_a_seed_that_lacks_a_cell_of_dpo_or_dama_is_left_out() -> None:
    declared = [Cell("clean", method, 2e-5, seed) for seed in range(3) for method in (DPO, DAMA, "data-aware")]
    missing = {Cell("clean", DAMA, 2e-5, 1), Cell("clean", "data-aware", 2e-5, 2)}
    study = study_of({cell: run_of(cell, 5, 9.5) for cell in declared if cell not in missing}, declared)
    assert study.seeds == [0, 2] and not study.curve("clean", "data-aware").points
    findings = Findings(study, statements_pool())
    assert [row["method"] for row in findings.ablations] == [DAMA] and claims_of(findings)
    assert set(findings.numbers["missing"]) == {cell.name for cell in missing}
    with pytest.raises(ValueError, match=r"expected a seed with every cell of DPO and DAMA, got none; 1 of 9"):
        study_of({declared[0]: run_of(declared[0], 5, 9.5)}, declared).seeds  # noqa: B018


def test_cells_that_diverged_are_named() -> None:
    cells = [Cell("clean", DPO, 2e-5, seed) for seed in (0, 1)]
    runs = {cell: run_of(cell, 5, 9.5) for cell in cells}
    assert study_of(runs).diverged == []
    probes = runs[cells[1]]["stops"]["3"]["probes"]
    probes["held_out_hard"] = probes["held_out_hard"] | {"margin": float("nan")}
    assert study_of(runs).diverged == [cells[1].name]


def test_the_learning_rate_is_the_best_that_costs_little_recall() -> None:
    """From a recall of 96: at 4e-5 it falls to 90, too far; of the others the one that invents less is taken."""
    ends = {1e-5: (7, 9.5), 2e-5: (5, 9.3), 4e-5: (2, 9.0)}
    cells = {Cell("clean", DPO, rate, seed): ends[rate] for rate in ends for seed in (0, 1)}
    study = study_of({cell: run_of(cell, *end) for cell, end in cells.items()})
    found = study.curve("clean", DPO)
    assert found.chosen_rate == 2e-5 and found.chosen.of("response_level").value == pytest.approx(50)
    assert found.chosen.of("object_recall").value == pytest.approx(93)
    low, high = found.chosen.of("response_level")[1:]
    assert low is not None and high is not None and low < 50 < high  # scenes differ
    assert found.chosen.work == 3 * (16 + 2 * 12)


def test_a_rate_that_a_seed_lacks_is_no_point() -> None:
    cells = [Cell("clean", DPO, rate, seed) for rate in (1e-5, 2e-5) for seed in (0, 1)][:-1]
    study = study_of({cell: run_of(cell, 5, 9.5) for cell in cells})
    assert {p.rate for p in study.curve("clean", DPO).points} == {1e-5}


def test_what_happened_to_the_pairs() -> None:
    """The filter selects the first twelve of sixteen.

    So both of the two flipped ones are dropped, and two of the fourteen others.
    """
    cell = Cell("flipped", DAMA, 2e-5, 0)
    study = study_of({cell: run_of(cell, 5, 9.5)})
    for part in mechanism.drop_rates(study, DAMA, 2e-5):
        assert (part["flipped"][0], part["right"][0]) == pytest.approx((100, 100 / 7))
        assert part["difference"] == pytest.approx((600 / 7,) * 3)
    weights = mechanism.weights_of_thirds(study, "flipped", DAMA, 2e-5, SIXTEEN)
    assert weights["hard"] == pytest.approx(
        {"alpha_D": 1.5, "beta": 0.1, "selected": 1.0, "R_first": 0.5, "R_last": 2.5}
    )
    assert weights["easy"]["selected"] == pytest.approx(9 / 13)
    assert mechanism.alpha_M(study, "flipped", DAMA, 2e-5)[0] == [1, 2, 3]
    assert mechanism.spread_of_alpha_D(study, "flipped", DAMA, 2e-5) == pytest.approx(np.std(range(16)))


SIXTEEN = {"hard": ["p0", "p1"], "middle": ["p2"], "easy": [f"p{n}" for n in range(3, 16)]}
"""Of the pairs of `run_of`."""


def test_overfitting_is_of_the_same_third_and_knows_that_few_pairs_were_held_out() -> None:
    """Last met at R = 2 and 3 the two hard pairs are right, of the held-out ones 80 %."""
    cells = [Cell("clean", DPO, 2e-5, seed) for seed in (0, 1)]
    study = study_of({cell: run_of(cell, 5, 9.5) for cell in cells})
    seen = mechanism.trained(study, "clean", DPO, 2e-5, SIXTEEN)
    assert seen["hard"] == {"margin": pytest.approx([0.25, 0.25]), "accuracy": [1, 1]}
    accuracies = {third: figures["accuracy"] for third, figures in seen.items()}
    unseen = mechanism.held_out_at_end(study, "clean", DPO, 2e-5, "accuracy")
    found = mechanism.overfitting(study, accuracies, unseen, probes=50)
    assert found["hard"][0] == pytest.approx(20)
    assert np.std(found["hard"][1:]) == pytest.approx(100 * np.sqrt(0.8 * 0.2 / 50), rel=0.1)


def test_evenness_is_counted_where_both_margins_are_positive() -> None:
    def with_margins(cell: Cell, easy: float, hard: float) -> dict[str, Any]:
        run = run_of(cell, 5, 9.5)
        for third, margin in (("easy", easy), ("hard", hard)):
            run["stops"]["3"]["probes"][f"held_out_{third}"] = {"margin": margin, "accuracy": 0.8, "loss": 0.6}
        return run

    margins = {(DPO, 0): (0.4, 0.1), (DAMA, 0): (0.3, 0.1), (DPO, 1): (0.4, 0.1), (DAMA, 1): (0.4, -0.01),
               (DPO, 2): (0.4, 0.2), (DAMA, 2): (0.4, 0.2)}  # fmt: skip
    cells = {Cell("clean", method, 2e-5, seed): ends for (method, seed), ends in margins.items()}
    study = study_of({cell: with_margins(cell, *ends) for cell, ends in cells.items()})
    assert mechanism.easy_over_hard(study, "clean", DAMA, 2e-5) == pytest.approx({0: 3, 2: 2})
    assert mechanism.more_even(study, "clean", DAMA) == (1, 2)


def test_pairs_in_parts_by_delta() -> None:
    """Deltas 0 to 3 last met at R 1, 2, 3, 6, whose mean is 3: in two parts 0.5 and 1.5 times it."""
    met = [{"id": f"p{n}", "delta": float(n), "alpha_D": 1.0 + n, "R": R} for n, R in enumerate([1.0, 2.0, 3.0, 6.0])]
    earlier = [pair | {"R": 100.0} for pair in met]
    cell = Cell("clean", DPO, 2e-5, 0)
    study = study_of({cell: run_of(cell, 5, 9.5, pairs=[*earlier, *met])})
    found = mechanism.by_delta(study, "clean", DPO, 2e-5, parts=2)
    for name, means in {"delta": [0.5, 2.5], "alpha_D": [1.5, 3.5], "R": [0.5, 1.5]}.items():
        assert found[name] == pytest.approx(means)


def statements_pool() -> Pool:
    """Cosines nearly alike, one to three statements against one."""
    pool = pool_of()
    scores = {id: ([0.2 + 0.001 * (n % 2)] * (1 + n % 3), [0.2]) for n, id in enumerate(pool.rows)}
    return replace(pool, scores=scores)


def test_what_beats_both_is_named() -> None:
    """A variation that invents half as much at the same recall, and one that invents as much."""
    ends = {DPO: 6, DAMA: 6, "DAMA, mean": 2, "DAMA, logit": 6}
    cells = {Cell("clean", method, 2e-5, seed): wrong for method, wrong in ends.items() for seed in (0, 1)}
    study = study_of({cell: run_of(cell, wrong, 9.5) for cell, wrong in cells.items()})
    findings = Findings(study, statements_pool())
    assert findings.better_than_both == ["DAMA, mean"]
    told = {claim.claim: claim for claim in claims_of(findings)}
    beats = told["Some variant beats both DPO and DAMA"]
    assert beats[1:] == ("holds", "Of 2 tried on clean pairs, clearly better at the same recall: DAMA, mean.")
    free = told["A delta free of length is better"]
    assert free.verdict == "holds" and "DAMA, mean -40.0 [" in free.figures


def test_a_sum_grows_with_statements() -> None:
    """The sum's delta is nearly their number, which the mean does not see."""
    study = study_of({CELLS[0]: run_of(CELLS[0], 6, 9.5)})
    found = Findings(study, statements_pool()).statements
    assert found["sum"] == pytest.approx(1, abs=0.01) and found["mean"] == pytest.approx(0, abs=0.01)


# --- For real ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two methods and two conditions, one rate, one seed, finished by two processes."""
    folder = tmp_path_factory.mktemp("study")
    assert not runner.run_study(CELLS, runner.prepare_world(folder, SMALL), folder, 2)
    return folder


CELLS = [Cell(condition, method, 2e-5, 0) for condition in ("clean", "flipped") for method in (DPO, DAMA)]


def test_cells_are_trainings_with_captions_and_probes(folder: Path) -> None:
    study = Study.read(folder, CELLS, runner.read_world(folder, SMALL).fingerprint)
    for cell, run in study.cells.items():
        assert list(run["stops"]) == ["2", "4"] and len(run["pairs"]) == SMALL.steps * 16 - 16  # 16 + 8 pairs an epoch
        assert [entry["step"] for entry in run["log"]] == [1, 2, 3, 4]
        assert run["log"][0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
        stop = run["stops"]["4"]
        assert len(stop["test"]["response_level"]) == SMALL.test
        assert set(stop["probes"]) == {f"held_out_{third}" for third in THIRDS}
        assert len(run["flipped"]) == (5 if cell.condition == "flipped" else 0)
        assert all(pair["selected"] for pair in run["pairs"]) is (cell.method == DPO)
    margins = [run["stops"]["4"]["probes"]["held_out_easy"]["margin"] for run in study.cells.values()]
    assert len(set(margins)) == len(margins)
    assert not list((folder / "cells/work").iterdir())


def test_what_is_finished_is_kept_and_what_is_repeated_is_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    world = runner.prepare_world(folder, SMALL)
    assert not runner.run_study(CELLS, world, folder, 2)
    assert files == {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    assert "4 cells declared, 4 finished" in capsys.readouterr().out
    assert runner.run_again(CELLS, world, folder, 1) == 0
    assert "the same to the last caption" in capsys.readouterr().out


def test_another_scale_is_another_result(folder: Path) -> None:
    world = runner.read_world(folder, SMALL)
    assert runner.is_finished(CELLS[0], world, folder / "cells")
    larger = replace(world, pool=replace(world.pool, scale=SMALL._replace(steps=5)))
    assert not runner.is_finished(CELLS[0], larger, folder / "cells")
    with pytest.raises(FileNotFoundError, match="expected finished cells, found none; run the study first"):
        Study.read(folder, CELLS, larger.fingerprint)


def test_a_cell_that_fails_is_listed_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "study")
    bad = Cell("clean", DPO, -1.0, 0)
    world = runner.read_world(tmp_path / "study", SMALL)
    last = tmp_path / f"study/cells/{CELLS[-1].name}.json"
    last.unlink()
    assert runner.run_study([bad, *CELLS], world, tmp_path / "study", 1)
    assert list(json.loads((tmp_path / "study/failed.json").read_text())) == [bad.name] and last.is_file()


def test_the_page_holds_every_figure_and_nothing_from_outside(folder: Path, tmp_path: Path) -> None:
    world = runner.read_world(folder, SMALL)
    findings = Findings(Study.read(folder, CELLS, world.fingerprint), world.pool)
    numbers = write_study(findings, tmp_path)
    text, data = (tmp_path / "study.html").read_text(), json.loads((tmp_path / "study.json").read_text())
    assert set(data["cells"]) == {cell.name for cell in CELLS} and not data["missing"] and not data["failed"]
    for claim in claims_of(findings):
        assert claim.verdict in text and claim.claim in text and claim.figures.replace("'", "&#39;") in text
    assert data["claims"] == [claim._asdict() for claim in claims_of(findings)]
    assert summary(data) == summary(numbers)
    assert [row["condition"] for row in data["main"]] == ["clean", "flipped"]
    assert text.count("<svg") == 6 and "http://" not in text.replace("http://www.w3.org", "") and "<script" not in text
    first = data["main"][0]["ends"][0]["response_level"][0]
    assert f"{first:.1f} [" in text


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--cores", "0", "--out", str(tmp_path)]) == 2
    assert "--cores: expected 1 or more, got 0" in capsys.readouterr().err


def test_the_docs_quote_the_committed_study() -> None:
    """Of every declared cell; the page beside it says the same."""
    page, text = (ROOT / "docs/study.html").read_text(), (ROOT / "docs/study.json").read_text()
    data = json.loads(text)
    assert summary(data) in (ROOT / "docs/tinycoco.md").read_text()
    assert set(data["cells"]) == {cell.name for cell in declare()} and not data["missing"] and not data["failed"]
    for row in data["claims"]:
        assert row["figures"].replace("'", "&#39;") in page


def test_verdicts_differ_in_color_and_sign_and_every_plot_is_explained() -> None:
    tones = {words: tone_of(words) for words in (HOLDS, CONTRARY, OPEN, NONE, *VERDICTS)}
    assert tones == {
        HOLDS: "positive", CONTRARY: "negative", OPEN: "open", NONE: "negative", "clearly better": "positive",
        "clearly worse": "negative", "no clear difference": "open", "not comparable": "open",
    }  # fmt: skip
    page = (ROOT / "docs/study.html").read_text()
    for row in json.loads((ROOT / "docs/study.json").read_text())["claims"]:
        tone = tone_of(row["verdict"])
        assert f'<span class="verdict {tone}">{SIGNS[tone]} {row["verdict"]}</span>' in page
    titles = [html.unescape(title) for title in re.findall(r"<figcaption>(.*?)</figcaption>", page)]
    assert len(titles) == page.count("<svg") and all(marks_of(title) in html.unescape(page) for title in titles)
    assert all("Horizontal: " in marks_of(title) for title in titles)


def test_the_study_in_a_browser(tmp_path: Path) -> None:
    """Three colors of verdicts in light and dark; on a phone the tables have a hint and the page fits."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver, "needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={tmp_path}"):
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options=options, service=Service(driver)) as chrome:
        chrome.get((ROOT / "docs/study.html").as_uri())
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            colors = {
                chrome.execute_script("return getComputedStyle(document.querySelector(arguments[0])).color", selector)
                for selector in (".verdict.positive", ".verdict.negative", ".verdict.open")
            }
            assert len(colors) == 3
        size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert chrome.execute_script("return document.documentElement.scrollWidth") == 390
        hints = chrome.find_elements("css selector", ".sideways")
        assert len(hints) == len(chrome.find_elements("css selector", ".results")) > 0
        assert all(hint.is_displayed() for hint in hints)
