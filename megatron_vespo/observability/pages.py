"""A page as one file that loads nothing: template, styles and script of this folder."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from megatron_vespo.observability.report_charts import Figure

HERE = Path(__file__).parent


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render a template of this folder with `values`, and `css` and `script`, into `path`, replaced in one move.

    Texts are escaped where the template shows them. The folder of `path` is made.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_text(template)).render(
        css=Markup(_text("report.css")), script=Markup(_text("report.js")), **values
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".html.partial")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def shown(figures: Iterable[Figure | None]) -> list[dict[str, Any]]:
    """What templates take of figures; None is left out. Bodies are HTML made by us."""
    return [{**vars(figure), "body": Markup(figure.body)} for figure in figures if figure is not None]


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
