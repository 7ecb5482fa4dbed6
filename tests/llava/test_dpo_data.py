"""Steps, held-out pairs, and what is refused before training."""

import json

import pytest

from dama.train.data import hold_out
from dama.train.steps import StepPlan, StepSampler
from llava.train.arguments import parse_arguments
from llava.train.train_dpo import run
from tests.llava.tiny import flags, prepare


def covered(size, batch_size, world_size, accumulation, seed=3):
    """For each step, the dataset indices in global order, as all ranks together see them."""
    samplers = [StepSampler(size, batch_size, world_size, r, accumulation, seed) for r in range(world_size)]
    batches = [list(sampler) for sampler in samplers]
    steps, first = [], 0
    for step in range(samplers[0].steps):
        plan = samplers[0].plan(step)
        pairs = {}
        for micro in range(plan.micro_batches):
            for rank in range(world_size):
                block = plan.block(micro, rank)
                pairs |= dict(zip(block, batches[rank][first + micro]))
        first += plan.micro_batches
        steps.append([pairs[p] for p in range(plan.pairs)])
    assert all(len(batch) == first for batch in batches)
    return steps


@pytest.mark.parametrize("layout", [(16, 1, 1), (8, 2, 1), (4, 4, 1), (4, 1, 4), (4, 2, 2), (1, 16, 1)])
@pytest.mark.parametrize("size", [16, 40, 53])
def test_steps_are_the_same_whatever_the_hardware(layout, size):
    steps = covered(size, *layout)
    assert steps == covered(size, 16, 1, 1)
    assert sorted(i for step in steps for i in step) == list(range(size))


def test_last_step_is_spread_without_repeating_a_pair():
    """5 pairs on 4 ranks: blocks of 1, 1, 1 and 2."""
    plan = StepPlan(5, 4, 1)
    assert [list(plan.block(0, rank)) for rank in range(4)] == [[0], [1], [2], [3, 4]]


def test_a_rank_without_a_pair_gets_one_that_does_not_count():
    sampler = StepSampler(1, 4, 2, 0, 1, 0)
    assert list(sampler.plan(0).block(0, 0)) == [] and list(sampler) == [[0]]


def test_epochs_differ_and_repeat():
    sampler = StepSampler(32, 4, 1, 0, 1, 0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_held_out_pairs_share_no_image_with_the_others(in_golden, tmp_path):
    _, _, data = prepare(parse_arguments(flags(tmp_path)))
    train, held_out = hold_out(data.train.prepared, 3, seed=1)
    assert len(train) + len(held_out) == 8 and len(held_out) >= 3
    assert not {item.pair.image for item in train} & {item.pair.image for item in held_out}
    with pytest.raises(ValueError, match="--eval_pairs 8: holds out all 8 pairs"):
        hold_out(data.train.prepared, 8, seed=1)
    assert len(hold_out(data.train.prepared, 0.01, seed=1)[1]) >= 1  # a few pairs of one's own, to try it
    assert hold_out(data.train.prepared, 0, seed=1)[1] == []


def test_long_pairs_are_named_or_skipped_and_never_cut(in_golden, tmp_path):
    with pytest.raises(ValueError, match=r"pair \d: \d+ tokens with its image, the model takes 75"):
        prepare(parse_arguments(flags(tmp_path, "--model_max_length", "75")))
    _, _, data = prepare(parse_arguments(flags(tmp_path, "--model_max_length", "75", "--on_long_pair", "skip")))
    assert len(data.train) + len(data.skipped) == 8 and data.skipped
    assert max(len(item.chosen.input_ids) for item in data.train.prepared) + 15 <= 75


def records(golden, **changes):
    rows = json.loads((golden / "dama" / "rlaifv_records.json").read_text())
    return [row | changes for row in rows]


def write(tmp_path, rows):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    return ["--data_path", str(path)]


def test_hardness_missing(in_golden, tmp_path):
    rows = [{k: v for k, v in row.items() if not k.endswith("_logits")} for row in records(in_golden)]
    with pytest.raises(ValueError, match=r"hardness: expected delta for every pair, got none for 8 of 8.*--hardness"):
        run(parse_arguments(flags(tmp_path, *write(tmp_path, rows))))


def test_reference_missing(in_golden, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "logps"} for row in records(in_golden)]
    with pytest.raises(ValueError, match=r"reference: expected log-probs for every pair, got none for 8 of 8"):
        run(parse_arguments(flags(tmp_path, *write(tmp_path, rows))))


def test_reference_of_another_model_stops_the_first_step(in_golden, tmp_path):
    rows = records(in_golden)
    for row in rows:
        logps = json.loads(row["logps"])
        values = logps["logps"] if isinstance(logps, dict) else logps
        values[0] += 0.5
        row["logps"] = json.dumps(values)
    with pytest.raises(
        ValueError, match=r"reference log-probs: expected the first step's \|R\| below 0.001 nats per square root"
    ):
        run(parse_arguments(flags(tmp_path, *write(tmp_path, rows))))
    more = write(tmp_path, rows) + ["--check_reference", "False", "--max_steps", "1", "--save_strategy", "no"]
    assert run(parse_arguments(flags(tmp_path, *more))).state.global_step == 1
