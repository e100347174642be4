#!/bin/sh
# Runs `mae-dist WORDS` for `docker run IMAGE WORDS`, or WORDS themselves if they begin with torchrun, python or a shell.
# The programs are listed, since a verb such as export is also a shell command.
set -eu
case "${1:-}" in
  torchrun | python | python3 | bash | sh) exec "$@" ;;
  *) exec mae-dist "$@" ;;
esac
