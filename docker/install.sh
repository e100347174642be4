#!/bin/sh
# Makes a virtual environment and installs mae_dist into it, with the versions that CI runs: the same lines for `make`,
# for CI (which runs make) and for docker/Dockerfile.
#
#   docker/install.sh VENV WHAT      WHAT is for pip: '.' or '.[dev]'; PYTHON=python3.12 takes another Python
set -eu
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/python" -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e "$2"
