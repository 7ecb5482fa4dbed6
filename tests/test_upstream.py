"""The comparison with LLaVA: against the recorded inventory, and on small checkouts that the tests write."""

import ast
import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tools.upstream.__main__ import main
from tools.upstream.comparison import Finding, compare, reason_for
from tools.upstream.inventory import (
    CONFIG_FIELDS,
    Item,
    UpstreamError,
    config_fields,
    inventory_of,
    load_inventory,
    parameters_of,
)
from tools.upstream.reasons import CHANGED, LEFT_OUT
from tools.upstream.report import left_out_page, report_lines, summary, write_page

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def ours():
    return inventory_of(ROOT)


@pytest.fixture(scope="module")
def findings(ours, golden):
    return compare(load_inventory(golden / "api_inventory.json"), ours)


def checkout(folder: Path, **files: str) -> Path:
    """A checkout with llava/<name>.py for each keyword; __init__ is there in any case."""
    (folder / "llava").mkdir(parents=True)
    for name, text in ({"__init__": ""} | files).items():
        (folder / "llava" / f"{name}.py").write_text(text)
    return folder


def states(theirs: Path, ours: Path, file: str = "llava/a.py") -> dict[str, tuple[str, str]]:
    found = compare(inventory_of(theirs), inventory_of(ours))
    return {finding.name: (finding.state, finding.how) for finding in found if finding.file == file and finding.name}


# ------------------------------------------------------------------------------------------------ this repository


def test_nothing_of_llava_is_missing_without_a_reason(findings):
    assert [f"{f.file} {f.name}" for f in findings if f.state == "missing"] == []


def test_every_change_that_can_break_a_call_has_a_reason(findings):
    bare = [f"{f.file} {f.name}: {f.how}" for f in findings if f.name and f.state == "changed" and not f.reason]
    assert bare == []


def test_every_file_and_name_of_the_record_is_accounted_for(findings, golden):
    """Names of files that are absent as a whole, and members of classes that are, are not listed one by one."""
    theirs = load_inventory(golden / "api_inventory.json")
    assert {finding.file for finding in findings} >= set(theirs)
    listed = {(finding.file, finding.name) for finding in findings}
    for file, names in theirs.items():
        present = any(f.file == file and not f.name and f.state not in ("left out", "missing") for f in findings)
        for name in names:
            absent_class = (file, name.split(".")[0]) in listed and reason_for(LEFT_OUT, file, name.split(".")[0])
            trivial = name.endswith(".__init__")
            assert not present or (file, name) in listed or absent_class or trivial, (file, name)


def test_the_heart_of_llava_is_the_same(findings):
    whole = {finding.file: finding.state for finding in findings if not finding.name}
    for file in ("constants.py", "conversation.py", "mm_utils.py", "model/builder.py"):
        assert whole[f"llava/{file}"] == "same"


def test_no_reason_excuses_what_is_there(ours):
    for pattern in LEFT_OUT:
        subjects = [f"{file}:{name}" for file, names in ours.items() for name in names] if ":" in pattern else ours
        assert [subject for subject in subjects if fnmatchcase(subject, pattern)] == [], pattern


def test_every_reason_for_a_change_explains_one(findings):
    changed = [f"{finding.file}:{finding.name}" for finding in findings if finding.state == "changed"]
    assert [pattern for pattern in CHANGED if not any(fnmatchcase(name, pattern) for name in changed)] == []


def test_fields_of_a_llava_checkpoint_are_known(ours, golden):
    """config.json as LLaVA wrote it: each of its own fields is read or written here, or has its reason."""
    fields = json.loads((golden / "llava-v1.5-tiny/config.json").read_text())
    own = {name for name in fields if "mm_" in name or name.startswith("image_")}
    assert len(own) == 15
    found = compare({CONFIG_FIELDS: {name: Item("config field") for name in own}}, {CONFIG_FIELDS: ours[CONFIG_FIELDS]})
    assert [finding.name for finding in found if finding.state == "missing"] == []
    assert {f.name for f in found if f.state == "left out"} == {
        "mm_resampler_type", "freeze_mm_vision_resampler", "tune_mm_vision_resampler",
    }  # fmt: skip


def test_the_document_is_current():
    """Remedy: python -m tools.upstream --left-out > docs/left_out.md."""
    assert (ROOT / "docs/left_out.md").read_text(encoding="utf-8") == left_out_page()


def written_from(record: dict, folder: Path) -> Path:
    """A checkout with the names, signatures, fields and flags of the record and nothing in its functions."""
    llava, scripts = record["upstream_llava"], record["upstream_scripts_argparse"]
    flags = llava["argparse_flags"] | scripts
    for file in [*llava["modules"], *scripts]:
        module = llava["modules"].get(file, {"constants": [], "functions": {}, "classes": {}})
        own = module["constants"]
        own = own[: min((own.index(name) for name in ("parser", "args") if name in own), default=len(own))]
        lines = [f"{name} = object()" for name in own]
        lines += [f"def {name}{entry['signature']}: ..." for name, entry in module["functions"].items()]
        for name, entry in module["classes"].items():
            lines += [f"class {name}({', '.join(entry['bases'])}):", "    ..."]
            fields = llava["dataclass_fields"].get(file, {}).get(name, {"fields": []})["fields"]
            lines += [f"    {f['field']}: {f['type']}" + f" = {f['default']}" * bool(f["default"]) for f in fields]
            known = {f["field"] for f in fields}
            lines += [f"    {attribute} = object()" for attribute in entry["class_attrs"] if attribute not in known]
            for method, told in entry["methods"].items():
                lines += [f"    @{decorator}" for decorator in told["decorators"]]
                lines += [f"    def {method}{told['signature']}: ..."]
        lines += ["if __name__ == '__main__':", "    args = 1"]
        for flag in flags.get(file, []):
            settings = [f"{key}={text}" for key, text in flag.items() if key != "flags"]
            lines += [f"    parser.add_argument({', '.join([*map(repr, flag['flags']), *settings])})"]
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("\n".join(lines) + "\n")
    return folder


def test_a_checkout_and_its_record_say_the_same(tmp_path, golden, findings, ours):
    """The record is LLaVA's own. A checkout written from it has to compare as the record does, name by name."""
    record = load_inventory(golden / "api_inventory.json")
    read = inventory_of(written_from(json.loads((golden / "api_inventory.json").read_text()), tmp_path))
    both = compare(record, read) + compare(read, record)
    assert [finding for finding in both if finding.state != "same"] == []
    assert len([finding for finding in both if finding.name]) > 800
    assert set(compare(read, ours)) == set(findings)


# --------------------------------------------------------------------------------------------------- the rules


def signature(text: str) -> ast.arguments:
    [function] = ast.parse(f"def f({text}): ...").body
    assert isinstance(function, ast.FunctionDef)
    return function.args


@pytest.mark.parametrize(
    ("theirs", "ours", "state", "how"),
    [
        ("a, b=1", "a: int, b: int = 1", "same", ""),
        ("a, b='x'", 'a, b="x"', "same", ""),
        ("a", "a, *, b=1", "same", ""),
        ("a", "a, *args, **kwargs", "same", ""),
        ("a", "a, b=1", "changed (compatible)", "b = 1 is new"),
        ("a", "a=None", "changed (compatible)", "a = required -> None"),
        ("a", "a, b", "changed", "needs b"),
        ("a", "a, *, b", "changed", "needs b"),
        ("a, b", "b, a", "changed", "a in place 1, was in place 0; b in place 0, was in place 1"),
        ("a, b=1", "a, *, b=1", "changed", "b by keyword only, was in place 1"),
        ("a, b=1", "a, b=2", "changed", "b = 1 -> 2"),
        ("a, b=1", "a, b", "changed", "b = 1 -> required"),
        ("a, b", "a", "changed", "no parameter b"),
        ("a, **kwargs", "a", "changed", "no **kwargs"),
    ],
)
def test_signatures(tmp_path, theirs, ours, state, how):
    before = checkout(tmp_path / "theirs", a=f"def f({theirs}): ...")
    after = checkout(tmp_path / "ours", a=f"def f({ours}): ...")
    assert states(before, after) == {"f": (state, how)}


def test_parameters_carry_kind_and_default():
    found = [(p.name, p.kind, p.default) for p in parameters_of(signature("a, b=(1, 2), *c, d, e=None, **f"))]
    assert found == [
        ("a", "positional", None),
        ("b", "positional", "[1, 2]"),
        ("c", "*", None),
        ("d", "keyword", None),
        ("e", "keyword", "None"),
        ("f", "**", None),
    ]


def test_a_name_that_moved_and_is_imported_back_is_there(tmp_path):
    source = "def f(x): ...\nclass C:\n    def m(self): ...\n"
    theirs = checkout(tmp_path / "theirs", a=source)
    direct = checkout(tmp_path / "direct", b=source, a="from llava.b import f, C\n")
    again = checkout(tmp_path / "again", c=source, b="from .c import *\n", a="from llava.b import f as f, C\n")
    lazy = checkout(tmp_path / "lazy", b=source, a="def __getattr__(name):\n    from llava.b import f, C\n")
    guarded = checkout(tmp_path / "guarded", b=source, a="try:\n    from llava.b import f, C\nexcept ImportError: 0\n")
    for ours in (direct, again, lazy, guarded):
        assert states(theirs, ours) == {name: ("same", "") for name in ("f", "C", "C.m")}
    changed = checkout(tmp_path / "changed", b=source.replace("x", ""), a="from llava.b import f, C\n")
    assert states(theirs, changed)["f"] == ("changed", "no parameter x")


def test_what_cannot_be_imported_is_no_name(tmp_path):
    text = "from typing import Any\nimport os\nLIMIT = 3\n_hidden = 1\nif __name__ == '__main__':\n    args = 1\n"
    assert set(inventory_of(checkout(tmp_path, a=text))["llava/a.py"]) == {"Any", "os", "LIMIT"}
    empty = checkout(tmp_path / "empty", a="")
    assert states(tmp_path, empty) == {"LIMIT": ("missing", "")}


def test_classes_by_member(tmp_path):
    theirs = """
class Gone:
    def m(self): ...
class Kept(object):
    kind = "llava"
    def __init__(self): ...
    def inherited(self, x): ...
    @property
    def size(self): ...
    @property
    def width(self): ...
    def _private(self): ...
    def lost(self): ...
"""
    ours = """
class Base:
    def inherited(self, x): ...
class Kept(Base):
    kind = "llama"
    def start(self):
        self.size = 1
    def width(self): ...
"""
    found = states(checkout(tmp_path / "theirs", a=theirs), checkout(tmp_path / "ours", a=ours))
    assert found == {
        "Gone": ("missing", ""),
        "Kept": ("same", ""),
        "Kept.kind": ("changed", "default 'llava' -> 'llama'"),
        "Kept.inherited": ("same", ""),
        "Kept.size": ("same", ""),
        "Kept.width": ("changed", "property -> function"),
        "Kept.lost": ("missing", ""),
        "Kept.start": ("added", ""),
        "Base": ("added", ""),
    }


def test_dataclass_fields_are_flags_with_type_and_default(tmp_path):
    theirs = """
@dataclass
class A:
    name: Optional[str] = field(default="x", metadata={"help": "h"})
    items: List[int] = field(default_factory=list)
    rate: float = 0.1
    bits: int = 16
"""
    ours = """
def described(default, text):
    return field(default=default, metadata={"help": text})
@dataclass
class A:
    name: str | None = described("x", "help")
    items: list[int] = field(default_factory=list)
    rate: float = described(0.2, "help")
    bits: str = "16"
"""
    found = states(checkout(tmp_path / "theirs", a=theirs), checkout(tmp_path / "ours", a=ours))
    assert found["A.name"] == found["A.items"] == ("same", "")
    assert found["A.rate"] == ("changed", "default 0.1 -> 0.2")
    assert found["A.bits"] == ("changed", "type int -> str; default 16 -> '16'")


def test_flags_also_where_an_imported_function_adds_them(tmp_path):
    theirs = """
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-q", "--question", type=str, default=None)
    parser.add_argument("--mode", choices=["once", "reload"], default="once")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=128)
"""
    ours = """
from llava.b import add_flags
def main():
    add_flags(argparse.ArgumentParser(), 128)
"""
    shared = """
MODES = ("once", "reload")
def add_flags(parser, tokens):
    parser.add_argument("--max_new_tokens", type=int, default=tokens)
    parser.add_argument("-q", "--question", help="what is asked")
    parser.add_argument("--mode", choices=MODES, default="once")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--chunks", type=int, required=True)
"""
    found = states(checkout(tmp_path / "theirs", a=theirs), checkout(tmp_path / "ours", a=ours, b=shared))
    assert {found[flag] for flag in ("-q", "--question", "--mode", "--max_new_tokens")} == {("same", "")}
    assert found["--top_p"] == ("missing", "") and found["--top-p"] == ("added", "")
    assert found["--chunks"] == ("changed", "default 1 -> not set; required not set -> True")


def test_config_fields():
    """What is read, written or asked for counts; so does what a loop writes. LLaMA's own fields do not."""
    text = """
def g(config, model_cfg, other):
    width = config.mm_hidden_size + config.hidden_size + other.mm_other
    self.config.use_mm_proj = True
    getattr(model_cfg, "image_aspect_ratio", None)
    for name in ("mm_projector_type", "word"):
        setattr(config, name, 1)
"""
    assert config_fields(ast.parse(text)) == {
        "mm_hidden_size", "use_mm_proj", "image_aspect_ratio", "mm_projector_type",
    }  # fmt: skip


def test_reasons_by_pattern():
    table = {"llava/old*.py": "old", "llava/a.py:Old*": "old class", "*:--path": "a flag"}
    assert reason_for(table, "llava/old_one.py", "") == "old"
    assert reason_for(table, "llava/old_one.py", "f") == ""  # a file's reason excuses no name in it
    assert reason_for(table, "llava/a.py", "OldModel") == "old class"
    assert reason_for(table, "llava/b.py", "--path") == "a flag"


def test_files_of_both_sides(tmp_path):
    theirs = checkout(tmp_path / "theirs", eval_pope="", lost="", kept="x = 1")
    ours = checkout(tmp_path / "ours", kept="x = 1", new="")
    for root, text in ((theirs, "{}"), (ours, '{"a": 1}')):
        (root / "scripts").mkdir()
        (root / "scripts/zero2.json").write_text(text)
    (theirs / "llava/serve").mkdir()
    (theirs / "llava/serve/controller.py").write_text("")
    found = {f.file: (f.state, bool(f.reason)) for f in compare(inventory_of(theirs), inventory_of(ours)) if not f.name}
    assert found == {
        "config.json": ("same", False),
        "llava/__init__.py": ("same", False),
        "llava/eval_pope.py": ("missing", False),
        "llava/kept.py": ("same", False),
        "llava/lost.py": ("missing", False),
        "llava/new.py": ("added", False),
        "llava/serve/controller.py": ("left out", True),
        "scripts/zero2.json": ("changed", False),
    }


# ------------------------------------------------------------------------------------- the command and the page


def test_the_command_runs_nothing_of_the_checkout(tmp_path, capsys):
    theirs = checkout(tmp_path / "theirs", constants="IGNORE_INDEX = -100\nraise SystemExit('imported')\n")
    assert main([str(theirs)]) == 0
    out = capsys.readouterr().out
    assert "llava/constants.py" in out and "names: 1 same" in out and "IGNORE_INDEX" not in out
    assert main([str(theirs), "--all"]) == 0
    assert "same                  IGNORE_INDEX" in capsys.readouterr().out


def test_a_missing_name_is_an_error(tmp_path, capsys):
    theirs = checkout(tmp_path / "theirs", constants="UNHEARD_OF = '<image>'\nIGNORE_INDEX = -1\n", unknown="")
    assert main([str(theirs), "--html", str(tmp_path / "page.html")]) == 1
    shown = capsys.readouterr()
    assert "changed               IGNORE_INDEX: value -1 -> -100" in shown.out
    assert "missing without a reason (2):\n  llava/constants.py  UNHEARD_OF\n  llava/unknown.py" in shown.err
    assert "UNHEARD_OF" in (tmp_path / "page.html").read_text()


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "expected the root of a LLaVA checkout" in capsys.readouterr().err
    with pytest.raises(UpstreamError, match=r"a\.py: expected Python that can be parsed"):
        inventory_of(checkout(tmp_path / "broken", a="def ("))


def test_the_page_is_self_contained_and_escapes(tmp_path, findings):
    more = Finding("llava/conversation.py", "tag", "changed", "default '<b>' -> '<i>'", "because")
    write_page([*findings, more], tmp_path / "page.html", "a <checkout>")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page and "<b>" not in page and "a &lt;checkout&gt;" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page and "src=" not in page
    for finding in findings:
        assert finding.file in page and finding.name in page


def test_summary_counts(tmp_path):
    found = [
        Finding("a", "", "changed"), Finding("a", "x", "same"), Finding("a", "y", "same"), Finding("b", "", "left out"),
    ]  # fmt: skip
    assert summary(found) == ["files: 1 changed, 1 left out", "names: 2 same"]
    assert report_lines(found)[:2] == [f"{'a':<50} changed", f"{'b':<50} left out"]
