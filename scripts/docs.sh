#!/usr/bin/env bash
# Builds the documentation into site/, to be opened from disk or served as files; the site loads nothing from the network.
# A broken link, a missing anchor or a page outside the navigation is an error.
#   bash scripts/docs.sh            write site/
#   bash scripts/docs.sh --serve    a live view on http://127.0.0.1:8000, built again when a file changes
# Further flags go to mkdocs. DOCS_REPOSITORY, the repository's address, makes files outside docs/ links.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" NO_MKDOCS_2_WARNING=true
if [ "${1:-}" = --serve ]; then
    shift
    exec mkdocs serve --strict "$@"
fi
mkdocs build --strict "$@"
echo "docs: site/index.html"
