"""dama.stage: resumed after kills, or made in shards, a stage has the bytes of an undisturbed run.

Other inputs are refused by name.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import dama.stage as stage_module
from dama.stage import (
    Attachment,
    RecordFile,
    Shard,
    StageError,
    differences,
    merge_shards,
    open_stage,
    read_stage,
    stage_of,
    write_joined,
)

ROOT = Path(__file__).parents[2]
SIZES = [3, 2, 4, 1]
INPUTS = {"pairs": "abc", "clip": {"model": "tiny", "weights": "123"}, "scale": "cosine"}
WRITER = """
import os, sys, time
from dama.stage import open_stage
folder, mode = sys.argv[1:]
sizes = {sizes}
with open_stage(folder, "toy", {inputs}, sizes) as stage:
    for chunk in range(stage.chunks_done, len(sizes)):
        first = sum(sizes[:chunk])
        if mode == "torn" and chunk == 2:
            stage._file.write(b'{{"id": "5", "v": 0.5}}\\n{{"id": "6", "v"')
            stage._file.flush()
        if mode == "hold" or (mode == "torn" and chunk == 2):
            print("ready", flush=True)
            time.sleep(60)
        if mode == "slow":
            time.sleep(0.05)
        stage.append([{{"id": str(first + n), "v": (first + n) / 10}} for n in range(sizes[chunk])])
    if not stage.complete:
        stage.finish({{"mean": 0.45}})
"""


def writer(folder: Path, mode: str) -> subprocess.Popen[str]:
    script = WRITER.format(sizes=SIZES, inputs=INPUTS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder), mode], stdout=subprocess.PIPE, text=True, env=environment
    )


def finished(folder: Path, mode: str = "plain") -> str:
    process = writer(folder, mode)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return output


def contents(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """The records' bytes and the manifest without its times."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["time"]
    return (folder / "toy.jsonl").read_bytes(), manifest


def records(chunk: int) -> list[dict[str, Any]]:
    first = sum(SIZES[:chunk])
    return [{"id": str(first + n), "v": (first + n) / 10} for n in range(SIZES[chunk])]


@pytest.mark.kill
def test_killed_inside_a_line_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    """Chunks 0 and 1 (5 records) are written; of chunk 2 one whole line and a torn one lie in the file at the kill."""
    finished(tmp_path / "calm")
    process = writer(tmp_path / "killed", "torn")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    assert (tmp_path / "killed/toy.jsonl").read_bytes().endswith(b'{"id": "6", "v"')
    with pytest.raises(StageError, match="interrupted\nRemedy: run .*again, it continues"):
        read_stage(tmp_path / "killed", "toy")
    assert "continues at record 5 of 10 in" in (output := finished(tmp_path / "killed"))
    assert "37 bytes of an interrupted chunk cut off" in output
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")
    assert json.loads((tmp_path / "killed/manifest.json").read_text())["time"]["records"] == 5


def test_killed_again_and_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """Each life is killed as soon as the file has grown, wherever it is then."""
    finished(tmp_path / "calm")
    path, lives = tmp_path / "killed/toy.jsonl", 0
    while True:
        size = path.stat().st_size if path.exists() else 0
        process = writer(tmp_path / "killed", "slow")
        while process.poll() is None and (not path.exists() or path.stat().st_size <= size):
            time.sleep(0.005)
        process.kill()
        process.communicate(timeout=30)
        lives += 1
        if process.returncode == 0 or lives > 10:
            break
    finished(tmp_path / "killed")
    assert lives > 2
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")


def test_a_complete_stage_is_skipped_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with open_stage(tmp_path, "toy", INPUTS, SIZES) as stage:
        assert stage.complete and stage.chunks_done == len(SIZES) and stage.records_done == 10
        with pytest.raises(StageError, match="complete or closed"):
            stage.append(records(0))
    assert "toy: complete in" in capsys.readouterr().out
    assert (tmp_path / "manifest.json").read_bytes() == before
    manifest, rows = read_stage(tmp_path, "toy")
    assert manifest["summary"] == {"mean": 0.45}
    assert rows == [row for chunk in range(len(SIZES)) for row in records(chunk)]


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:
    process = writer(tmp_path, "hold")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with pytest.raises(StageError, match="another process writes"):
        open_stage(tmp_path, "toy", INPUTS, SIZES)
    process.kill()
    process.wait(timeout=30)
    process.stdout.close()
    with open_stage(tmp_path, "toy", INPUTS, SIZES) as stage:
        assert stage.chunks_done == 0


@pytest.mark.parametrize("complete", [True, False])
def test_other_inputs_are_refused_field_by_field(tmp_path: Path, complete: bool) -> None:
    with open_stage(tmp_path, "toy", INPUTS, [1]) as stage:
        stage.append([{"id": "0"}]) if complete else None
        stage.finish({}) if complete else None
    other = INPUTS | {"clip": {"model": "tiny", "weights": "456"}, "scale": "logit"}
    with pytest.raises(StageError) as caught:
        open_stage(tmp_path, "toy", other, [1])
    message = str(caught.value)
    assert 'clip.weights: "123" -> "456"' in message and 'scale: "cosine" -> "logit"' in message
    assert "pairs" not in message and "model" not in message
    assert "another --out, or --overwrite" in message
    with open_stage(tmp_path, "toy", other, [1], overwrite=True) as stage:
        assert (stage.chunks_done, stage.complete, stage.records_path.read_bytes()) == (0, False, b"")


def test_another_stage_in_the_folder_is_refused(tmp_path: Path) -> None:
    open_stage(tmp_path, "toy", INPUTS, [1]).close()
    with pytest.raises(StageError, match="holds the stage toy, this is other"):
        open_stage(tmp_path, "other", INPUTS, [1])
    with pytest.raises(StageError, match="holds the stage toy, expected other"):
        read_stage(tmp_path, "other")


def test_another_plan_is_refused_while_unfinished_only(tmp_path: Path) -> None:
    with open_stage(tmp_path, "toy", INPUTS, [1, 1]) as stage:
        stage.append([{"id": "0"}])
    with pytest.raises(StageError, match=r"begun with other chunks \(2 records; now 2 records in 1 chunks\)"):
        open_stage(tmp_path, "toy", INPUTS, [2])
    with open_stage(tmp_path, "toy", INPUTS, [1, 1]) as stage:
        stage.append([{"id": "1"}])
        stage.finish({})
    assert open_stage(tmp_path, "toy", INPUTS, [2]).complete


def test_damage_is_named(tmp_path: Path) -> None:
    finished(tmp_path)
    path = tmp_path / "toy.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    for use in (lambda: read_stage(tmp_path, "toy"), lambda: open_stage(tmp_path, "toy", INPUTS, SIZES)):
        with pytest.raises(StageError, match="changed since the stage was finished(?s:.*)--overwrite"):
            use()
    path.unlink()
    with pytest.raises(StageError, match="missing, although"):
        read_stage(tmp_path, "toy")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StageError, match=r"manifest\.json: not JSON"):
        open_stage(tmp_path, "toy", INPUTS, SIZES)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StageError, match=r"no manifest\.json in .*\nRemedy: run `python -m dama toy"):
        read_stage(tmp_path, "toy")
    path.write_text('{"id": "0"}\n')
    with pytest.raises(StageError, match="records without a manifest"):
        open_stage(tmp_path, "toy", INPUTS, SIZES)


def test_records_after_a_damaged_line_are_made_again(tmp_path: Path) -> None:
    """Of chunks 0 (3), 1 (2) the fourth record is spoilt: chunk 1 starts again."""
    with open_stage(tmp_path, "toy", INPUTS, SIZES) as stage:
        stage.append(records(0))
        stage.append(records(1))
    lines = stage.records_path.read_bytes().splitlines(keepends=True)
    stage.records_path.write_bytes(b"".join(lines[:3]) + b"\0" * len(lines[3]) + b"\n" + lines[4])
    with open_stage(tmp_path, "toy", INPUTS, SIZES) as stage:
        assert (stage.chunks_done, stage.records()) == (1, records(0))


def test_misuse_is_refused(tmp_path: Path) -> None:
    with open_stage(tmp_path, "toy", INPUTS, [2]) as stage:
        with pytest.raises(StageError, match="chunk 0 has 1 records, planned were 2"):
            stage.append([{"id": "0"}])
        with pytest.raises(ValueError, match="toy: a record: expected finite numbers, got NaN .* in v\nRemedy"):
            stage.append([{"v": float("nan")}, {}])
        with pytest.raises(StageError, match="finished after 0 of 1 chunks"):
            stage.finish({})
        stage.append([{}, {}])
        with pytest.raises(StageError, match="all 1 planned chunks"):
            stage.append([{}])


def test_differences_names_nested_fields() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": [5]}
    assert differences(old, new) == ["a.c: 2 -> 4", "d: 3 -> default", "e: default -> [5]"]
    flags = {"a.": "--", "d": "--depth"}
    assert differences(old, new, flags) == ["--c: 2 -> 4", "--depth: 3 -> default", "e: default -> [5]"]
    assert differences(old, old) == []


# ---------------------------------------------------------------------------------------------------------- shards


def summarize(rows: list[dict[str, Any]], facts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"mean": sum(row["v"] for row in rows) / len(rows), "skipped": facts[0]["skipped"]}


def run_shard(folder: Path, shard: Shard, inputs: dict[str, Any] = INPUTS, **flags: Any) -> dict[str, Any] | None:
    with open_stage(folder, "toy", inputs, SIZES, shard=shard, **flags) as stage:
        for chunk in stage.to_do:
            stage.append(records(chunk))
        return stage.conclude(summarize, {"skipped": ["x"]})


@pytest.fixture
def unsharded(tmp_path: Path) -> tuple[bytes, dict[str, Any]]:
    assert run_shard(tmp_path / "unsharded", Shard(0, 1)) is not None
    assert not (tmp_path / "unsharded/shards").exists()
    return contents(tmp_path / "unsharded")


def test_a_shard_is_read_from_text_and_named_by_its_folder() -> None:
    assert Shard.parse("3/16") == (3, 16) and str(Shard(3, 16)) == "3/16"
    assert Shard(3, 16).folder(Path("out")) == Path("out/shards/00003-of-00016")
    for text in ("4/4", "1", "-1/4", "1/0", "a/b", "1/2/3"):
        with pytest.raises(ValueError, match=f"shard '{text}': expected i/n with 0 <= i < n"):
            Shard.parse(text)


def test_a_shard_is_known_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both torchrun and DeepSpeed set RANK, srun SLURM_PROCID; torchrun inside a SLURM job counts its own ranks."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert Shard.from_launcher() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert Shard.from_launcher() == (2, 4)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Shard.from_launcher() == (5, 8)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_blocks_partition_the_chunks_evenly(count: int) -> None:
    blocks = [Shard(index, count).block(5) for index in range(count)]
    assert [chunk for block in blocks for chunk in block] == [0, 1, 2, 3, 4]
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@pytest.mark.parametrize("count", [2, 3, 6])
def test_shards_in_any_order_give_the_bytes_of_an_unsharded_run(
    tmp_path: Path, unsharded: tuple[bytes, dict[str, Any]], count: int
) -> None:
    """Six shards of four chunks: two have none."""
    *early, last = [Shard(index, count) for index in reversed(range(count))]
    assert [run_shard(tmp_path / "out", shard) for shard in early] == [None] * (count - 1)
    manifest = run_shard(tmp_path / "out", last)
    assert manifest is not None and manifest["time"]["shards"] == count
    assert contents(tmp_path / "out") == unsharded
    assert read_stage(tmp_path / "out", "toy")[0] == manifest
    assert run_shard(tmp_path / "out", Shard(1, count)) == manifest  # complete: any shard says so
    assert merge_shards(tmp_path / "out", "toy", summarize)["digest"] == manifest["digest"]  # as two at once would


def test_a_large_file_is_merged_without_holding_its_records(
    tmp_path: Path, unsharded: tuple[bytes, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "IN_MEMORY", 0)
    run_shard(tmp_path / "out", Shard(0, 2))
    run_shard(tmp_path / "out", Shard(1, 2))
    assert contents(tmp_path / "out") == unsharded


def test_joining_takes_no_memory_that_grows_with_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "IN_MEMORY", 0)
    sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for number, source in enumerate(sources):
        source.write_text("".join(json.dumps({"v": number + 2 * i, "text": "x" * 10_000}) + "\n" for i in range(500)))
    size = sum(source.stat().st_size for source in sources)
    places = [record["v"] for source in sources for record in RecordFile(source)]
    tracemalloc.start()
    write_joined(tmp_path / "whole.jsonl", sources, places)
    records = RecordFile(tmp_path / "whole.jsonl")
    assert [record["v"] for record in records] == list(range(1000)) and len(records) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 5
    with pytest.raises(ValueError, match="1000 records, expected one for each of 999 places"):
        write_joined(tmp_path / "other.jsonl", sources, places[1:])
    assert not (tmp_path / "other.jsonl").exists()


def test_an_interrupted_shard_continues(tmp_path: Path, unsharded: tuple[bytes, dict[str, Any]]) -> None:
    run_shard(tmp_path / "out", Shard(0, 2))
    with open_stage(tmp_path / "out", "toy", INPUTS, SIZES, shard=Shard(1, 2)) as stage:
        assert (stage.to_do, stage.total) == (range(2, 4), 5)
        stage.append(records(2))
    with pytest.raises(StageError, match=r"no manifest\.json in .*\nRemedy: finish its shards, then .*dama merge"):
        read_stage(tmp_path / "out", "toy")
    with pytest.raises(StageError, match="do not fit together\n  00001-of-00002: unfinished\n  gap: chunks 2 to 3"):
        merge_shards(tmp_path / "out", "toy", summarize)
    with open_stage(tmp_path / "out", "toy", INPUTS, SIZES, shard=Shard(1, 2)) as stage:
        assert stage.to_do == range(3, 4)
    assert run_shard(tmp_path / "out", Shard(1, 2)) is not None
    assert contents(tmp_path / "out") == unsharded


def test_two_processes_on_one_shard_are_kept_apart(tmp_path: Path) -> None:
    with (
        open_stage(tmp_path, "toy", INPUTS, SIZES, shard=Shard(0, 2)),
        open_stage(tmp_path, "toy", INPUTS, SIZES, shard=Shard(1, 2)),
        pytest.raises(StageError, match="another process writes"),
    ):
        open_stage(tmp_path, "toy", INPUTS, SIZES, shard=Shard(1, 2))


def test_gaps_are_named(tmp_path: Path) -> None:
    """Chunks 0 to 3 in four shards, of which 1 and 3 are absent."""
    with pytest.raises(StageError, match="no shards in"):
        merge_shards(tmp_path, "toy", summarize)
    for index in (0, 2):
        run_shard(tmp_path, Shard(index, 4))
    with pytest.raises(StageError) as caught:
        merge_shards(tmp_path, "toy", summarize)
    assert "gap: chunks 1 to 1 are in no finished shard\n  gap: chunks 3 to 3" in str(caught.value)
    assert not (tmp_path / "toy.jsonl").exists()


def test_overlaps_are_named_and_left_over_shards_of_another_count_do_not_disturb(
    tmp_path: Path, unsharded: tuple[bytes, dict[str, Any]]
) -> None:
    """Chunks 0 to 3: of two shards the first has 0 and 1, of three the first 0, the second 1."""
    run_shard(tmp_path / "out", Shard(0, 2))
    for index in range(3):
        run_shard(tmp_path / "out", Shard(index, 3))
    assert contents(tmp_path / "out") == unsharded
    with pytest.raises(StageError, match="00000-of-00002: overlaps another, chunks 0 to 0 are(?s:.*)remove"):
        merge_shards(tmp_path / "out", "toy", summarize)


def test_shards_of_other_inputs_are_refused(tmp_path: Path) -> None:
    """A shard left over from other inputs is replaced with overwrite, and until then not merged."""
    other = INPUTS | {"scale": "logit"}
    run_shard(tmp_path, Shard(0, 2), other)
    assert run_shard(tmp_path, Shard(1, 2)) is None
    with pytest.raises(StageError, match='00001-of-00002: other inputs than 00000-of-00002 .scale: "logit"'):
        merge_shards(tmp_path, "toy", summarize)
    with pytest.raises(StageError, match='made from other inputs(?s:.*)scale: "logit" -> "cosine"'):
        run_shard(tmp_path, Shard(0, 2))
    assert run_shard(tmp_path, Shard(0, 2), overwrite=True) is not None
    with pytest.raises(StageError, match="not a shard of the stage other"):
        merge_shards(tmp_path, "other", summarize)


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    for index in range(2):
        run_shard(tmp_path, Shard(index, 2))
    path = tmp_path / "shards/00001-of-00002/toy.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StageError, match="changed since the stage was finished"):
        merge_shards(tmp_path, "toy", summarize)


def test_a_folder_tells_its_stage(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="neither manifest.json nor shards"):
        stage_of(tmp_path)
    run_shard(tmp_path, Shard(0, 2))
    assert stage_of(tmp_path) == "toy"
    run_shard(tmp_path, Shard(1, 2))
    assert stage_of(tmp_path) == "toy"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"stage": ' + "9" * 5000 + "}", "[]", '"a"', "null", "\xff"])
def test_a_manifest_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    """Nested without end, a number of too many digits, another kind of JSON, no UTF-8."""
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(StageError, match=r"manifest\.json: not .*\nRemedy"):
        open_stage(tmp_path, "toy", INPUTS, SIZES)


# -------------------------------------------------------------------------------------------------------- attachments


BYTES = Attachment("values.bin", lambda record: 2 * int(record["id"]))  # record n has 2 n bytes


def attached(chunk: int) -> bytes:
    return b"".join(bytes([int(record["id"])] * BYTES.size_of(record)) for record in records(chunk))


def written(folder: Path, chunks: int = len(SIZES), **options: Any) -> None:
    """A stage with its first chunks; finished with all of them."""
    with open_stage(folder, "toy", INPUTS, SIZES, attachment=BYTES, **options) as stage:
        for chunk in stage.to_do[: max(0, chunks - stage.chunks_done)]:
            stage.append(records(chunk), attached(chunk))
        if not stage.to_do and not stage.complete:
            stage.conclude(lambda found, _: {"records": len(found)}, {})


WHOLE_FILE = b"".join(map(attached, range(len(SIZES))))


@pytest.mark.parametrize(
    ("torn", "kept"),
    [(b"", 2), (b"rest of a chunk whose records are missing", 2), (None, 1)],
    ids=["whole", "bytes before their records", "a file cut short"],
)
def test_an_attachment_continues_with_the_records(tmp_path: Path, torn: bytes | None, kept: int) -> None:
    """Killed behind two chunks: bytes without records are cut off, records without their bytes are done again."""
    path = tmp_path / "values.bin"
    written(tmp_path, 2)
    assert path.read_bytes() == attached(0) + attached(1)
    path.write_bytes(path.read_bytes()[:-1] if torn is None else path.read_bytes() + torn)
    with open_stage(tmp_path, "toy", INPUTS, SIZES, attachment=BYTES) as stage:
        assert stage.chunks_done == kept and path.read_bytes() == b"".join(map(attached, range(kept)))
    written(tmp_path)
    assert path.read_bytes() == WHOLE_FILE
    assert read_stage(tmp_path, "toy")[0]["attached"].keys() == {"values.bin"}


def test_an_attachment_of_shards_is_that_of_an_undivided_run(tmp_path: Path) -> None:
    written(tmp_path / "whole")
    for index in (1, 0):
        written(tmp_path / "parts", shard=Shard(index, 2))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert (tmp_path / "parts/values.bin").read_bytes() == WHOLE_FILE
    (tmp_path / "parts/values.bin").unlink()
    merge_shards(tmp_path / "parts", "toy", lambda found, _: {"records": len(found)})
    assert (tmp_path / "parts/values.bin").read_bytes() == WHOLE_FILE


def test_an_attachment_that_changed_is_named(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "values.bin").write_bytes(WHOLE_FILE[:-1] + b"x")
    with pytest.raises(StageError, match="values.bin: changed since the stage was finished"):
        read_stage(tmp_path, "toy")
    (tmp_path / "values.bin").unlink()
    with pytest.raises(StageError, match="values.bin: changed since"):
        written(tmp_path)


def test_bytes_that_do_not_belong_to_the_records_are_refused(tmp_path: Path) -> None:
    with (
        open_stage(tmp_path, "toy", INPUTS, SIZES, attachment=BYTES) as stage,
        pytest.raises(StageError, match="expected 6 attached bytes for chunk 0, got 5"),
    ):
        stage.append(records(0), b"12345")
