import shutil

import pytest

from megatron_vespo.config import ConfigError, TrainConfig, load_config
from megatron_vespo.orchestration.run_folder import create_run_folder


@pytest.fixture
def config():
    return load_config(TrainConfig, "examples/quickstart.yaml")


def test_a_new_folder_holds_the_resolved_configuration(tmp_path, config):
    folder = create_run_folder(config, str(tmp_path / "run"), overwrite=False, checkpoint_bytes=0)
    assert load_config(TrainConfig, folder / "config.yaml") == config


def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run of ours"):
        create_run_folder(config, str(tmp_path), overwrite=True, checkpoint_bytes=0)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_run_is_replaced_only_when_asked(tmp_path, config):
    folder = create_run_folder(config, str(tmp_path / "run"), overwrite=False, checkpoint_bytes=0)
    (folder / "metrics.jsonl").write_text("old")
    with pytest.raises(ConfigError, match="overwrite=true"):
        create_run_folder(config, str(folder), overwrite=False, checkpoint_bytes=0)
    assert (folder / "metrics.jsonl").exists()
    create_run_folder(config, str(folder), overwrite=True, checkpoint_bytes=0)
    assert not (folder / "metrics.jsonl").exists()


def test_a_full_disk_is_said_before_the_run(tmp_path, config):
    with pytest.raises(ConfigError, match="MiB needed"):
        create_run_folder(config, str(tmp_path / "run"), False, checkpoint_bytes=shutil.disk_usage(tmp_path).free)
    assert not (tmp_path / "run").exists()
