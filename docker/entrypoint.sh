#!/bin/sh
# What `docker run IMAGE WORDS` does: WORDS are mae-dist's (`pretrain CONFIG.yaml ...`), unless they name one of the
# programs that start it on many machines or look around. A list, since verbs such as export are also a shell's words.
set -eu
case "${1:-}" in
  torchrun | python | python3 | bash | sh) exec "$@" ;;
  *) exec mae-dist "$@" ;;
esac
