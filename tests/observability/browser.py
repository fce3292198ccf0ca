"""A page in a real browser, in a frame as wide as a screen: what a script in it found."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

READABLE = """(() => {
  const shown = (element) => { const box = element.getBoundingClientRect(); return box.width > 0 && box.height > 0
    && getComputedStyle(element).visibility !== "hidden" && !element.closest(".tip, [hidden], script, style"); };
  const own = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  const texts = [...document.body.querySelectorAll("*")].filter((element) => own(element) && shown(element));
  const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
  const box = (element) => { const range = document.createRange(); range.selectNodeContents(element);
    return range.getBoundingClientRect(); };
  const clashes = [];
  for (const figure of document.querySelectorAll("figure")) {
    const labels = texts.filter((element) => figure.contains(element)).map((element) => [element, box(element)]);
    labels.forEach(([a, first], index) => labels.slice(index + 1).forEach(([b, second]) => {
      if (!a.contains(b) && !b.contains(a) && overlap(first, second))
        clashes.push(`${figure.id}: ${a.textContent.trim()} | ${b.textContent.trim()}`);
    }));
  }
  const small = texts.filter((element) => parseFloat(getComputedStyle(element).fontSize) < 10);
  return { texts: texts.length, small: small.map((element) => element.textContent.trim().slice(0, 40)), clashes };
})()"""
"""A script's value: texts that are shown, those under 10 px, and pairs in one figure that lie on each other."""

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
