"""For mkdocs: what the pages link to in the repository outside of docs/ goes into the site with them."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)\)")
"""[text](../path): docs/ has no folders of pages."""
COPIES = "repository"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Files that pages name are copied, as text where a browser would not show them."""
    pages = [Path(config.docs_dir) / page.src_uri for page in files.documentation_pages()]
    for path in sorted({found[2] for page in pages for found in OUTSIDE.finditer(page.read_text())}):
        if not (REPOSITORY / path).exists():
            raise PluginError(f"docs link to {path}, which is not there")
        if (REPOSITORY / path).is_file() and not files.get_file_from_path(copy_of(path)):
            files.append(File.generated(config, copy_of(path), content=(REPOSITORY / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    def link(found: re.Match[str]) -> str:
        text, path = found.groups()
        return f"[{text}]({copy_of(path)})" if (REPOSITORY / path).is_file() else f"`{path}`"

    return OUTSIDE.sub(link, markdown)


def copy_of(path: str) -> str:
    return f"{COPIES}/{path}" + ("" if path.endswith(".json") else ".txt")
