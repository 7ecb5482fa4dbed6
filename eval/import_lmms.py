"""Import results of lmms-eval (MME, SEED-Bench, MMBench, GQA, TextVQA, ScienceQA ...) as results.json.

    python -m lmms_eval --tasks gqa,mme --log_samples --output_path RESULTS ...
    python -m eval.import_lmms RESULTS --out runs/lmms
    python -m eval.compare runs/lmms/BASE/gqa/results.json runs/lmms/ALIGNED/gqa/results.json

Each task becomes OUT/<model>/<task>/results.json, which python -m eval.compare and eval.page read. A metric that is the
mean of its samples' scores gets intervals; of any other, such as MME's sums over categories, only the value is taken.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dama.completion import well_formed
from dama.console import digest_of_file, log, report_error
from dama.errors import error_list
from eval.core.metrics import Metric, ratios
from eval.core.official import read_json
from eval.core.store import Provenance, write_results
from eval.core.types import Record
from eval.imported import description

HARNESS = "lmms-eval"
TOLERANCE = 1e-6

_REMEDY = "give what lmms-eval wrote with --log_samples --output_path: *_results.json, or a folder with one"
_RESULTS = "_results.json"


def results_file(path: Path) -> Path:
    """Return the *_results.json that `path` is, or that is in this folder. ValueError for none and for several."""
    if path.is_file():
        return path
    found = sorted(path.rglob(f"*{_RESULTS}"))
    if len(found) != 1:
        listed = [str(file) for file in found] or ["none"]
        raise ValueError(error_list(f"{path}: expected one *{_RESULTS}, got {len(found)}", listed, _REMEDY))
    return found[0]


def read_results(path: Path) -> dict[str, Any]:
    """Read a *_results.json. Raises ValueError where it is not lmms-eval's."""
    content = read_json(path)
    missing = [name for name in ("results", "configs") if not isinstance(content, dict) or name not in content]
    if missing:
        raise ValueError(
            f"{path}: expected the fields results and configs, got no {' and no '.join(missing)}\n{_REMEDY}"
        )
    return content


def read_samples(path: Path, task: str) -> list[dict[str, Any]]:
    """Read a task's samples beside its *_results.json. Raises ValueError without them, and for doc_ids used twice."""
    samples = path.with_name(path.name.removesuffix(_RESULTS) + f"_samples_{task}.jsonl")
    if not samples.is_file():
        raise ValueError(f"{samples}: missing\nRemedy: run lmms-eval with --log_samples")
    rows = read_json(samples)
    ids = [row.get("doc_id") for row in rows]
    if not rows or None in ids or len(set(ids)) < len(ids):
        raise ValueError(f"{samples}: expected samples with a doc_id each, got {len(rows)} with {len(set(ids))}")
    return rows


# ------------------------------------------------------------------------------------------------------------- metrics


def metrics_of(content: Mapping[str, Any], task: str) -> dict[str, tuple[Metric, float]]:
    """Return name -> metric and value; filters other than "none" are part of the name, standard errors are left out."""
    found = {}
    for key, value in content["results"][task].items():
        name, _, chosen = key.partition(",")
        if not chosen or "_stderr" in name or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        full = name if chosen == "none" else f"{name},{chosen}"
        decimals = 4 if abs(value) <= 1 else 2
        found[full] = (Metric(full, full.replace("_", " "), _direction(content, task, name), decimals), float(value))
    return found


def _direction(content: Mapping[str, Any], task: str, metric: str) -> Any:
    """Return the direction of improvement that the task states, None where it states none."""
    listed = content["configs"].get(task, {}).get("metric_list") or []
    stated = {row.get("metric"): row.get("higher_is_better") for row in listed if isinstance(row, dict)}
    stated |= content.get("higher_is_better", {}).get(task) or {}
    return {True: "higher", False: "lower"}.get(stated.get(metric))  # type: ignore[arg-type]


def sample_score(sample: Mapping[str, Any], metric: str) -> float | None:
    """Return a sample's value of a metric: a number, or the `score` of what the task hands on; None without one."""
    value = sample.get(metric.partition(",")[0])
    if isinstance(value, dict):
        value = value.get("score")
    return float(value) if isinstance(value, (int, float)) else None


def parts_of(samples: Sequence[Mapping[str, Any]], values: Mapping[str, float | None]) -> dict[str, float]:
    """Return metric -> factor for those that are the mean of their samples' scores, times 1 or 100."""
    factors: dict[str, float] = {}
    for metric, value in values.items():
        scores = [score for sample in samples if (score := sample_score(sample, metric)) is not None]
        if scores and value is not None:
            mean = sum(scores) / len(scores)
            fitting = [factor for factor in (1.0, 100.0) if abs(factor * mean - value) <= TOLERANCE]
            factors |= {metric: fitting[0]} if fitting else {}
    return factors


# --------------------------------------------------------------------------------------------------------------- items


def item_of(sample: Mapping[str, Any], factors: Mapping[str, float], names: Sequence[str]) -> Record:
    """Return a sample's record. wrong: whether the first of its scores is 0; None where it has no score."""
    scores = {name: sample_score(sample, name) for name in names}
    first = next((score for score in scores.values() if score is not None), None)
    parts = {name: [factor * score, 1.0] for name, factor in factors.items() if (score := scores[name]) is not None}
    return {
        "id": str(sample["doc_id"]),
        "image_id": "",
        "image": "",
        "prompt": well_formed(_text(sample.get("input", ""))),
        "text": well_formed(_text(sample.get("filtered_resps", ""))),
        "truth": _text(sample.get("target", "")),
        "wrong": None if first is None else first <= 0,
        "spans": [],
        "parts": parts,
    }


def _text(value: Any) -> str:
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else str(value)


# ------------------------------------------------------------------------------------------------------------- command


def import_task(path: Path, content: Mapping[str, Any], task: str, model: str, out: Path) -> Path:
    """Write results.json of one task, and return its path."""
    found, samples = metrics_of(content, task), read_samples(path, task)
    if not found:
        raise ValueError(f"{path}: expected a metric of {task}, got none that is a number\nRemedy: {_REMEDY}")
    values = {name: value if math.isfinite(value) else None for name, (_, value) in found.items()}
    factors = parts_of(samples, values)
    items = [item_of(sample, factors, list(values)) for sample in samples]
    sums = ratios(items, factors)
    config = content["configs"].get(task) or {}
    name = f"{HARNESS}/{task}"
    provenance = Provenance(
        benchmark=name,
        protocol=protocol_of(content, task),
        checkpoint=model,
        fingerprint=digest_of_file(path),
        decoding=config.get("generation_kwargs") or {},
        counts={"answers": len(items), "missing": 0, "unparsed": sum(item["wrong"] is None for item in items)},
    )
    described = description(name, f"{task} ({HARNESS})", "scores 0", [metric for metric, _ in found.values()])
    target = out / model / task / "results.json"
    write_results(target, values | {n: v for n, v in sums.items() if v is not None}, provenance, items, described)
    without = [metric for metric in values if metric not in factors]
    log(f"{task}: {len(items)} samples -> {target}" + f"; no intervals for {', '.join(without)}" * bool(without))
    return target


def protocol_of(content: Mapping[str, Any], task: str) -> str:
    """Return task, its version, number of examples, and the limit if there was one."""
    words = [f"{HARNESS} {task}, version {content.get('versions', {}).get(task)}"]
    shots, limit = content.get("n-shot", {}).get(task), (content.get("config") or {}).get("limit")
    words += [] if shots is None else [f"{shots}-shot"]
    words += [] if limit is None else [f"first {limit:g}"]
    return ", ".join(words)


def model_of(content: Mapping[str, Any], path: Path) -> str:
    """Return the last part of the model's name, or the name of the folder."""
    stated = content.get("model_name") or path.parent.name
    return Path(str(stated)).name or path.parent.name


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.import_lmms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="*_results.json of lmms-eval, or a folder with one")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks to import (default: all that have samples)")
    parser.add_argument("--name", help="name of the model (default: as lmms-eval has it)")
    parser.add_argument("--out", type=Path, default=Path("runs/lmms"), help="output folder (default: %(default)s)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Import the tasks. Raises ValueError that names unknown tasks, and where there is none."""
    path = results_file(args.results)
    content = read_results(path)
    own = [task for task in content["results"] if task in content["configs"]]  # groups have no configuration
    unknown = [task for task in args.tasks or () if task not in own]
    if unknown or not own:
        raise ValueError(f"--tasks: expected some of {', '.join(own) or 'none'}, got {', '.join(unknown) or 'none'}")
    model = args.name or model_of(content, path)
    for task in args.tasks or own:
        import_task(path, content, task, model, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after an error."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except Exception as error:
        report_error(error, "import_lmms")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
