"""Pages: one base template for all; a page is one self-contained file, with its stylesheets and script inlined.

A template extends base.html.jinja and sets `styles`, perhaps `script`: names of files beside it or in this folder.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).parent


def page_environment(folder: Path = FOLDER, **options: Any) -> Environment:
    """Create the environment of the templates in `folder` and of those here."""
    folders = list(dict.fromkeys((folder, FOLDER)))
    environment = Environment(
        loader=FileSystemLoader(folders),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )

    def inline(name: str) -> Markup:
        return Markup(_find(folders, name).read_text(encoding="utf-8"))

    def content_policy(script: str | None) -> Markup:
        return _content_policy(None if script is None else inline(script))

    environment.globals |= {"inline": inline, "content_policy": content_policy}
    return environment


def render_page(template: str, folder: Path = FOLDER, **view: Any) -> str:
    """Render a page, with everything escaped that is not Markup.

    Args:
        template: name of a template in `folder`, or here.
        folder: where the template and its stylesheets and script are.
        view: variables of the template.
    """
    return page_environment(folder, autoescape=True).get_template(template).render(view)


def _find(folders: list[Path], name: str) -> Path:
    return next(path for folder in folders if (path := folder / name).is_file())


def _content_policy(script: str | None) -> Markup:
    """Build the Content-Security-Policy: nothing from outside, and no script but this one.

    Plots and bars have style attributes, which hashes do not cover.
    """
    policy = Markup("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    if script is None:
        return policy
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return policy + Markup("; script-src 'sha256-%s'; base-uri 'none'; form-action 'none'") % digest
