"""Where the benchmarks' official files come from: pinned revisions, digests, and what is made from packages."""

from __future__ import annotations

import ast
import base64
import json
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from eval.core.objects import ObjectVocabulary
from eval.core.official import read_json
from eval.core.transfer import TransferError, members


@dataclass(frozen=True)
class File:
    """One file of the data folder and its home.

    sha256, size (bytes): None where nobody has published them. instead: another file that does as well. package: the
    file that it is made from, by `make`: (package, data folder) -> content. by_hand: what a person does where no direct
    link leads to it. judge_only: rules do without it. check: of a file without a published digest, raises ValueError
    where the content is another than it should be.
    """

    path: str
    url: str = ""
    sha256: str | None = None
    size: int | None = None
    instead: str = ""
    package: File | None = None
    make: Callable[[Path, Path], bytes] | None = None
    by_hand: str = ""
    judge_only: bool = False
    check: Callable[[Path], None] | None = None

    @property
    def home(self) -> str:
        if self.package is not None:
            return f"made from {self.package.path}, {self.package.home}"
        return self.by_hand or f"from {self.url}"


# ---------------------------------------------------------------------------------------------------------- content
# A login page, a quota notice or an error in JSON may come with status 200 in place of a file.


def rows_with(*names: str) -> Callable[[Path], None]:
    """Checks for JSON objects, one a line, that all have these fields."""

    def check(path: Path) -> None:
        expected = f"expected lines of objects with {', '.join(names)}"
        empty = True
        with open(path, encoding="utf-8") as file:
            for line in filter(str.strip, file):
                row, empty = _object(line), False
                if not all(name in row for name in names):
                    raise ValueError(f"{expected}, got {line[:60]!r}")
        if empty:
            raise ValueError(f"{expected}, got an empty file")

    return check


def questions_with(*names: str) -> Callable[[Path], None]:
    """Checks for a JSON object of objects that all have these fields."""

    def check(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        rows = _object(text)
        if not rows or not all(isinstance(row, dict) and row.keys() >= set(names) for row in rows.values()):
            raise ValueError(f"expected an object of questions with {', '.join(names)}, got {text[:60]!r}")

    return check


def archive_with(*names: str) -> Callable[[Path], None]:
    """Checks for a zip archive with files of these last names."""

    def check(path: Path) -> None:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                raise ValueError(f"expected a zip archive, got {file.read(60)!r}")
        with zipfile.ZipFile(path) as archive:
            held = {PurePosixPath(name).name for name in archive.namelist()}
        if missing := sorted(set(names) - held):
            raise ValueError(f"expected a zip archive with {', '.join(missing)}, got one of {len(held)} other files")

    return check


def is_script(path: Path) -> None:
    """Checks for Python that is more than one value, as an error in JSON is."""
    text = path.read_text(encoding="utf-8")
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"expected a Python script, got {text[:60]!r}") from error
    if all(isinstance(statement, ast.Expr) for statement in body):
        raise ValueError(f"expected a Python script, got {text[:60]!r}")


def _object(text: str) -> dict[str, Any]:
    """ValueError for text that is no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON object, got {text[:60]!r}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text[:60]!r}")
    return value


@dataclass(frozen=True)
class Pictures:
    """A benchmark's pictures: their folder, and a function from the data folder to name -> URL ("": none of its own).

    home: where each comes from, in words. package: a file that has them inside, which `take` hands out: (package,
    names) -> (name, content).
    """

    folder: str
    urls: Callable[[Path], dict[str, str]]
    home: str
    package: File | None = None
    take: Callable[[Path, Collection[str]], Iterator[tuple[str, bytes]]] = members


@dataclass(frozen=True)
class Home:
    files: tuple[File, ...]
    pictures: Pictures

    def paths_without_digest(self) -> list[str]:
        """Of the files, and of the packages that they are made from."""
        packages = [file.package for file in self.files if file.package]
        return [file.path for file in (*self.files, *packages, self.pictures.package) if file and file.sha256 is None]


_RAW = "https://raw.githubusercontent.com"
_RLAIF_V = f"{_RAW}/RLHF-V/RLAIF-V/83d917b2e8118ca8e7877a796d72af9bb3e6b356/eval"
_AMBER = f"{_RAW}/junyangwang0410/AMBER/534babf6bbfcce2e735c26289dedfb21cef3c939/data"
_POPE = f"{_RAW}/RUCAIBox/POPE/3df3ba1b110ecce25696989577fad583b67d4239/output/coco"
_POPE_OF_LLAVA = f"{_RAW}/RUCAIBox/POPE/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"
_LLAVA = f"{_RAW}/haotian-liu/LLaVA/c121f0432da27facab705978f83c4ada465e46fd"
_LLAVA_BENCH = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild/resolve/main"
_MM_VET = f"{_RAW}/yuweihao/MM-Vet/acde843e02dae30047bb456ee4a8ab28dee7e0ae"
_COCO = "http://images.cocodataset.org"
_COCO_NAME = "COCO_val2014_{:012d}.jpg"
_COCO_HOME = f"each from {_COCO}/val2014/NAME"

_INSTANCES, _CAPTIONS = "instances_val2014.json", "captions_val2014.json"

_OBJHAL_PACKAGE = File(
    "objhal/obj_halbench_300_with_image.jsonl",
    f"{_RLAIF_V}/data/obj_halbench_300_with_image.jsonl",
    check=rows_with("org_idx", "image_id", "question", "image"),
)
_COCO_ANNOTATIONS = File(
    "coco/annotations_trainval2014.zip",
    f"{_COCO}/annotations/annotations_trainval2014.zip",
    check=archive_with(_INSTANCES, _CAPTIONS),
)
_MM_VET_PACKAGE = File(
    "mmvet/mm-vet.zip",
    "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip",
    check=archive_with("mm-vet.json"),
)
_AMBER_PACKAGE = File(
    "amber/AMBER.zip",
    by_hand="by hand, from the Google Drive that the README of github.com/junyangwang0410/AMBER links to",
    check=archive_with(),
)


def _coco_pictures(names: Iterable[str]) -> dict[str, str]:
    return {name: f"{_COCO}/val2014/{name}" for name in names}


def _objhal_pictures(data: Path) -> dict[str, str]:
    rows = read_json(data / "objhal/obj_halbench_300_questions.jsonl")
    return _coco_pictures(_COCO_NAME.format(row["image_id"]) for row in rows)


def _pope_pictures(data: Path) -> dict[str, str]:
    # The file says .json and is one question a line; all its variants are about the same 500 pictures.
    lines = (data / "pope/coco_pope_random.json").read_text(encoding="utf-8").splitlines()
    return _coco_pictures(json.loads(line)["image"] for line in lines)


def _amber_pictures(data: Path) -> dict[str, str]:
    return {row["image"]: "" for row in read_json(data / "amber/query/query_generative.json")}


def _mmhal_pictures(data: Path) -> dict[str, str]:
    """By image_id, or as its Flickr page calls it where that file is there."""
    pictures = {}
    for row in read_json(data / "mmhal/mmhal-bench_answer_template.json"):
        source = PurePosixPath(row["image_src"])
        own = row["image_id"] + source.suffix
        pictures[source.name if (data / "mmhal/images" / source.name).is_file() else own] = row["image_src"]
    return pictures


def _llava_bench_pictures(data: Path) -> dict[str, str]:
    names = {row["image"] for row in read_json(data / "llava_bench/questions.jsonl")}
    return {name: f"{_LLAVA_BENCH}/images/{quote(name)}" for name in sorted(names)}


def _mm_vet_pictures(data: Path) -> dict[str, str]:
    return {row["imagename"]: "" for row in read_json(data / "mmvet/mm-vet.json").values()}


def _objhal_questions(package: Path, data: Path) -> bytes:
    """The rows without their pictures."""
    fields = ("org_idx", "image_id", "question")
    rows = ({name: row[name] for name in fields} for row in read_json(package))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _objhal_package_pictures(package: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    for row in read_json(package):
        name = _COCO_NAME.format(row["image_id"])
        if name in names:
            yield name, base64.b64decode(row["image"])


def _ground_truth(package: Path, data: Path) -> bytes:
    """image_id -> the COCO objects in the picture."""
    from eval.objhal import ground_truth_from_coco

    vocabulary = ObjectVocabulary.from_synonym_lines((data / "objhal/synonyms_refine.txt").read_text().splitlines())
    pictures = [row["image_id"] for row in read_json(data / "objhal/obj_halbench_300_questions.jsonl")]
    parts = {name: json.loads(content) for name, content in members(package, (_INSTANCES, _CAPTIONS))}
    objects = ground_truth_from_coco(parts[_INSTANCES], parts[_CAPTIONS], pictures, vocabulary)
    return json.dumps({str(picture): found for picture, found in objects.items()}, indent=0).encode()


def _mm_vet_questions(package: Path, data: Path) -> bytes:
    found = dict(members(package, ("mm-vet.json",)))
    if not found:
        raise TransferError("it has no mm-vet.json")
    return found["mm-vet.json"]


def _files(folder: str, home: str, known: Mapping[str, tuple[int, str]]) -> tuple[File, ...]:
    """Files that a repository holds in a folder like ours: name -> (bytes, SHA-256)."""
    return tuple(File(f"{folder}/{name}", f"{home}/{name}", digest, size) for name, (size, digest) in known.items())


BENCHMARKS = {
    "objhal": Home(
        (
            *_files(
                "objhal",
                f"{_RLAIF_V}/data",
                {"synonyms_refine.txt": (3594, "681041d2958d7871ed6fa69c3108f34aa6a0a354eb53ed4c5a425e65f86bc72a")},
            ),
            File(
                "objhal/obj_halbench_300_questions.jsonl",
                sha256="cd472b9e4053197fa0d669bf45a72d86629c294f18942070bc6d316b87b92c93",
                size=51200,
                package=_OBJHAL_PACKAGE,
                make=_objhal_questions,
            ),
            File(
                "objhal/gt_objects_300.json",
                sha256="48066570e510991b82d25bdcb6b95c027543eb398fa226a08b81ee8e0aed26cc",
                size=13872,
                package=_COCO_ANNOTATIONS,
                make=_ground_truth,
            ),
            File(
                "objhal/eval_gpt_obj_halbench.py",
                f"{_RLAIF_V}/eval_gpt_obj_halbench.py",
                instead="prompts/objhal_extract.txt",
                judge_only=True,
                check=is_script,
            ),
        ),
        Pictures("coco/val2014", _objhal_pictures, _COCO_HOME, _OBJHAL_PACKAGE, _objhal_package_pictures),
    ),
    "amber": Home(
        _files(
            "amber",
            _AMBER,
            {
                "annotations.json": (1813301, "db22a436c4836fbb295e60b4e80d519573077579fb7032f01b193c1bd022b797"),
                "relation.json": (12699, "c4c1491e9bbc3209abc1888c12a1bf8413bdbab8a0d8be04b990a2e7680cf23e"),
                "safe_words.txt": (57, "f92cf1123f4578a2630832fac3e6ac4de36212ea55859d3bed4fd233723f4043"),
                "query/query_generative.json": (
                    106220,
                    "b7e4c36596126ee36d2c3922638b7fa98743c26efda78fea2315f4425258d087",
                ),
                "query/query_discriminative.json": (
                    1738529,
                    "1502887ac020f4bb7ea564af4e37bddcb030d61b78490d00f9da492a2307abb8",
                ),
            },
        ),
        Pictures(
            "amber/images",
            _amber_pictures,
            f"taken out of {_AMBER_PACKAGE.path}, {_AMBER_PACKAGE.home}",
            _AMBER_PACKAGE,
        ),
    ),
    "mmhal": Home(
        (
            File(
                "mmhal/mmhal-bench_answer_template.json",
                f"{_RLAIF_V}/data/mmhal-bench_answer_template.json",
                "28ed24e19ffef292597c35f1dad37760b2e0a088b3b40ca3b50f105fc1b951bb",
                50519,
            ),
            File(
                "mmhal/eval_gpt_mmhal.py",
                f"{_RLAIF_V}/eval_gpt_mmhal.py",
                instead="prompts/mmhal_judge.txt",
                check=is_script,
            ),
        ),
        Pictures(
            "mmhal/images",
            _mmhal_pictures,
            "each from its image_src in mmhal-bench_answer_template.json (some of these links may be dead), or by hand "
            "from the data set Shikhar/MMHal-Bench on Hugging Face",
        ),
    ),
    "llavabench": Home(
        (
            *_files(
                "llava_bench",
                f"{_LLAVA}/llava/eval/table",
                {"rule.json": (9098, "dd7345a44ce9f7a24e51a30ee030cdab32346f9d08e3359c80545ff1312b1e07")},
            ),
            *(
                File(f"llava_bench/{name}", f"{_LLAVA_BENCH}/{name}", check=rows_with(*names))
                for name, names in (
                    ("questions.jsonl", ("question_id", "image", "text", "category")),
                    ("context.jsonl", ("image", "caption")),
                    ("answers_gpt4.jsonl", ("question_id", "text")),
                )
            ),
        ),
        Pictures("llava_bench/images", _llava_bench_pictures, f"each from {_LLAVA_BENCH}/images/NAME"),
    ),
    "mmvet": Home(
        (
            File(
                "mmvet/mm-vet.json",
                package=_MM_VET_PACKAGE,
                make=_mm_vet_questions,
                check=questions_with("imagename", "question", "answer", "capability"),
            ),
            File(
                "mmvet/mm-vet_evaluator.py",
                f"{_MM_VET}/mm-vet_evaluator.py",
                instead="prompts/mmvet_grader.txt",
                check=is_script,
            ),
        ),
        Pictures(
            "mmvet/images",
            _mm_vet_pictures,
            f"taken out of {_MM_VET_PACKAGE.path}, {_MM_VET_PACKAGE.home}",
            _MM_VET_PACKAGE,
        ),
    ),
    "pope": Home(
        _files(
            "pope",
            _POPE,
            {
                "coco_pope_random.json": (368166, "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994"),
                "coco_pope_popular.json": (370190, "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753"),
                "coco_pope_adversarial.json": (
                    370401,
                    "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8",
                ),
            },
        )
        + _files(
            "pope/llava_variant",
            _POPE_OF_LLAVA,
            {
                "coco_pope_random.json": (360212, "c16b65d2df6d70bb0814c8a4375833d39cdb09928fd936d3fc546491efa37f35"),
                "coco_pope_popular.json": (370234, "5b16653023bf4f64d57eb0d168259de6627f5cde7538b85ebed3cc33034aa6cc"),
                "coco_pope_adversarial.json": (
                    370459,
                    "1d8f0906a9b50c05640f6f23abfac97523be2a1bed28f7eadc63b811699b2d26",
                ),
            },
        ),
        Pictures("coco/val2014", _pope_pictures, _COCO_HOME),
    ),
}
