"""Three floors and one-way imports: dama below, llava above it, eval on top; nobody imports playground or scripts."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for top in ("dama", "llava", "eval", "playground")
    for path in (ROOT / top).rglob("*.py")
)
FORBIDDEN = {
    "dama": ("llava", "eval", "playground"),
    "llava": ("eval", "playground"),
    "eval": ("llava.train", "playground"),
    "playground": (),
}
TORCH_ONLY = ("dama/losses.py", "dama/weighting.py", "dama/logps.py")
ALLOWED_BESIDE_TORCH = {"torch", "dama", "__future__", "math", "enum", "typing", "collections", "dataclasses"}


def imports(source: str) -> set[str]:
    """Modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / source).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def reaches(found: set[str], forbidden: tuple[str, ...]) -> set[str]:
    return {name for name in found for top in forbidden if name == top or name.startswith(top + ".")}


@pytest.mark.parametrize("source", MODULES)
def test_imports_go_one_way(source):
    forbidden = FORBIDDEN[source.split("/")[0]]
    assert not reaches(imports(source), forbidden)


@pytest.mark.parametrize("source", TORCH_ONLY)
def test_the_mathematics_needs_torch_alone(source):
    assert {name.split(".")[0] for name in imports(source)} <= ALLOWED_BESIDE_TORCH


@pytest.mark.parametrize("source", MODULES)
def test_every_file_says_what_it_is_for(source):
    assert ast.get_docstring(ast.parse((ROOT / source).read_text())), source


def test_importing_starts_nothing():
    """No output, no process group, no CUDA context."""
    names = [m.removesuffix(".py").replace("/", ".") for m in MODULES if "__main__" not in m and "__init__" not in m]
    program = "\n".join(["import importlib, torch", f"for name in {names!r}: importlib.import_module(name)"])
    program += "\nassert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]


def test_the_templates_are_never_reassigned():
    """LLaVA reassigns conversation.default_conversation at run time; here nothing does."""
    for source in MODULES:
        for node in ast.walk(ast.parse((ROOT / source).read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                assert not (isinstance(target, ast.Attribute) and target.attr == "default_conversation"), source


def test_every_flag_says_what_it_is():
    """In --help; `**options` may bring the words."""
    scripts = [path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").rglob("*.py")]
    silent = []
    for source in MODULES + scripts:
        for node in ast.walk(ast.parse((ROOT / source).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                given = {keyword.arg for keyword in node.keywords}
                if not given & {"help", None} and "'version'" not in ast.unparse(node):
                    silent.append(f"{source}:{node.lineno}: {ast.unparse(node)}")
    assert not silent, "\n".join(silent)
