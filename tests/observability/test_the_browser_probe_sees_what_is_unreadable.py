"""What the tests of pages ask a browser for finds planted mistakes, in frames of both widths."""

from browser import READABLE, needs_chromium, seen_in_browser

PAGE = f"""<!doctype html><meta charset="utf-8"><body><figure id="one" style="position:relative;height:40px">
<span style="position:absolute;left:0">0.25</span><span style="position:absolute;left:8px">0.50</span>
<span style="position:absolute;left:200px">apart</span><i hidden style="position:absolute;left:200px">hidden</i></figure>
<p style="font-size:9px">tiny</p><p>wide enough</p>
<script>parent.document.title = JSON.stringify({READABLE});</script></body>"""


@needs_chromium
def test_small_texts_and_labels_on_each_other_are_told(tmp_path):
    seen = seen_in_browser(PAGE, 400, tmp_path)
    assert seen == {"texts": 5, "small": ["tiny"], "clashes": ["one: 0.25 | 0.50"]}
