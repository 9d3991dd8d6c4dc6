"""Hooks of MkDocs: README and its neighbors become pages, and links to other files become text."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)]*)?\)")
PLACES = {f"docs/{path.name}": path.name for path in ROOT.glob("docs/*.*")}
PLACES |= {path.name: f"project/{path.name.lower()}" for path in ROOT.glob("*.md")}
PLACES["README.md"] = "index.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the Markdown files beside docs/."""
    for name, page in PLACES.items():
        if "/" not in name:
            files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point each relative link to the page of its file."""
    here = page.file.src_uri
    source = next(name for name, place in PLACES.items() if place == here)

    def moved(link: re.Match[str]) -> str:
        mark, text, path, anchor = link.groups()
        target = PLACES.get(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if target is None:
            return text
        return f"{mark}[{text}]({posixpath.relpath(target, posixpath.dirname(here))}{anchor or ''})"

    return LINK.sub(moved, markdown)
