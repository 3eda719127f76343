#!/usr/bin/env bash
# Runs one machine's part of a training over several; start it on every machine with the same arguments but the first.
# Usage: bash scripts/run_multi_node.sh <node-rank> <nodes> <master-address> <processes-per-node> \
#            [accelerate-config] [script] [flags...]
#   node-rank            0 on the machine with the master address, 1, 2, ... on the others
#   nodes                how many machines there are
#   master-address       address or name of machine 0, as the others reach it
#   processes-per-node   processes on each machine, one for each of its devices
#   accelerate-config    a name in accelerate_configs/, or a file   (default: multi_node)
#   script               run_pretraining.py, run_clm.py or run_glue.py   (default: run_pretraining.py)
#   flags                of the script; the first argument that begins with - ends the positional ones
#   MASTER_PORT          in the environment: a port that is free on machine 0   (default: 29500)
#   MAX_RESTARTS         how often a run of which a process died goes on from its last checkpoint by itself; needs
#                        --output_dir   (default: 0)
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   the network to use   (default: the one on the way to machine 0)
# --output_dir must be a folder that all machines see. Text is prepared on each machine that does not find it prepared.
set -euo pipefail

scripts=$(dirname "${BASH_SOURCE[0]}")
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
refuse() { echo "error: $*" >&2 && exit 2; }

for word in "$@"; do
    if [[ $word == --help || $word == -h ]]; then usage && exit; fi
done
FRUGAL_COMMAND="bash scripts/run_multi_node.sh${1+$(printf ' %q' "$@")}" # for the model card
export FRUGAL_COMMAND
positional=()
while (($#)) && [[ $1 != -* || $1 =~ ^-[0-9.]+$ ]]; do positional+=("$1") && shift; done
if ((${#positional[@]} < 4 || ${#positional[@]} > 6)); then
    echo "error: ${#positional[@]} arguments before the flags instead of 4 to 6" >&2
    usage >&2
    exit 2
fi
rank=${positional[0]} nodes=${positional[1]} master=${positional[2]} per_node=${positional[3]}
script=${positional[5]:-run_pretraining.py}
port=${MASTER_PORT:-29500} restarts=${MAX_RESTARTS:-0}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || refuse "nodes '$nodes': give the number of machines, 1 or more"
[[ $rank =~ ^(0|[1-9][0-9]*)$ ]] && ((rank < nodes)) ||
    refuse "node-rank '$rank': give a number from 0 to $((nodes - 1)), another on each machine"
[[ -n $master ]] || refuse "master-address '': give the address of machine 0"
[[ $per_node =~ ^[1-9][0-9]*$ ]] || refuse "processes-per-node '$per_node': give the number of processes, 1 or more"
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] && ((port < 65536)) || refuse "MASTER_PORT '$port': give a port from 1 to 65535"
[[ $restarts =~ ^[0-9]+$ ]] || refuse "MAX_RESTARTS '$restarts': give a number"

source "$scripts/launch_env.sh"
[[ $script == run_*.py && -f $repo/$script ]] ||
    refuse "script '$script': give one of $(cd "$repo" && echo run_*.py)"
resolve_config "${positional[4]:-multi_node}"
if ((gpus > 0 && per_node > gpus)) && [[ $role != cpu ]]; then
    refuse "processes-per-node $per_node: only $gpus GPUs are visible here; give fewer"
fi
choose_precision "$@"
processes=$per_node # which share this machine's cores
choose_threads
processes=$((nodes * per_node)) machines=$nodes

# find_network   Sets network to that of machine 0's address, here or on the way there; empty where nothing says it.
find_network() {
    local address
    network=
    command -v getent >/dev/null && command -v ip >/dev/null || return 0
    address=$(getent ahosts "$master" | awk 'NR == 1 { print $1 }' || true)
    [[ -n $address ]] || refuse "master-address '$master': this machine does not know that name"
    network=$(ip -o address show to "$address" | awk 'NR == 1 { print $2 }' || true)
    [[ -n $network ]] || network=$(ip -o route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p' || true)
}
if [[ -z ${GLOO_SOCKET_IFNAME:-}${NCCL_SOCKET_IFNAME:-} ]]; then
    find_network
    if [[ -n $network ]]; then
        echo "machine $rank of $nodes: talks to $master over $network"
        export GLOO_SOCKET_IFNAME=$network NCCL_SOCKET_IFNAME=$network
    fi
fi

launch_flags+=(--num_machines "$nodes" --machine_rank "$rank" --num_processes "$processes")
launch_flags+=(--main_process_ip "$master" --main_process_port "$port" --rdzv_backend static --same_network)
launch_flags+=(--max_restarts "$restarts")
launch_flags+=(--deepspeed_multinode_launcher standard) # this script is what starts it on each machine
check_then_launch "$script" "$@"
