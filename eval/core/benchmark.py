"""The description of a benchmark: everything that generation, scoring, tables, pages and downloads need of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eval.core.judged import Judge
from eval.core.metrics import Metric
from eval.core.published import Published, read_published
from eval.core.scores import Score, Table, TableColumn
from eval.core.sources import File, ImageSource
from eval.core.types import BenchmarkData, Question

if TYPE_CHECKING:
    from llava.generation.request import Request


@dataclass(frozen=True)
class Mode:
    """A way to run the benchmark. The first of a benchmark is the default.

    help: for the command line. answers: folder of the answers; modes that share it share the answers. judged: whether a
    judge decides. quirks: whether the original scorer's handling can be asked for. decoding: what differs from the
    parts' decoding.
    """

    name: str = ""
    help: str = ""
    answers: str = "answers"
    judged: bool = False
    quirks: bool = True
    decoding: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        """Hash by name, which is unique in a benchmark."""
        return hash(self.name)


@dataclass(frozen=True)
class Part:
    """Questions that are answered with the same decoding.

    decoding: the published one, as fields of llava.generation.request.Decoding. name: folder of the answers, that of
    the mode if empty. includes: whether a question belongs to the part.
    """

    decoding: Mapping[str, Any]
    name: str = ""
    includes: Callable[[Question], bool] = lambda question: True


@dataclass(frozen=True)
class SummaryColumn:
    """A metric in the table and the chart of all benchmarks.

    rim: the value at the rim of the chart, or at its center if lower is better; None leaves it out of the chart. kind:
    whether it measures hallucination, or general ability, which alignment should not lower.
    """

    metric: str
    title: str
    rim: float | None = 100
    decimals: int = 1
    kind: Literal["hallucination", "ability"] = "hallucination"


@dataclass(frozen=True)
class TradeOff:
    """Metrics that improve by saying less, and the metric of how much is said, at which runs are compared.

    All of them are ratios of the items' parts. coverage: recall where the benchmark has it, else the mean length.
    """

    coverage: str
    metrics: tuple[str, ...]


def _requests_of(data: BenchmarkData, part: Part) -> list[Request]:
    return data.requests(part.includes)


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A benchmark.

    name: of the command, the folders and the script. wrong: what makes an answer wrong, as the end of the sentence "An
    answer is wrong where it ...". files, images: the official files and where they come from. load: (data folder, name
    of the mode) -> questions; raises ValueError that names file and fields. score: (data, answers, verdicts of the
    judge if the mode is judged, official_quirks= if the mode has them) -> score. metrics: all of them, in the order of
    tables. columns: those in the summary of all benchmarks. stratum: the class of a question; --limit takes the first N
    of each. trade_off: how runs of several checkpoints are compared. requests: (data, part) -> generation requests.
    table: scores of models -> the benchmark's own table; all metrics if None. published_file: published results.
    aliases: other names that results.json may have it under.
    """

    name: str
    title: str
    wrong: str
    files: tuple[File, ...]
    images: ImageSource
    load: Callable[[Path, str], BenchmarkData]
    parts: tuple[Part, ...]
    score: Callable[..., Score]
    metrics: tuple[Metric, ...]
    columns: tuple[SummaryColumn, ...] = ()
    modes: tuple[Mode, ...] = (Mode(),)
    judge: Judge | None = None
    stratum: Callable[[Question], str] = lambda question: ""
    trade_off: TradeOff | None = None
    requests: Callable[[BenchmarkData, Part], list[Request]] = _requests_of
    table: Callable[[Mapping[str, Score]], str] | None = None
    published_file: Path | None = None
    aliases: tuple[str, ...] = ()
    from_rows: Callable[..., BenchmarkData] | None = None
    id_of: Callable[[Mapping[str, Any], Any], str | None] | None = None
    takes_image_ids: bool = False
    takes_text_only: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a description that contradicts itself, naming every error."""
        known = [metric.name for metric in self.metrics]
        errors = [f"metric {name!r} is listed twice" for name in sorted({n for n in known if known.count(n) > 1})]
        errors += [f"column {c.metric!r} is no metric" for c in self.columns if c.metric not in known]
        if self.trade_off is not None:
            plain = {metric.name for metric in self.metrics if metric.formula is None}
            chosen = (self.trade_off.coverage, *self.trade_off.metrics)
            errors += [f"trade-off: {name!r} is no ratio of the items' parts" for name in chosen if name not in plain]
        errors += [
            f"metric {metric.name!r} is derived from {name!r}, which is no metric"
            for metric in self.metrics
            for name in metric.inputs
            if name not in known
        ]
        if self.judge is None and any(mode.judged for mode in self.modes):
            errors.append("a mode is judged, but there is no judge")
        if errors:
            raise ValueError(f"benchmark {self.name}: {'; '.join(errors)}\nRemedy: correct its description")

    @cached_property
    def metric_named(self) -> Mapping[str, Metric]:
        """Name -> metric."""
        return {metric.name: metric for metric in self.metrics}

    def mode_named(self, name: str | None) -> Mode:
        """Return the mode of this name, or the default for None and for names of other benchmarks' modes."""
        return next((mode for mode in self.modes if mode.name == name), self.modes[0])

    def metric(self, name: str) -> Metric:
        """Return the metric of this name. Raises ValueError for an unknown one."""
        if name not in self.metric_named:
            raise ValueError(self.unknown_metric(name))
        return self.metric_named[name]

    def unknown_metric(self, name: str) -> str:
        """Describe the error that a metric is unknown."""
        expected = ", ".join(self.metric_named)
        return f"metric {name!r}: expected a metric of {self.title} ({expected}), got {name!r}"

    def format_table(self, rows: Mapping[str, Score]) -> str:
        """Format the benchmark's own table. rows: name of the model -> score."""
        columns = tuple(TableColumn(metric.name, metric.title, metric.decimals) for metric in self.metrics)
        return (self.table or Table(columns))(rows)

    def published(self) -> tuple[Published, ...]:
        """Read the published results."""
        return read_published(self.published_file)

    def paths_without_digest(self) -> list[str]:
        """Return the paths of files, and of the packages they are made from, whose digest nobody has published."""
        packages = [file.package for file in self.files if file.package]
        return [file.path for file in (*self.files, *packages, self.images.package) if file and file.sha256 is None]
