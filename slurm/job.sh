#!/usr/bin/env bash
# One start of a run inside a Slurm job: launch the ranks, pass on Slurm's warning, decide what comes after.
#
#   slurm/job.sh RECIPE [options of `fd-scale distill`]    called by the templates, in the directory of the submission
#   slurm/job.sh evaluate NETWORK [options of `fd-scale evaluate`]
#
# Resources are the template's, hyper-parameters the recipe's, libraries env.sh's. From the environment it takes
#   FD_SCALE_SET      distill: assignments for --set, quoted as for a shell; those of the command line win
#   FD_SCALE_SRUN     further options of srun (a container of pyxis)
#   FD_SCALE_EXEC     a command in front of the interpreter (a container of apptainer)
#   FD_SCALE_STAGE_SHARDS, FD_SCALE_STAGE_ENV
#                     a folder of shards, an environment as a .tar: every node first copies them to its own disk
#
# The program replaces the one line of the file $FD_SCALE_STATE as it goes on:
#   RUNNING step=S from=F      it began at step F, and a next start would begin at step S
#   PREEMPTED step=S from=F    it stopped as asked, all saved
#   DONE step=S                nothing is left to do
#   FAILED reason              another start would fail in the same way
# Each start becomes one line of RECIPE-JOB.starts (evaluate-JOB.starts). A start without progress ends at the step where it began.

set -uo pipefail

readonly MAX_STALLED=3   # starts in a row without progress; another one would not help
readonly MAX_STARTS=100  # starts of one job; what goes on longer goes on for ever
readonly REQUEUE_TRIES=6 # ten seconds apart: the controller may be restarting just now

say() { printf '%(%FT%T)T job.sh: %s\n' -1 "$*"; }

give_up() {
    say "$*" >&2
    exit 1
}

# The words of $2 into the array named $1: quotes are honoured, nothing is expanded or run. $3 is $2's name.
split() {
    local lines
    lines=$(xargs -r printf '%s\n' <<<"$2") || give_up "$3=$2: the quotes do not match"
    mapfile -t "$1" < <(printf '%s' "${lines:+$lines$'\n'}")
}

# ---- the record of starts; a line holds time, state, restart=, nodes=, exit=

close_start() { # $1: exit status of the ranks, or "lost" when this script was cut off with them
    local state
    [[ -e $FD_SCALE_STATE ]] || return 0
    read -r state <"$FD_SCALE_STATE"
    printf '%(%FT%T)T %s restart=%s nodes=%s exit=%s\n' \
        -1 "$state" "${SLURM_RESTART_COUNT:-0}" "$SLURM_JOB_NODELIST" "$1" >>"$record"
    rm -f "$FD_SCALE_STATE"
}

last_word() { tail -n 1 "$record" | cut -d ' ' -f 2; }

num_starts() { wc -l <"$record"; }

num_stalled() { # starts without progress at the end of the record
    awk '{ step = from = 0
           for (i = 3; i <= 4; i++) {
               split($i, field, "=")
               if (field[1] == "step") step = field[2]
               if (field[1] == "from") from = field[2]
           }
           stalled = step > from ? 0 : stalled + 1 }
         END { print stalled + 0 }' "$record"
}

check_progress() {
    local stalled
    stalled=$(num_stalled)
    ((stalled < MAX_STALLED)) ||
        give_up "$stalled starts in a row without progress: given up. How they ended is in $record, why in the log"
    (($(num_starts) < MAX_STARTS)) || give_up "$MAX_STARTS starts: given up. Submit again to go on"
}

# ---- the ranks

ask_to_stop() { # the ranks save at the next step and leave
    asked=1
    [[ -z $srun ]] || kill -USR2 "$srun" 2>/dev/null
}

on_term() { # Slurm itself tells the ranks. srun would make a KILL of a TERM, so that is for the impatient.
    if ((terms++)); then kill -TERM "$srun" 2>/dev/null; else ask_to_stop; fi
}

facts() { squeue --noheader --jobs="$self" --format="%T %r" 2>/dev/null; } # "RUNNING None"

attend() { # run srun in the background, where traps are served; returns its exit status
    local status=0
    srun --export=ALL --kill-on-bad-exit=1 --wait=60 "$@" &
    srun=$!
    while kill -0 "$srun" 2>/dev/null; do # a signal ends `wait` early
        wait "$srun"
        status=$?
        # Past the time limit, Slurm kills this script within KillWait, saved or not: decide now.
        ((terms)) && [[ $(facts) == *" TimeLimit" ]] && break
    done
    srun=''
    return "$status"
}

local_copy() { # where a node keeps its copy of $1; an environment that was made anew has another place
    local version
    version=$([[ -f $1 ]] && stat -Lc "%Y %s" "$1")
    echo "${TMPDIR:-/tmp}/fd_scale-$UID/$(cksum <<<"$1 $version" | cut -d ' ' -f 1)"
}

stage() { # copy $1, if anything, to every node; fails when asked to stop meanwhile
    [[ -n $1 ]] || return 0
    attend --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 slurm/stage.sh "$1" "$(local_copy "$1")" || return
    ((!asked))
}

ranks() { # $@: options of distill, or words of evaluate
    local assignment command
    [[ -z $environment ]] || FD_SCALE_PYTHON=$(local_copy "$environment")/bin/python
    command=("${prefix[@]}" "$FD_SCALE_PYTHON" -m fd_scale)
    if [[ $name == evaluate ]]; then
        command+=(evaluate "$@")
    else
        command+=(distill --recipe "$name")
        for assignment in "${assignments[@]}"; do command+=(--set "$assignment"); done
        command+=("$@")
        [[ -z $shards ]] || command+=(--set "data.shards=$(local_copy "$shards")")
    fi
    attend --ntasks="$num_ranks" --ntasks-per-node="$SLURM_NTASKS_PER_NODE" --label "${options[@]}" "${command[@]}"
}

# ---- what comes after a start that left something to do

go_on() { # $1: exit status of the ranks
    local summary now try
    check_progress
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        if ((SLURM_ARRAY_TASK_ID < SLURM_ARRAY_TASK_MAX)); then
            say "the next task of array $SLURM_ARRAY_JOB_ID goes on"
        else
            say "this was the last task of array $SLURM_ARRAY_JOB_ID: submit again to go on"
        fi
        exit "$1"
    fi
    summary="$(num_starts) starts so far, the last $(num_stalled) without progress"
    trap '' USR1
    trap 'exit 0' TERM # the requeue ends this script, and a scancel that comes just now must win
    for ((try = 0; try < REQUEUE_TRIES; try++)); do
        now=$(facts)
        if [[ $now == COMPLETING* && $now != *" TimeLimit" ]]; then
            say "Slurm itself ends this job (scancel, or room for another): what follows is left to Slurm"
            exit "$1"
        fi
        say "to be requeued: $summary"
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        sleep 10
    done
    give_up "the job cannot be requeued: submit again to go on"
}

# ---- one start

name=${1:?the name of a recipe, or the word evaluate, comes first}
shift
: "${SLURM_JOB_ID:?this runs inside a job: sbatch slurm/$name.sbatch}"
srun='' asked=0 terms=0
trap ask_to_stop USR1
trap on_term TERM

# shellcheck source=slurm/env.sh
source slurm/env.sh

self=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
self=${self:-$SLURM_JOB_ID}
record=$PWD/$name-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}.starts
export FD_SCALE_STATE=$PWD/$name-$SLURM_JOB_ID.state
# SLURM_NTASKS is that of the submission, also when the job waited and was given another number of nodes.
num_ranks=$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:?the template gives --ntasks-per-node}))
if [[ $name == evaluate && -n ${FD_SCALE_SET:-}${FD_SCALE_STAGE_SHARDS:-} ]]; then
    say "FD_SCALE_SET and FD_SCALE_STAGE_SHARDS are of distillations, and not used"
    unset FD_SCALE_SET FD_SCALE_STAGE_SHARDS
fi
shards=${FD_SCALE_STAGE_SHARDS:-} environment=${FD_SCALE_STAGE_ENV:-}
[[ -z $shards || -d $shards ]] || give_up "FD_SCALE_STAGE_SHARDS=$shards is no folder"
[[ -z $environment || -f $environment ]] || give_up "FD_SCALE_STAGE_ENV=$environment is no file"
assignments=() options=() prefix=()
split assignments "${FD_SCALE_SET:-}" FD_SCALE_SET
split options "${FD_SCALE_SRUN:-}" FD_SCALE_SRUN
split prefix "${FD_SCALE_EXEC:-}" FD_SCALE_EXEC

touch "$record" || give_up "$PWD cannot be written: submit from another directory"
close_start lost
case $(last_word) in # of an earlier task of this array
    DONE) say "the run is finished" && exit 0 ;;
    FAILED) give_up "an earlier start failed for good, see $record" ;;
esac
check_progress

say "start $(($(num_starts) + 1)) of $name on $SLURM_JOB_NODELIST, $num_ranks ranks"
echo "RUNNING step=0 from=0" >"$FD_SCALE_STATE"
stage "$environment" && stage "$shards" && ranks "$@"
status=$?
close_start "$status"

case $(last_word) in
    DONE) say "done" && exit 0 ;;
    FAILED) give_up "failed for good: $(tail -n 1 "$record")" ;;
    PREEMPTED) go_on 0 ;;
    *) go_on "$((status ? status : 1))" ;;
esac
