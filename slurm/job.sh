# shellcheck shell=bash
# What the templates share. Sourced after cluster.env, in the folder that sbatch was called in.

# A mistake in the input ends with 2, as in megatron-vespo's own commands.
fail() {
    echo "error: $*" >&2
    exit 2
}

# begin_job FOLDER: sets LOGS (FOLDER/slurm/[task_I/]attempt_K, K counts restarts) and JOB_TMP (of this job on each node,
# which is TMPDIR, removed at the end), loads modules and the environment.
begin_job() {
    LOGS=$1/slurm/${SLURM_ARRAY_TASK_ID:+task_$SLURM_ARRAY_TASK_ID/}attempt_${SLURM_RESTART_COUNT:-0}
    mkdir -p "$LOGS"
    JOB_TMP=$LOCAL_SCRATCH/v$SLURM_JOB_ID
    # Of an attempt on this node that lost power.
    rm -rf -- "$JOB_TMP"
    trap 'rm -rf -- "$JOB_TMP"' EXIT
    # Without this a signal would end the shell before its EXIT trap.
    trap 'exit 143' TERM
    mkdir -p "$JOB_TMP"
    export TMPDIR=$JOB_TMP
    load_environment
    echo "job $SLURM_JOB_ID, attempt ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST; logs: $LOGS"
}

# Sets SRUN_CONTAINER (options of srun) and IN_CONTAINER (words before a command); both are empty without a container.
load_environment() {
    SRUN_CONTAINER=()
    IN_CONTAINER=()
    if [ -n "$MODULES" ]; then
        # shellcheck disable=SC2086  # names of several modules
        module load $MODULES
    fi
    case $CONTAINER in
    none)
        [ -x "$VENV/bin/python" ] || fail "cluster.env: VENV: no $VENV/bin/python on $SLURMD_NODENAME"
        export PATH=$VENV/bin:$PATH
        ;;
    pyxis) SRUN_CONTAINER=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS,$JOB_TMP:$JOB_TMP" --container-workdir="$PWD") ;;
    apptainer) IN_CONTAINER=(apptainer exec --nv --bind "$CONTAINER_MOUNTS,$JOB_TMP:$JOB_TMP" --pwd "$PWD" "$CONTAINER_IMAGE") ;;
    *) fail "cluster.env: CONTAINER is '$CONTAINER'; none, pyxis and apptainer are known" ;;
    esac
}

# step NODE ROLE COMMAND...: run COMMAND on NODE; its output goes to LOGS/NODE.ROLE.log. srun does not take over
# --cpus-per-task from sbatch since Slurm 22.05, hence it is said again.
step() {
    local node=$1 role=$2
    shift 2
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
        --output="$LOGS/$node.$role.log" --open-mode=append "${SRUN_CONTAINER[@]}" "${IN_CONTAINER[@]}" "$@"
}

# whole_job ROLE COMMAND...: this command is the job; ends with its exit code, after the end of its log. It is no step
# where it need not be one: at the end of a job srun ends before what it started has, and that still needs JOB_TMP.
whole_job() {
    local pid tell=true code=0 log=$LOGS/$SLURMD_NODENAME.$1.log
    if [ "$CONTAINER" = pyxis ]; then
        step "$SLURMD_NODENAME" "$@" &
    else
        "${IN_CONTAINER[@]}" "${@:2}" >>"$log" 2>&1 &
        tell="kill -TERM $!"
    fi
    pid=$!
    # Slurm tells steps by itself, and at the end of a job all processes of the script, but `scancel --batch` the shell alone.
    # shellcheck disable=SC2064  # as it is now
    trap "echo 'job $SLURM_JOB_ID is to end (SIGTERM)' >&2; $tell 2>/dev/null || true" TERM
    # A signal ends a wait, but not what is waited for.
    while kill -0 "$pid" 2>/dev/null; do
        code=0
        wait "$pid" || code=$?
    done
    tail -n 20 "$log"
    exit "$code"
}
