#!/usr/bin/env bash
# Check the prerequisites before anything is downloaded, and print the command that installs missing ones.
set -u
python=${1:-python3}
missing=()
command -v "$python" >/dev/null || missing+=(python3)
command -v make >/dev/null || missing+=(make)
command -v g++ >/dev/null || missing+=(g++)
if command -v "$python" >/dev/null; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $("$python" --version) is too old: Python 3.11 or later is needed; name one with make PYTHON=..." >&2
        exit 2
    }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    header=$("$python" -c 'import sysconfig, pathlib; print(pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h")')
    [ -f "$header" ] || missing+=(python3-dev)
fi
if [ ${#missing[@]} -gt 0 ]; then
    echo "error: missing on this machine: ${missing[*]}; install with: sudo apt-get install ${missing[*]}" >&2
    exit 2
fi
