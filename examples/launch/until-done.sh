#!/bin/bash
# Starts a command again until it is done, wrong (exit code 2) or stopped by Ctrl-C (130), as on a TPU
# VM that no scheduler looks after:
#
#   examples/launch/until-done.sh nha train configs/nha-340m.yaml --run gs://bucket/runs/340m

for attempt in $(seq 100); do
  "$@"
  code=$?
  case $code in
    0 | 2 | 130) exit "$code" ;;
  esac
  echo "attempt $attempt ended with $code; again in ${PAUSE:-30} s" >&2
  sleep "${PAUSE:-30}"
done
exit "$code"
