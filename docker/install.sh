#!/bin/sh
# Makes a virtual environment and installs mae_dist into it, with the versions that CI tests.
# `make`, CI (through make) and docker/Dockerfile all use this script.
#
#   docker/install.sh VENV WHAT      WHAT is an argument of pip: '.' or '.[dev]'; PYTHON=python3.12 uses another Python;
#                                    INSTALLER=uv unpacks several packages at once, but reads none of pip's settings
#                                    other than extra-index-url; where it fails pip is used
set -eu
cd "$(dirname "$0")/.."
venv=$1
"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
by_uv() {
  pip install --quiet uv
  UV_EXTRA_INDEX_URL=$(pip config get global.extra-index-url 2>/dev/null || :)
  export UV_EXTRA_INDEX_URL UV_INDEX_STRATEGY=unsafe-best-match # as pip searches
  "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" -c .ci/constraints.txt -e "$1"
}
if [ "${INSTALLER:-pip}" != uv ] || ! by_uv "$2"; then
  pip install --quiet -c .ci/constraints.txt -e "$2"
fi
