#!/usr/bin/env bash
# Run parts one after the other, also after one that fails; then print how each ended and how long it took.
# Usage: tools/parts.sh NAME COMMAND [NAME COMMAND ...]; the exit code is 1 where a part failed.
set -uo pipefail

summary="" failed=0 number=0 count=$(($# / 2))
while [ $# -ge 2 ]; do
  number=$((number + 1))
  echo "==> [$number/$count] $1"
  began=$SECONDS result=passed
  bash -euo pipefail -c "$2" || { result="FAILED ($?)"; failed=1; }
  summary+="$(printf '    %-14s %5d s  %s' "$result" $((SECONDS - began)) "$1")"$'\n'
  shift 2
done
echo "==> the parts took $SECONDS s:"
printf '%s' "$summary"
exit $failed
