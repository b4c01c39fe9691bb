#!/usr/bin/env bash
# A real Ray cluster of several nodes on one machine: each node is a raylet of its own, with its own label, CPUs, object
# store and directory. See `cluster/local.sh help`, and docs/cluster.md.
set -euo pipefail

STATE="${DPO_RAY_LOCAL_STATE:-/tmp/dpo-ray-local}" # what `up` started, for the other commands
BRIDGE="${DPO_RAY_LOCAL_BRIDGE:-dporay0}"          # --namespaces: its name begins those of all interfaces and namespaces
SUBNET="${DPO_RAY_LOCAL_SUBNET:-10.231.7}"         # --namespaces: .1 is this machine, node N is .(10+N)
STOP_WAIT_SECONDS=120                              # what Ray's own stop leaves a driver before SIGKILL; its default is 3
START_WAIT_SECONDS=90

help() {
  cat <<TEXT
usage: cluster/local.sh COMMAND

  up [options]            start the cluster, and say how to use it
    --nodes N             nodes, with the head; default 3
    --roles A,B,...       the label dpo/role of each node; default head,reference,train, and train for all further ones
    --cpus N              logical CPUs of each node; default 4, whatever the machine has
    --object-store-mib N  shared memory of each node; default 200
    --dashboard-port N    default 8265; --gcs-port N default 6379
    --token               require a token, and make one
    --namespaces          a network namespace and an IP address for each node (needs root and iproute2)
  status                  the nodes, and whether they run
  kill-node N             kill all processes of node N at once, as a power cut does; 0 is the head
  start-node N            start node N again, after kill-node or when a cut has ended it; not the head
  cut-node N SECONDS      --namespaces only: take node N off the network for so long
  down                    stop everything, and delete its files

One cluster at a time for each DPO_RAY_LOCAL_STATE (now: $STATE).
TEXT
}

fail() {
  echo "error: $1" >&2
  [ -z "${2:-}" ] || echo "  -> $2" >&2
  exit 9
}

number() { # number NAME VALUE: refuse what is none
  [[ "$2" =~ ^[0-9]+$ ]] || fail "$1 wants a whole number, not '$2'" "cluster/local.sh help"
}

# ---- one node ----------------------------------------------------------------------------------------------------------

namespace_of() { echo "$BRIDGE-$1"; }
address_of() { if [ -e "$STATE/namespaces" ]; then echo "$SUBNET.$((10 + $1))"; else echo 127.0.0.1; fi; }

tree_of() { # tree_of PID: the process and all that descend from it
  echo "$1"
  local child
  for child in $(ps -o pid= --ppid "$1"); do tree_of "$child"; done
}

started_at() { # started_at PID: tells a process from a later one with the same number; nothing for one that has ended
  awk '$3 != "Z" {print $22}' "/proc/$1/stat" 2>/dev/null || true
}

runs() { # runs N
  local pid began
  [ -e "$STATE/node-$1/pid" ] || return 1
  read -r pid began <"$STATE/node-$1/pid"
  [ -n "$began" ] && [ "$(started_at "$pid")" = "$began" ]
}

make_namespace() { # make_namespace N: a namespace whose only interface is a cable to the bridge, if it is not there yet
  local space
  space="$(namespace_of "$1")"
  ! ip -n "$space" link show eth0 >/dev/null 2>&1 || return 0
  ip netns add "$space"
  ip link add "$BRIDGE.$1" type veth peer name eth0 netns "$space"
  ip link set "$BRIDGE.$1" master "$BRIDGE" up
  ip -n "$space" address add "$(address_of "$1")/24" dev eth0
  ip -n "$space" link set lo up
  ip -n "$space" link set eth0 up
}

start_node() { # start_node N ROLE
  local node="$STATE/node-$1" space=() options=()
  mkdir -p "$node"
  echo "$2" >"$node/role"
  [ ! -e "$STATE/namespaces" ] || {
    make_namespace "$1"
    # Gloo would look this machine's name up, which is of no namespace.
    space=(ip netns exec "$(namespace_of "$1")" env GLOO_SOCKET_IFNAME=eth0)
  }
  options=(--node-ip-address="$(address_of "$1")" --num-cpus="$cpus" --object-store-memory="$((store_mib << 20))"
    --labels="dpo/role=$2" --temp-dir="$node/ray" --dashboard-agent-listen-port=0 --disable-usage-stats --block)
  if [ "$1" = 0 ]; then
    options+=(--head --port="$gcs_port" --dashboard-host="$(address_of 0)" --dashboard-port="$dashboard_port"
      --include-dashboard=true --ray-client-server-port="$((gcs_port + 1))")
  else
    options+=(--address="$(address_of 0):$gcs_port")
  fi
  # A session of its own: nothing that ends the caller ends the node.
  setsid "${space[@]}" "$ray" start "${options[@]}" </dev/null >"$node/log" 2>&1 &
  local pid=$!
  disown
  echo "$pid $(started_at "$pid")" >"$node/pid"
}

kill_node() { # kill_node N: first stop all of its processes, so that none can start another meanwhile
  runs "$1" || return 0
  local pid _ processes
  read -r pid _ <"$STATE/node-$1/pid"
  processes="$(tree_of "$pid")"
  # shellcheck disable=SC2086 # a list of numbers
  kill -STOP $processes 2>/dev/null || true
  processes="$(tree_of "$pid")"
  # shellcheck disable=SC2086
  kill -KILL $processes 2>/dev/null || true
}

# ---- commands ----------------------------------------------------------------------------------------------------------

up() {
  local nodes="" roles=() cpus=4 store_mib=200 gcs_port=6379 dashboard_port=8265 token=no namespaces=no n
  while [ $# -gt 0 ]; do
    case "$1" in
      --token) token=yes ;;
      --namespaces) namespaces=yes ;;
      --nodes | --roles | --cpus | --object-store-mib | --gcs-port | --dashboard-port)
        [ $# -gt 1 ] || fail "$1 wants a value" "cluster/local.sh help"
        [ "$1" = --roles ] || number "$1" "$2"
        case "$1" in
          --nodes) nodes="$2" ;;
          --roles) IFS=, read -r -a roles <<<"$2" ;;
          --cpus) cpus="$2" ;;
          --object-store-mib) store_mib="$2" ;;
          --gcs-port) gcs_port="$2" ;;
          --dashboard-port) dashboard_port="$2" ;;
        esac
        shift
        ;;
      *) fail "up knows no '$1'" "cluster/local.sh help" ;;
    esac
    shift
  done
  if [ ${#roles[@]} = 0 ]; then
    roles=(head reference train)
    nodes="${nodes:-3}"
    for ((n = 3; n < nodes; n++)); do roles+=(train); done
    roles=("${roles[@]:0:nodes}")
  fi
  [ "${#roles[@]}" = "${nodes:-${#roles[@]}}" ] || fail "--roles names ${#roles[@]} nodes, --nodes says $nodes" "leave one of them out"
  [ "${#roles[@]}" -gt 0 ] || fail "a cluster has at least one node" "--nodes 1"
  is_ours
  [ ! -e "$STATE" ] || fail "there is a cluster already, in $STATE" "cluster/local.sh down"
  [ "$namespaces" = no ] || check_namespaces
  find_ray

  mkdir -m 700 "$STATE"
  trap 'echo "stopping what was started" >&2; down >/dev/null; exit 130' INT TERM
  [ "$token" = no ] || (umask 077 && head -c 32 /dev/urandom | od -A n -t x1 | tr -d ' \n' >"$STATE/token")
  set_environment
  if [ "$namespaces" = yes ]; then
    touch "$STATE/namespaces"
    ip link add "$BRIDGE" type bridge
    ip address add "$SUBNET.1/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
  fi
  echo "$cpus $store_mib $gcs_port $dashboard_port" >"$STATE/settings"
  echo "http://$(address_of 0):$dashboard_port" >"$STATE/dashboard"

  start_node 0 "${roles[0]}"
  await "node 0 (head)" head_answers
  for ((n = 1; n < ${#roles[@]}; n++)); do start_node "$n" "${roles[n]}"; done
  await "${#roles[@]} nodes" all_joined "${#roles[@]}"
  trap - INT TERM
  echo "up: ${#roles[@]} nodes (${roles[*]}), $cpus logical CPUs each"
  usage
}

set_environment() { # of the nodes, and of all that runs on them
  export RAY_JOB_STOP_WAIT_TIME_S="$STOP_WAIT_SECONDS" RAY_AUTH_MODE=disabled
  unset RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH
  if [ -e "$STATE/token" ]; then export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$STATE/token"; fi
}

usage() {
  echo "  export DPO_RAY_ADDRESS=$(cat "$STATE/dashboard")"
  [ ! -e "$STATE/token" ] || echo "  export RAY_AUTH_TOKEN_PATH=$STATE/token"
  echo "  dpo-ray submit pipelines/quickstart.yaml output=/tmp/dpo-ray-runs --wait"
}

find_ray() { # jobs run `python`, so Ray's own Python comes first in the nodes' PATH
  local bin
  bin="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin"
  [ ! -x "$bin/ray" ] || export PATH="$bin:$PATH"
  ray="$(command -v ray)" || fail "there is no ray here" "make install, or activate the environment that has it"
}

check_namespaces() {
  command -v ip >/dev/null || fail "--namespaces needs the command ip" "install iproute2, or leave --namespaces out"
  [ "$(id -u)" = 0 ] || fail "--namespaces needs root" "sudo, or leave --namespaces out"
  ip netns add "$BRIDGE-try" 2>/dev/null || fail "this machine does not permit network namespaces" "leave --namespaces out"
  ip netns delete "$BRIDGE-try"
}

await() { # await WHAT CHECK [ARGUMENT]: until it holds, no node has died, and not for ever
  local what="$1" until=$((SECONDS + START_WAIT_SECONDS)) node
  shift
  until "$@"; do
    for node in "$STATE"/node-*; do
      runs "${node##*-}" || give_up "node ${node##*-} has ended" "$node/log"
    done
    [ "$SECONDS" -lt "$until" ] || give_up "$what: not up after $START_WAIT_SECONDS s" "$STATE/node-0/log"
    sleep 1
  done
}

give_up() { # give_up WHAT LOG
  tail -n 15 "$2" >&2
  down >/dev/null
  fail "$1" "its last words are above; is a port taken? --gcs-port, --dashboard-port"
}

head_answers() { ask /api/version >/dev/null; }

all_joined() { # all_joined N
  [ "$(ask '/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE' | grep -o '"node_id"' | wc -l)" -ge "$1" ]
}

ask() { # ask PATH: of the dashboard
  local header=()
  [ ! -e "$STATE/token" ] || header=(-H @-) # not among the arguments, which everybody sees
  curl -sf --noproxy '*' -m 10 "${header[@]}" "$(cat "$STATE/dashboard")$1" \
    <<<"$([ ! -e "$STATE/token" ] || echo "Authorization: Bearer $(cat "$STATE/token")")"
}

is_ours() { # what lies there names processes to kill
  [ ! -e "$STATE" ] || { [ -d "$STATE" ] && [ ! -L "$STATE" ] && [ -O "$STATE" ]; } || fail "$STATE is not yours" "set DPO_RAY_LOCAL_STATE"
}

is_up() { is_ours && [ -e "$STATE/dashboard" ] || fail "there is no cluster in $STATE" "cluster/local.sh up"; }

status() {
  is_up
  local node
  for node in "$STATE"/node-*; do
    printf 'node %s  %-10s  %-15s  %s\n' "${node##*-}" "$(cat "$node/role")" "$(address_of "${node##*-}")" \
      "$(runs "${node##*-}" && echo runs || echo dead)"
  done
  usage
}

kill_one() { # kill_one N
  is_up
  number kill-node "${1:-}"
  runs "$1" || fail "node $1 does not run" "cluster/local.sh status"
  kill_node "$1"
  echo "killed node $1"
}

start_one() { # start_one N
  is_up
  number start-node "${1:-}"
  [ "$1" != 0 ] || fail "a head is not started again: its cluster is gone with it" "cluster/local.sh down, then up"
  [ -e "$STATE/node-$1" ] || fail "there is no node $1" "cluster/local.sh status"
  ! runs "$1" || fail "node $1 runs" "cluster/local.sh status"
  local cpus store_mib gcs_port dashboard_port alive=1 node
  read -r cpus store_mib gcs_port dashboard_port <"$STATE/settings"
  find_ray
  set_environment
  for node in "$STATE"/node-*; do if runs "${node##*-}"; then alive=$((alive + 1)); fi; done
  start_node "$1" "$(cat "$STATE/node-$1/role")"
  until all_joined "$alive"; do runs "$1" || fail "node $1 has ended" "see $STATE/node-$1/log"; sleep 1; done
  echo "started node $1"
}

cut_one() { # cut_one N SECONDS
  is_up
  [ -e "$STATE/namespaces" ] || fail "only nodes with a network of their own can be cut off" "cluster/local.sh up --namespaces"
  number cut-node "${1:-}"
  number cut-node "${2:-}"
  runs "$1" || fail "node $1 does not run" "cluster/local.sh status"
  cable="$BRIDGE.$1" # not local: the trap outlives this function
  ip link set "$cable" down
  trap 'ip link set "$cable" up' EXIT
  echo "node $1 is off the network for $2 s"
  sleep "$2"
  ip link set "$cable" up
  trap - EXIT
  echo "node $1 is back"
}

down() {
  is_ours
  [ -e "$STATE" ] || {
    echo "nothing is up"
    return 0
  }
  local node
  for node in "$STATE"/node-*; do kill_node "${node##*-}"; done
  if [ -e "$STATE/namespaces" ]; then
    for node in "$STATE"/node-*; do
      ip link delete "$BRIDGE.${node##*-}" 2>/dev/null || true # a namespace goes only when its last process is reaped
      ip netns delete "$(namespace_of "${node##*-}")" 2>/dev/null || true
    done
    ip link delete "$BRIDGE" 2>/dev/null || true
  fi
  rm -rf "$STATE"
  echo "down"
}

case "${1:-help}" in
  up | status | down) "$@" ;;
  kill-node) kill_one "${2:-}" ;;
  start-node) start_one "${2:-}" ;;
  cut-node) cut_one "${2:-}" "${3:-}" ;;
  help | -h | --help) help ;;
  *) fail "there is no command '$1'" "cluster/local.sh help" ;;
esac
