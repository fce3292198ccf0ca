"""The documentation builds without network, no link of it is broken, and its reference is that of the code."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vespo.observability.run_folder import FILES

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    built = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return target


def test_every_page_is_there_and_loads_nothing_from_another_host(site):
    pages = {page.stem for page in (REPOSITORY / "docs").glob("*.md")}
    assert pages <= {page.stem for page in site.glob("*.html")}
    for page in site.glob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]*src="([^"]+)"|<link[^>]*stylesheet[^>]*href="([^"]+)"', page.read_text()
        )
        assert [url for pair in loaded for url in pair if "//" in url] == []


def test_every_link_within_the_site_leads_somewhere(site):
    for page in site.glob("*.html"):
        if page.stem == "404":  # its links are absolute
            continue
        for target, anchor in re.findall(r'<a[^>]*href="([^"#:]*)(?:#([^"]*))?"', page.read_text()):
            found = page if not target else page.parent / target
            assert found.exists(), f"{page.name}: {target}"
            if anchor and found.suffix == ".html":
                assert f'id="{anchor}"' in found.read_text(), f"{page.name}: {target}#{anchor}"


def test_the_table_of_what_a_run_leaves_has_every_file_of_the_report():
    section = (REPOSITORY / "docs" / "operations.md").read_text().split("## What a run leaves\n")[1].split("\n## ")[0]
    named = {
        name
        for line in section.splitlines()
        if line.startswith("| `")
        for name in re.findall("`([^`]+)`", line.split(" | ")[0])
    }
    assert set(FILES) <= named


def test_the_configuration_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("reference", REPOSITORY / "tools" / "write_config_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text() == module.reference(), "run python tools/write_config_reference.py"


def test_every_key_has_a_line_with_its_meaning():
    lines = (REPOSITORY / "docs" / "configuration.md").read_text().splitlines()
    keys = [line.split(" | ") for line in lines if line.startswith("| `")]
    silent = [cells[0] for cells in keys if cells[1] != "section" and len(cells[3].strip(" |")) < 3]
    assert silent == []
