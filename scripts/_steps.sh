# shellcheck shell=bash
# Steps that are done once: what `prune_llama.sh` and `pico.sh` are made of. Scripts
# source this file after setup_env.sh, with RUN_DIR set.
#
#   step NAME OUTPUT "NEEDS" COMMAND...
#
# runs COMMAND, which makes OUTPUT, unless OUTPUT is there already and was made by this very command
# from these very inputs. NEEDS are the names of earlier steps. RUN_DIR/.steps/NAME keeps the
# command and a checksum of what each needed step recorded, so that a changed setting is noticed
# in the step it belongs to and in all that come of it. An output of other settings is never
# thrown away by itself: the step stops and says so, and REDO=1 makes it again.
#
# An unfinished output of the same settings is removed and made again; with
# `resumable_step`, the command itself goes on from it.

step() { _step no "$@"; }
resumable_step() { _step yes "$@"; }

# What a step depends on that no command makes: a file or directory from outside, by name, size
# and time of its files.
given() {
    local name=$1 path=$2
    mkdir -p "$RUN_DIR/.steps"
    python - "$path" >"$RUN_DIR/.steps/$name" <<'PY'
import sys
from pathlib import Path

path = Path(sys.argv[1]).resolve()
print("given", path)
for file in sorted(path.iterdir()) if path.is_dir() else [path]:
    if file.is_file():
        print(file.name, file.stat().st_size, file.stat().st_mtime_ns)
PY
}

# into FILE COMMAND...: its standard output, in FILE once it has succeeded.
into() {
    local file=$1
    shift
    "$@" >"$file.part" && mv "$file.part" "$file"
}

_record_of_this_step() {
    local needs=$1 need
    shift
    for need in $needs; do
        [[ -f "$RUN_DIR/.steps/$need" ]] || die "step $need has not been run"
        echo "needs $need $(cksum <"$RUN_DIR/.steps/$need")"
    done
    printf 'runs'
    printf ' %q' "$@"
    echo
}

_step() {
    local resumable=$1 name=$2 output=$3 needs=$4
    shift 4
    local record=$RUN_DIR/.steps/$name now before=""
    mkdir -p "$RUN_DIR/.steps"
    now=$(_record_of_this_step "$needs" "$@")
    [[ ! -f "$record" ]] || before=$(cat "$record")

    if [[ -e "$output" ]]; then
        if [[ "$before" == "$now" && -f "$record.seconds" ]]; then
            say "$name: done before, in $(cat "$record.seconds") s"
            return
        elif [[ "$before" == "$now" && $resumable == yes ]]; then
            say "$name: goes on from where it stopped"
        elif [[ "$before" == "$now" ]]; then
            rm -rf "$output"
        elif [[ "${REDO:-0}" == 1 ]]; then
            say "$name: was made with other settings; again, because of REDO=1"
            rm -rf "$output"
        elif [[ -z "$before" ]]; then
            die "$output exists and was not made here; move it away, or set RUN_DIR to another place"
        else
            printf '%s\n' "--- then" "$before" "--- now" "$now" >&2
            die "$output was made with other settings (above); set RUN_DIR to another place, or REDO=1 to make it again"
        fi
    fi

    say "$name"
    show "$@"
    rm -f "$record.seconds"
    [[ "$before" == "$now" ]] || rm -f "$record.spent"
    echo "$now" >"$record"
    local began=$SECONDS spent status=0
    "$@" || status=$?
    spent=$(($(cat "$record.spent" 2>/dev/null || echo 0) + SECONDS - began))
    if ((status != 0)); then
        echo "$spent" >"$record.spent" # a run that goes on later counts all its seconds
        say "step $name ended with exit code $status"
        exit "$status"
    fi
    [[ -e "$output" ]] || die "step $name ended without an error, but $output is not there"
    echo "$spent" >"$record.seconds"
}
