#!/bin/sh
# Two ranks serve the model that examples/train.py has saved, curl asks them, and a signal ends them.
#
#     horovodrun -np 2 python examples/train.py
#     sh examples/serve.sh [MODEL]
set -eu

MODEL=${1:-output/model.keras}
PORT=${PORT:-8000}
URL=http://localhost:$PORT
LOG=$(mktemp)

# A shell's background job does not hear Ctrl-C; the trap ends it whatever happens here.
${HOROVODRUN:-horovodrun} -np 2 hvdext serve "trained=$MODEL" --port "$PORT" > "$LOG" 2>&1 &
SERVER=$!
trap 'kill $SERVER 2> /dev/null || true; rm -f "$LOG"' EXIT

# Ready: every model has a rank that answers.
SECONDS_LEFT=120
until curl --silent --fail --output /dev/null "$URL/v2/health/ready"; do
  SECONDS_LEFT=$((SECONDS_LEFT - 1))
  if [ $SECONDS_LEFT = 0 ] || ! kill -0 $SERVER 2> /dev/null; then
    cat "$LOG"
    exit 1
  fi
  sleep 1
done
echo "ready: $URL"

echo "inputs and outputs:"
curl --silent --fail "$URL/v2/models/trained"
echo

# A request with one row of zeros, made from what the model takes.
echo "an answer:"
curl --silent --fail "$URL/examples/trained" |
  curl --silent --fail --header "Content-Type: application/json" --data @- "$URL/v2/models/trained/infer"
echo

# The front answers what it has, ends all ranks, and the launcher ends with exit code 0.
kill "$(sed -n 's/.*to drain and end: kill //p' "$LOG")"
wait $SERVER
echo "drained"
