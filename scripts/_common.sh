# shellcheck shell=bash
# What every script here shares. Scripts source this file; nobody runs it.
#
#   say TEXT          a line of progress, on standard error
#   show COMMAND...   the command that is about to run, likewise
#   die TEXT          an error, and the end
#   help_if_asked     prints the header comment of the running script for --help
#   absolute PATH     prints it, from the root
#   wanted NAME...    variables that have to be set; they are printed
#   on_ranks N ARGS   `megatron-prune ARGS` in N processes on this machine, or started by $LAUNCHER

# shellcheck disable=SC2034  # used by the scripts that source this
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ -t 2 ]]; then
    say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
    show() { printf '\033[2m   $ %s\033[0m\n' "$(readable "$@")" >&2; }
else
    say() { printf '== %s\n' "$*" >&2; }
    show() { printf '   $ %s\n' "$(readable "$@")" >&2; }
fi

die() {
    printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

help_if_asked() {
    case "${1:-}" in
        -h | --help)
            # The comment under the shebang, without its marks, up to the first other line.
            awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0"
            exit 0
            ;;
    esac
}

# A path that survives a change of directory; what it names need not exist.
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac }

wanted() {
    local name
    for name in "$@"; do
        [[ -n "${!name:-}" ]] || die "$name is not set; see --help"
        say "$name=${!name}"
    done
}

# For more than one machine, LAUNCHER is a command that is called as `$LAUNCHER N ARGS...` and starts
# N processes of `python -m megatron_prune ARGS...` with torchrun's variables (RANK, WORLD_SIZE,
# LOCAL_RANK, MASTER_ADDR, MASTER_PORT): scripts/slurm_launch.sh is one.
on_ranks() {
    local ranks=$1
    shift
    if ((ranks == 1)); then
        python -m megatron_prune "$@"
    elif [[ -n "${LAUNCHER:-}" ]]; then
        # shellcheck disable=SC2086  # a command and its own words
        $LAUNCHER "$ranks" "$@"
    else
        # One thread each: with more, ranks on one machine fight for the same cores.
        OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m torch.distributed.run \
            --standalone --nproc-per-node "$ranks" -m megatron_prune "$@"
    fi
}

# The command as one would type it, without what these scripts wrap around it.
readable() {
    case "$1" in
        into) shift 2 && readable "$@" ;;
        on_ranks)
            local ranks=$2
            shift 2
            ((ranks == 1)) || printf '(%d processes) ' "$ranks"
            readable megatron-prune "$@"
            ;;
        *) printf '%s' "$*" ;;
    esac
}
