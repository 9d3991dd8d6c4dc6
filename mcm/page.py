"""The HTML page of a report: style, script, tables and pictures; tables in Markdown."""

import base64
import html
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from cache_tools.records import printable

STYLE, SCRIPT = (
    Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
)


def page(title: str, body: str, reload_s: int = 0) -> bytes:
    """Return one HTML file that loads nothing else; with `reload_s`, it loads itself again."""
    title, viewport = html.escape(title), '"width=device-width, initial-scale=1"'
    head = f"<meta charset=utf-8><meta name=viewport content={viewport}><title>{title}</title>"
    head += f"<meta http-equiv=refresh content={reload_s}>" if reload_s else ""
    head = f'<!doctype html><html lang="en">{head}<style>{STYLE}</style><h1>{title}</h1>'
    return printable(f"{head}{body}<script>{SCRIPT}</script></html>\n").encode()


def picture(image: bytes, alt: str, caption: str = "") -> str:
    """Return a figure of an SVG, which becomes light on dark in a dark page, or of a PNG."""
    return f"<figure>{_img(image, alt)}{_caption(caption)}</figure>"


def gallery(columns: Sequence[tuple[Mapping[str, bytes], str]], caption: str) -> str:
    """Return columns side by side; each has pictures by their alternative text, and a caption."""
    cells = []
    for images, text in columns:
        images_html = "".join(_img(image, alt) for alt, image in images.items())
        cells.append(f"<figure>{images_html}{_caption(text)}</figure>")
    return f"<figure><div class=gallery>{''.join(cells)}</div>{_caption(caption)}</figure>"


def _img(image: bytes, alt: str) -> str:
    kinds = {b"\x89": "png", b"\xff": "jpeg"}
    kind = kinds.get(image[:1], "svg+xml")
    source = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    return f'<img class={kind[:3]} alt="{html.escape(alt)}" src="{source}">'


def _caption(text: str) -> str:
    return f"<figcaption>{html.escape(text)}</figcaption>" if text else ""


def charts(figures: Sequence[str]) -> str:
    """Return figures side by side, as many as fit."""
    return f"<div class=charts>{''.join(figures)}</div>" if figures else ""


def table(lines: Sequence[Sequence[str]], caption: str, styles: Sequence[str] = ()) -> str:
    """Return a table of a header and rows, each with its CSS if there is any."""

    def row(tag: str, cells: Sequence[str], style: str) -> str:
        return f"<tr{style}>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"

    head = row("th", [f"<button>{html.escape(cell)}</button>" for cell in lines[0]], "")
    styled = zip_longest(lines[1:], (f' style="{style}"' for style in styles), fillvalue="")
    body = "".join(row("td", list(map(html.escape, line)), style) for line, style in styled)
    button = "<button class=copy>copy as TSV</button>"
    text = f"<figcaption>{html.escape(caption)} {button}</figcaption>"
    box = f"<div class=box tabindex=0><table><thead>{head}<tbody>{body}</table></div>"
    return f"<figure class=table>{text}{box}</figure>"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a table in GitHub's Markdown, its columns aligned."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    first, *others = (max(3, *map(len, column)) for column in zip(*lines, strict=True))
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    ruled = [lines[0], rule, *lines[1:]]
    padded = [[name.ljust(first), *map(str.rjust, cells, others)] for name, *cells in ruled]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)
