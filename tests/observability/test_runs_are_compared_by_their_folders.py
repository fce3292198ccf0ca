from pathlib import Path

import pytest
from test_comparison_shows_every_run import Page, make_run
from typer.testing import CliRunner

from megatron_vespo.cli import app
from megatron_vespo.config import ConfigError
from megatron_vespo.observability.compare_runs import compare_runs


def test_runs_that_differ_in_nothing_but_the_seed_are_one_line(tmp_path):
    for variant, extra in (("steady", 1), ("other", 2)):
        for seed in (1, 2):
            make_run(tmp_path / "grid" / variant / str(seed), seed, after=0.5 + 0.1 * seed, extra={"a": extra})
    folders = [tmp_path / "grid" / name / seed for name in ("steady", "other") for seed in "12"]
    page = compare_runs(folders)
    assert page == tmp_path / "grid" / "comparison.html"
    text = Page(page.read_text()).text
    assert "steady / other" in text and "65.0%" in text  # the mean of 0.6 and 0.7
    assert "extra.a" in text


def test_runs_from_anywhere_are_called_by_where_they_are(tmp_path):
    one, two = tmp_path / "a" / "run", tmp_path / "b" / "deep" / "run"
    make_run(one, 1, extra={"a": 1})
    make_run(two, 1, extra={"a": 2})
    result = CliRunner().invoke(app, ["report", str(one), str(two), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert "a/run / b/deep/run" in Page((tmp_path / "page.html").read_text()).text


def test_runs_without_a_configuration_are_never_taken_for_seeds(tmp_path):
    for name in "ab":
        make_run(tmp_path / name, 1)
        (tmp_path / name / "config.yaml").unlink()
    assert "a / b" in Page(compare_runs([tmp_path / "a", tmp_path / "b"]).read_text()).text


def test_mistakes_are_named(tmp_path):
    make_run(tmp_path / "a", 1)
    with pytest.raises(ConfigError, match="given twice"):
        compare_runs([tmp_path / "a", tmp_path / "b" / ".." / "a"])
    with pytest.raises(ConfigError, match="nothing"):
        compare_runs([tmp_path / "a", Path(tmp_path / "nothing")])
    alone = CliRunner().invoke(app, ["report", str(tmp_path / "a"), "--out", str(tmp_path / "page.html")])
    assert isinstance(alone.exception, ConfigError)
