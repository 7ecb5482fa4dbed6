"""A benchmark as one evaluation runs it: its mode and limit, its requests, and the folders of answers and results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.core.benchmark import Benchmark, Mode, Part
from eval.core.judge import VERDICTS
from eval.core.types import Question
from llava.generation.request import Decoding, Request


@dataclass(frozen=True)
class Task:
    """A benchmark, the way it is run, and the number of questions of each stratum (None: all).

    image_ids: file or list of the images that are asked about; None for the benchmark's own.
    """

    benchmark: Benchmark
    mode: Mode
    limit: int | None
    image_ids: Path | tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The benchmark's name."""
        return self.benchmark.name

    @property
    def judged(self) -> bool:
        """Whether a judge decides."""
        return self.mode.judged

    def load(self, folder: Path) -> Any:
        """Load the benchmark, or its first questions. Raises ValueError that names file and fields."""
        chosen = {} if self.image_ids is None else {"image_ids": self.image_ids}
        data = self.benchmark.load(folder, self.mode.name, **chosen)
        return data if self.limit is None else replace(data, questions=self._first(data.questions))

    def _first(self, questions: Iterable[Question]) -> tuple[Question, ...]:
        strata: dict[str, list[Question]] = {}
        for question in questions:
            strata.setdefault(self.benchmark.stratum(question), []).append(question)
        return tuple(question for stratum in strata.values() for question in stratum[: self.limit])

    def parts(self, data: Any) -> dict[str, tuple[list[Request], Decoding]]:
        """Return folder of the answers -> generation requests and published decoding; parts without questions: none."""
        found = {
            part.name or self.mode.answers: (self.benchmark.requests(data, part), self.decoding(part))
            for part in self.benchmark.parts
        }
        return {name: (requests, decoding) for name, (requests, decoding) in found.items() if requests}

    def decoding(self, part: Part) -> Decoding:
        """Return the published decoding of a part in this mode."""
        return Decoding(**{**part.decoding, **self.mode.decoding})

    def answers_folder(self, run: Path) -> Path:
        """Return the folder of the answers in a model's folder; runs with a limit use a separate one."""
        return run / (self.name if self.limit is None else f"{self.name}_first{self.limit}")

    def results_folder(self, run: Path) -> Path:
        """Return the folder of verdicts and results; that of the answers, or below it where the mode is not default."""
        folder = self.answers_folder(run)
        return folder if self.mode == self.benchmark.modes[0] else folder / self.mode.name

    def has_verdicts(self, run: Path) -> bool:
        """Whether an earlier run left verdicts in a model's folder."""
        return (self.results_folder(run) / VERDICTS).is_file()
