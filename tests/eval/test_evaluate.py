"""One command for every benchmark, on TinyCOCO's checkpoint and small folders in the official layout."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from eval.compare import compare
from eval.core.answering import AnsweringError, spawn
from eval.evaluate import main
from eval.page_items import unpacked
from tests import warm
from tests.eval import tiny_bench
from tests.models.saved import save, save_adapter
from tests.openai_server import VERSION, Scripted, ScriptedServer, failure

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = str(ROOT / "playground/tinycoco/weights/llava")
SHORT = ["--conv-mode", "v1", "--max-new-tokens", "12", "--device", "cpu"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for make in (tiny_bench.objhal, tiny_bench.amber, tiny_bench.pope, tiny_bench.mmhal):
        make(folder)
    tiny_bench.record(folder)
    return folder


@pytest.fixture()
def command(world, tmp_path, monkeypatch):
    """Runs the command in this process; its output folder is `out`."""
    monkeypatch.setenv("DAMA_BENCH_DATA", str(world))

    def run(benchmark, *flags, checkpoint=CHECKPOINT, settings=SHORT):
        return main([benchmark, checkpoint, "--out", str(tmp_path / "out"), *settings, *flags])

    return run


@pytest.fixture()
def official_prompts(monkeypatch):
    """The tiny folder's prompts are taken for the official ones."""
    digest = sha256(tiny_bench.MMHAL_PROMPT.encode()).hexdigest()
    monkeypatch.setattr("eval.mmhal._PROMPT_SHA256", digest)


def results(path):
    return json.loads((path / "results.json").read_text())


def recomputed(content, metric):
    above, below = zip(*(item["parts"][metric] for item in content["items"]))
    return sum(above) / sum(below)


# ----------------------------------------------------------------------------------------------------- end to end


def test_objhal_from_questions_to_results(command, tmp_path, capsys, world):
    assert command("objhal") == 0
    home = tmp_path / "out/llava/objhal"
    content = results(home)
    assert len(content["items"]) == content["provenance"]["counts"]["answers"] == 6
    for metric in ("response_level", "mention_level", "object_recall", "mean_words"):
        assert content["metrics"][metric] == pytest.approx(recomputed(content, metric))
    provenance = content["provenance"]
    assert re.fullmatch(r"objhal-rules, data [0-9a-f]{8}, max_new_tokens 12", provenance["protocol"])
    assert provenance["checkpoint"] == CHECKPOINT and provenance["judge"] is None
    assert provenance["decoding"] | {"num_beams": 3, "temperature": 0.0, "template": "v1"} == provenance["decoding"]
    asked = [json.loads(line) for line in (home / "answers/answers.jsonl").read_text().splitlines()]
    questions = (world / "objhal/obj_halbench_300_questions.jsonl").read_text().splitlines()
    assert {a["question_id"]: a["prompt"] for a in asked} == {
        str(q["org_idx"]): q["question"] for q in map(json.loads, questions)
    }
    table = (home / "table.txt").read_text()
    assert table in capsys.readouterr().out and "response-level %" in table and (home / "page.html").exists()

    before = (home / "results.json").read_bytes()
    assert command("objhal") == 0
    assert "answers: complete in" in capsys.readouterr().out and (home / "results.json").read_bytes() == before


def test_amber_has_a_decoding_for_each_part(command, tmp_path):
    assert command("amber") == 0
    content = results(tmp_path / "out/llava/amber")
    assert content["provenance"]["counts"]["answers"] == 9
    decoding = content["provenance"]["decoding"]
    assert {part: d["num_beams"] for part, d in decoding.items()} == {"generative": 1, "discriminative": 1}
    assert content["metrics"]["cover"] == pytest.approx(recomputed_over(content, "cover"))


def recomputed_over(content, metric):
    having = [item["parts"][metric] for item in content["items"] if metric in item["parts"]]
    return sum(part[0] for part in having) / sum(part[1] for part in having)


def test_both_variants_of_pope_keep_apart(command, tmp_path):
    assert command("pope") == command("pope", "--mode", "official") == 0
    home = tmp_path / "out/llava/pope"
    protocols = [results(folder)["provenance"]["protocol"].split(",")[0] for folder in (home, home / "official")]
    assert protocols == ["pope-llava", "pope-official"]
    assert (home / "answers/answers.jsonl").exists() and (home / "answers_official/answers.jsonl").exists()


def test_a_trial_has_a_folder_of_its_own(command, tmp_path):
    assert command("pope", "--limit", "1") == 0
    content = results(tmp_path / "out/llava/pope_first1")
    assert [item["split"] for item in content["items"]] == ["random", "popular", "adversarial"]
    assert content["provenance"]["protocol"].endswith(", first 1")


# --------------------------------------------------------------------------------------------------------- judges


def test_a_judge_is_asked_once(command, tmp_path, capsys, official_prompts):
    """Ratings 5 and 2: mean 3.5, one of two hallucinates. A second run, and one without a server, asks nobody."""
    server = ScriptedServer(lambda call: "Rating: 5" if "picture 0?" in call.text else "Rating: 2")
    with server as url:
        judge = ["--judge-base-url", url, "--judge-model", "tiny-judge", "--judge-prices", "10", "30"]
        assert command("mmhal", *judge) == command("mmhal", *judge) == command("mmhal") == 0
    said = capsys.readouterr().out
    content = results(tmp_path / "out/llava/mmhal")
    assert len(server.calls) == 2 and (tmp_path / "out/llava/mmhal/verdicts.jsonl").exists()
    assert (content["metrics"]["score"], content["metrics"]["hallucination_rate"]) == (3.5, 50.0)
    judge = content["provenance"]["judge"]
    assert (judge["name"], judge["version"], judge["temperature"]) == ("tiny-judge", VERSION, 0.0)
    # 2 replies of 10 and 5 tokens: (20 x 10 + 10 x 30) / 1e6 = 0.0005
    assert "2 replies paid for, 0 from the cache, 0 failed; 20 prompt and 10 completion tokens, cost 0.00" in said
    assert "0 replies paid for, 2 from the cache" in said


def test_without_a_judge(command, tmp_path, capsys, official_prompts):
    assert command("mmhal") == 2
    assert "mmhal: expected --judge-base-url, got none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # said before anything is generated
    assert command("mmhal", "--answers-only") == 0
    home = tmp_path / "out/llava/mmhal"
    assert (home / "answers/answers.jsonl").exists() and not (home / "results.json").exists()


def test_quirks_are_labelled(command, tmp_path, official_prompts):
    """A rating that the original cannot read is 0 with it."""
    with ScriptedServer(lambda call: "**Rating**: 6") as url:
        assert command("mmhal", "--judge-base-url", url) == 0
        content = results(tmp_path / "out/llava/mmhal")
        assert content["metrics"]["score"] == 6
        assert command("mmhal", "--judge-base-url", url, "--official-quirks") == 0
    content = results(tmp_path / "out/llava/mmhal")
    assert content["metrics"]["score"] == 0 and "mmhal-official-quirks" in content["provenance"]["protocol"]


def test_both_modes_of_objhal_share_answers(command, tmp_path, world, monkeypatch, capsys):
    """The judge names an object that no scene has, in each answer: 100 % at response level."""
    prompt = "Q: {question}\nA: {answer}\nList the objects."
    monkeypatch.setattr("eval.objhal._PROMPT_SHA256", sha256(prompt.encode()).hexdigest())
    absent = "surfboard"
    try:
        (world / "prompts/objhal_extract.txt").write_text(prompt)
        with ScriptedServer(lambda call: f'["{absent}"]') as url:
            assert command("objhal") == 0
            assert command("objhal", "--mode", "llm", "--judge-base-url", url, "--limit", "2") == 0
            assert command("objhal", "--mode", "llm", "--judge-base-url", url) == 0
    finally:
        (world / "prompts/objhal_extract.txt").unlink()
    home = tmp_path / "out/llava/objhal"
    llm, rules = results(home / "llm"), results(home)
    assert llm["provenance"]["protocol"].startswith("objhal-llm") and llm["provenance"]["judge"]["version"] == VERSION
    assert rules["provenance"]["protocol"].startswith("objhal-rules")
    assert [item["text"] for item in llm["items"]] == [item["text"] for item in rules["items"]]
    assert "complete in" in capsys.readouterr().out


def completion_of(content, finish="stop", **message):
    body = {"choices": [{"index": 0, "finish_reason": finish, "message": {"content": content} | message}]}
    return Scripted(200, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (failure(400, "Unsupported parameter: 'max_tokens'"), "--judge-omit max_tokens"),
        (failure(404, "nobody here"), "nobody here"),
        (Scripted(200, b'{"error": {"message": "no such deployment"}}'), "no such deployment"),
        (failure(400, "strange words"), "strange words"),
    ],
)
def test_a_judge_that_never_judges_is_an_error(command, tmp_path, capsys, official_prompts, trouble, words):
    """Exit code 2 with the server's words, no results, and seconds instead of minutes."""
    started = time.monotonic()
    server = ScriptedServer(lambda call: trouble)
    with server as url:
        assert command("mmhal", "--judge-base-url", url) == 2
    assert words in capsys.readouterr().err and time.monotonic() - started < 60
    assert len(server.calls) <= 2 and not (tmp_path / "out/llava/mmhal/results.json").exists()


def test_a_judge_s_settings_can_be_left_to_it(command, tmp_path, official_prompts):
    server = ScriptedServer(lambda call: "Rating: 5")
    with server as url:
        assert command("mmhal", "--judge-base-url", url, "--judge-omit", "max_tokens", "temperature") == 0
    assert all(set(call.body) == {"model", "messages"} for call in server.calls)
    content = results(tmp_path / "out/llava/mmhal")
    assert content["provenance"]["judge"]["temperature"] is None and content["metrics"]["score"] == 5
    assert command("mmhal") == 0  # from the verdicts that were kept


SERVED = ["--backend", "openai", "--num-beams", "1", "--max-new-tokens", "12"]


def test_a_served_model_that_thinks_refuses_and_breaks_off(command, tmp_path, capsys):
    """Of six pictures two get a caption; the other four are counted, shown on the page, and in no metric."""
    captions = iter(
        [
            completion_of("<think>Not a dog.</think>A red cup."),
            Scripted(200, completion_of("a XX cup").body.replace(b"XX", b"\\ud83d")),
            completion_of(None, "length"),
            completion_of(None, refusal="I can't help."),
            completion_of("<think>A dog", "length"),
            completion_of([], "content_filter"),
        ]
    )
    with ScriptedServer(lambda call: next(captions)) as url:
        served = [*SERVED, "--base-url", url, "--concurrency", "1"]
        assert command("objhal", *served, checkpoint="thinker", settings=[]) == 0
        assert command("objhal", *served, checkpoint="thinker", settings=[]) == 0  # complete, asks nobody
    home = tmp_path / "out/thinker/objhal"
    content = results(home)
    assert sorted(item["text"] for item in content["items"]) == ["", "", "", "", "A red cup.", "a \ufffd cup"]
    counts = content["provenance"]["counts"]
    assert (counts["answers"], counts["missing"]) == (2, 4)
    missing = [item for item in content["items"] if "missing" in item]
    assert len(missing) == 4 and all(item["wrong"] is None and item["parts"] == {} for item in missing)
    assert content["metrics"]["mean_words"] == 3.0
    rows = [json.loads(line) for line in (home / "answers/answers.jsonl").read_text().splitlines()]
    assert sorted(row["finish_reason"] for row in rows)[:2] == ["content_filter", "length"]
    page = (home / "page.html").read_text()
    items = unpacked(page.split('id="items-data">')[1].split("</script>")[0])
    states = [item.state for item in items]
    assert states.count("missing") == 4 and "No answer" in page and "unparsed" not in states
    said = capsys.readouterr().out
    assert "objhal: no answer to 4 of 6 questions" in said and "1: refusal: I can't help." in said
    assert "no answer: refusal: I can't help." in [fact for item in items for fact in item.answers[0].facts]


def test_a_missing_answer_can_be_compared_with_one_that_is_there(command, tmp_path):
    """The item of the one is in no metric of the other's."""
    for name, silent in (("whole", ()), ("silent", (2,))):
        with ScriptedServer(lambda call, s=silent: completion_of(None if call.number in s else "A cup.")) as url:
            flags = [*SERVED, "--base-url", url, "--concurrency", "1"]
            assert command("objhal", *flags, checkpoint=name, settings=[]) == 0
    paths = [tmp_path / f"out/{name}/objhal/results.json" for name in ("whole", "silent")]
    text = compare(paths).text
    assert "Missing: whole 0, silent 1." in text


def test_a_model_that_answers_nothing_is_an_error(command, tmp_path, capsys):
    with ScriptedServer(lambda call: completion_of(None, "length")) as url:
        assert command("objhal", *SERVED, "--base-url", url, checkpoint="mute", settings=[]) == 2
    assert "no answer to 6 of 6 questions (6: empty reply, finish reason length)" in capsys.readouterr().err


def test_settings_of_a_served_model_can_be_left_to_it(command, tmp_path):
    server = ScriptedServer(lambda call: "A cup.")
    with server as url:
        omit = ["--omit", "max_tokens", "seed", "temperature"]
        assert command("objhal", *SERVED, "--base-url", url, *omit, checkpoint="m", settings=[]) == 0
    assert all(set(call.body) == {"model", "messages"} for call in server.calls)


@pytest.mark.parametrize(
    "name", ["..", ".", "../..", "/", "", "a/..", "a/../", ". .", "a\x1b[2J", "x" * 300, r"a\..\b"]
)
def test_a_checkpoint_s_name_stays_below_the_output_folder(command, tmp_path, capsys, name):
    served = ["--backend", "openai", "--base-url", "http://127.0.0.1:9/v1"]
    for flags in (served, [*served, "--compare", CHECKPOINT], []):
        assert command("objhal", *flags, checkpoint=name) == 2
        assert "expected a name" in capsys.readouterr().err
    assert command("objhal", "--compare", name or ".") == 2
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- two models, all of it


def test_two_checkpoints(command, tmp_path, capsys):
    """The same weights under another name: every difference is nought."""
    other = tmp_path / "other"
    other.symlink_to(CHECKPOINT)
    assert command("objhal", "--compare", str(other)) == 0
    said = capsys.readouterr().out
    assert "other and llava have the same weights." in said and "mention-level" in said
    assert "llava - other" in said and "Differences: each minus the base, other." in said
    assert (tmp_path / "out/other/objhal/results.json").exists()
    page = (tmp_path / "out/llava/objhal/page.html").read_text()
    assert len(json.loads(page.split('id="images-data">')[1].split("</script>")[0])) == 6
    assert command("objhal", "--compare", CHECKPOINT + "/") == 2
    assert "its folder's name is the checkpoint's" in capsys.readouterr().err


def test_all_draws_a_table_and_a_chart_and_says_what_it_left_out(command, tmp_path, capsys, official_prompts):
    assert command("all") == 2
    said = capsys.readouterr()
    missing = "chair, hallusionbench, llavabench, mmvet, mmstar"
    assert f"left out, because their data could not be had (see above): {missing}" in said.err
    assert "LEFT OUT: benchmark data in" in said.out and "mmvet/mm-vet.json: made from mmvet/mm-vet.zip" in said.out
    assert "mmhal: 2 answers in" in said.out and "not scored, no --judge-base-url" in said.out
    table = (tmp_path / "out/summary.txt").read_text()
    row = next(line for line in table.splitlines() if line.startswith("llava "))
    assert row.split()[-15:-4] == ["100.0", *["n/a"] * 10] and row.split()[-3:] == ["n/a"] * 3
    with Image.open(io.BytesIO((tmp_path / "out/radar.png").read_bytes())) as chart:
        assert chart.size[0] > 600


# ------------------------------------------------------------------------------------------------- killed, sharded


def answers_in(out):
    path = out / "llava/objhal/answers/answers.jsonl"
    return path.read_bytes() if path.exists() else b""


def kill_after(answers, world, out):
    """Starts the command as a process of its own and kills it when it has written so many answers."""
    line = [sys.executable, "-m", "eval.evaluate", "objhal", CHECKPOINT, "--out", str(out), *SHORT, "--batch-size", "1"]
    environment = os.environ | {"DAMA_BENCH_DATA": str(world), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while process.poll() is None and answers_in(out).count(b"\n") < answers:
        time.sleep(0.002)
    warm.kill(process)


@pytest.mark.kill
def test_killed_and_resumed_is_never_killed(command, world, tmp_path, capsys):
    """Killed twice between batches, at whatever moment: the third run's files are the undisturbed run's to the byte."""
    names = ("answers/answers.jsonl", "results.json")
    home = tmp_path / "out/llava/objhal"
    assert command("objhal", "--batch-size", "1") == 0
    whole = {name: (home / name).read_bytes() for name in names}
    shutil.rmtree(tmp_path / "out")
    for answers in (1, 3):
        kill_after(answers, world, tmp_path / "out")
        assert answers <= answers_in(tmp_path / "out").count(b"\n") < 6
    assert command("objhal", "--batch-size", "1") == 0
    assert re.search(r"continues at record [345] of 6", capsys.readouterr().out)
    assert {name: (home / name).read_bytes() for name in names} == whole


def test_two_processes_write_the_bytes_of_one(command, tmp_path, capfd):
    assert command("objhal", "--batch-size", "2") == 0
    one = answers_in(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert command("objhal", "--batch-size", "2", "--processes", "2") == 0
    assert answers_in(tmp_path / "out") == one
    assert (tmp_path / "out/llava/objhal/answers/shards/00001-of-00002/answers.jsonl").exists()
    assert command("objhal", "--batch-size", "2", "--processes", "2") == 0
    assert "answers: complete in" in capfd.readouterr().out


def test_a_process_that_fails_is_named():
    """Each process knows its number; the second of three fails."""
    program = "import os, sys; sys.exit(3 * (os.environ['RANK'] == os.environ['LOCAL_RANK'] == '1'))"
    with pytest.raises(
        AnsweringError, match="process 1 of 3 ended with status 3[\\s\\S]*run the same again, it continues"
    ):
        spawn(3, [sys.executable, "-c", program])
    spawn(1, [sys.executable, "-c", program])


# ------------------------------------------------------------------------------------- models other than LLaVA-1.5


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tiny Qwen2.5-VL and an adapter over it, each in a folder of its own name."""
    folder = tmp_path_factory.mktemp("models")
    save("qwen2_5_vl", folder / "qwen")
    save_adapter("qwen2_5_vl", folder / "qwen", folder / "aligned")
    return folder


OTHER = ["--max-new-tokens", "12", "--device", "cpu"]  # flags of any model


def test_another_model_and_its_adapter_side_by_side(command, qwen, tmp_path, capsys):
    base, aligned = str(qwen / "qwen"), str(qwen / "aligned")
    assert command("pope", "--compare", base, checkpoint=aligned, settings=OTHER) == 0
    contents = [results(tmp_path / f"out/{name}/pope") for name in ("aligned", "qwen")]
    assert all(len(content["items"]) == 12 for content in contents)
    protocols = {content["provenance"]["protocol"] for content in contents}
    assert len(protocols) == 1 and protocols.pop().startswith("pope-llava")
    assert contents[0]["provenance"]["fingerprint"] != contents[1]["provenance"]["fingerprint"]
    assert contents[0]["provenance"]["decoding"]["template"] == "the model's own"
    capsys.readouterr()
    assert command("pope", "--compare", base, checkpoint=aligned, settings=OTHER) == 0
    assert capsys.readouterr().out.count("answers: complete in") == 2


def test_another_model_in_several_processes_with_its_flags(command, qwen, tmp_path, capsys):
    flags = ["--system_prompt", "Be brief.", "--max_pixels", "256", "--processor_option", "do_normalize=false"]
    settings = [*OTHER, *flags, "--dtype", "float32"]
    assert (
        command("objhal", "--processes", "2", "--batch-size", "2", checkpoint=str(qwen / "qwen"), settings=settings)
        == 0
    )
    provenance = results(tmp_path / "out/qwen/objhal")["provenance"]
    assert provenance["protocol"].endswith(", system prompt, max_pixels 256, do_normalize=false, max_new_tokens 12")
    several = (tmp_path / "out/qwen/objhal/answers/answers.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "out")
    assert command("objhal", "--batch-size", "2", checkpoint=str(qwen / "qwen"), settings=settings) == 0
    assert (tmp_path / "out/qwen/objhal/answers/answers.jsonl").read_bytes() == several


def test_a_template_given_for_another_model_is_refused_before_anything_starts(command, qwen, tmp_path, capsys):
    assert command("pope", checkpoint=str(qwen / "qwen"), settings=[*OTHER, "--conv-mode", "vicuna_v1"]) == 2
    assert "--conv-mode vicuna_v1: expected with LLaVA-1.5 only, got" in capsys.readouterr().err
    assert command("pope", "--compare", str(qwen / "qwen")) == 2
    assert "--conv-mode v1: expected with LLaVA-1.5 only, got" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- refused


def test_other_inputs_are_refused_with_the_difference(command, capsys, tmp_path):
    assert command("objhal", "--batch-size", "3") == 0
    assert command("objhal", "--batch-size", "3", "--num-beams", "1") == 2
    assert "--num-beams: 3 -> 1" in capsys.readouterr().err
    assert command("objhal", "--batch-size", "3", "--num-beams", "1", "--overwrite") == 0
    protocol = results(tmp_path / "out/llava/objhal")["provenance"]["protocol"]
    assert protocol.endswith("num_beams 1, max_new_tokens 12")


def test_another_template_is_another_protocol(command, tmp_path):
    assert command("pope", settings=[*SHORT, "--conv-mode", "plain"]) == 0
    assert ", template plain" in results(tmp_path / "out/llava/pope")["provenance"]["protocol"]


def test_changed_data_are_refused(command, world, capsys):
    path = world / "objhal/gt_objects_300.json"
    before = path.read_text()
    try:
        path.write_text(before.replace("person", "dog"))
        assert command("objhal") == 2
    finally:
        path.write_text(before)
    assert "objhal/gt_objects_300.json: expected SHA-256" in capsys.readouterr().err


def test_all_faults_of_the_flags_at_once(command, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--limit", "0", "--batch-size", "0", "--mode", "rulez", "--official-quirks", "--backend", "openai"]
    assert command("objhal", *flags) == 2
    said = capsys.readouterr().err
    for part in (
        "--limit 0: expected 1 or more",
        "--batch-size 0: expected 1 or more",
        "--mode rulez: expected rules or llm for objhal",
        "--official-quirks: rules have none",
        "started by a launcher",
        "a server decodes without beams, published are 3; add --num-beams 1",
    ):
        assert part in said


def test_a_missing_checkpoint(command, capsys, tmp_path):
    assert command("pope", checkpoint=str(tmp_path / "nowhere")) == 2
    said = capsys.readouterr().err
    assert "nowhere': expected a folder or the name of a model on the hub" in said and "Traceback" not in said
    assert not (tmp_path / "out/nowhere/pope/results.json").exists()


def test_a_given_folder_is_not_written_to(command, world, tmp_path, monkeypatch, capsys):
    """What DAMA_BENCH_DATA lacks is named; only eval.download brings it."""
    given = tmp_path / "given"
    tiny_bench.pope(given)
    monkeypatch.setenv("DAMA_BENCH_DATA", str(given))
    (given / "coco/val2014/COCO_val2014_000000000001.jpg").unlink()
    tiny_bench.record(given)
    before = sorted(given.rglob("*"))
    assert command("pope") == 2
    said = capsys.readouterr().err
    assert "coco/val2014/: 1 images (COCO_val2014_000000000001.jpg), each from http://images.cocodataset.org" in said
    assert sorted(given.rglob("*")) == before


# ---------------------------------------------------------------------------------------------------------- served


def test_a_served_checkpoint(command, tmp_path):
    server = ScriptedServer(lambda call: "Yes, there is.")
    with server as url:
        flags = ["--backend", "openai", "--base-url", url]
        assert command("pope", *flags, checkpoint="my/export", settings=[]) == 0
    content = results(tmp_path / "out/export/pope")
    assert content["metrics"]["random_accuracy"] == 50.0 and content["metrics"]["random_yes_ratio"] == 100.0
    # 12 questions in three splits, of which 4 are different: equal ones are asked once
    assert len(server.calls) == 4 and content["provenance"]["fingerprint"] == "served"
    assert content["provenance"]["checkpoint"] == "my/export"
