"""The command line. Heavy modules are imported inside the commands, so that --help answers at once."""

import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from megatron_vespo.errors import ConfigError, RunError

app = typer.Typer(
    name="megatron-vespo",
    help="Stable off-policy reinforcement learning of MoE language models: Megatron-Core, SGLang, Ray, VESPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(help="YAML configuration.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, as key.path=value.", metavar="[KEY=VALUE]...")
]
LOADING = "reading the model and the tasks"
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Annotated[
        str,
        typer.Option(
            help="Go on with the run in run_dir: never, auto (its newest checkpoint), or a checkpoint's folder."
        ),
    ] = "never",
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with settings that change what the run computes.")
    ] = False,
) -> None:
    """Reinforcement learning, from a checkpoint to a report."""
    from megatron_vespo.config import TrainConfig, load_config
    from megatron_vespo.config.describe import describe_run

    settings = load_config(TrainConfig, config, overrides)
    print(describe_run(settings, full=dry_run))
    if dry_run:
        return
    from megatron_vespo.observability.console import RunConsole

    name, algorithm = Path(settings.run_dir).name, settings.algorithm
    with RunConsole(name, algorithm.steps, algorithm.sync_every, settings.observability.console) as console:
        console.phase(LOADING)
        from megatron_vespo.orchestration.training import run_training
        from megatron_vespo.orchestration.training_run import Resume

        what_next = run_training(settings, console, Resume(resume, allow_changes))
    print(what_next)


@app.command()
def sft(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Supervised training on demonstrations, with the same policy."""
    from megatron_vespo.config import SFTConfig, load_config
    from megatron_vespo.config.describe import dump

    settings = load_config(SFTConfig, config, overrides)
    if dry_run:
        print(dump(settings))
        return
    from megatron_vespo.observability.console import RunConsole

    with RunConsole(Path(settings.run_dir).name, settings.steps, mode=settings.observability.console) as console:
        console.phase(LOADING)
        from megatron_vespo.orchestration.sft import run_sft

        checkpoint = run_sft(settings, console)
    print(f"checkpoint   {checkpoint}")


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder in Hugging Face format.", metavar="CHECKPOINT")],
    tasks: Annotated[
        Path, typer.Argument(help="YAML with tasks and how to sample, or that of a training run.", metavar="TASKS")
    ],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--out", help="Also write the figures as JSON.")] = None,
) -> None:
    """Accuracy of a checkpoint on the engine: avg@k, pass@k, response length."""
    from megatron_vespo.config import load_tasks
    from megatron_vespo.observability.console import RunConsole

    settings = load_tasks(tasks, overrides)
    with RunConsole(f"eval {checkpoint}", 1) as console:
        console.phase(LOADING)
        from megatron_vespo.orchestration.evaluate_checkpoint import run_evaluation

        result = run_evaluation(settings, checkpoint, output, console)
    print(result)


@app.command()
def ablate(
    grid: Annotated[Path, typer.Argument(help="YAML with variants, values and seeds.", metavar="GRID")],
    output: Annotated[Path, typer.Option("--out", help="Folder of the runs and of their comparison.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of every run, as key.path=value.", metavar="[KEY=VALUE]...")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Instead of the grid's seeds; repeatable.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Start no further run after so many minutes; with 0 runs are only compared.")
    ] = None,
    only: Annotated[
        int | None,
        typer.Option(
            min=0, help="Of the runs that --dry-run lists, this one alone, counted from 0; several may go on at once."
        ),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="Lay SCALE.yaml, a file beside GRID, over the configuration of every run: gpu.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Also keep the figures in this .json file, with how they were made.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
) -> None:
    """Many runs of one configuration, compared on one page; goes on where it was stopped."""
    from megatron_vespo.config import AblationConfig, load_config, plan_runs

    settings = load_config(AblationConfig, grid, settings={"seeds": seeds} if seeds else None)
    over = None if scale is None else grid.parent / f"{scale}.yaml"
    planned = plan_runs(settings, grid, output, overrides, over)
    if only is not None:
        if only >= len(planned):
            raise ConfigError(f"--only {only}: {grid} has {len(planned)} runs, 0 to {len(planned) - 1}")
        # Others of the grid may go on at this moment, so what is not the run's own has a folder of its own.
        planned, output = [planned[only]], output / f"only_{only}"
    if dry_run:
        print("\n".join(run.config.run_dir for run in planned))
        return
    from megatron_vespo.orchestration.ablation import run_ablation

    also = None
    if results is not None:
        command = ["megatron-vespo", "ablate", str(grid), "--out", str(output), *(overrides or [])]
        command += [word for seed in seeds or () for word in ("--seed", str(seed))] + (
            ["--scale", scale] if scale else []
        )
        also = kept(results, settings.title, shlex.join(command), len(planned))
    print(run_ablation(settings.title, planned, output, minutes, also))


def kept(path: Path, title: str, command: str, planned: int) -> Callable[..., None]:
    """What `run_ablation` is to do with its runs besides comparing them: write them to `path`."""
    from megatron_vespo.observability.results import Origin, write_results
    from megatron_vespo.orchestration.provenance import cores, machine, source_commit

    return partial(write_results, path, Origin(title, command, planned, source_commit(), machine(), cores()))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs; of several, one page compares them.", metavar="RUN...")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Page that compares runs; else comparison.html in the folder of them all."),
    ] = None,
) -> None:
    """Write report.html again from a run's files, or compare several runs on one page."""
    if len(runs) > 1:
        from megatron_vespo.observability.compare_runs import compare_runs

        print(f"comparison: {compare_runs(runs, output)}")
        return
    if output is not None:
        raise ConfigError("--out is for the page that compares runs, and there is one run: leave it out")
    from megatron_vespo.observability.report import write_report

    print(f"report: {write_report(runs[0])}")


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of the whole run.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each.")] = 8,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of the whole run, instead of --nodes. Else what the settings use.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200 or a100.")] = "h100",
    gpu_memory: Annotated[str | None, typer.Option(help="Of a GPU, as 80GB; else the model's.")] = None,
    host_memory: Annotated[str, typer.Option(help="Of a node.")] = "1000GB",
    explain: Annotated[bool, typer.Option("--explain", help="Print every formula with its numbers.")] = False,
    splits: Annotated[
        bool, typer.Option("--splits", help="Also simulate every split of the GPUs into sampling and training.")
    ] = False,
    max_staleness: Annotated[
        list[int] | None,
        typer.Option(help="With --splits (implied): bound instead of the configuration's; repeatable."),
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(help="With --splits (implied): YAML with speeds; else published ones of Qwen3-30B-A3B on H100."),
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Of a prompt.")] = None,
    median_response: Annotated[float | None, typer.Option(min=1, help="Median response length, in tokens.")] = None,
    sigma: Annotated[
        float | None, typer.Option(min=0, help="Standard deviation of the logarithm of the response length.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Memory and time of a run before any GPU is used. Exit code 1 where it does not fit."""
    from megatron_vespo.config import TrainConfig, load_config
    from megatron_vespo.planning.command import PlanOptions, run_plan

    fits = run_plan(
        load_config(TrainConfig, config, overrides),
        PlanOptions(
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            gpus=gpus,
            gpu=gpu,
            gpu_memory=gpu_memory,
            host_memory=host_memory,
            splits=splits or bool(max_staleness) or rates is not None,
            max_staleness=max_staleness or [],
            rates=rates,
            prompt_tokens=prompt_tokens,
            median_response=median_response,
            sigma=sigma,
        ),
        explain=explain,
        as_json=as_json,
    )
    if not fits:
        raise typer.Exit(1)


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Default: what the configuration needs.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="Default: what the template says.")] = None,
    time: Annotated[str | None, typer.Option(help="Limit, as sbatch takes it (1-12:00:00).")] = None,
    partition: Annotated[str | None, typer.Option(help="Default: the site's (slurm/cluster.env).")] = None,
    site: Annotated[
        Path | None, typer.Option(help="Its cluster.env. Default: what CLUSTER_ENV names, else slurm/cluster.env.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job's script and stop.")] = False,
) -> None:
    """Hand a training run to Slurm: slurm/train.sbatch, filled from the configuration."""
    from megatron_vespo.config import TrainConfig, load_config
    from megatron_vespo.submit import Request, script
    from megatron_vespo.submit import submit as submit_job

    settings, words = load_config(TrainConfig, config, overrides), [str(config), *(overrides or [])]
    request = Request(nodes, gpus_per_node, time, partition)
    print(script(settings, request, words, site) if dry_run else submit_job(settings, request, words, site))


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What a run does now: its step, its processes, and who waits for what and for how long."""
    from megatron_vespo.observability.status import read_status

    found = read_status(run)
    if as_json:
        print(found.as_json())
        return
    from rich.console import Console

    from megatron_vespo.observability.status_view import view

    Console(highlight=False).print(view(found))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="YAML configuration, whose needs are checked as well.", metavar="[CONFIG]")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    lock: Annotated[Path | None, typer.Option(help="Versions to compare with; else the lock for this host.")] = None,
    shm_gb: Annotated[float, typer.Option(help="Free GiB that /dev/shm shall have.")] = 1.0,
    disk_gb: Annotated[float, typer.Option(help="Free GiB of a run's folder, where CONFIG does not tell.")] = 5.0,
    import_seconds: Annotated[float, typer.Option(help="Longest that one import may take.")] = 120.0,
) -> None:
    """What this host has and lacks, what that costs, and what mends it. Exit code 1: a run would not work here."""
    from megatron_vespo.doctor import Options, as_text, examine, is_fit
    from megatron_vespo.doctor import as_json as json_of

    findings = examine(Options(config, tuple(overrides or ()), lock, shm_gb, disk_gb, import_seconds))
    print(json_of(findings) if as_json else as_text(findings))
    if not is_fit(findings):
        raise typer.Exit(1)


def main() -> None:
    """Exit codes: 0 done, 1 the run failed, 2 a mistake in the input, 128 + n stopped by signal n."""
    sys.exit(exit_code(app))


def exit_code(command: Callable[[], None]) -> int:
    """Run `command`, print its failure, and say what to exit with (see `main`)."""
    try:
        command()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as exit_request:
        return exit_request.code if isinstance(exit_request.code, int) else 1
    return 0
