"""Hooks of mkdocs: links of a page to files of the repository that are not in docs/, and short code that does not wrap.

In the repository such a link is relative, as in `[SECURITY.md](../SECURITY.md)`. On the site it leads to the repository
where `extra.repository` names its address, and is plain text otherwise. A file that does not exist is a warning, which
`--strict` turns into an error.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.docs_links")
LINK = re.compile(r"(?<!!)\[([^\]\[]+)\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")
SHORT_CODE = re.compile(r"<code>([^<]{1,24}|[^<\s]{1,40})</code>")  # such as a flag with its value
ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page with its links out of docs/ rewritten."""
    return rewrite(markdown, page.file.src_uri, str(config.extra.get("repository") or ""))


def on_page_content(html: str, **_: Any) -> str:
    """The page's HTML with short code marked for the style sheet: a line does not end behind the `--` of a flag."""
    return SHORT_CODE.sub(r'<code class="short">\1</code>', html)


def rewrite(markdown: str, source: str, repository: str) -> str:
    """Rewrite links out of docs/.

    Args:
        markdown: text of a page.
        source: the page, relative to docs/.
        repository: address of the repository, or an empty string.
    """

    def replace(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = os.path.normpath(os.path.join("docs", os.path.dirname(source), target))
        if path.startswith("docs" + os.sep):
            return match[0]
        if path.startswith("..") or not (ROOT / path).exists():
            log.warning(f"{source}: link to {target}, which does not exist in the repository")
        if not repository:
            return str(text)
        return f"[{text}]({repository.rstrip('/')}/blob/main/{path}{anchor or ''})"

    return LINK.sub(replace, markdown)
