"""This repository beside a LLaVA checkout, by syntax tree: what is the same, changed, added, left out and why.

Nothing of the checkout is imported or run. LEFT_OUT is the one table of what is left out, docs/left_out.md its copy.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from dama.console import write_atomic

# ------------------------------------------------------------------------------------------------------- the reasons

_OTHER_MODELS = "LLaVA-v1.5 is built on LLaMA (Vicuna). Of models on MPT and Mistral only the templates are there."
_OTHER_TOWER = "Pictures at several scales (S2) belong to later models; LLaVA-v1.5 has one CLIP tower at one scale."
_ATTENTION = "transformers has the fast attention built in: SDPA, and FlashAttention where it is installed."
_TRANSFORMERS = "transformers' own method is inherited; `generate` has turned the pictures into embeddings before."
_SERVING = "Export the model (python -m llava.model.export --to hf) and serve it with vLLM or `transformers serve`."
_FRONT_END = "The page is written anew for one process and two models side by side; its callbacks are no interface."
_NO_CONTROLLER = "There is no controller to list models: they are named by --model-path and --compare."
_PUBLIC_DEMO = "For LLaVA's public demonstration: moderation, votes, logs of visitors, a page inside another."
_LOGGING = "Standard output is not swapped for a logger."
_OWN_DRIVERS = "Generation has one driver, llava/eval/generate.py, which model_vqa and model_vqa_loader put to work."
_OTHER_BENCHMARKS = "eval/ measures hallucination; for general benchmarks run lmms-eval or VLMEvalKit on the export."
_JUDGES = "Answers reviewed by GPT, a copy of the program for each benchmark. Benchmarks with a judge belong to eval/."
_DEMONSTRATION = "Pictures, tables and pages of LLaVA's own demonstration."
_OLD_SCRIPTS = "Commands of LLaVA before v1.5; those of v1.5 are in scripts/v1_5/."
_RESAMPLER = "A field without effect that v1.5's checkpoints carry; it is kept when such a checkpoint is saved."
_MODULE_STATE = "State of the module at run time; here it is asked for where it is needed."

LEFT_OUT: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "llava/model/language_model/llava_mpt.py",
            "llava/model/language_model/llava_mistral.py",
            "llava/model/__init__.py:LlavaM*",
            "llava/train/train.py:TrainingArguments.mpt_attn_impl",
        ),
        _OTHER_MODELS,
    ),
    "llava/model/multimodal_encoder/clip_encoder.py:CLIPVisionTowerS2": _OTHER_TOWER,
    "config.json:s2_scales": _OTHER_TOWER,
    "config.json:*_resampler*": _RESAMPLER,
    "llava/train/llama_flash_attn_monkey_patch.py": _ATTENTION,
    "llava/train/llama_xformers_attn_monkey_patch.py": _ATTENTION,
    "llava/train/train_xformers.py": _ATTENTION,
    "llava/model/language_model/llava_llama.py:LlavaLlamaForCausalLM.prepare_inputs_for_generation": _TRANSFORMERS,
    **dict.fromkeys(
        (
            "llava/serve/gradio_web_server.py:load_demo",
            "llava/serve/gradio_web_server.py:regenerate",
            "llava/serve/gradio_web_server.py:clear_history",
            "llava/serve/gradio_web_server.py:add_text",
            "llava/serve/gradio_web_server.py:http_bot",
            "llava/serve/gradio_web_server.py:*able_btn",
            "llava/serve/gradio_web_server.py:no_change_btn",
            "llava/serve/gradio_web_server.py:title_markdown",
            "llava/serve/gradio_web_server.py:block_css",
        ),
        _FRONT_END,
    ),
    **dict.fromkeys(
        (
            "llava/serve/gradio_web_server.py:get_model_list",
            "llava/serve/gradio_web_server.py:load_demo_refresh_model_list",
            "llava/serve/gradio_web_server.py:priority",
            "llava/serve/gradio_web_server.py:headers",
            "llava/serve/gradio_web_server.py:--controller-url",
            "llava/serve/gradio_web_server.py:--model-list-mode",
        ),
        _NO_CONTROLLER,
    ),
    **dict.fromkeys(
        (
            "llava/serve/gradio_web_server.py:get_conv_log_filename",
            "llava/serve/gradio_web_server.py:*vote_last_response",
            "llava/serve/gradio_web_server.py:flag_last_response",
            "llava/serve/gradio_web_server.py:logger",
            "llava/serve/gradio_web_server.py:get_window_url_params",
            "llava/serve/gradio_web_server.py:tos_markdown",
            "llava/serve/gradio_web_server.py:learn_more_markdown",
            "llava/serve/gradio_web_server.py:--moderate",
            "llava/serve/gradio_web_server.py:--embed",
        ),
        _PUBLIC_DEMO,
    ),
    **dict.fromkeys(
        (
            "llava/serve/controller.py",
            "llava/serve/model_worker.py",
            "llava/serve/sglang_worker.py",
            "llava/serve/register_worker.py",
            "llava/serve/test_message.py",
        ),
        _SERVING,
    ),
    "llava/utils.py:StreamToLogger": _LOGGING,
    "llava/utils.py:handler": _LOGGING,
    "llava/train/train.py:local_rank": _MODULE_STATE,
    "llava/train/train.py:IS_TOKENIZER_GREATER_THAN_0_14": _MODULE_STATE,
    "llava/eval/model_qa.py": _OWN_DRIVERS,
    "llava/eval/model_vqa_loader.py:CustomDataset": _OWN_DRIVERS,
    "llava/eval/model_vqa_loader.py:create_data_loader": _OWN_DRIVERS,
    "llava/eval/model_vqa_loader.py:collate_fn": _OWN_DRIVERS,
    **dict.fromkeys(
        (
            "llava/eval/model_vqa_mmbench.py",
            "llava/eval/model_vqa_science.py",
            "llava/eval/eval_science_qa*.py",
            "llava/eval/eval_textvqa.py",
            "llava/eval/m4c_evaluator.py",
            "scripts/convert_*",
            "scripts/v1_5/eval/*",
        ),
        _OTHER_BENCHMARKS,
    ),
    "llava/eval/eval_gpt_review*.py": _JUDGES,
    "llava/eval/qa_baseline_gpt35.py": _JUDGES,
    "llava/eval/summarize_gpt_review.py": _JUDGES,
    "llava/eval/generate_webpage_data_from_table.py": _DEMONSTRATION,
    "llava/eval/table/*": _DEMONSTRATION,
    "llava/eval/webpage/*": _DEMONSTRATION,
    "llava/serve/examples/*": _DEMONSTRATION,
    **dict.fromkeys(
        (
            "scripts/pretrain*.sh",
            "scripts/finetune*.sh",
            "scripts/sqa_eval_*.sh",
            "scripts/upload_pypi.sh",
        ),
        _OLD_SCRIPTS,
    ),
}
"""Pattern -> reason. A pattern is FILE or FILE:NAME with *; NAME is a name, Class.member or --flag."""

_FROM_CHECKPOINT = "Not given, it is what the checkpoint says, and only then LLaVA's default."
_V1_5 = "The value of LLaVA-v1.5's scripts."
_NAME_THE_MODEL = "There is no default model: it has to be named."
_NAME_THE_FILE = "There is no default file: it has to be named."
_ANY_DEVICE = "Not given, it is cuda where there is one, else cpu."
_THIS_MACHINE = "Reached from this machine only, unless another address is given."
_ONE_PROCESS = "One process answers, so fewer at the same time; the others wait."
_SEVERAL_FOLDERS = "It may be given more than once, so that links from one folder into another are followed."
_FUSED = "Not given, it is adamw_torch on CPUs and adamw_torch_fused on GPUs: the same steps in one kernel."
_NO_EFFECT = "Taken and without effect: rows are always tokenised when needed, and show whether they have an image."

CHANGED: Mapping[str, str] = {
    "llava/train/train.py:ModelArguments.model_name_or_path": _NAME_THE_MODEL,
    "*:--model-path": _NAME_THE_MODEL,
    "llava/eval/model_vqa*.py:--question-file": _NAME_THE_FILE,
    "llava/serve/cli.py:--device": _ANY_DEVICE,
    "llava/serve/gradio_web_server.py:build_demo": _FRONT_END,
    "llava/serve/gradio_web_server.py:--host": _THIS_MACHINE,
    "llava/serve/gradio_web_server.py:--concurrency-count": _ONE_PROCESS,
    "scripts/extract_mm_projector.py:--output": _NAME_THE_FILE,
    "llava/eval/model_vqa*.py:--image-folder": _SEVERAL_FOLDERS,
    "llava/train/train.py:TrainingArguments.optim": _FUSED,
    "llava/train/train.py:ModelArguments.version": _V1_5,
    "llava/train/train.py:ModelArguments.mm_use_im_patch_token": _V1_5,
    "llava/train/train.py:TrainingArguments.model_max_length": _V1_5,
    "llava/train/train.py:ModelArguments.mm_*": _FROM_CHECKPOINT,
    "llava/train/train.py:DataArguments.image_aspect_ratio": _FROM_CHECKPOINT,
    "llava/train/train.py:DataArguments.lazy_preprocess": _NO_EFFECT,
    "llava/train/train.py:DataArguments.is_multimodal": _NO_EFFECT,
}
"""The same for names that are there and differ. The first pattern that fits counts."""

CONFIG_FIELDS = "config.json"
"""Stands in for a file: the fields that LLaVA adds to the language model's configuration."""

# ------------------------------------------------------------------------------------------------- what a file offers

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
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    found = [Parameter(a.arg, "positional", source_text(d)) for a, d in zip(positional, defaults)]
    found += [Parameter(arguments.vararg.arg, "*")] if arguments.vararg else []
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
        found.append(Parameter(argument.arg, "keyword", source_text(default)))
    return (*found, *([Parameter(arguments.kwarg.arg, "**")] if arguments.kwarg else []))


def members_of(sources: Sources, path: Path, node: ast.ClassDef, imported: bool = False) -> Names:
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
    """Calls of add_argument below `node`, and what the parameters of the function around them were given."""
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


# --------------------------------------------------------------------------------------------------- the comparison

State = Literal["same", "changed (compatible)", "changed", "added", "left out", "missing"]
STATES: tuple[State, ...] = ("same", "changed (compatible)", "changed", "added", "left out", "missing")


@dataclass(frozen=True)
class Finding:
    """One file (`name` empty) or one name in it. `how`: what changed. `reason`: why, from the tables above."""

    file: str
    name: str
    state: State
    how: str = ""
    reason: str = ""


def compare(theirs: Inventory, ours: Inventory) -> list[Finding]:
    """Every file and name of `theirs`, and what `ours` adds to the files that both have.

    A name is there when it can be imported from the same module. Keyword-only parameters may be added.
    """
    findings = []
    for file in sorted({*theirs, *ours}):
        if file not in theirs:
            findings.append(Finding(file, "", "added"))
        elif file not in ours:
            findings.append(_absent(file, ""))
        else:
            findings += _compare_names(file, theirs[file], ours[file])
    return findings


def _compare_names(file: str, theirs: Names, ours: Names) -> list[Finding]:
    findings = []
    for name in (name for name, item in theirs.items() if _is_demanded(file, name, item)):
        if name in ours:
            findings.append(_compare_items(file, name, theirs[name], ours[name]))
        elif _owner(name) in ours or not _owner(name):  # a class that is absent is reported once
            findings.append(_absent(file, name))
    added = [name for name, item in ours.items() if name not in theirs and not item.imported]
    findings += [Finding(file, name, "added") for name in added if _owner(name) in theirs or not _owner(name)]
    states = {finding.state for finding in findings} - {"same", "added"}
    compatible: State = "changed (compatible)"
    whole: State = "same" if not states else compatible if states == {compatible} else "changed"
    return [Finding(file, "", whole), *findings]


def _is_demanded(file: str, name: str, item: Item) -> bool:
    """What a module merely imports is no part of its interface, except in a package's __init__."""
    trivial = name.endswith(".__init__") and len(item.parameters) == 1  # as good as inherited
    return not trivial and (not item.imported or file.endswith("__init__.py"))


def _owner(name: str) -> str:
    """The class of a member; empty for other names."""
    return name.partition(".")[0] if "." in name else ""


def _absent(file: str, name: str) -> Finding:
    reason = reason_for(LEFT_OUT, file, name)
    return Finding(file, name, "left out" if reason else "missing", reason=reason)


def reason_for(table: Mapping[str, str], file: str, name: str) -> str:
    """The reason of the first pattern that fits; empty when there is none."""
    subject = f"{file}:{name}" if name else file
    fits = (pattern for pattern in table if (":" in pattern) == bool(name) and fnmatchcase(subject, pattern))
    return next((table[pattern] for pattern in fits), "")


def _compare_items(file: str, name: str, theirs: Item, ours: Item) -> Finding:
    if "unknown" in (theirs.kind, ours.kind):  # it is there: imported from a library, or set by a method
        return Finding(file, name, "same")
    kinds = [item.kind.replace("property", "field") for item in (theirs, ours)]
    if kinds[0] != kinds[1]:
        changes, compatible = [f"{theirs.kind} -> {ours.kind}"], False
    else:
        changes, compatible = _signature_changes(theirs.parameters, ours.parameters)
        settings = _setting_changes(theirs, ours)
        changes, compatible = changes + settings, compatible and not settings
    if not changes:
        return Finding(file, name, "same")
    state: State = "changed (compatible)" if compatible else "changed"
    return Finding(file, name, state, "; ".join(changes), reason_for(CHANGED, file, name))


def _setting_changes(theirs: Item, ours: Item) -> list[str]:
    """Differences of a flag's or field's settings; values that one side does not record are not compared."""
    if theirs.kind == "flag":
        names = sorted({*theirs.settings, *ours.settings})
        before, after = ({n: i.settings.get(n, "not set") for n in names} for i in (theirs, ours))
    else:
        names = [name for name in theirs.settings if name in ours.settings]
        before, after = ({n: i.settings[n] for n in names} for i in (theirs, ours))
    if theirs.kind == "content":
        return ["the contents differ (not Python, not compared further)"] if before != after else []
    return [f"{name} {before[name]} -> {after[name]}" for name in names if before[name] != after[name]]


def _signature_changes(theirs: tuple[Parameter, ...], ours: tuple[Parameter, ...]) -> tuple[list[str], bool]:
    """(what differs, whether every call that LLaVA's signature allows still means the same)."""
    places = {parameter.name: (place, parameter) for place, parameter in enumerate(ours)}
    breaking: list[str] = []
    harmless: list[str] = []
    for place, parameter in enumerate(theirs):
        here, twin = places.get(parameter.name, (None, None))
        if parameter.kind in ("*", "**"):
            if not any(other.kind == parameter.kind for other in ours):
                breaking.append(f"no {parameter.kind}{parameter.name}")
        elif twin is None:
            breaking.append(f"no parameter {parameter.name}")
        elif (twin.kind, here) != (parameter.kind, place) and parameter.kind == "positional":
            where = f"in place {here}" if twin.kind == "positional" else "by keyword only"
            breaking.append(f"{parameter.name} {where}, was in place {place}")
        elif parameter.default != twin.default:
            known = harmless if parameter.default is None else breaking
            known.append(f"{parameter.name} = {parameter.default or 'required'} -> {twin.default or 'required'}")
    for parameter in ours:
        if parameter.name in {other.name for other in theirs} or parameter.kind in ("*", "**"):
            continue
        if parameter.default is None:
            breaking.append(f"needs {parameter.name}")
        elif parameter.kind == "positional":
            harmless.append(f"{parameter.name} = {parameter.default} is new")
    return breaking + harmless, not breaking


# --------------------------------------------------------------------------------------------------------- the report


def report_lines(findings: list[Finding], everything: bool = False) -> list[str]:
    """The comparison as text: a line for each file, one below it for each name that is not the same."""
    lines = []
    for finding in findings:
        if not finding.name:
            lines.append(f"{finding.file:<50} {finding.state}" + (f"  {finding.reason}" if finding.reason else ""))
        elif everything or finding.state not in ("same", "added"):
            why = " - ".join(text for text in (finding.how, finding.reason) if text)
            lines.append(f"    {finding.state:<21} {finding.name}" + (f": {why}" if why else ""))
    return [*lines, "", *summary(findings)]


def summary(findings: list[Finding]) -> list[str]:
    """Files and names by state."""
    lines = []
    for title, group in (("files", [f for f in findings if not f.name]), ("names", [f for f in findings if f.name])):
        counts = Counter(finding.state for finding in group)
        lines.append(f"{title}: " + ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]))
    return lines


def write_page(findings: list[Finding], path: str | Path, subject: str) -> None:
    """The comparison as one self-contained HTML page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    files = [finding for finding in findings if not finding.name]
    names = {file.file: [f for f in findings if f.name and f.file == file.file] for file in files}
    template = environment.get_template("upstream.html.jinja")
    page = template.render(subject=subject, files=files, names=names, totals=summary(findings))
    write_atomic(path, page)


def left_out_page() -> str:
    """docs/left_out.md: the tables above, patterns of one reason together."""
    lines = [
        "# What differs from LLaVA, and why",
        "",
        "Written by `python -m dama.upstream > docs/left_out.md` from the tables in `dama/upstream.py`.",
        "`python -m dama upstream PATH_TO_A_LLAVA_CHECKOUT` compares a checkout with this repository, name by name.",
        "A star stands for any characters; `FILE:NAME` is a name, `Class.member` or `--flag` in a file.",
    ]
    for title, table in (("Left out", LEFT_OUT), ("Changed", CHANGED)):
        lines += ["", f"## {title}"]
        for reason in dict.fromkeys(table.values()):
            lines += ["", reason, ""]
            lines += [f"- `{pattern}`" for pattern in table if table[pattern] == reason]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(left_out_page())
