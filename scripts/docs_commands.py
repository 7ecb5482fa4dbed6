"""Check every shell command of the documentation against the code: scripts, modules, flags, environment variables.

python -m scripts.docs_commands           # prints each command with its place, and what is wrong with it
python -m scripts.docs_commands --list    # prints the commands only

Commands are those of the bash blocks of README.md, CONTRIBUTING.md and docs/, and those that the comments
`<!-- table: COMMAND -->` above tables of numbers name. tests/test_docs.py runs the same checks, and the commands that
are short and need no download.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dama import cli
from dama.console import OWN, log
from dama.flag_table import rebuild
from llava.commands.train import training_flags
from llava.train.flag_names import reject_unknown_flags, translate_flags
from scripts import flag_tables

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[^\s`{]*)[^`]*$")
TABLE_COMMENT = re.compile(r"<!-- table: (.+?) -->")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
SEPARATORS = re.compile(r"[;&|()]+")
REDIRECTION = re.compile(r"\d?(>>?|<<?<?|>&|&>)\d?")
KEYWORDS = {"if", "then", "else", "elif", "fi", "for", "do", "done", "while", "until", "case", "esac", "{", "}", "!"}
WRAPPERS = {"env", "exec", "sudo", "nohup", "time", "command"}
LAUNCHERS = {"python", "python3", "bash", "sbatch", "srun", "deepspeed", "torchrun", "accelerate"}
# Other programs that pages may call, whose flags are not checked.
OTHERS = {
    "apptainer", "cat", "cd", "chmod", "cp", "curl", "dama", "docker", "echo", "export", "find", "git", "grep", "head",
    "hf", "jq", "jupyter", "jupytext", "kill", "less", "lint-imports", "ls", "mkdir", "mkdocs", "mv", "mypy",
    "nvidia-smi", "pip", "pre-commit", "printf", "pytest", "rm", "rsync", "ruff", "scancel", "scontrol", "set",
    "singularity", "sinfo", "source", "squeue", "ssh", "tail", "tar", "tensorboard", "tmux", "transformers", "unset",
    "uv", "vllm", "wait", "wc", "wget",
}  # fmt: skip
# Variables of libraries and of the shell.
VARIABLES = {
    "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CXX", "DS_ACCELERATOR", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN",
    "MASTER_ADDR", "MASTER_PORT", "NCCL_DEBUG", "OMP_NUM_THREADS", "OPENAI_API_KEY", "PATH", "PYTHONPATH",
    "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "TRITON_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TMPDIR",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its first line, `comment` what stands right above it."""

    page: str
    line: int
    language: str
    text: str
    comment: str = ""


@dataclass(frozen=True)
class Command:
    """A simple command of a page: variables set in front of it, and its words."""

    page: str
    line: int
    variables: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """The command on one line."""
        return " ".join(self.words)


# --------------------------------------------------------------------------------------------------- reading pages


def pages() -> list[Path]:
    """README.md, CONTRIBUTING.md, and every page below docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(path: Path) -> list[Block]:
    """Fenced blocks of a page."""
    lines, found, above, number = path.read_text(encoding="utf-8").splitlines(), [], "", 0
    page = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    while number < len(lines):
        match = FENCE.match(lines[number])
        if match is None:
            above = lines[number].strip() or above
            number += 1
            continue
        end = next(
            (n for n in range(number + 1, len(lines)) if lines[n].strip() == match["fence"]),
            len(lines),
        )
        inside = [line.removeprefix(match["indent"]) for line in lines[number + 1 : end]]
        comment = above if above.startswith("<!--") else ""
        found.append(Block(page, number + 2, match["language"], "\n".join(inside) + "\n", comment))
        above, number = "", end + 1
    return found


def bash_blocks() -> list[Block]:
    """Every bash block of every page."""
    return [block for path in pages() for block in blocks_of(path) if block.language in ("bash", "sh", "shell")]


def commands() -> list[Command]:
    """Every command of the bash blocks, and every command that a comment above a table names."""
    found = [command for block in bash_blocks() for command in commands_of(block)]
    for path in pages():
        page = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for text in TABLE_COMMENT.findall(line):
                found += commands_of(Block(page, number, "bash", text))
    return found


def commands_of(block: Block) -> list[Command]:
    """The simple commands of a block, variables that it sets itself put in."""
    known: dict[str, str] = {}
    return [command for line, words in statements(block) for command in simple_commands(block.page, line, words, known)]


def statements(block: Block) -> Iterator[tuple[int, list[str]]]:
    """(line, words) of each statement: a line, or several joined by a backslash or an open quote."""
    pending, first, heredoc = "", block.line, ""
    for number, line in enumerate(block.text.splitlines(), block.line):
        if heredoc:
            heredoc = "" if line.strip() == heredoc else heredoc
            continue
        first = first if pending else number
        pending += line + "\n"
        if line.endswith("\\"):
            pending = pending[:-2] + " "
            continue
        try:
            words = split_words(pending)
        except ValueError:  # an open quote
            continue
        pending = ""
        if here := re.search(r"<<-?\s*['\"]?(\w+)", line):
            heredoc = here[1]
        yield first, words
    if pending:
        raise ValueError(f"{block.page}:{first}: expected the end of a command, got {pending!r}")


def split_words(text: str) -> list[str]:
    """Words of a statement without its comments, separators and redirections as words of their own.

    Raises:
        ValueError: a quote is open at the end.
    """
    lexer = shlex.shlex(without_comments(text), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    return list(lexer)


def without_comments(text: str) -> str:
    """Remove comments: from a `#` that begins a word outside of quotes to the end of its line."""
    kept, quote, before, skipping = [], "", "\n", False
    for character in text:
        skipping = character != "\n" and (skipping or (character == "#" and not quote and before.isspace()))
        if skipping:
            continue
        if quote:
            quote = "" if character == quote and before != "\\" else quote
        elif character in "'\"" and before != "\\":
            quote = character
        kept.append(character)
        before = character
    return "".join(kept)


def simple_commands(page: str, line: int, words: Sequence[str], known: dict[str, str]) -> Iterator[Command]:
    """Split a statement at its separators; `known` gathers the variables that are set on the way."""
    current: list[str] = []
    skip = False
    for word in [*words, ";"]:
        if skip:
            skip = False
        elif REDIRECTION.fullmatch(word):
            skip = True
        elif SEPARATORS.fullmatch(word):
            yield from _command(page, line, current, known)
            current = []
        else:
            current.append(word)


def _command(page: str, line: int, words: list[str], known: dict[str, str]) -> Iterator[Command]:
    variables: list[str] = []
    while words:
        assigned = ASSIGNMENT.fullmatch(words[0])
        if assigned:
            variables.append(assigned[1])
            if len(words) == 1:
                known[assigned[1]] = assigned[2]
        elif words[0] == "for":
            return
        elif words[0] not in KEYWORDS and words[0] not in WRAPPERS:
            break
        words = words[1:]
    if words and not words[0].startswith("$"):
        yield Command(page, line, tuple(variables), tuple(_expanded(word, known) for word in words))


def _expanded(word: str, known: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda match: known.get(match[1], match[0]), word)


# ------------------------------------------------------------------------------------------------ checking commands


def errors_of(command: Command) -> list[str]:
    """What is wrong with a command, without running it; a page may call the files that it tells its reader to write."""
    written = files_written_on(command.page)
    known = [text for file in written for text in (f"{file}: no such file", f"invalid choice: '{Path(file).stem}'")]
    return [error for error in all_errors(command) if not any(text in error for text in known)]


@functools.cache
def files_written_on(page: str) -> tuple[str, ...]:
    """Files that a page gives in whole: blocks whose first line is a comment with the path."""
    blocks = blocks_of(ROOT / page) if (ROOT / page).is_file() else []
    firsts = [re.match(r"# ([\w./]+\.(?:py|sh))\n", block.text) for block in blocks if block.language != "bash"]
    return tuple(match[1] for match in firsts if match)


def all_errors(command: Command) -> list[str]:
    """Errors of variables, program, script or module, and flags."""
    errors = [f"variable {name}: nothing reads it" for name in command.variables if not is_read(name)]
    program = command.words[0].rpartition("/")[2] if "/" in command.words[0] else command.words[0]
    if program == "dama":
        return errors + parse_errors("dama", command.words[1:])
    if program == "pip" or command.words[:3] == ("python", "-m", "pip"):
        return errors + extra_errors(command)
    if program not in LAUNCHERS:
        known = program in OTHERS or (ROOT / command.words[0]).is_file()
        return errors if known else [*errors, f"{program}: no such program is known"]
    return errors + launched_errors(command)


def launched_errors(command: Command) -> list[str]:
    """Errors of what python, bash, a launcher or a scheduler runs."""
    words = command.words
    for number, word in enumerate(words[1:], 1):
        if word in ("-m", "--module") and number + 1 < len(words):
            return module_errors(words[number + 1], words[number + 2 :])
        if word.endswith((".py", ".sh")) and not word.startswith("-"):
            return script_errors(word, words[number + 1 :])
        if word == "-c":
            return []
    if words[0] == "srun":
        return []
    return [] if words[1:] in ((), ("--version",), ("--help",)) else [f"{words[0]}: runs neither a script nor a module"]


def module_errors(module: str, words: Sequence[str]) -> list[str]:
    """Errors of `python -m module words`."""
    if module.split(".")[0] not in OWN:
        return [] if importlib.util.find_spec(module.split(".")[0]) else [f"python -m {module}: no such module"]
    file = ROOT / (module.replace(".", "/") + ".py")
    if not file.is_file() and not (file.with_suffix("") / "__main__.py").is_file():
        return [f"python -m {module}: no such module"]
    return parse_errors(module, words)


def script_errors(script: str, words: Sequence[str]) -> list[str]:
    """Errors of a script that is called with these words."""
    if "$" in script:
        return []
    path = ROOT / script
    if not path.is_file():
        return [f"{script}: no such file"]
    if "--help" in words or "-h" in words:
        return []
    if script.endswith(".py"):
        return parse_errors(script, words)
    return shell_errors(script, list(words))


SWITCHES = {"--dry-run": 0, "--smoke": 0, "--trust_remote_code": 0, "--rounds": 1, "--model": 1}  # of our shell scripts


def shell_errors(script: str, words: list[str]) -> list[str]:
    """Errors of the flags of a shell script, most of which it passes on."""
    name, text = Path(script).name, (ROOT / script).read_text(encoding="utf-8")
    while words and words[0] in SWITCHES and words[0] in read_with_sources(script):
        words = words[1 + SWITCHES[words[0]] :]
    if match := re.search(r"python -m (eval\.evaluate) (\w+) \"\$@\"", text):
        return parse_errors(match[1], [match[2], *words])
    if name == "soak.sh":
        return parse_errors("scripts/soak.py", words)
    if name == "gpu_check.sh":
        return parse_errors("scripts.gpu", words)
    if script.startswith("scripts/slurm/"):
        return unknown_flags(f"dama {Path(script).stem}", words)
    if name.startswith(("dama_", "synthalign_")) or script.startswith("scripts/v1_5/"):
        return training_errors(words)
    if name == "test.sh":
        return []
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    return [f"{script} {flag}: no such flag" for flag in flags if flag not in text]


def read_with_sources(script: str) -> str:
    """Text of a shell script and of those beside it, one of which it may source."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / script).parent.glob("*.sh")))


def training_errors(words: Sequence[str]) -> list[str]:
    """Errors of flags of train_mem.py."""
    if set(words) & {"--help", "--help_all", "-h"}:
        return []
    translated, _ = translate_flags(words)
    try:
        reject_unknown_flags(translated, training_parser())
    except ValueError as error:
        return [str(error)]
    errors = parsing_errors(lambda: training_parser().parse_known_args(translated))
    return [] if open_values(words) else errors


@functools.cache
def training_parser() -> argparse.ArgumentParser:
    """The parser of train_mem.py, from the table that answers its --help."""
    table = json.loads((ROOT / "llava/flags.json").read_text(encoding="utf-8"))
    return rebuild(table[flag_tables.TRAINING]["parser"])


def parse_errors(name: str, words: Sequence[str]) -> list[str]:
    """Errors that the parser of a module, a script or a command finds in its words."""
    if re.fullmatch(r"llava[./]train[./]train(_mem|_dpo)?(\.py)?", name):
        return training_errors(words)
    if name == "dama":
        return dama_errors(list(words))
    if not words and name.startswith("scripts"):  # imports of seconds, and nothing to parse
        return []
    parser = parser_named(name)
    if parser is None:
        return []
    errors = parsing_errors(lambda: parser.parse_args(list(words)))
    if errors and open_values(words):
        return [f"{name} {flag}: no such flag" for flag in given_flags(words) if normal(flag) not in flags_in(parser)]
    return errors


def dama_errors(words: list[str]) -> list[str]:
    """Errors of a `python -m dama` command; training and the doctor take the flags of training too."""
    found: list[argparse.Namespace] = []
    words = cli._joined(words)
    name = next((word for word in words if word in cli.COMMANDS), "")
    parser = cli.build_parser(name)

    def parse() -> None:
        args, rest = parser.parse_known_args(words)
        args.rest = rest
        found.append(args)
        if rest and not cli.COMMANDS[args.command].passes_on:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")

    errors = parsing_errors(parse)
    if errors and open_values(words):
        return unknown_flags(f"dama {name}", words)
    if errors or not found or not found[0].rest:
        return errors
    rest = found[0].rest
    return training_errors(training_flags(rest) if name == "train" else rest)


def unknown_flags(name: str, words: Sequence[str]) -> list[str]:
    """Flags that a `dama` command does not have, whatever their values."""
    known = flags_in(cli.build_parser(name.removeprefix("dama ")))
    return [f"{name} {flag}: no such flag" for flag in given_flags(words) if normal(flag) not in known]


def parsing_errors(parse: Callable[[], object]) -> list[str]:
    """The error that argparse prints before it exits; none where it exits after its help."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            parse()
    except SystemExit as end:
        return stderr.getvalue().strip().splitlines()[-1:] if end.code else []
    return []


def given_flags(words: Sequence[str]) -> list[str]:
    """Long flags among the words, without their values."""
    return [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]


def normal(flag: str) -> str:
    """A flag in one of its two spellings."""
    return "--" + flag[2:].replace("-", "_")


def flags_in(parser: argparse.ArgumentParser) -> set[str]:
    """Long flags of a parser and of its subcommands."""
    found = {normal(flag) for flag in parser._option_string_actions if flag.startswith("--")}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found |= flags_in(inner)
    return found


def open_values(words: Sequence[str]) -> bool:
    """Whether some value is known to the shell only."""
    return any("$" in word or "`" in word for word in words)


@functools.cache
def parser_named(name: str) -> argparse.ArgumentParser | None:
    """The parser of a module or of a Python script; None where it has none."""
    if name in flag_tables.MODULES:
        table = json.loads((ROOT / name.split(".")[0] / "flags.json").read_text(encoding="utf-8"))
        return rebuild(table[name]["parser"])
    path = list(sys.path)
    try:
        if not name.endswith(".py"):
            return flag_tables.parser_of(name)
        sys.path.insert(0, str((ROOT / name).parent))
        with flag_tables.captured_parsers():
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except flag_tables.Captured as captured:
        return captured.parser
    except ValueError:
        return None
    finally:
        sys.path[:] = path
    return None


def extra_errors(command: Command) -> list[str]:
    """Extras of this package that an installation names and that it does not have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [
        extra.strip()
        for word in command.words
        for extras in re.findall(r"(?:^\.|dama-mllm)\[([^\]]+)\]", word)
        for extra in extras.split(",")
    ]
    return [f"extra {name}: not declared" for name in named if name not in project["optional-dependencies"]]


@functools.cache
def is_read(name: str) -> bool:
    """Whether a variable in front of a command is one of a library, or is read by a script or module here."""
    return name in VARIABLES or re.search(rf"\b{name}\b", source_text()) is not None


@functools.cache
def source_text() -> str:
    """Text of all scripts and modules."""
    files = [path for folder in OWN if folder != "tests" for path in sorted((ROOT / folder).rglob("*"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".sh"))


def syntax_error(block: Block) -> str:
    """The error that `bash -n` prints for a block; an empty string for none."""
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    return f"{block.page}:{block.line}: {done.stderr.strip()}" if done.returncode or done.stderr else ""


def main() -> int:
    """Print every command with what is wrong with it; 1 where something is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the commands without checking them")
    args, status = parser.parse_args(), 0
    for block in bash_blocks():
        if error := syntax_error(block):
            status = 1
            log(error)
    for command in commands():
        errors = [] if args.list else errors_of(command)
        status = max(status, int(bool(errors)))
        log(f"{command.page}:{command.line}: {command.text}")
        for error in errors:
            log(f"    {error}")
    return status


if __name__ == "__main__":
    sys.exit(main())
