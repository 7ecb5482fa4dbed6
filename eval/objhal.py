"""Object HalBench: which COCO objects does a description name, and which of them are not in the picture?

    bench = load(folder)                                  # 300 questions, ground truth, synonyms
    requests(bench), DECODING                             # for llava.eval.generate, in the RLAIF-V protocol
    score(bench, answers)                                 # objhal-rules: the words of the answer itself are matched
    run = judge(bench, answers, JUDGE.settings(url), out)           # or replay(out, judge_requests(...))
    score(bench, answers, run)                            # objhal-llm: what a judge finds named in the answer

Both are paths of the official scorer (RLHF-V / RLAIF-V, after CHAIR, Rohrbach et al. 2018). By rules EVERY OCCURRENCE
counts, with a judge each surface string once per answer, so that mention-level figures of the two are not comparable.
Different from the original on purpose: upper case hides no object, a phrase hides none beside it, synonyms of three
words match whole, words are split at any white space, "()" is an empty list, a verdict that cannot be read is counted
and in no metric, and a metric with nothing to divide by is None. `official_quirks` reads verdicts as the original.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dama.chat import ChatRequest, ChatSettings
from dama.console import say
from dama.errors import error_list
from eval.core.judge import QUIRKS, JudgeRun, OfficialJudge, after_thoughts, ask_judge
from eval.core.nouns import FALLBACK, Tagger, rule_tagger, spacy_tagger
from eval.core.objects import Mention, ObjectVocabulary
from eval.core.official import REMEDY, official_prompt, read_json, read_records, refuse_faults
from eval.core.scores import aligned
from eval.core.statistics import Interval, paired_difference, ratio_interval
from eval.core.types import Answer, Benchmark, Question

if TYPE_CHECKING:
    from llava.generation.request import Request

PROTOCOL, JUDGED = "objhal-rules", "objhal-llm"
DECODING: dict[str, Any] = {"max_new_tokens": 1024, "num_beams": 3, "temperature": 0.0}  # of llava.eval.generate
JUDGE = OfficialJudge("gpt-3.5-turbo-0613", temperature=0.0, max_tokens=512)  # the original: at temperature 0.2
SHORTEST_ASKED = 4  # words; shorter answers name nothing and no judge is asked

_PROMPT_SHA256 = "c3dc8146b288c75245224456441b366c51eb64a173436beb05fbffbd6bec06ff"
_QUIRK_TEMPERATURE = 0.2
_QUESTION = {"org_idx": (int,), "image_id": (int,), "question": (str,)}
_IMAGE = "COCO_val2014_{:012d}.jpg"


# ------------------------------------------------------------------------------------------------------ benchmark


@dataclass(frozen=True, kw_only=True)
class ObjHal(Benchmark):
    """ground_truth: image_id of a question -> the nodes in its picture, possibly none."""

    ground_truth: Mapping[str, frozenset[str]]
    vocabulary: ObjectVocabulary


def load(folder: str | Path) -> ObjHal:
    """obj_halbench_300_questions.jsonl, gt_objects_300.json, synonyms_refine.txt of folder/objhal; coco/val2014.

    The judge's prompt: folder/prompts/objhal_extract.txt, or a string in folder/objhal/eval_gpt_obj_halbench.py; rules
    need none. Raises ValueError, naming file and fields, also for ground truth that is absent or no node.
    """
    home, images = Path(folder) / "objhal", Path(folder) / "coco/val2014"
    vocabulary = ObjectVocabulary.from_synonym_lines(_read_lines(home / "synonyms_refine.txt"))
    path = home / "obj_halbench_300_questions.jsonl"
    rows = read_records(path, _QUESTION)
    twice = [number for number, times in Counter(row["org_idx"] for row in rows).items() if times > 1]
    refuse_faults(path, [f"field 'org_idx': {number} is used more than once" for number in twice])
    truth = _read_truth(home / "gt_objects_300.json", [row["image_id"] for row in rows], vocabulary)
    questions = tuple(_question(row, truth[row["image_id"]]) for row in rows)
    scripts = [Path(folder) / "prompts/objhal_extract.txt", home / "eval_gpt_obj_halbench.py"]
    prompt = official_prompt(scripts, _PROMPT_SHA256) if any(path.is_file() for path in scripts) else ""
    by_image = {question.image_id: truth[row["image_id"]] for question, row in zip(questions, rows)}
    return ObjHal(questions, prompt, images, ground_truth=by_image, vocabulary=vocabulary)


def _read_lines(path: Path) -> list[str]:
    refuse_faults(path, [] if path.is_file() else ["missing"])
    return path.read_text(encoding="utf-8").splitlines()


def _read_truth(path: Path, pictures: Iterable[int], vocabulary: ObjectVocabulary) -> dict[int, frozenset[str]]:
    """COCO id -> nodes, of these pictures."""
    rows = read_json(path)
    refuse_faults(path, [] if isinstance(rows, dict) else [f"expected an object, got {type(rows).__name__}"])
    faults = []
    for picture in pictures:
        nodes = rows.get(str(picture))
        if not isinstance(nodes, list):
            faults.append(f"picture {picture}: expected a list of its objects, got {nodes!r}")
        elif unknown := sorted(set(nodes) - vocabulary.nodes):
            faults.append(f"picture {picture}: {unknown} are no nodes of synonyms_refine.txt")
    refuse_faults(path, faults)
    return {picture: frozenset(rows[str(picture)]) for picture in pictures}


def _question(row: Mapping[str, Any], truth: frozenset[str]) -> Question:
    listed = ", ".join(sorted(truth))
    return Question(str(row["org_idx"]), _IMAGE.format(row["image_id"]), row["question"], listed)


def ground_truth_from_coco(
    instances: Mapping[str, Any], captions: Mapping[str, Any], pictures: Iterable[int], vocabulary: ObjectVocabulary
) -> dict[int, list[str]]:
    """COCO id -> sorted nodes: the categories of its instances, and what its reference captions name.

    instances, captions: the contents of COCO's instances_*.json and captions_*.json.
    """
    found: dict[int, set[str]] = {picture: set() for picture in pictures}
    categories = {row["id"]: vocabulary.node_of[row["name"]] for row in instances["categories"]}
    for row in instances["annotations"]:
        if row["image_id"] in found:
            found[row["image_id"]].add(categories[row["category_id"]])
    for row in captions["annotations"]:
        if row["image_id"] in found:
            found[row["image_id"]] |= {mention.node for mention in vocabulary.mentions(row["caption"])}
    return {picture: sorted(nodes) for picture, nodes in found.items()}


def requests(bench: ObjHal) -> list[Request]:
    """What the model is asked: the raw question."""
    return bench.requests()


# ---------------------------------------------------------------------------------------------------------- judge


def judge_requests(bench: ObjHal, answers: Iterable[Answer], *, official_quirks: bool = False) -> list[ChatRequest]:
    """What the judge is asked about each answer of more than three words: the official prompt as a system message."""
    if not bench.judge_prompt:
        raise ValueError(
            "Object HalBench: expected the judge's prompt in prompts/objhal_extract.txt or "
            f"objhal/eval_gpt_obj_halbench.py, got neither\nRemedy: {REMEDY}"
        )
    return [
        ChatRequest(question.id, ({"role": "system", "content": _filled(bench.judge_prompt, question, answer)},))
        for question, answer in bench.answered(answers)
        if len(_spoken(answer).split()) >= SHORTEST_ASKED
    ]


def _spoken(answer: Answer) -> str:
    return answer.text.replace("Assistant:", "").strip()


def _filled(template: str, question: Question, answer: Answer) -> str:
    """Both slots at once, so that braces in an answer are only braces."""
    slots = {"{question}": question.prompt, "{answer}": _spoken(answer)}
    return re.sub("|".join(map(re.escape, slots)), lambda slot: slots[slot[0]], template)


def judge(
    bench: ObjHal,
    answers: Iterable[Answer],
    settings: ChatSettings,
    out: str | Path,
    *,
    tries: int = 3,
    official_quirks: bool = False,
) -> JudgeRun:
    """Asks what each answer names and writes out/verdicts.jsonl. Unreadable lists are asked for up to `tries` times."""
    read: Callable[[str], list[str] | None] = parse
    if official_quirks:
        read = parse_official
        if settings.temperature is not None:  # None: left to the server
            settings = replace(settings, temperature=_QUIRK_TEMPERATURE, top_p=1.0)
    return ask_judge(settings, judge_requests(bench, answers), out, bench.prompt_digest, parse=read, tries=tries)


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


# -------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class ObjHalItem:
    """One answer, the objects it names that count, and the nodes that are in its picture.

    marks: where the text names them. unparsed: the judge's verdict could not be read, so that nothing is known.
    """

    answer: Answer
    mentions: tuple[Mention, ...]
    marks: tuple[Mention, ...]
    truth: frozenset[str]
    image: str = ""
    unparsed: bool = False

    @property
    def hallucinated(self) -> tuple[Mention, ...]:
        return tuple(mention for mention in self.mentions if mention.node not in self.truth)

    @property
    def found(self) -> frozenset[str]:
        return self.truth & {mention.node for mention in self.mentions}

    @property
    def words(self) -> int:
        return len(_spoken(self.answer).split())

    @property
    def repeated(self) -> int:
        """Objects named more than once by the same word: "a dog and a dog" is one, "a man and a woman" is none."""
        return sum(count > 1 for count in Counter(mark.surface for mark in self.marks).values())

    def spans(self) -> list[tuple[int, int, Literal["hallucinated", "correct"]]]:
        """(start, end, kind) per mark, character offsets into the answer's text, for marking them in place."""
        return [(m.start, m.end, "correct" if m.node in self.truth else "hallucinated") for m in self.marks]

    def record(self) -> dict[str, Any]:
        """As in results.json."""
        return {
            "id": self.answer.id,
            "image_id": self.answer.image_id,
            "image": self.image,
            "prompt": self.answer.prompt,
            "text": self.answer.text,
            "truth": sorted(self.truth),
            "wrong": None if self.unparsed else bool(self.hallucinated),
            "spans": [[start, end] for start, end, kind in self.spans() if kind == "hallucinated"],
            "parts": {name: [float(number) for number in part(self)] for name, part in METRICS.items()},
            "mentions": [
                {"surface": m.surface, "node": m.node, "start": m.start, "end": m.end, "correct": m.node in self.truth}
                for m in self.mentions
            ],
            "missed": [] if self.unparsed else sorted(self.truth - self.found),
            "words": self.words,
            "repeated_objects": self.repeated,
        }


# Each metric is sum(first) / sum(second) over the items; rates in percent, words and objects per response.
METRICS: dict[str, Callable[[ObjHalItem], tuple[float, float]]] = {
    "response_level": lambda item: (100.0 * bool(item.hallucinated), bool(item.mentions)),  # CHAIRs_refine
    "chairs": lambda item: (100.0 * bool(item.hallucinated), not item.unparsed),
    "mention_level": lambda item: (100.0 * len(item.hallucinated), len(item.mentions)),  # CHAIRi
    "object_recall": lambda item: (100.0 * len(item.found), 0 if item.unparsed else len(item.truth)),
    "mean_words": lambda item: (item.words, 1),
    "repeated_objects": lambda item: (item.repeated, 0 if item.unparsed else 1),
}


@dataclass(frozen=True)
class ObjHalScore:
    """metrics: the names of METRICS -> value with its 95 % bootstrap interval over pictures; None where undefined.

    judge: as in results.json, None by rules. missing: ids of the questions without answer.
    """

    items: tuple[ObjHalItem, ...]
    metrics: Mapping[str, Interval]
    protocol: str = PROTOCOL
    judge: Mapping[str, Any] | None = None
    missing: tuple[str, ...] = ()

    @property
    def unparsed(self) -> tuple[str, ...]:
        return tuple(item.answer.id for item in self.items if item.unparsed)

    def counts(self) -> dict[str, int]:
        return {
            "answers": len(self.items),
            "missing": len(self.missing),
            "unparsed": len(self.unparsed),
            "answers_without_object": sum(not item.mentions and not item.unparsed for item in self.items),
            "mentions": sum(len(item.mentions) for item in self.items),
            "hallucinated_mentions": sum(len(item.hallucinated) for item in self.items),
            "objects_in_pictures": sum(len(item.truth) for item in self.items),
        }

    def metrics_record(self) -> dict[str, float | None]:
        """As in results.json."""
        return {name: interval.value for name, interval in self.metrics.items()}


def score(
    bench: ObjHal,
    answers: Iterable[Answer],
    run: JudgeRun | None = None,
    *,
    tagger: Tagger | None = None,
    official_quirks: bool = False,
) -> ObjHalScore:
    """By rules, or from a judge's verdicts where there is a run of them.

    tagger: finds the nouns in what the judge extracted; spaCy's en_core_web_trf where it can be loaded, else rules, and
    then the protocol says so. ValueError for an answer that the judge was not asked about.
    """
    answered = bench.answered(answers)
    missing = tuple(sorted({question.id for question in bench.questions} - {question.id for question, _ in answered}))
    named = [replace(answer, image_id=question.image_id) for question, answer in answered]
    images = {question.image_id: question.image for question, _ in answered}
    if run is None:
        if official_quirks:
            raise ValueError(f"{PROTOCOL}: official_quirks are those of {JUDGED}; give its verdicts or leave it out")
        return replace(score_captions(named, bench.ground_truth, bench.vocabulary, images), missing=missing)
    tagger = tagger or spacy_tagger() or _fallback(bench.vocabulary)
    extracted = _extracted(named, run, parse_official if official_quirks else parse)
    items = tuple(
        _judged_item(answer, extracted[answer.id], bench, images[answer.image_id], tagger, official_quirks)
        for answer in named
    )
    label = JUDGED + f"-{FALLBACK}" * (tagger.name == FALLBACK) + QUIRKS * official_quirks
    return replace(_score(items, label), judge=run.provenance(), missing=missing)


def _fallback(vocabulary: ObjectVocabulary) -> Tagger:
    say(f"{JUDGED}: spaCy's en_core_web_trf cannot be loaded, so rules find the nouns; figures labelled {FALLBACK}")
    return rule_tagger(vocabulary.words)


def _extracted(
    answers: Sequence[Answer], run: JudgeRun, read: Callable[[str], list[str] | None]
) -> dict[str, list[str] | None]:
    """Answer id -> what the judge found named in it; None where its verdict is no list."""
    verdicts = {verdict.id: verdict.text for verdict in run.verdicts}
    long = {answer.id for answer in answers if len(_spoken(answer).split()) >= SHORTEST_ASKED}
    faults = [f"answer {id_!r}: no verdict" for id_ in sorted(long - verdicts.keys())]
    faults += [f"verdict on {id_!r}: there is no such answer" for id_ in sorted(verdicts.keys() - long)]
    if faults:
        raise ValueError(error_list("verdicts", faults, "score the answers that the judge was asked about"))
    return {answer.id: read(verdicts[answer.id] or "") if answer.id in long else [] for answer in answers}


def _judged_item(
    answer: Answer, objects: list[str] | None, bench: ObjHal, image: str, tagger: Tagger, official_quirks: bool
) -> ObjHalItem:
    truth, vocabulary = bench.ground_truth[answer.image_id], bench.vocabulary
    if objects is None:
        return ObjHalItem(answer, (), (), truth, image, unparsed=True)
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
    place = {mark.surface: mark for mark in reversed(marks)}
    return ObjHalItem(answer, tuple(place.get(m.surface, m) for m in mentions), marks, truth, image)


def score_captions(
    captions: Iterable[Answer],
    ground_truth: Mapping[str, Collection[str]],
    vocabulary: ObjectVocabulary,
    images: Mapping[str, str] | None = None,
) -> ObjHalScore:
    """Scores captions by rules, against image_id -> nodes in that picture (possibly none). images: id -> file name.

    Raises ValueError for a caption whose picture has no ground truth, and for a node that the vocabulary lacks.
    """
    return _score(tuple(_item(answer, ground_truth, vocabulary, images or {}) for answer in captions), PROTOCOL)


def _score(items: tuple[ObjHalItem, ...], protocol: str) -> ObjHalScore:
    groups = [item.answer.image_id for item in items]
    metrics = {name: ratio_interval(*_sums(items, name), groups) for name in METRICS}
    return ObjHalScore(items, metrics, protocol)


def _item(
    answer: Answer,
    ground_truth: Mapping[str, Collection[str]],
    vocabulary: ObjectVocabulary,
    images: Mapping[str, str],
) -> ObjHalItem:
    if answer.image_id not in ground_truth:
        raise ValueError(
            f"answer {answer.id!r}: image_id {answer.image_id!r} is not among the {len(ground_truth)} pictures with "
            "ground truth; score the answers with the ground truth of their own pictures (ids are text)"
        )
    truth = frozenset(ground_truth[answer.image_id])
    if unknown := truth - vocabulary.nodes:
        raise ValueError(
            f"ground truth of picture {answer.image_id!r}: {sorted(unknown)} are no nodes of the vocabulary, so no "
            "caption can name them; use the vocabulary that the ground truth was made with"
        )
    mentions = tuple(vocabulary.mentions(answer.text))
    return ObjHalItem(answer, mentions, mentions, truth, images.get(answer.image_id, ""))


def _sums(items: Sequence[ObjHalItem], metric: str) -> tuple[list[float], list[float]]:
    pairs = [METRICS[metric](item) for item in items]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def difference(first: ObjHalScore, second: ObjHalScore) -> dict[str, Interval]:
    """first - second per metric, with a paired bootstrap interval. ValueError unless both answer the same questions."""
    ours, theirs = ({item.answer.id: item for item in score.items} for score in (first, second))
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"paired difference: {len(ours.keys() ^ theirs.keys())} question ids are in one of the two scores only "
            f"(of {len(ours)} and {len(theirs)}); score both models on the same questions"
        )
    items, others = list(ours.values()), [theirs[key] for key in ours]
    groups = [item.answer.image_id for item in items]
    return {name: paired_difference(_sums(items, name), _sums(others, name), groups) for name in METRICS}


_COLUMNS = {
    "response_level": ("response-level %", 1),
    "mention_level": ("mention-level %", 1),
    "object_recall": ("object recall %", 1),
    "mean_words": ("mean words", 1),
    "repeated_objects": ("repeated objects", 2),
}


def format_table(rows: Mapping[str, ObjHalScore]) -> str:
    """One aligned line per model: each figure as "value [low, high]" with its 95 % interval, or n/a, and its protocol.

    Below: the answers that are in no metric but the words, and the questions without answer.
    """
    lines = [["", "protocol", *(title for title, _ in _COLUMNS.values())]]
    for name, score in rows.items():
        cells = (_cell(score.metrics[key], decimals) for key, (_, decimals) in _COLUMNS.items())
        lines.append([name, score.protocol, *cells])
    notes = []
    for name, score in rows.items():
        for what, ids in (("no readable list from the judge", score.unparsed), ("no answer", score.missing)):
            notes += [f"{name}: {what}: {len(ids)} of {len(score.items) + len(score.missing)}"] * bool(ids)
    return "\n".join([aligned(lines), *notes])


def _cell(interval: Interval, decimals: int) -> str:
    if interval.value is None:
        return "n/a"
    return f"{interval.value:.{decimals}f} [{interval.low:.{decimals}f}, {interval.high:.{decimals}f}]"
