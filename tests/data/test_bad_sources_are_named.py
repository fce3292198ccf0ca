"""A mistake in a source or a file is a ConfigError that says where it is."""

import json

import pytest

from megatron_vespo.config import ConfigError, CustomSource, FileSource, ReasoningGymSource
from megatron_vespo.data.sources import build_source

GOOD = '{"prompt": "1?", "answer": "1"}\n'


def reasoning_gym_source(task, **settings):
    return build_source(ReasoningGymSource(type="reasoning_gym", task=task, settings=settings), 1, "data.sources.0")


def file_source(path, **keys):
    return build_source(FileSource(type="file", path=str(path), **keys), 1, "data.sources.0")


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("chain_sums", {}, r"data.sources.0.task: reasoning-gym has no task 'chain_sums'; similar: .*chain_sum"),
        ("chain_sum", {"min_term": 3}, r"data.sources.0.settings.min_term: unknown setting .*min_terms"),
        ("chain_sum", {"min_terms": 0}, r"data.sources.0.settings: chain_sum refuses"),
        ("chain_sum", {"min_terms": "three"}, r"data.sources.0"),
        ("chain_sum", {"seed": 3}, r"data.sources.0.settings.seed: is set by the run"),
    ],
)
def test_tasks_and_settings(task, settings, message):
    with pytest.raises(ConfigError, match=message):
        reasoning_gym_source(task, **settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        (GOOD + "{oops\n", "row 2 is not JSON"),
        (GOOD + "[1]\n", "row 2 is not an object"),
        (GOOD + GOOD + '{"prompt": "1?"}\n', "row 3 has no 'answer'"),
        ('{"question": "1?", "answer": "1"}\n', r"row 1 has no 'prompt' \(its columns: question, answer\)"),
        ('{"prompt": " ", "answer": "1"}\n', "row 1: 'prompt' is empty"),
        ('{"prompt": [{"role": "user"}], "answer": "1"}\n', "row 1: 'prompt' is neither text nor a list"),
        ('{"prompt": 5, "answer": "1"}\n', "row 1: 'prompt' is neither"),
    ],
)
def test_rows(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        file_source(path)


def test_files(tmp_path):
    with pytest.raises(ConfigError, match=r"data.sources.0.path: .*no such file"):
        file_source(tmp_path / "missing.jsonl")
    (tmp_path / "rows.txt").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"is neither of \.jsonl, \.parquet, \.csv"):
        file_source(tmp_path / "rows.txt")
    (tmp_path / "rows.parquet").write_text(GOOD)
    with pytest.raises(ConfigError, match="not readable as parquet"):
        file_source(tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("prompt,answer\n1?,1,2\n")
    with pytest.raises(ConfigError, match="row 1 has not as many fields as the header"):
        file_source(tmp_path / "rows.csv")


def test_a_relative_path_is_said_with_the_folder_it_was_taken_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"rows\.csv: no such file \(looked for from {tmp_path}, where the command"):
        file_source("rows.csv")


def test_the_same_rows_come_from_jsonl_parquet_and_csv(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"What is 0{n}, or “{n}”?", "answer": f"0{n}"} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("prompt,answer\n" + "".join(f'"{r["prompt"]}",{r["answer"]}\n' for r in rows))
    for kind in ("jsonl", "parquet", "csv"):
        source = file_source(tmp_path / f"rows.{kind}")
        items = [source.item(i) for i in range(5)]
        assert sorted((i.reference for i in items), key=lambda row: row["answer"]) == rows
        assert all(i.question == i.reference["prompt"] for i in items)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_colon", "not of the form package.module:name"),
        ("no_such_module_of_ours:Prompts", "does not import"),
        ("json:NoSuchName", "has no 'NoSuchName'"),
        ("json:__name__", "is not a class"),
        ("collections:Counter", "has no `name`"),
    ],
)
def test_custom_targets(target, message):
    with pytest.raises(ConfigError, match=f"data.sources.0.*{message}"):
        build_source(CustomSource(type="custom", target=target), 1, "data.sources.0")
