#!/usr/bin/env bash
# Set up, lint, check types, test: what continuous integration runs, and what to run before a commit.
#
#   bash scripts/test.sh [PYTEST ARGUMENTS...]     for example: -k reshard, -m slow, tests/store
#
# Variables
#   JOBS=3   test processes; each may wait for ranks of its own. 0 runs all in one process.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
help_if_asked "$@"
setup_env dev
cd "$REPO"

say "ruff"
ruff check . || die "ruff found mistakes; 'make format' mends what can be mended by itself"
ruff format --check . || die "some files are not formatted; run 'make format'"

say "mypy"
mypy

say "shellcheck"
# All in one call, so that what one file defines for another is seen.
mapfile -t shell_files < <(find scripts tools emb_pruner .ci -type f \( -name '*.sh' -o -name '*.sbatch' -o -name run \) | sort)
shellcheck --external-sources "${shell_files[@]}"

say "hadolint"
hadolint docker/Dockerfile docker/Dockerfile.cpu

say "pytest"
# One thread a process: a test is small, and there are more processes than cores already.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
parallel=()
if [[ "${JOBS:=3}" != 0 ]]; then
    # worksteal: tests differ a lot in length.
    parallel=(-n "$JOBS" --dist worksteal)
fi
# The last -m counts, so that one on the command line replaces this one.
exec python -m pytest "${parallel[@]}" -m "not slow and not gpu" "$@"
