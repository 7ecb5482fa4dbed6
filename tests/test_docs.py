"""README and docs/: every command parses and names what exists, short ones run, the site needs no network."""

import ast
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dama.console import OWN
from scripts import docs_commands, docs_links
from scripts.docs_commands import ROOT, Block, bash_blocks, blocks_of, commands, commands_of, errors_of, pages

PAGES = [path.relative_to(ROOT).as_posix() for path in pages()]
NUMBER = re.compile(r"[-+~]?\d[\d,.]*(\s|%|$|/|\[|\()")


# ------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("page", PAGES)
def test_every_bash_block_parses(page):
    errors = [docs_commands.syntax_error(block) for block in bash_blocks() if block.page == page]
    assert [error for error in errors if error] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_names_what_exists(page):
    """`python -m scripts.docs_commands` lists the same."""
    found = [command for command in commands() if command.page == page]
    assert [f"{c.line}: {c.text}: {error}" for c in found for error in errors_of(c)] == []


def test_commands_are_found_on_the_pages_that_have_them():
    found = {command.page for command in commands()}
    assert {"README.md", "docs/quickstart/llava.md", "docs/faq.md", "docs/models.md"} <= found


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("bash scripts/dama_8b.sh", "scripts/dama_8b.sh: no such file"),
        ("python -m dama hardnes --data a", "invalid choice: 'hardnes'"),
        ("python -m dama hardness --data a --image_folder b --out c --clipp d", "unrecognized arguments: --clipp d"),
        ("dama train --model a --learnig_rate 1", "--learnig_rate: no such flag"),
        ("bash scripts/dama_7b.sh --dry-run --learnig_rate 1", "--learnig_rate: no such flag"),
        ("bash scripts/dama_tiny.sh --smoke --strategy all", "invalid choice: 'all'"),
        ("bash scripts/eval_pope.sh M --limits 3", "unrecognized arguments: --limits 3"),
        ("bash scripts/docs.sh --server", "scripts/docs.sh --server: no such flag"),
        ("MODL=a bash scripts/dama_7b.sh", "variable MODL: nothing reads it"),
        ("torchrun --nproc_per_node 2 -m dama train --modell a", "--modell: no such flag"),
        ("python -m dama.nothing", "python -m dama.nothing: no such module"),
        ("python -m eval.compare a b --curves x", "unrecognized arguments: --curves x"),
        ("pythons -m dama train", "pythons: no such program is known"),
        ('pip install ".[evals]"', "extra evals: not declared"),
        ('python -m llava.eval.generate --model-path "$M" --nothing 1', "--nothing: no such flag"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_found(line, error):
    (command,) = commands_of(Block("page", 1, "bash", line + "\n"))
    assert any(error in found for found in errors_of(command))


@pytest.mark.fast
def test_a_block_is_split_into_its_commands():
    text = """\
# the user's own
DIR=weights   # a comment's end
A=1 bash scripts/x.sh --flag "a b" \\
    --other $DIR/clip && source .venv/bin/activate
cat > file <<'END'
not a command
END
python -m x | head; echo '# no comment'
"""
    found = commands_of(Block("page", 10, "bash", text))
    assert [(command.line, command.variables, command.words) for command in found] == [
        (12, ("A",), ("bash", "scripts/x.sh", "--flag", "a b", "--other", "weights/clip")),
        (12, (), ("source", ".venv/bin/activate")),
        (14, (), ("cat",)),
        (17, (), ("python", "-m", "x")),
        (17, (), ("head",)),
        (17, (), ("echo", "# no comment")),
    ]


# ------------------------------------------------------------------------------------------- commands that are run


def environment(**more):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def run(script, folder, **variables):
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment(**variables),
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def printing():
    """Commands that only print: dry runs, help and lists."""
    words = ("--dry-run", "--help", "--help_all", "--list", "--left-out")
    programs = ("bash", "python", "dama")
    found = [c for c in commands() if c.words[0] in programs]
    found = [c for c in found if set(words) & set(c.words) or c.words[-1] == "--version"]  # training's has a value
    return sorted({(c.words, tuple(v for v in c.variables)): c for c in found}.values(), key=lambda c: c.text)


@pytest.mark.parametrize("command", printing(), ids=lambda command: command.text)
def test_what_only_prints_runs(command):
    values = {"GPUS": "4", "MICRO_BATCH": "1"}  # other variables may have any value
    words = [sys.executable, "-m", "dama", *command.words[1:]] if command.words[0] == "dama" else command.words
    script = " ".join(f"'{word}'" for word in words)
    done = run(script, ROOT, **{name: values.get(name, "dpo") for name in command.variables if name in values})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def marked_to_run():
    return [block for block in bash_blocks() if block.comment.startswith("<!-- run:")]


@pytest.mark.parametrize("block", marked_to_run(), ids=lambda block: f"{block.page}:{block.line}")
def test_the_quick_start_without_a_gpu_runs(block, tmp_path):
    """In a folder with the repository's packages, README's pair as pairs.jsonl, and its image."""
    for name in ("dama", "llava", "eval", "playground", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48), "gray").save(tmp_path / "images/street.jpg")
    (example,) = (block for block in blocks_of(ROOT / "README.md") if block.language == "json")
    (tmp_path / "pairs.jsonl").write_text(example.text)
    done = run(block.text, tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/mine/dama/config.json").is_file()


# -------------------------------------------------------------------------------------------------- pages as text


@pytest.mark.fast
def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def number_tables(path):
    """(line, text of its section above it) of each table whose cells are mostly numbers, fenced or of Markdown."""
    lines, found, inside = path.read_text(encoding="utf-8").splitlines(), [], False
    starts = [block.line - 2 for block in blocks_of(path) if not block.language and has_numbers(block.text)]
    for number, line in enumerate(lines):
        inside ^= bool(docs_commands.FENCE.match(line))
        if not inside and number and re.fullmatch(r"\|[ :|-]+\|", line.strip()):
            rows = list(itertools.takewhile(lambda row: row.startswith("|"), lines[number + 1 :]))
            cells = [cell.strip() for row in rows for cell in row.strip("| ").split(" | ")[1:] if cell.strip()]
            if sum(bool(NUMBER.match(cell)) for cell in cells) * 2 >= max(1, len(cells)):
                starts.append(number - 1)
    for start in sorted(starts):
        above = itertools.takewhile(lambda line: not line.startswith("#"), reversed(lines[:start]))
        found.append((start + 1, "\n".join(list(above)[::-1])))
    return found


def has_numbers(text):
    return len(re.findall(r"\d\.\d", text)) >= 3


def names_a_command(text):
    return bool(re.search(r"(python3? (-m )?|bash |dama )[\w./]+|scripts/[\w/]+\.(py|sh)", text))


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES)
def test_every_table_of_numbers_names_its_command(page):
    """In the text of its section, best in a comment right above it: `<!-- table: COMMAND -->`."""
    assert [line for line, above in number_tables(ROOT / page) if not names_a_command(above)] == []


@pytest.mark.fast
def test_tables_of_numbers_are_recognized(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "| a | b |\n|---|---|\n| x | 1.5 |\n\n| a | b |\n|---|---|\n| x | words |\n\n## Title\n\nFrom `bash a.sh`\n"
        "```\n1.0 2.0 3.0\n```\n"
    )
    found = number_tables(page)
    assert [(line, names_a_command(above)) for line, above in found] == [(1, False), (12, True)]


@functools.cache
def messages():
    """Texts of the code, parts that are put in at run time left out, and of the shell scripts."""
    found = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "scripts").rglob("*.sh"))]
    for folder in ("dama", "llava", "eval"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\0".join(found)


def quoted_messages():
    rows = [line for line in (ROOT / "docs/faq.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [re.match(r"\| `([^`]+)` \|", row)[1].replace("\\|", "|") for row in rows]


@pytest.mark.parametrize("message", quoted_messages())
def test_the_code_has_the_messages_that_the_page_on_errors_explains(message):
    parts = [part.strip(" ',()") for part in message.split("...")]
    assert max(map(len, parts)) >= 10
    assert [part for part in parts if part not in messages()] == []


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES)
def test_python_examples_import_what_exists(page):
    """But for blocks that begin with the path of a file, which tests/test_howtos.py runs."""
    examples = [block for block in blocks_of(ROOT / page) if block.language == "python"]
    for block in (block for block in examples if not re.match(r"# [\w/]+\.\w+", block.text)):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OWN:
                base = ROOT / node.module.replace(".", "/")
                file = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
                text = file.read_text(encoding="utf-8")
                for name in (alias.name for alias in node.names):
                    known = re.search(rf"^\s*(def|class) {name}\b|^{name}\b.*=|import .*\b{name}\b", text, re.MULTILINE)
                    assert known or (base / f"{name}.py").is_file(), f"{node.module}.{name}"


@pytest.mark.fast
def test_links_out_of_docs_lead_to_the_repository(monkeypatch):
    said = []
    monkeypatch.setattr(docs_links.log, "warning", said.append)
    text = "[a](../SECURITY.md) [b](../docs/faq.md) [c](../nothing.md)"
    assert docs_links.rewrite(text, "security.md", "") == "a [b](../docs/faq.md) c"
    assert len(said) == 1 and "nothing.md, which does not exist" in said[0]
    linked = docs_links.rewrite("[a](../../SECURITY.md#what)", "api/data.md", "https://host/dama/")
    assert linked == "[a](https://host/dama/blob/main/SECURITY.md#what)"


@pytest.mark.fast
def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert len(targets) > 20
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


# ------------------------------------------------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly: a broken link, a missing anchor or a page outside the navigation fails."""
    folder = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env=environment(NO_MKDOCS_2_WARNING="true"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder
    shutil.rmtree(folder)


class Loaded(HTMLParser):
    """What a page loads by itself, in contrast to its links."""

    ATTRIBUTES = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data",
                  "embed": "src", "audio": "src"}  # fmt: skip
    RELATIONS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}

    def __init__(self):
        super().__init__()
        self.sources = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "link" and self.RELATIONS & set((values.get("rel") or "").split()):
            self.sources.append(values.get("href"))
        if tag in self.ATTRIBUTES:
            self.sources += [values.get(self.ATTRIBUTES[tag]), *(values.get("srcset") or "").split(",")]
        self.sources += re.findall(r"url\(([^)]+)\)", values.get("style") or "")


def is_remote(source):
    return bool(re.match(r"\s*['\"]?(https?:)?//", source or ""))


def test_the_site_has_every_page_and_a_search_index(site):
    built = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    named = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert named <= built and (site / "search/search_index.js").is_file()
    api = (site / "api/objectives.html").read_text(encoding="utf-8")
    assert 'id="dama.weighting.weigh"' in api and 'id="dama.losses.Loss.parse"' in api


def test_no_page_loads_anything_from_the_network(site):
    remote = []
    for path in site.rglob("*.html"):
        text, loaded = path.read_text(encoding="utf-8"), Loaded()
        loaded.feed(text)
        styles = re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL)
        found = [*loaded.sources, *(url for style in styles for url in re.findall(r"url\(([^)]+)\)", style))]
        remote += [f"{path.name}: {source}" for source in found if is_remote(source)]
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        found = [*re.findall(r"url\(([^)]+)\)", text), *re.findall(r"@import\s+(\S+)", text)]
        remote += [f"{path.name}: {source}" for source in found if is_remote(source)]
    assert remote == []
    assert is_remote("https://unpkg.com/a.js") and is_remote("//cdn/a.css") and not is_remote("../assets/a.js")
