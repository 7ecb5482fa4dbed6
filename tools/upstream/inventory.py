"""Inventory of a checkout by syntax tree: files, names, signatures, flags, config fields. Nothing is imported."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

CONFIG_FIELDS = "config.json"
"""Stands in for a file: the fields that LLaVA adds to the language model's configuration."""

FOLDERS = ("llava", "scripts")
"""What commands and imports of LLaVA's users reach; documents, pictures and packaging are not compared."""

Kind = Literal["function", "class", "property", "constant", "field", "flag", "config field", "content", "unknown"]


@dataclass(frozen=True)
class Parameter:
    """`kind`: positional (a name will do as well), keyword (by name only), * or **. `default`: source text."""

    name: str
    kind: Literal["positional", "keyword", "*", "**"]
    default: str | None = None


@dataclass(frozen=True)
class Item:
    """A public name. `settings`: what a flag, field or constant is set to, as source text; unknown ones are absent."""

    kind: Kind
    parameters: tuple[Parameter, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    imported: bool = False


Names = dict[str, Item]
Inventory = dict[str, Names]
"""File, relative to the checkout's root -> name -> what it is."""


class UpstreamError(ValueError):
    """A checkout or inventory that cannot be read."""


class Sources:
    """The files under a root, parsed when they are needed; finds what a name means through imports."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._trees: dict[Path, ast.Module] = {}
        self._bindings: dict[Path, dict[str, ast.AST]] = {}

    def tree(self, path: Path) -> ast.Module:
        """Parse a file once."""
        if path not in self._trees:
            try:
                self._trees[path] = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError) as error:
                raise UpstreamError(f"{path}: expected Python that can be parsed, got: {error}") from error
        return self._trees[path]

    def module(self, importer: Path, name: str | None, level: int = 0) -> Path | None:
        """The file of `from <dots><name> import`; None when it is not under the root."""
        start = importer.parents[level - 1] if level else self.root
        base = start.joinpath(*(name or "").split("."))
        candidates = (base.with_name(base.name + ".py") if name else base / "__init__.py", base / "__init__.py")
        return next((path for path in candidates if path.is_file()), None)

    def bindings(self, path: Path) -> dict[str, ast.AST]:
        """Public names that can be imported from a file -> the statement (or alias) that binds them."""
        if path in self._bindings:
            return self._bindings[path]
        found = self._bindings[path] = {}  # known from here on: files may import * from each other
        for node in _statements(self.tree(path).body):
            names = _bound(node)
            if isinstance(node, ast.ImportFrom) and names == ["*"]:
                source = self.module(path, node.module, node.level)
                names = list(self.bindings(source)) if source else []
            found |= {name: node for name in names if not name.startswith("_")}
        return found

    def find(self, path: Path, name: str, depth: int = 0) -> tuple[Path, ast.AST] | None:
        """Where a name is defined and by which statement, through re-exports; None when outside the root."""
        node = self.bindings(path).get(name)
        if not isinstance(node, ast.ImportFrom):
            return (path, node) if node else None
        source = self.module(path, node.module, node.level)
        original = next((alias.name for alias in node.names if (alias.asname or alias.name) == name), name)
        return self.find(source, original, depth + 1) if source and depth < 10 else None

    def value(self, path: Path, node: ast.expr | None) -> str | None:
        """A value as source text; the name of a constant is looked up."""
        if isinstance(node, ast.Name) and (found := self.find(path, node.id)):
            statement = found[1]
            node = statement.value if isinstance(statement, (ast.Assign, ast.AnnAssign)) else node
        return source_text(node)


def source_text(node: ast.expr | None) -> str | None:
    """An expression as written, but for quotes and spaces; a tuple is written as a list."""
    if node is None:
        return None
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
    return repr(list(value) if isinstance(value, tuple) else value)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import, those under try, with, for and if included; not those of a script's main."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and re.search("__name__|TYPE_CHECKING", ast.unparse(node.test)):
            continue
        if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":  # lazy re-exports
            yield from (inner for inner in ast.walk(node) if isinstance(inner, ast.ImportFrom))
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.For)):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _bound(node: ast.AST) -> list[str]:
    """Names that one statement binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def inventory_of(root: str | Path) -> Inventory:
    """What the files of llava/ and scripts/ under `root` offer: names, signatures, flags, defaults, config fields.

    Raises:
        UpstreamError: `root` has no llava/ with Python files, or one of them cannot be parsed.
    """
    sources = Sources(root)
    if not any((sources.root / "llava").glob("*.py")):
        raise UpstreamError(f"'{root}': expected the root of a LLaVA checkout, with a folder llava/ of Python files")
    inventory: Inventory = {CONFIG_FIELDS: {}}
    for path in sorted(path for folder in FOLDERS for path in (sources.root / folder).rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        if "__pycache__" in name or any(part.startswith(".") for part in name.split("/")):
            continue
        if path.suffix == ".py":
            inventory[name] = names_of(sources, path)
            inventory[CONFIG_FIELDS] |= {key: Item("config field") for key in config_fields(sources.tree(path))}
        else:
            inventory[name] = {"content": Item("content", settings={"sha256": sha256(path.read_bytes()).hexdigest()})}
    return inventory


def names_of(sources: Sources, path: Path) -> Names:
    """Functions, classes with their members, constants, and the flags of the file's command line."""
    names: Names = {}
    for name, node in sources.bindings(path).items():
        imported = isinstance(node, (ast.Import, ast.ImportFrom))
        found = sources.find(path, name) if imported else (path, node)
        names |= described(sources, name, *found, imported) if found else {name: Item("unknown", imported=True)}
    return names | {flag: item for flag, item in flags_of(sources, path)}


def described(sources: Sources, name: str, path: Path, node: ast.AST, imported: bool = False) -> Names:
    """A definition as items: itself and, of a class, its public members and those it inherits from this checkout."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return {name: Item("function", parameters_of(node.args), imported=imported)}
    if isinstance(node, ast.ClassDef):
        members = members_of(sources, path, node, imported)
        return {name: Item("class", imported=imported)} | {f"{name}.{key}": item for key, item in members.items()}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {name: Item("unknown", imported=True)}
    value = sources.value(path, node.value) if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    settings = {"value": value} if value and _is_literal(value) else {}
    return {name: Item("constant", settings=settings, imported=imported)}


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except ValueError:
        return False
    return True


def parameters_of(arguments: ast.arguments) -> tuple[Parameter, ...]:
    """List the parameters of a signature."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    found = [Parameter(a.arg, "positional", source_text(d)) for a, d in zip(positional, defaults)]
    found += [Parameter(arguments.vararg.arg, "*")] if arguments.vararg else []
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
        found.append(Parameter(argument.arg, "keyword", source_text(default)))
    return (*found, *([Parameter(arguments.kwarg.arg, "**")] if arguments.kwarg else []))


def members_of(sources: Sources, path: Path, node: ast.ClassDef, imported: bool = False) -> Names:
    """Describe the public members of a class, with those inherited from classes of the same checkout."""
    members: Names = {}
    for base in reversed(node.bases):
        where, parent = (sources.find(path, base.id) if isinstance(base, ast.Name) else None) or (path, None)
        if isinstance(parent, ast.ClassDef) and parent is not node:
            members |= members_of(sources, where, parent, imported=True)
    for part in ast.walk(node):  # attributes that methods set; the class's own statements override them below
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and ast.unparse(part.value) == "self":
            members.setdefault(part.attr, Item("unknown", imported=True))
    for statement in node.body:
        members |= _member(sources, path, statement, imported)
    return {name: item for name, item in members.items() if not name.startswith("_") or _is_special(name)}


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _member(sources: Sources, path: Path, node: ast.stmt, imported: bool) -> Names:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        if any(ast.unparse(d).endswith("property") for d in node.decorator_list):
            return {node.name: Item("property", imported=imported)}
        return {node.name: Item("function", parameters_of(node.args), imported=imported)}
    value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    settings = {}
    if isinstance(node, ast.AnnAssign):
        settings = field_settings(ast.unparse(node.annotation), field_default(sources, path, value))
    elif value is not None and _is_literal(literal := sources.value(path, value) or ""):
        settings = {"default": literal}
    return {name: Item("field", settings=settings, imported=imported) for name in _bound(node)}


def field_settings(annotation: str, default: str | None) -> dict[str, str]:
    """Default of a dataclass field, and its type where that says how a flag is read; str | None is read as str."""
    plain = re.sub(r"^Optional\[(.*)\]$", r"\1", annotation.removeprefix("typing.")).removesuffix(" | None")
    scalar = {"type": plain} if plain in ("str", "int", "float", "bool") else {}
    return scalar | ({"default": default} if default is not None else {})


def field_default(sources: Sources, path: Path, value: ast.expr | None) -> str | None:
    """The default of a dataclass field, also where `field(...)` or a helper that returns one wraps it."""
    if not isinstance(value, ast.Call):
        return sources.value(path, value)
    given = {word.arg: word.value for word in value.keywords}
    if ast.unparse(value.func) in ("field", "dataclasses.field"):
        if "default_factory" in given:
            return f"{ast.unparse(given['default_factory'])}()"
        return sources.value(path, given.get("default"))
    helper = sources.find(path, ast.unparse(value.func))
    if helper and isinstance(helper[1], ast.FunctionDef):
        given |= dict(zip((argument.arg for argument in helper[1].args.args), value.args))
        return sources.value(path, given.get("default"))
    return ast.unparse(value)


# A flag's settings; its help, metavar and dest are free.
_FLAG_SETTINGS = ("default", "type", "action", "nargs", "choices", "required", "const")
# What argparse takes when they are not given.
_FLAG_DEFAULTS = {"default": "None", "type": "str", "required": "False", "action": "'store'"}


def flags_of(sources: Sources, path: Path) -> Iterator[tuple[str, Item]]:
    """The flags of every add_argument call of a file, and of functions that it imports and calls."""
    for owner, call, given in _flag_calls(sources, path, sources.tree(path), {}, set()):
        flags = [word.value for word in call.args if isinstance(word, ast.Constant) and str(word.value).startswith("-")]
        words = {word.arg: given.get(ast.unparse(word.value), word.value) for word in call.keywords}
        settings = _flag_settings({name: sources.value(owner, value) for name, value in words.items()})
        yield from ((str(flag), Item("flag", settings=settings)) for flag in flags)


def _flag_settings(texts: Mapping[str | None, str | None]) -> dict[str, str]:
    known = {name: texts.get(name) for name in _FLAG_SETTINGS}
    return {name: text for name, text in known.items() if text and text != _FLAG_DEFAULTS.get(name)}


Given = dict[str | None, ast.expr]


def _flag_calls(
    sources: Sources, path: Path, node: ast.AST, given: Given, seen: set[tuple[Path, str]]
) -> Iterator[tuple[Path, ast.Call, Given]]:
    """Call of add_argument below `node`, and what the parameters of the function around them were given."""
    for call in ast.walk(node):
        if not isinstance(call, ast.Call):
            continue
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            yield path, call, given
        elif isinstance(call.func, ast.Name) and (found := sources.find(path, call.func.id)):
            where, function = found
            if isinstance(function, ast.FunctionDef) and (where, function.name) not in seen:
                seen.add((where, function.name))
                passed: Given = dict(zip((argument.arg for argument in function.args.args), call.args))
                passed |= {word.arg: word.value for word in call.keywords}
                yield from _flag_calls(sources, where, function, passed, seen)


# LLaVA's own fields of config.json, told from LLaMA's by their names.
_CONFIG_FIELD = re.compile(r"(\w*mm_\w+|image_(aspect|grid|crop)\w+|tokenizer_\w+|s2_\w+)")
_CONFIG_OBJECT = re.compile(r"(.*\.)?(config|cfg|model_cfg|vision_tower_cfg|model_config)")


def config_fields(tree: ast.AST) -> set[str]:
    """Fields that are read from, written to or asked of a model's config."""
    found: set[Any] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _CONFIG_OBJECT.fullmatch(ast.unparse(node.value)):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and len(node.args) > 1 and _CONFIG_OBJECT.fullmatch(ast.unparse(node.args[0])):
            found |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
        elif isinstance(node, ast.FunctionDef) and re.search(r"setattr\([\w.]*config, [a-z]", ast.unparse(node)):
            # Fields written in a loop stand in the function as strings.
            found |= {word.value for word in ast.walk(node) if isinstance(word, ast.Constant)}
    return {name for name in found if isinstance(name, str) and _CONFIG_FIELD.fullmatch(name)}


def load_inventory(path: str | Path) -> Inventory:
    """An inventory kept as JSON (`upstream_llava` and `upstream_scripts_argparse`), for where there is no checkout."""
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    llava = record["upstream_llava"]
    flags = llava["argparse_flags"] | record["upstream_scripts_argparse"]
    inventory: Inventory = {CONFIG_FIELDS: {}}
    for file in [*llava["modules"], *record["upstream_scripts_argparse"]]:
        module = llava["modules"].get(file, {"classes": {}, "functions": {}, "constants": []})
        names = {name: _recorded_function(entry) for name, entry in module["functions"].items()}
        for name, entry in module["classes"].items():
            fields = llava["dataclass_fields"].get(file, {}).get(name, {"fields": []})["fields"]
            names |= _recorded_class(name, entry, fields)
        for name in module["constants"]:
            if name in ("parser", "args"):  # from here on they are variables of the file's main
                break
            names[name] = Item("constant")
        for entry in flags.get(file, []):
            settings = _flag_settings({key: _normal(text) for key, text in entry.items() if key != "flags"})
            names |= {flag: Item("flag", settings=settings) for flag in entry["flags"]}
        inventory[file] = names
    return inventory


def _normal(text: str) -> str:
    """Recorded source text, written as `source_text` writes it."""
    return source_text(ast.parse(text, mode="eval").body) or ""


def _recorded_function(entry: Mapping[str, Any]) -> Item:
    if "property" in entry["decorators"]:
        return Item("property")
    tree = ast.parse(f"def f{entry['signature']}: ...").body[0]
    assert isinstance(tree, ast.FunctionDef)
    return Item("function", parameters_of(tree.args))


def _recorded_class(name: str, entry: Mapping[str, Any], fields: list[dict[str, str | None]]) -> Names:
    members = {key: _recorded_function(method) for key, method in entry["methods"].items()}
    members |= {attribute: Item("field") for attribute in entry["class_attrs"]}
    for record in fields:
        default = None if record["default"] is None else _normal(record["default"])
        members[str(record["field"])] = Item("field", settings=field_settings(str(record["type"]), default))
    public = {key: item for key, item in members.items() if not key.startswith("_") or _is_special(key)}
    return {name: Item("class")} | {f"{name}.{key}": item for key, item in public.items()}
