#!/bin/sh
# Makes a virtual environment and installs mae_dist into it, with the versions that CI tests.
# `make`, CI (through make) and docker/Dockerfile all use this script.
#
#   docker/install.sh VENV WHAT      WHAT is an argument of pip: '.' or '.[dev]'; PYTHON=python3.12 uses another Python
set -eu
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/python" -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e "$2"
