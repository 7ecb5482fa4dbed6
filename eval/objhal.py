"""Object HalBench: which COCO objects does a description name, and which of them are not in the image?

    bench = load(folder)                              # 300 questions, ground truth, synonyms
    score(bench, answers)                             # objhal-rules: the words of the answer itself are matched
    verdicts = JUDGE.ask(bench, answers, JUDGE.settings(url), out)
    score(bench, answers, verdicts)                   # objhal-llm: what a judge finds named in the answer

Both are paths of the official scorer (RLHF-V / RLAIF-V, after CHAIR, Rohrbach et al. 2018). By rules EVERY OCCURRENCE
counts, with a judge each surface string once per answer, so mention-level metrics of the two are not comparable.
Different from the original on purpose: upper case hides no object, a phrase hides no object beside it, synonyms of
three words match as a whole, words are split at any white space, "()" is an empty list, an unreadable verdict is
counted and in no metric, and a metric with denominator 0 is None. `official_quirks` reads verdicts as the original.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dama.chat import ChatRequest, ChatSettings
from dama.console import log
from dama.errors import error_list
from eval.core.benchmark import Benchmark, Mode, Part, SummaryColumn, TradeOff
from eval.core.judge import JudgeRun, after_thoughts, ask_judge
from eval.core.judged import Judge
from eval.core.metrics import Metric
from eval.core.nouns import FALLBACK, Tagger, rule_tagger, spacy_tagger
from eval.core.objects import Mention, ObjectVocabulary, ground_truth_from_coco
from eval.core.official import REMEDY, official_prompt, raise_errors, read_json, read_records
from eval.core.scores import QUIRKS, Score, Table, TableColumn, score_items
from eval.core.sources import (
    CAPTIONS,
    COCO_ANNOTATIONS,
    COCO_FOLDER,
    COCO_NAME,
    COCO_SOURCE,
    GITHUB_RAW,
    INSTANCES,
    File,
    ImageSource,
    coco_urls,
    files_of,
    is_script,
    members,
    rows_with,
)
from eval.core.types import Answer, BenchmarkData, Parts, Question, Record, record_of

PROTOCOL, JUDGED = "objhal-rules", "objhal-llm"
DECODING: dict[str, Any] = {"max_new_tokens": 1024, "num_beams": 3, "temperature": 0.0}
SHORTEST_ASKED = 4  # words; shorter answers name nothing and no judge is asked

_PROMPT_SHA256 = "c3dc8146b288c75245224456441b366c51eb64a173436beb05fbffbd6bec06ff"
_OFFICIAL_TEMPERATURE = 0.2
_QUESTION = {"org_idx": (int,), "image_id": (int,), "question": (str,)}


# ------------------------------------------------------------------------------------------------------ benchmark


@dataclass(frozen=True, kw_only=True)
class ObjHal(BenchmarkData):
    """Questions with ground truth: image_id of a question -> the nodes in its image, possibly none."""

    ground_truth: Mapping[str, frozenset[str]]
    vocabulary: ObjectVocabulary


def load(folder: str | Path, mode: str = "rules") -> ObjHal:
    """Read the questions, ground truth and synonyms in folder/objhal; both modes have the same questions.

    The judge's prompt is folder/prompts/objhal_extract.txt, or a string in folder/objhal/eval_gpt_obj_halbench.py;
    rules need none. Raises ValueError, naming file and fields, also for missing ground truth and unknown nodes.
    """
    source, images = Path(folder) / "objhal", Path(folder) / COCO_FOLDER
    vocabulary = ObjectVocabulary.from_synonym_lines(_read_lines(source / "synonyms_refine.txt"))
    path = source / "obj_halbench_300_questions.jsonl"
    rows = read_records(path, _QUESTION)
    twice = [number for number, times in Counter(row["org_idx"] for row in rows).items() if times > 1]
    raise_errors(path, [f"field 'org_idx': {number} is used more than once" for number in twice])
    truth = _read_truth(source / "gt_objects_300.json", [row["image_id"] for row in rows], vocabulary)
    questions = tuple(_question(row, truth[row["image_id"]]) for row in rows)
    scripts = [Path(folder) / "prompts/objhal_extract.txt", source / "eval_gpt_obj_halbench.py"]
    prompt = official_prompt(scripts, _PROMPT_SHA256) if any(path.is_file() for path in scripts) else ""
    by_image = {question.image_id: truth[row["image_id"]] for question, row in zip(questions, rows)}
    return ObjHal(questions, prompt, images, ground_truth=by_image, vocabulary=vocabulary)


def _read_lines(path: Path) -> list[str]:
    raise_errors(path, [] if path.is_file() else ["missing"])
    return path.read_text(encoding="utf-8").splitlines()


def _read_truth(path: Path, images: Iterable[int], vocabulary: ObjectVocabulary) -> dict[int, frozenset[str]]:
    """Read COCO id -> nodes of these images."""
    rows = read_json(path)
    raise_errors(path, [] if isinstance(rows, dict) else [f"expected an object, got {type(rows).__name__}"])
    errors = []
    for image in images:
        nodes = rows.get(str(image))
        if not isinstance(nodes, list):
            errors.append(f"image {image}: expected a list of its objects, got {nodes!r}")
        elif unknown := sorted(set(nodes) - vocabulary.nodes):
            errors.append(f"image {image}: {unknown} are no nodes of synonyms_refine.txt")
    raise_errors(path, errors)
    return {image: frozenset(rows[str(image)]) for image in images}


def _question(row: Mapping[str, Any], truth: frozenset[str]) -> Question:
    listed = ", ".join(sorted(truth))
    return Question(str(row["org_idx"]), COCO_NAME.format(row["image_id"]), row["question"], listed)


# ---------------------------------------------------------------------------------------------------------- judge


def judge_requests(bench: ObjHal, answers: Iterable[Answer], *, official_quirks: bool = False) -> list[ChatRequest]:
    """Ask about each answer of more than three words, with the official prompt as a system message.

    The original scorer's requests are the same. Raises ValueError where the prompt is missing.
    """
    del official_quirks
    if not bench.judge_prompt:
        raise ValueError(
            "Object HalBench: expected the judge's prompt in prompts/objhal_extract.txt or "
            f"objhal/eval_gpt_obj_halbench.py, got neither\nRemedy: {REMEDY}"
        )
    return [
        ChatRequest(question.id, ({"role": "system", "content": _filled(bench.judge_prompt, question, answer)},))
        for question, answer in bench.answered(answers)
        if len(_without_speaker(answer).split()) >= SHORTEST_ASKED
    ]


def _without_speaker(answer: Answer) -> str:
    return answer.text.replace("Assistant:", "").strip()


def _filled(template: str, question: Question, answer: Answer) -> str:
    """Fill both slots at once, so that braces in an answer stay braces."""
    slots = {"{question}": question.prompt, "{answer}": _without_speaker(answer)}
    return re.sub("|".join(map(re.escape, slots)), lambda slot: slots[slot[0]], template)


def _ask_as_original(
    settings: ChatSettings, requests: Sequence[ChatRequest], out: str | Path, prompt_digest: str, *, runs: int = 1
) -> JudgeRun:
    """Ask at temperature 0.2, again up to twice for what the original cannot read."""
    if settings.temperature is not None:  # None: left to the server
        settings = replace(settings, temperature=_OFFICIAL_TEMPERATURE, top_p=1.0)
    return ask_judge(settings, requests, out, prompt_digest, parse=parse_official, runs=runs, tries=3)


def parse(text: str) -> list[str] | None:
    """The last list of strings in the reply, in whatever it is wrapped, with the names of lists inside it.

    "()" is the empty list. None without a list, and where it is not clear what is named: a list of strings that is
    unfinished, without commas or with other things in it; or several lists that differ, unless the text before the
    last says that it replaces the others.
    """
    text = after_thoughts(text)
    if re.fullmatch(r"\W*\(\s*\)\W*", text):  # what the prompt's rule 5 asks for
        return []
    names: list[str] | None = None
    end, opened = 0, -1  # end of the list that was read last; bracket that opens no list of strings
    place = text.find("[")
    while place >= 0:
        found, after = _list_at(text, place)
        if found is None and _OPENS_STRINGS.match(text, place):
            return None
        if found is None:
            opened = place
        else:
            inside = opened >= 0 and "]" not in text[opened:place]
            if inside or (names is not None and found != names and not _replaces(text[end:place])):
                return None
            names, end = found, after
        place = text.find("[", after)
    return names


_TOKEN = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[\[\],])""", re.DOTALL)
_OPENS_STRINGS = re.compile(r"""\[[\[\s]*["']""")
_FINAL = re.compile(r"\b(?:but|instead|final|finally|so|thus|hence|therefore|answer|result|output|corrected|revised)\b")
_MORE = re.compile(r"\b(?:also|and|plus|or|other|well|too)\b")


def _replaces(between: str) -> bool:
    """Whether the text between two lists says that the second one counts."""
    return bool(_FINAL.search(between.lower())) and not _MORE.search(between.lower())


def _list_at(text: str, start: int) -> tuple[list[str] | None, int]:
    """The names in the list that opens at `start`, and its end; None where it is no list of strings."""
    names: list[str] = []
    depth, place, may_follow = 0, start, True
    while token := _TOKEN.match(text, place):
        word, place = token[1], token.end()
        if word == "]":
            depth, may_follow = depth - 1, False
            if depth == 0:
                return names, place
        elif may_follow is (word == ","):  # no comma before an item, or no item before a comma
            break
        elif word == "[":
            depth += 1
        elif word == ",":
            may_follow = True
        else:
            name = _string(word)
            if name is None:
                break
            names.append(name)
            may_follow = False
    return None, start + 1


def _string(literal: str) -> str | None:
    """The content of a string in double or single quotes; None for one that is not valid."""
    if literal.startswith("'"):
        literal = '"' + literal[1:-1].replace("\\'", "'").replace('"', '\\"') + '"'
    try:
        return json.loads(literal)
    except ValueError:
        return None


def parse_official(text: str) -> list[str] | None:
    """As the original: the whole text is JSON, or its last line where there is a [" in it; so "()" is none."""
    for candidate in (text, *text.splitlines()[-1:] * ('["' in text)):
        try:
            found = json.loads(candidate)
        except ValueError:
            continue
        return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None
    return None


JUDGE = Judge(
    "gpt-3.5-turbo-0613",
    temperature=0.0,  # the original: 0.2
    max_tokens=512,
    requests=judge_requests,
    parse=parse,
    parse_official=parse_official,
    repeats=False,
    ask_official=_ask_as_original,
)


# -------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class ObjHalItem:
    """One answer, the objects it names that count, and the nodes that are in its image.

    marks: where the text names them. unparsed: whether the judge's verdict could not be read.
    """

    question: Question
    answer: Answer
    mentions: tuple[Mention, ...]
    marks: tuple[Mention, ...]
    truth: frozenset[str]
    unparsed: bool = False

    @cached_property
    def hallucinated(self) -> tuple[Mention, ...]:
        """The mentions of objects that are not in the image."""
        return tuple(mention for mention in self.mentions if mention.node not in self.truth)

    @cached_property
    def found(self) -> frozenset[str]:
        """The nodes in the image that are mentioned."""
        return self.truth & {mention.node for mention in self.mentions}

    @property
    def words(self) -> int:
        """Number of words of the answer."""
        return len(_without_speaker(self.answer).split())

    @property
    def repeated(self) -> int:
        """Number of words for objects that occur repeatedly: 1 for "a dog and a dog", 0 for "a man and a woman"."""
        return sum(count > 1 for count in Counter(mark.surface for mark in self.marks).values())

    def parts(self) -> Parts:
        """Return metric -> [numerator, denominator]; rates in percent, words and objects per response."""
        wrong, scored = 100.0 * bool(self.hallucinated), float(not self.unparsed)
        parts = {
            "response_level": (wrong, bool(self.mentions)),  # CHAIRs_refine
            "chairs": (wrong, scored),
            "mention_level": (100.0 * len(self.hallucinated), len(self.mentions)),  # CHAIRi
            "object_recall": (100.0 * len(self.found), len(self.truth) * scored),
            "mean_words": (self.words, 1),
            "repeated_objects": (self.repeated, scored),
        }
        return {name: [float(above), float(below)] for name, (above, below) in parts.items()}

    def record(self) -> Record:
        """Return the record of results.json."""
        return record_of(
            self.question,
            self.answer.text,
            wrong=None if self.unparsed else bool(self.hallucinated),
            parts=self.parts(),
            image_id=self.question.image_id or self.answer.image_id,
            truth=sorted(self.truth),
            spans=[[mark.start, mark.end] for mark in self.marks if mark.node not in self.truth],
            mentions=[
                {"surface": m.surface, "node": m.node, "start": m.start, "end": m.end, "correct": m.node in self.truth}
                for m in self.mentions
            ],
            missed=[] if self.unparsed else sorted(self.truth - self.found),
            words=self.words,
            repeated_objects=self.repeated,
        )


METRICS = (
    Metric("response_level", "response-level %", "lower"),
    Metric("chairs", "CHAIRs %", "lower"),
    Metric("mention_level", "mention-level %", "lower"),
    Metric("object_recall", "object recall %"),
    Metric("mean_words", "mean words", None),
    Metric("repeated_objects", "repeated objects", "lower", 2),
)


def score(
    bench: ObjHal,
    answers: Iterable[Answer],
    verdicts: JudgeRun | None = None,
    *,
    tagger: Tagger | None = None,
    official_quirks: bool = False,
) -> Score:
    """Score by rules, or from a judge's verdicts where they are given.

    tagger: finds the nouns in what the judge extracted; spaCy's en_core_web_trf where it can be loaded, else rules, and
    then the protocol says so. Raises ValueError for an answer that the judge was not asked about.
    """
    answered = bench.answered(answers)
    if verdicts is None:
        if official_quirks:
            raise ValueError(
                f"{PROTOCOL}: expected no official_quirks, got them; they are those of {JUDGED}\n"
                "Remedy: give the judge's verdicts, or leave them out"
            )
        items = [_item(*pair, bench.ground_truth[pair[0].image_id], bench.vocabulary) for pair in answered]
        return _score(items, PROTOCOL, bench.questions)
    tagger = tagger or spacy_tagger() or _fallback(bench.vocabulary)
    extracted = _extracted(answered, verdicts, parse_official if official_quirks else parse)
    items = [_judged_item(*pair, extracted[pair[1].id], bench, tagger, official_quirks) for pair in answered]
    label = JUDGED + f"-{FALLBACK}" * (tagger.name == FALLBACK) + QUIRKS * official_quirks
    return _score(items, label, bench.questions, verdicts.provenance())


def _score(
    items: Sequence[ObjHalItem],
    protocol: str,
    questions: Iterable[Question],
    judge: Mapping[str, Any] | None = None,
) -> Score:
    counts = {
        "unparsed": sum(item.unparsed for item in items),
        "answers_without_object": sum(not item.mentions and not item.unparsed for item in items),
        "mentions": sum(len(item.mentions) for item in items),
        "hallucinated_mentions": sum(len(item.hallucinated) for item in items),
        "objects_in_pictures": sum(len(item.truth) for item in items),
    }
    records = [item.record() for item in items]
    return score_items(protocol, METRICS, records, questions, counts=counts, judge=judge)


def _fallback(vocabulary: ObjectVocabulary) -> Tagger:
    log(f"{JUDGED}: spaCy's en_core_web_trf cannot be loaded, so rules find the nouns; metrics labeled {FALLBACK}")
    return rule_tagger(vocabulary.words)


def _extracted(
    answered: Sequence[tuple[Question, Answer]], run: JudgeRun, read: Callable[[str], list[str] | None]
) -> dict[str, list[str] | None]:
    """Return answer id -> the objects that the judge lists for it; None where its verdict is no list."""
    verdicts = {verdict.id: verdict.text for verdict in run.verdicts}
    long = {answer.id for _, answer in answered if len(_without_speaker(answer).split()) >= SHORTEST_ASKED}
    errors = [f"answer {id_!r}: no verdict" for id_ in sorted(long - verdicts.keys())]
    errors += [f"verdict on {id_!r}: there is no such answer" for id_ in sorted(verdicts.keys() - long)]
    if errors:
        raise ValueError(error_list("verdicts", errors, "score the answers that the judge was asked about"))
    return {answer.id: read(verdicts[answer.id] or "") if answer.id in long else [] for _, answer in answered}


def _judged_item(
    question: Question,
    answer: Answer,
    objects: list[str] | None,
    bench: ObjHal,
    tagger: Tagger,
    official_quirks: bool,
) -> ObjHalItem:
    truth, vocabulary = bench.ground_truth[question.image_id], bench.vocabulary
    if objects is None:
        return ObjHalItem(question, answer, (), (), truth, unparsed=True)
    surfaces: dict[str, None] = {}
    for name in objects:
        named = vocabulary.surfaces_of(tagger.words(f"a {name}"), official_quirks=official_quirks)
        surfaces |= dict.fromkeys(named)
    if "toilet" in surfaces:
        surfaces.pop("seat", None)
    known = vocabulary.spelled if official_quirks else vocabulary.node_of.keys()
    mentions = [Mention(surface, vocabulary.node_of[surface.lower()]) for surface in surfaces if surface in known]
    nodes = {mention.node for mention in mentions}
    marks = tuple(mark for mark in vocabulary.mentions(answer.text) if mark.node in nodes)
    first_mark = {mark.surface: mark for mark in reversed(marks)}
    return ObjHalItem(question, answer, tuple(first_mark.get(m.surface, m) for m in mentions), marks, truth)


def score_captions(
    captions: Iterable[Answer], ground_truth: Mapping[str, Collection[str]], vocabulary: ObjectVocabulary
) -> Score:
    """Score captions by rules, against image_id -> nodes in that image (possibly none).

    Raises ValueError for a caption whose image has no ground truth, and for a node that is not in the vocabulary.
    """
    captions = list(captions)
    truth = {answer.id: _truth_of(answer, ground_truth, vocabulary) for answer in captions}
    questions = [Question(a.id, "", a.prompt, ", ".join(sorted(truth[a.id]))) for a in captions]
    items = [_item(question, a, truth[a.id], vocabulary) for question, a in zip(questions, captions)]
    return _score(items, PROTOCOL, questions)


def _item(question: Question, answer: Answer, truth: frozenset[str], vocabulary: ObjectVocabulary) -> ObjHalItem:
    mentions = tuple(vocabulary.mentions(answer.text))
    return ObjHalItem(question, answer, mentions, mentions, truth)


def _truth_of(
    answer: Answer, ground_truth: Mapping[str, Collection[str]], vocabulary: ObjectVocabulary
) -> frozenset[str]:
    if answer.image_id not in ground_truth:
        raise ValueError(
            f"answer {answer.id!r}: image_id {answer.image_id!r} is not among the {len(ground_truth)} images with "
            "ground truth; score the answers with the ground truth of their own images (ids are strings)"
        )
    truth = frozenset(ground_truth[answer.image_id])
    if unknown := truth - vocabulary.nodes:
        raise ValueError(
            f"ground truth of image {answer.image_id!r}: {sorted(unknown)} are no nodes of the vocabulary, so no "
            "caption can name them; use the vocabulary that the ground truth was made with"
        )
    return truth


format_table = Table(
    (
        TableColumn("response_level", "response-level %", interval=True),
        TableColumn("mention_level", "mention-level %", interval=True),
        TableColumn("object_recall", "object recall %", interval=True),
        TableColumn("mean_words", "mean words", interval=True),
        TableColumn("repeated_objects", "repeated objects", 2, interval=True),
    ),
    unparsed=False,
    note="no readable list from the judge",
)


# ------------------------------------------------------------------------------------------------------- benchmark

_RLAIF_V = f"{GITHUB_RAW}/RLHF-V/RLAIF-V/83d917b2e8118ca8e7877a796d72af9bb3e6b356/eval"
_QUESTIONS = "objhal/obj_halbench_300_questions.jsonl"
_SYNONYMS = {"synonyms_refine.txt": (3594, "681041d2958d7871ed6fa69c3108f34aa6a0a354eb53ed4c5a425e65f86bc72a")}
_PACKAGE = File(
    "objhal/obj_halbench_300_with_image.jsonl",
    f"{_RLAIF_V}/data/obj_halbench_300_with_image.jsonl",
    check=rows_with("org_idx", "image_id", "question", "image"),
)


def _make_questions(package: Path, data: Path) -> bytes:
    """Return the package's rows without their images."""
    del data
    fields = ("org_idx", "image_id", "question")
    rows = ({name: row[name] for name in fields} for row in read_json(package))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _make_ground_truth(package: Path, data: Path) -> bytes:
    """Return image_id -> the COCO objects in the image, from COCO's annotations."""
    vocabulary = ObjectVocabulary.from_synonym_lines((data / "objhal/synonyms_refine.txt").read_text().splitlines())
    images = [row["image_id"] for row in read_json(data / _QUESTIONS)]
    contents = {name: json.loads(content) for name, content in members(package, (INSTANCES, CAPTIONS))}
    objects = ground_truth_from_coco(contents[INSTANCES], contents[CAPTIONS], images, vocabulary)
    return json.dumps({str(image): found for image, found in objects.items()}, indent=0).encode()


def _image_urls(data: Path) -> dict[str, str]:
    return coco_urls(COCO_NAME.format(row["image_id"]) for row in read_json(data / _QUESTIONS))


def _take_images(package: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    for row in read_json(package):
        name = COCO_NAME.format(row["image_id"])
        if name in names:
            yield name, base64.b64decode(row["image"])


BENCHMARK = Benchmark(
    name="objhal",
    title="Object HalBench",
    wrong="names an object that is not in the image",
    files=(
        *files_of("objhal", f"{_RLAIF_V}/data", _SYNONYMS),
        File(
            _QUESTIONS,
            sha256="cd472b9e4053197fa0d669bf45a72d86629c294f18942070bc6d316b87b92c93",
            size=51200,
            package=_PACKAGE,
            make=_make_questions,
        ),
        File(
            "objhal/gt_objects_300.json",
            sha256="48066570e510991b82d25bdcb6b95c027543eb398fa226a08b81ee8e0aed26cc",
            size=13872,
            package=COCO_ANNOTATIONS,
            make=_make_ground_truth,
        ),
        File(
            "objhal/eval_gpt_obj_halbench.py",
            f"{_RLAIF_V}/eval_gpt_obj_halbench.py",
            instead="prompts/objhal_extract.txt",
            judge_only=True,
            check=is_script,
        ),
    ),
    images=ImageSource(COCO_FOLDER, _image_urls, COCO_SOURCE, _PACKAGE, _take_images),
    load=load,
    parts=(Part(DECODING),),
    score=score,
    metrics=METRICS,
    columns=(
        SummaryColumn("response_level", "ObjHal resp."),
        SummaryColumn("mention_level", "ObjHal ment.", rim=50),
        SummaryColumn("object_recall", "ObjHal recall"),
        SummaryColumn("mean_words", "ObjHal words", rim=None),
    ),
    modes=(
        Mode("rules", "the answer's own words, no judge", quirks=False),
        Mode("llm", "a judge extracts the objects; not comparable with rules", judged=True),
    ),
    judge=JUDGE,
    trade_off=TradeOff("object_recall", ("response_level", "chairs", "mention_level")),
    table=format_table,
    published_file=Path(__file__).with_name("objhal_published.json"),
    aliases=("TinyCOCO captions",),
)
