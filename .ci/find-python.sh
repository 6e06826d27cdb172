#!/bin/sh
# Prints a Python 3 that runs, is new enough and can make virtual environments.
#
#     sh .ci/find-python.sh [MINOR]      MINOR: oldest minor version to accept, 11 if not given
#
# PYTHON in the environment overrides the search. The oldest version that fits is taken: the full suite should run on
# what the project still supports, and `make test-newest` looks after the other end.

minor="${1:-11}"

fits() {
    # A name on the PATH may be a shim of a version manager that fails when it is called, and Debian ships Python
    # without ensurepip: only running it tells.
    "$1" -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, $minor))" >/dev/null 2>&1
}

if [ -n "$PYTHON" ]; then
    candidates="$PYTHON"
else
    candidates="python3.11 python3.12 python3.13 python3.14 python3"
    for root in "${PYENV_ROOT:-$HOME/.pyenv}/versions" "$HOME/.local/share/uv/python"; do
        for found in "$root"/*/bin/python3; do
            candidates="$candidates $found"
        done
    done
fi

for candidate in $candidates; do
    if fits "$candidate"; then
        command -v "$candidate"
        exit 0
    fi
done

tried="${PYTHON:-python3.11 to python3.14, python3, those of pyenv and uv}"
echo "No Python 3.$minor or newer with its venv module was found (tried: $tried)." >&2
echo "Install one (Debian, Ubuntu: apt install python3-venv) or name it: make ... PYTHON=/path/to/python3" >&2
exit 1
