"""The files around the code: versions agree, YAML parses, continuous integration runs what people run, no typos."""

import re
import subprocess
import sys
import tomllib
from datetime import date

import pytest
import yaml

import dama
from tests.conftest import ROOT

pytestmark = pytest.mark.fast

CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
YAML = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
RELEASE = re.compile(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", re.MULTILINE)


def loaded(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_one_version():
    """Of the package, of the citation, and of the newest release, on the same day."""
    assert CONFIG["project"]["dynamic"] == ["version"]
    assert CONFIG["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "dama.version.__version__"}}
    releases = RELEASE.findall((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    citation = loaded("CITATION.cff")
    assert releases[0] == (dama.__version__, citation["date-released"].isoformat())
    assert citation["version"] == dama.__version__ and citation["license"] == CONFIG["project"]["license"]


def test_the_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    releases = RELEASE.findall(text)
    assert heads == ["[Unreleased]", *(f"[{version}] - {day}" for version, day in releases)]
    numbers = [tuple(map(int, version.split("."))) for version, _ in releases]
    assert len(numbers) > 1 and numbers == sorted(set(numbers), reverse=True)
    assert all(date.fromisoformat(day) for _, day in releases)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize(("workflow", "command"), [("ci", "bash .ci/run"), ("docs", "bash scripts/docs.sh")])
def test_continuous_integration_runs_what_people_run(workflow, command):
    jobs = loaded(f".github/workflows/{workflow}.yml")["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert command in [step.get("run") for step in steps] and all("timeout-minutes" in job for job in jobs.values())
    assert (ROOT / command.split()[1]).is_file()


def test_a_bug_report_asks_for_what_doctor_prints():
    fields = {field.get("id"): field for field in loaded(".github/ISSUE_TEMPLATE/bug.yml")["body"]}
    assert "python -m dama doctor" in fields["doctor"]["attributes"]["description"]
    kinds = loaded(".github/ISSUE_TEMPLATE/addition.yml")["body"][0]["attributes"]["options"]
    assert {"model family", "benchmark", "objective"} < set(kinds)


def test_hooks_are_of_this_environment():
    """No revision of a foreign repository is run: the tools are those of constraints.txt, or the system's."""
    (repository,) = loaded(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local" and {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff", "ruff-format", "codespell", "shellcheck"]


def test_files_that_contributors_read_name_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"(?:scripts|tests|dama|eval|docs)/[\w./]*\w", text)
    assert len(named) > 20 and [name for name in named if not (ROOT / name).exists()] == []


def test_no_misspellings():
    codespell = [sys.executable, "-m", "codespell_lib"]
    done = subprocess.run(codespell, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_every_requirement_is_pinned():
    """A name of pyproject.toml is in constraints.txt, but flash-attn, which is compiled where it is used."""
    project = CONFIG["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {canonical(re.split(r"[\[<>=]", each)[0]) for each in wanted}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert names - {canonical(line.partition("=")[0]) for line in lines} == {"flash-attn"}
    assert lines == sorted(lines, key=str.lower)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()
