#!/usr/bin/env bash
# scripts/recover.sh by the name it has in jordddan/Pruning-LLMs; variables and flags are the same.
set -euo pipefail

# shellcheck source=scripts/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
exec bash "$REPO/scripts/recover.sh" "$@"
