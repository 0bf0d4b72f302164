#!/usr/bin/env bash
# Makes .venv from requirements.lock; `make` calls it when the lock, pyproject.toml or this file is newer than .venv/ok.
# Usage: scripts/setup.sh [PYTHON]   (default: the first of python3, python3.12, python3.11 that will do)
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONHOME PYTHONPATH
PATH=${PATH//"$PWD/.venv/bin:"/} # an environment is not made with its own Python

suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; }

python=""
for candidate in ${1:-python3 python3.12 python3.11}; do
    if suits "$candidate"; then python=$candidate && break; fi
done
if [[ -z $python ]]; then
    version=$("${1:-python3}" --version 2>/dev/null) || version="not to be found"
    echo "Triptych needs Python 3.11 or 3.12, but ${1:-python3} is $version;" \
        "install one of them and name it, as in: make test PYTHON=python3.12" >&2
    exit 1
fi

# An environment that was interrupted while being made, or whose Python has gone or is too old, is made anew.
if ! suits .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    echo "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

total=$(grep -c '^[^#].*==' requirements.lock)
progress() { # pip's log -> one line that fills up; nothing where the output is no terminal
    local count=0 word what filled
    while read -r word what; do
        case $word in
            Collecting) what="finding $what" ;;
            Requirement) what="there already: ${what#already satisfied: }" ;;
            Downloading) what="downloading ${what##*/}" ;;
            Installing) what="unpacking" ;;
            *) continue ;;
        esac
        if [[ $word == [CR]* && $count -lt $total ]]; then count=$((count + 1)); fi
        filled=$(printf '%*s' $((30 * count / total)) '')
        if [[ -t 1 ]]; then printf '\r\033[K[%-30s] %d/%d %.60s' "${filled// /#}" "$count" "$total" "$what"; fi
    done
    if [[ -t 1 ]]; then printf '\r\033[K'; fi
}
echo "installing $total packages from requirements.lock (once; some minutes, mostly PyTorch)"
.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.lock | progress
.venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
touch .venv/ok
