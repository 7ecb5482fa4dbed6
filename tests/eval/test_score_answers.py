"""Answers that somebody has already: every format gives the score that the benchmark's own scorer gives."""

import csv
import json
import os
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from eval import pope
from eval.answer_files import read_rows
from eval.core.store import read_answers
from eval.score_answers import main
from eval.xlsx import read_xlsx
from playground.tinycoco.benchmarks import write_benchmarks
from tests.openai_server import ScriptedServer

pytestmark = pytest.mark.fast

SCENES = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_benchmarks(folder, SCENES, "test")
    return folder


@pytest.fixture
def scored(world, tmp_path, monkeypatch):
    """Run the command on files; return the content of results.json."""
    monkeypatch.setenv("DAMA_BENCH_DATA", str(world))

    def run(benchmark, *words, name="m", mode=""):
        assert main([benchmark, *map(str, words), "--out", str(tmp_path / "out"), "--name", name]) == 0
        return json.loads((tmp_path / "out" / name / benchmark / mode / "results.json").read_text())

    return run


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_xlsx(path, rows):
    """Write a workbook by hand: text as shared strings, with a run and an escape, and inline; empty cells left out."""
    names = list(rows[0])
    shared = list(dict.fromkeys(str(value) for row in [dict(zip(names, names)), *rows] for value in row.values()))

    def cell(column, number, value):
        place = f'r="{"ABCDEFGH"[column]}{number}"'
        if value == "":
            return ""
        if isinstance(value, int):
            return f"<c {place}><v>{value}</v></c>"
        return f'<c {place} t="s"><v>{shared.index(value)}</v></c>'

    lines = [[cell(i, 1, name) for i, name in enumerate(names)]]
    lines += [[cell(i, n, row[name]) for i, name in enumerate(names)] for n, row in enumerate(rows, 2)]
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    links = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    sheet = "".join(f"<row>{''.join(line)}</row>" for line in lines)
    texts = "".join(
        f"<si><r><t>{escape(t[:1])}</t></r><r><t>{escape(t[1:])}</t></r></si>".replace("\r", "_x000D_") for t in shared
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "xl/workbook.xml", f'<workbook {space} xmlns:r="{links}"><sheets><sheet r:id="rId7"/></sheets></workbook>'
        )
        archive.writestr("xl/_rels/workbook.xml.rels", '<R><L Id="rId7" Target="worksheets/s.xml"/></R>')
        archive.writestr("xl/worksheets/s.xml", f"<worksheet {space}><sheetData>{sheet}</sheetData></worksheet>")
        archive.writestr("xl/sharedStrings.xml", f"<sst {space}>{texts}</sst>")
    return path


def of_pope(world):
    """The questions, and right answers to every second one, nothing readable to every third of the others."""
    data = pope.load(world)
    other = {"yes": "No", "no": "Yes"}
    said = [q.truth if i % 2 else "Perhaps" if i % 3 else other[q.truth] for i, q in enumerate(data.questions)]
    return data, said


def test_llavas_jsonl_is_scored_as_by_the_scorer(world, tmp_path, scored):
    data, said = of_pope(world)
    rows = [{"question_id": int(q.id), "prompt": q.prompt, "text": text} for q, text in zip(data.questions, said)]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    found = scored("pope", path)
    assert found["metrics"] == pope.score(data, read_answers(path)).metrics
    assert found["provenance"]["protocol"].startswith("pope-llava, data ")
    assert found["provenance"]["decoding"] == {"decoding": "not stated"}
    assert (tmp_path / "out/m/pope/page.html").exists()


def test_all_formats_give_one_score(world, tmp_path, scored):
    """LLaVA's jsonl, lmms-eval's samples without and with documents, a workbook, a table, and id -> answer."""
    import pyarrow.parquet

    questions = pyarrow.parquet.read_table(world / "mmstar/mmstar.parquet", columns=[
        "index", "question", "answer", "category", "l2_category"]).to_pylist()  # fmt: skip
    said = [row["answer"] if row["index"] % 2 else "Dogs" if row["index"] % 3 else "" for row in questions]
    rows = [row | {"prediction": text} for row, text in zip(questions, said)]
    samples = [
        {"doc_id": i, "target": row["answer"], "input": f"<image> {row['question']} Answer!", "filtered_resps": text,
         "average": {"question_id": row["index"], "score": 0.0}}
        for i, (row, text) in enumerate(zip(questions, said))
    ]  # fmt: skip
    with_docs = [
        {"doc_id": i, "doc": row, "filtered_resps": [text]} for i, (row, text) in enumerate(zip(questions, said))
    ]
    with open(tmp_path / "table.tsv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    files = [
        write_lines(tmp_path / "llava.jsonl", [{"question_id": i, "text": text} for i, text in enumerate(said)]),
        write_lines(tmp_path / "samples.jsonl", samples),
        write_lines(tmp_path / "docs.jsonl", with_docs),
        write_xlsx(tmp_path / "book.xlsx", rows),
        tmp_path / "table.tsv",
        tmp_path / "map.json",
    ]
    files[-1].write_text(json.dumps({str(i): text for i, text in enumerate(said)}))
    results = [scored("mmstar", path, name=path.stem) for path in files]
    assert results[0]["metrics"]["total"] == 50.0 and results[0]["provenance"]["counts"]["unparsed"] == 3
    for result in results[1:]:
        assert result["metrics"] == results[0]["metrics"]
        assert result["items"] == results[0]["items"]


def test_a_workbook_has_the_questions_where_the_official_files_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DAMA_BENCH_DATA", str(tmp_path))
    rows = [{"index": i, "question": "Which?\nOptions: A: a, B: b", "answer": "AB"[i], "category": "math",
             "l2_category": "x", "prediction": "A"} for i in range(2)]  # fmt: skip
    path = write_xlsx(tmp_path / "answers.xlsx", rows)
    assert main(["mmstar", str(path), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/answers/mmstar/results.json").read_text())
    assert found["metrics"]["total"] == 50.0
    assert found["provenance"]["protocol"] == "mmstar, truths of the answers' file, 2 questions"
    assert "no page: none of the images is in" in capsys.readouterr().out
    path = write_lines(tmp_path / "a.jsonl", [{"question_id": 0, "text": "A"}])
    assert main(["mmstar", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "mmstar/mmstar.parquet" in capsys.readouterr().err


def test_a_table_has_the_questions_too_and_what_it_lacks_is_named(tmp_path, monkeypatch, capsys):
    """A .csv as a spreadsheet saves it, with a byte order mark; numbers are text. Rows used twice are named."""
    monkeypatch.setenv("DAMA_BENCH_DATA", str(tmp_path))
    rows = [{"index": i, "question": "Which?\nOptions: A: a, B: b", "answer": "AB"[i], "category": "math",
             "l2_category": "x", "prediction": "<answer>A</answer>"} for i in range(2)]  # fmt: skip
    path = tmp_path / "answers.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert main(["mmstar", str(path), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/answers/mmstar/results.json").read_text())["metrics"]["total"] == 50.0
    path = write_lines(tmp_path / "twice.jsonl", [*rows, rows[0]])
    assert main(["mmstar", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "mmstar/mmstar.parquet" in error and "field 'index': 0 is used 2 times" in error


def test_vlmevalkits_hallusionbench_index_names_the_question(world, tmp_path, scored):
    """It asks the part with images only, under NAME_CATEGORY_SUBCATEGORY_SET_FIGURE_QUESTION."""
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    questions = [
        row
        for row in json.loads((world / "hallusionbench/HallusionBench.json").read_text())
        if row["visual_input"] != "0"
    ]
    rows = [
        {"index": "_".join(["HallusionBench", *(row[key] for key in keys)]), "question": row["question"],
         "answer": ("No", "Yes")[int(row["gt_answer"])], "prediction": ("No.", "yes")[int(row["gt_answer"])]}
        for row in questions
    ]  # fmt: skip
    found = scored("hallusionbench", write_xlsx(tmp_path / "book.xlsx", rows))
    assert found["metrics"]["question_accuracy"] == 100.0
    assert found["provenance"]["counts"]["answers"] == len(rows)


def test_the_benchmarks_own_format_and_a_baseline(world, tmp_path, scored, capsys):
    rows = json.loads((world / "hallusionbench/HallusionBench.json").read_text())
    for name, said in (("right", ("No", "Yes")), ("yes", ("Yes", "Yes"))):
        given = [row | {"model_prediction": said[int(row["gt_answer"])]} for row in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps(given))
    found = scored("hallusionbench", tmp_path / "right.json", "--compare", tmp_path / "yes.json")
    assert found["metrics"]["pair_accuracy"] == 100.0
    printed = capsys.readouterr().out
    assert "m - yes" in printed and "m better" in printed and "Decoded differently" not in printed


def test_captions_choose_the_images(world, tmp_path, scored):
    captions = [{"image_id": i, "caption": "A dog."} for i in (2, 4)]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    found = scored("chair", tmp_path / "captions.json")
    assert found["provenance"]["protocol"].startswith("chair-512, 2 images ")
    assert [item["id"] for item in found["items"]] == ["2", "4"]


def test_a_judge_decides_and_is_not_asked_twice(world, tmp_path, scored):
    rows = json.loads((world / "hallusionbench/HallusionBench.json").read_text())[:4]
    path = write_lines(tmp_path / "a.jsonl", [row | {"model_prediction": row["gt_answer_details"]} for row in rows])
    with ScriptedServer(lambda call: "correct") as url:
        flags = ["--mode", "llm", "--judge-base-url", url, "--judge-model", "j"]
        found = scored("hallusionbench", path, *flags, mode="llm")
    assert found["metrics"]["question_accuracy"] == 100.0 and found["provenance"]["counts"]["missing"] > 0
    assert scored("hallusionbench", path, "--mode", "llm", mode="llm")["metrics"] == found["metrics"]  # no server now


class TestErrors:
    def failing(self, world, path, monkeypatch, capsys):
        monkeypatch.setenv("DAMA_BENCH_DATA", str(world))
        assert main(["pope", str(path), "--out", str(path.parent / "out")]) == 2
        return capsys.readouterr().err

    def test_another_wording_unknown_ids_and_second_answers(self, world, tmp_path, monkeypatch, capsys):
        first = pope.load(world).questions[0]
        rows = [{"question_id": first.id, "prompt": "Is it art?", "text": "yes"}, {"question_id": "x", "text": "no"},
                *[{"question_id": first.id, "text": "yes"}] * 2]  # fmt: skip
        error = self.failing(world, write_lines(tmp_path / "a.jsonl", rows), monkeypatch, capsys)
        assert "3 errors" in error and "row 0: no question has its id or wording" in error
        assert "row 1" in error and f"question '{first.id}': 2 rows answer it" in error

    def test_rows_without_answer(self, world, tmp_path, monkeypatch, capsys):
        error = self.failing(world, write_lines(tmp_path / "a.jsonl", [{"question_id": 1}]), monkeypatch, capsys)
        assert "row 0: expected an answer as prediction or model_prediction or" in error

    @pytest.mark.parametrize("name", ["a.xlsx", "a.json", "missing.jsonl"])
    def test_files_that_are_none(self, world, tmp_path, monkeypatch, capsys, name):
        if not name.startswith("missing"):
            (tmp_path / name).write_text("<html>")
        error = self.failing(world, tmp_path / name, monkeypatch, capsys)
        assert name in error and ("expected" in error or "not JSON" in error)

    def test_position_alone_joins_no_answer_to_a_question_of_another_wording(
        self, world, tmp_path, monkeypatch, capsys
    ):
        rows = [{"doc_id": 0, "input": "Is it art?", "filtered_resps": "yes"}]
        error = self.failing(world, write_lines(tmp_path / "a.jsonl", rows), monkeypatch, capsys)
        assert "row 0: no question has its id or wording" in error


def test_cells_of_a_workbook(tmp_path):
    rows = [{"index": 0, "text": "a\rb", "n": 3}, {"index": 1, "text": "", "n": 4}]
    assert read_xlsx(write_xlsx(tmp_path / "b.xlsx", rows)) == [
        {"index": 0, "text": "a\rb", "n": 3},
        {"index": 1, "n": 4},
    ]
    write_xlsx(tmp_path / "b.xlsx", [{"same": 1, "same_": 2}])
    with zipfile.ZipFile(tmp_path / "b.xlsx") as archive:
        parts = {name: archive.read(name).replace(b"<t>ame_</t>", b"<t>ame</t>") for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.xlsx", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="columns of different names, got same, same"):
        read_xlsx(tmp_path / "b.xlsx")


@pytest.mark.skipif("DAMA_BENCH_DATA" not in os.environ, reason="DAMA_BENCH_DATA is not set")
class TestOfficialData:
    @pytest.mark.parametrize("quirks", [[], ["--official-quirks"]])
    def test_1500_real_predictions(self, tmp_path, quirks):
        path = Path(os.environ["DAMA_BENCH_DATA"]) / "mmstar/llava_next_yi_34b_MMStar.xlsx"
        assert len(read_rows(path)) == 1500
        assert main(["mmstar", str(path), "--out", str(tmp_path), "--name", "m", *quirks]) == 0
        found = json.loads((tmp_path / "m/mmstar/results.json").read_text())
        assert round(found["metrics"]["total"], 2) == 52.07
        assert sum(item["wrong"] is False for item in found["items"]) == 781
        assert found["provenance"]["counts"] == {"answers": 1500, "missing": 0, "unparsed": 0}
