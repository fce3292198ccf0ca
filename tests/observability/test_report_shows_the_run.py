import re
import shlex
from html import unescape
from html.parser import HTMLParser

import pytest
import yaml
from small_run import CONFIG, HOSTILE, run_rows

from megatron_vespo.config import ConfigError, TrainConfig, load_config
from megatron_vespo.observability.report import write_report
from megatron_vespo.observability.run_folder import read_run
from megatron_vespo.observability.sinks import JsonlSink, Metrics
from megatron_vespo.observability.time_charts import batch_times, time_total

CHARTS = {
    *("learning", "length", "signal", "entropy", "kernel", "ages", "log-weight", "phi", "sample-size", "mismatch"),
    *("time", "time-total", "throughput", "loss", "grad-norm", "learning-rate"),
}


class Page(HTMLParser):
    """Elements with their attributes, and the text outside of script and style."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data


def page(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def charts(report: Page) -> list[str]:
    ids = [attrs.get("id") or "" for tag, attrs in report.elements if tag == "figure"]
    return [name.removeprefix("chart-") for name in ids]


def test_a_finished_run_has_every_chart_and_its_headline(finished_run):
    report = page(finished_run)
    assert sorted(charts(report)) == sorted(CHARTS)
    text = " ".join(report.text.split())
    assert "25% → 75%" in text and "+50.0 points on 64 held-out prompts" in text and "1 m 23 s" in text
    assert "This run is not complete" not in text and "Worth a look" not in text
    assert "min_terms: 5" in text
    assert "4, surely" in text


def test_what_a_model_wrote_stays_text(finished_run):
    report = page(finished_run)
    assert HOSTILE in report.text
    tags = [tag for tag, _ in report.elements]
    assert tags.count("script") == 1 and "img" not in tags and "i" in tags
    assert not [attrs for _, attrs in report.elements if any(name.startswith("on") for name in attrs)]
    assert "base<i>" in report.text


def test_the_page_loads_nothing(finished_run):
    text = write_report(finished_run).read_text(encoding="utf-8")
    for _tag, attrs in Page(text).elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attrs.get(name) or ""
            assert not re.match(r"(https?:)?//", value), (name, value)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|https?://", text)


def test_an_unfinished_run_is_reported_with_what_is_missing(unfinished_run):
    report = page(unfinished_run)
    text = " ".join(report.text.split())
    assert "This run is not complete" in text
    for expected in (
        "samples_after.json",
        "summary.json",
        "4 of 12 steps",
        "no evaluation after training",
        "1 half-written lines",
    ):
        assert expected in text
    assert "25% → ?" in text
    assert set(charts(report)) == CHARTS
    assert HOSTILE in report.text


def test_a_run_that_ended_at_its_start_is_reported(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "metrics.jsonl").write_text("")
    report = page(tmp_path)
    assert charts(report) == []
    assert "0 of 12 steps are done" in report.text


def test_supervised_runs_have_a_report_too(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 2\n")
    rows = [f'{{"kind": "step", "step": {step}, "timestamp": 1.0, "loss": {1 / step}}}\n' for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    assert charts(page(tmp_path)) == ["loss"]


def test_a_folder_without_a_run_is_the_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match="not the folder of a run"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        write_report(tmp_path / "nothing")


def test_trouble_is_said_in_words(finished_run):
    row = '{"kind": "step", "step": 13, "timestamp": 2e9, "mini_batch": 0, "log_weight/std": 0.8, "loss": null, "not_finite": {"loss": "nan"}}\n'
    sync = '{"kind": "sync", "step": 13, "timestamp": 2e9, "mismatches": 2}\n'
    grade = '{"kind": "rollout", "step": 13, "timestamp": 2e9, "reward/outcome/timeout": 3}\n'
    with (finished_run / "metrics.jsonl").open("a") as file:
        file.write(row + sync + grade)
    text = page(finished_run).text
    assert "2 tensors on the engine differed" in text
    assert "not finite at 1 steps, first at step 13" in text
    assert "reached 0.80 (alarm: 0.5)" in text
    assert "'timeout' 3 times" in text


def test_a_run_of_numbers_that_are_not_finite_is_reported(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with Metrics([JsonlSink(tmp_path)]) as metrics:
        for kind, step, values in run_rows():
            broken = {name: float("inf") if isinstance(value, float) else value for name, value in values.items()}
            metrics.write(kind, step, broken if kind in ("rollout", "step") else values)
    assert CHARTS - {"kernel", "ages", "time"} <= set(charts(page(tmp_path)))


def test_time_is_accounted_for(finished_run):
    run = read_run(finished_run)
    assert batch_times(run) == [(batch, [2.0, 0.5, 4.0, pytest.approx(0.4)]) for batch in range(3)]
    figure = time_total(run)
    assert figure is not None
    # start-up 1.5, generating 6, rewards 1.5, training 12, 4 syncs of 0.4, 2 evaluations of 3; 83 in all
    rest = 83 - (1.5 + 6 + 1.5 + 12 + 4 * 0.4 + 6)
    assert f"everything else</th><td>{rest:.1f} s" in figure.body


def test_the_suggested_next_run_is_a_valid_configuration(finished_run):
    text = unescape(write_report(finished_run).read_text(encoding="utf-8"))
    (command,) = re.findall(r"<pre>(megatron-vespo train .*?)</pre>", text)
    _, _, path, *overrides = shlex.split(command)
    assert load_config(TrainConfig, path, overrides).algorithm.staleness == 16
