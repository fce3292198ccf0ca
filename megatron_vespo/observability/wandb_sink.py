"""Metrics as a run of Weights & Biases.

A row of metrics.jsonl or weights.jsonl is a row there too, and its number among them all is W&B's `_step`: so a resumed
run, whose files are cut back to its checkpoint, knows to which `_step` W&B has to go back. The x-axis of every chart is
`optimizer_step`.

W&B's own process is a child of the driver, which it never outlives. Nothing that fails there fails the run, once it has
begun.
"""

import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import wandb

from megatron_vespo.config import WandbConfig
from megatron_vespo.errors import ConfigError, RunError
from megatron_vespo.observability.sinks import Row, charted

STEP = "optimizer_step"
FOLDER = "wandb"
IDENTITY = "run.json"
"""In the folder: which run of W&B this is."""
START_SECONDS = 20.0
"""How long W&B may take to answer when a run starts. Then the run is kept on disk."""
FINISH_SECONDS = 10.0
"""How long it may send what is left at the end; under what Slurm grants after its SIGTERM (30 s) with all else to stop."""
FLUSH_SECONDS = 1.0
"""How old what is not on disk may be. A run that is resumed after the machine went down must find its checkpoint's rows."""
KEY = "observability.wandb"

Mode = Literal["online", "offline"]


def check_wandb(config: WandbConfig) -> None:
    """Raises ConfigError where W&B calls a setting wrong, or nobody is logged in and it is to be online."""
    _refusals(lambda: _settings(config, Path.cwd(), config.mode))
    if config.mode == "online":
        with _library(config, Path.cwd(), config.mode):
            known = _refusals(lambda: wandb.login(prompt=False, verify=False))
        if not known:
            raise ConfigError(f"{KEY}: nobody is logged in to W&B: wandb login, set WANDB_API_KEY, or mode: offline")


class WandbSink:
    """See the module. Vectors become histograms of their finite elements.

    Args:
        run_dir: gets the folder `wandb`.
        settings: the whole resolved configuration, shown as that of the run.
        resumed: metrics.jsonl and weights.jsonl are those up to the checkpoint that the run goes on from.
        tell: prints a line that the user shall see.

    Raises:
        ConfigError: W&B refuses the run. One that is resumed goes on all the same, and is kept on disk.
    """

    def __init__(
        self, config: WandbConfig, run_dir: Path, settings: dict[str, Any], resumed: bool, tell: Callable[[str], None]
    ):
        self._folder, self._tell = run_dir.absolute() / FOLDER, tell
        self._rows = sum(_lines(run_dir / name) for name in ("metrics.jsonl", "weights.jsonl"))
        known = _known_run(self._folder, config) if resumed and self._rows else None
        if known is None:
            identity: dict[str, Any] = {"id": secrets.token_hex(4)}
        else:
            identity = {"resume_from": f"{known}?_step={self._rows - 1}"}
        arguments = {
            **identity,
            "project": config.project,
            "entity": config.entity,
            "name": config.name or run_dir.absolute().name,
            "group": config.group,
            "tags": config.tags or None,
            "config": settings,
        }
        self._stack = ExitStack()
        try:
            self._run: wandb.Run | None = self._start(config, arguments)
        except BaseException:
            self._end_library()
            raise
        _keep_identity(self._folder, config, known or identity["id"])

    def _start(self, config: WandbConfig, arguments: dict[str, Any]) -> wandb.Run:
        """Online where that is asked for and can be; else on disk."""
        resumed = "resume_from" in arguments
        mode: Mode = config.mode
        if mode == "online" and resumed and _has_parts_to_send(self._folder):
            mode = "offline"
            self._tell("W&B: earlier parts of this run are on disk and not uploaded, so this part is kept there too")
        if mode == "online":
            self._stack.enter_context(_library(config, self._folder.parent, mode))
            try:
                run = self._init(mode, arguments)
                self._tell(f"W&B: {run.url}")
                return run
            except (wandb.Error, TimeoutError, ValueError) as error:
                if not (resumed or _is_out_of_reach(error)):
                    raise ConfigError(
                        f"{KEY}: W&B refuses the run: {error}. run_dir is made already: overwrite=true replaces it"
                    ) from None
                self._end_library()
                self._tell(f"W&B did not answer as it should ({error}); the run goes on and is kept on disk")
        self._stack.enter_context(_library(config, self._folder.parent, "offline"))
        run = _refusals(lambda: self._init("offline", arguments))
        self._tell(f"W&B: upload the run with `wandb sync {self._folder}`")
        return run

    def _init(self, mode: Mode, arguments: dict[str, Any]) -> wandb.Run:
        run = wandb.init(**arguments, mode=mode, dir=str(self._folder.parent), reinit="create_new")
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        return run

    def write(self, row: Row) -> None:
        self._log(row["step"], charted(row))

    def write_weights(
        self, step: int, staleness: int, arrays: Mapping[str, Sequence[float]], prompts: Sequence[str]
    ) -> None:
        finite = {name: [value for value in vector if math.isfinite(value)] for name, vector in arrays.items()}
        self._log(step, {f"trajectories/{name}": wandb.Histogram(vector) for name, vector in finite.items() if vector})

    def write_routing(self, step: int, arrays: Mapping[str, Sequence[float]]) -> None:
        """The means over layers are among the metrics of the step."""

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        number, self._rows = self._rows, self._rows + 1
        if self._run is None or not values:
            return
        try:
            self._run.log({STEP: step, **values}, step=number, commit=True)
        except Exception as error:
            # Its process died, for one. Every number is in metrics.jsonl, and the run is worth more than its chart.
            self._tell(f"W&B takes no more of this run ({type(error).__name__}: {error}); metrics.jsonl has all of it")
            self._run = None
            self._end_library()

    def close(self, failure: BaseException | None = None) -> None:
        """W&B shows a run that failed as failed, with its exit code."""
        code = 0 if failure is None else failure.exit_code if isinstance(failure, RunError) else 1
        if self._run is not None:
            try:
                self._run.finish(exit_code=code)
            except TimeoutError:
                part = self._run.settings.sync_dir
                self._tell(f"W&B has not got all of the run yet: upload it with `wandb sync --include-online {part}`")
            except Exception as error:
                self._tell(f"W&B could not end the run ({type(error).__name__}: {error}); metrics.jsonl has all of it")
            self._run = None
        self._end_library()

    def _end_library(self) -> None:
        """Its process and threads are gone afterwards. Where that process died, ending it raises what is told already."""
        try:
            self._stack.close()
        except (Exception, SystemExit) as error:
            self._tell(f"W&B's process ended on its own ({type(error).__name__}: {error})")


@contextmanager
def _library(config: WandbConfig, root: Path, mode: Mode) -> Iterator[None]:
    """W&B's process and threads.

    W&B reports on itself from threads that nothing ends, and only its environment variable turns that off.
    """
    before = os.environ.get("WANDB_ERROR_REPORTING")
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    try:
        library = _refusals(lambda: wandb.setup(_settings(config, root, mode)))
        try:
            yield
        finally:
            try:
                wandb.teardown()
            finally:
                library.asyncer.join()
    finally:
        if before is None:
            del os.environ["WANDB_ERROR_REPORTING"]
        else:
            os.environ["WANDB_ERROR_REPORTING"] = before


def _settings(config: WandbConfig, root: Path, mode: Mode) -> wandb.Settings:
    """Nothing is printed or captured, and of code, git, packages and the host's load nothing is sent."""
    return wandb.Settings(
        project=config.project,
        entity=config.entity,
        run_name=config.name,
        run_group=config.group,
        run_tags=config.tags or None,
        mode=mode,
        root_dir=str(root),
        use_dot_wandb=False,
        symlink=False,
        silent=True,
        console="off",
        save_code=False,
        disable_code=True,
        disable_git=True,
        x_save_requirements=False,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_transaction_log_flush_interval=FLUSH_SECONDS,
        init_timeout=START_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )


def _refusals(ask: Callable[[], Any]) -> Any:
    """What `ask` returns; what W&B calls wrong becomes ConfigError."""
    try:
        return ask()
    except (wandb.Error, ValueError) as error:
        raise ConfigError(f"{KEY}: {error}") from None


def _is_out_of_reach(error: Exception) -> bool:
    """Whether W&B gave no answer. It has one class of errors for that and for refusals."""
    return isinstance(error, TimeoutError) or "timed out" in str(error).lower()


def _has_parts_to_send(folder: Path) -> bool:
    return any(not list(part.glob("*.synced")) for part in folder.glob("offline-run-*"))


def _known_run(folder: Path, config: WandbConfig) -> str | None:
    """The id of the run that earlier parts are of; none where they are of another project."""
    path = folder / IDENTITY
    kept = json.loads(path.read_text()) if path.exists() else {}
    return kept.get("id") if (kept.get("entity"), kept.get("project")) == (config.entity, config.project) else None


def _keep_identity(folder: Path, config: WandbConfig, run_id: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / IDENTITY).write_text(
        json.dumps({"entity": config.entity, "project": config.project, "id": run_id}) + "\n"
    )


def _lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)
