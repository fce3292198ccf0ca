"""A page in a real browser, in a frame as wide as a screen: what a script in it found."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")


def seen_in_browser(page: str, width: int, folder: Path) -> Any:
    """What `page` put into `parent.document.title`, as JSON. Anything on the console fails."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(f'<body style="margin:0"><iframe src="page.html" style="width:{width}px;height:3000px;border:0">')
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--allow-file-access-from-files", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},3000", "--virtual-time-budget=2000", "--dump-dom", frame.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in ran.stderr
    return json.loads(unescape(re.findall(r"<title>(.*?)</title>", ran.stdout)[0]))
