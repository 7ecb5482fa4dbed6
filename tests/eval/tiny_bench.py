"""Folders in the benchmarks' official layout, small: TinyCOCO's scenes as pictures, real questions and annotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval import benchmarks
from eval.core.record import RECORD
from eval.core.transfer import digest
from playground.tinycoco.captions import QUESTIONS
from playground.tinycoco.scenes import Scene, draw, sample_scene
from playground.tinycoco.vocabulary import SYNONYMS


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def scenes(count: int) -> list[Scene]:
    return [sample_scene(index, "test") for index in range(count)]


def paint(folder: Path, named: dict[str, Scene]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in named.items():
        draw(scene).save(folder / name)


def objhal(folder: Path, count: int = 6) -> None:
    """`count` scenes under COCO's names, their own objects as ground truth."""
    chosen = scenes(count)
    paint(folder / "coco/val2014", {f"COCO_val2014_{i:012d}.jpg": scene for i, scene in enumerate(chosen)})
    rows = [{"org_idx": 100 + i, "image_id": i, "question": QUESTIONS[i % len(QUESTIONS)]} for i in range(count)]
    write(folder / "objhal/obj_halbench_300_questions.jsonl", lines(rows))
    write(folder / "objhal/gt_objects_300.json", {str(i): sorted(scene.categories) for i, scene in enumerate(chosen)})
    synonyms = [", ".join([node, *(word for word in words if word != node)]) for node, words in SYNONYMS.items()]
    write(folder / "objhal/synonyms_refine.txt", "\n".join(synonyms) + "\n")


def amber(folder: Path, count: int = 3) -> None:
    """Descriptions of `count` scenes, and a question about a thing that is there and one that is not."""
    chosen = scenes(count)
    paint(folder / "amber/images", {f"AMBER_{i + 1}.jpg": scene for i, scene in enumerate(chosen)})
    queries = [{"id": i + 1, "image": f"AMBER_{i + 1}.jpg", "query": "Describe this image."} for i in range(count)]
    absent = [next(word for word in SYNONYMS if word not in scene.categories) for scene in chosen]
    annotations: list[dict[str, Any]] = [
        {"id": i + 1, "type": "generative", "truth": sorted(scene.categories), "hallu": [absent[i]]}
        for i, scene in enumerate(chosen)
    ]
    asked = []
    for i, scene in enumerate(chosen):
        for thing, truth in ((sorted(scene.categories)[0], "yes"), (absent[i], "no")):
            number = len(annotations) + 1
            asked.append({"id": number, "image": f"AMBER_{i + 1}.jpg", "query": f"Is there a {thing} in this image?"})
            kind = "discriminative-hallucination" if truth == "no" else "discriminative-attribute-state"
            annotations.append({"id": number, "type": kind, "truth": truth})
    write(folder / "amber/annotations.json", annotations)
    write(folder / "amber/query/query_generative.json", queries)
    write(folder / "amber/query/query_discriminative.json", asked)
    write(folder / "amber/relation.json", {word: [] for word in SYNONYMS})
    write(folder / "amber/safe_words.txt", "line\n")


def pope(folder: Path, count: int = 2) -> None:
    chosen = scenes(count)
    paint(folder / "coco/val2014", {f"COCO_val2014_{i:012d}.jpg": scene for i, scene in enumerate(chosen)})
    for variant in ("", "llava_variant/"):
        for split in ("random", "popular", "adversarial"):
            rows: list[dict[str, object]] = []
            for i, scene in enumerate(chosen):
                absent = next(word for word in SYNONYMS if word not in scene.categories)
                for thing, label in ((sorted(scene.categories)[0], "yes"), (absent, "no")):
                    text = f"Is there a {thing} in the image?"
                    image = f"COCO_val2014_{i:012d}.jpg"
                    rows.append({"question_id": len(rows) + 1, "image": image, "text": text, "label": label})
            write(folder / f"pope/{variant}coco_pope_{split}.json", lines(rows))


def mmhal(folder: Path, count: int = 2) -> None:
    """The judge's prompt is not the official one, whose digest `eval.mmhal` asks for."""
    paint(folder / "mmhal/images", {f"id{i}.jpg": scene for i, scene in enumerate(scenes(count))})
    rows = [
        {"question_type": kind, "question_topic": "outdoor", "image_id": f"id{i}", "image_content": ["Car"],
         "image_src": f"https://c4.staticflickr.com/{i}.jpg", "question": f"What is in picture {i}?",
         "gt_answer": "A car.", "model_answer": ""}
        for i, kind in enumerate(("attribute", "counting")[:count])
    ]  # fmt: skip
    write(folder / "mmhal/mmhal-bench_answer_template.json", rows)
    write(folder / "prompts/mmhal_judge.txt", MMHAL_PROMPT)


MMHAL_PROMPT = "Contents {} question {} standard {} answer {}"


def record(folder: Path) -> None:
    """Says in downloads.json that these files are meant to be as they are, although they are not the published ones."""
    files = [file.path for benchmark in benchmarks.BENCHMARKS for file in benchmark.files]
    known = {path: {"sha256": digest(folder / path)} for path in files if (folder / path).is_file()}
    write(folder / RECORD, known)
