# Sourced by run_clm.sh and run_clm_synthetic.sh: their positional arguments, and a model that fits the machine.
# Usage: source scripts/clm_arguments.sh, with a function usage; then read_arguments "$@"

# Parameters in millions, layers and hidden size of the OPTs that one device may hold (Zhang et al. 2022, table 1).
opt_shapes="125m 125 12 768
350m 331 24 1024
1.3b 1316 24 2048
2.7b 2652 32 2560
6.7b 6658 32 4096
13b 12853 40 5120"

# Sets flags (what the positional arguments mean to run_clm.py), size (of an OPT; empty where the model is named
# otherwise), extra (the user's own flags), and all that check_then_launch needs.
read_arguments() {
    local positional=() word name
    for word in "$@"; do
        if [[ $word == --help || $word == -h ]]; then
            usage
            source "$scripts/launch_env.sh"
            exec "$python" "$repo/run_clm.py" --help
        fi
    done
    FRUGAL_COMMAND="bash scripts/$(basename "$0")${1+$(printf ' %q' "$@")}" # for the model card
    export FRUGAL_COMMAND
    # A negative number is no flag: run_clm.py says what is wrong with it.
    while (($#)) && [[ $1 != -* || $1 =~ ^-[0-9.]+$ ]]; do positional+=("$1") && shift; done
    if ((${#positional[@]} > 5)); then
        echo "error: too many arguments: ${positional[5]}" >&2
        usage >&2
        exit 2
    fi
    extra=("$@")
    batch=${positional[0]:-16}
    cap=${positional[1]:-0}
    source "$scripts/launch_env.sh"
    choose_processes "${positional[3]:-}" "${positional[4]:-}"
    choose_precision "$@"
    choose_threads

    flags=(--per_device_train_batch_size "$batch" --mem_cap "$cap")
    block=$(value_of --block_size)
    if $on_cpu && [[ -z $block ]]; then
        block=128
        echo "block size: $block tokens, as this runs on a CPU; --block_size sets another"
        flags+=(--block_size "$block")
    fi
    size=
    name=${positional[2]:-}
    if [[ $name == 6.7 ]]; then
        size=6.7b
    elif [[ $name =~ ^[0-9][0-9.]*[bBmM]?$ ]]; then
        size=$(tr BM bm <<<"$name") # of an unknown one, run_clm.py says which are known
    elif [[ -n $name ]]; then
        flags+=(--model_name_or_path "$name")
    elif ! given --model_name_or_path --config_name --model_type --model_size; then
        choose_size
    fi
}

# choose_processes gpu-num config   Sets on_cpu, and what resolve_config sets.
choose_processes() {
    local number=$1 name=$2
    if [[ -n $number && ! $number =~ ^[1-9][0-9]*$ ]]; then
        echo "error: gpu-num '$number': give the number of processes, 1 or more" >&2
        exit 2
    fi
    count_gpus
    if [[ -z $name ]]; then
        number=${number:-1}
        if ((gpus == 0)); then name=cpu; elif ((number == 1)); then name=single_gpu; else name=ddp; fi
    fi
    resolve_config "$name"
    if [[ -n $number ]]; then
        processes=$number
        launch_flags+=(--num_processes "$number")
    fi
    on_cpu=false
    if [[ $role == cpu ]] || ((gpus == 0)); then
        on_cpu=true
    elif ((processes > gpus)); then
        echo "error: gpu-num $processes: but only $gpus GPUs are visible; give fewer, or cpu as the fifth argument" >&2
        exit 2
    fi
}

# value_of --flag   Prints the user's value of a flag, nothing where there is none.
value_of() {
    local word last=
    for word in ${extra[@]+"${extra[@]}"}; do
        if [[ $last == "$1" ]]; then echo "$word" && return; fi
        if [[ $word == "$1"=* ]]; then echo "${word#*=}" && return; fi
        last=$word
    done
}

# given --flag...   Whether the user has given one of these.
given() {
    local word
    for word in ${extra[@]+"${extra[@]}"}; do
        if [[ " $* " == *" ${word%%=*} "* ]]; then return; fi
    done
    return 1
}

# Sets size to the largest OPT whose training fits, the smallest if none does; on a CPU a larger one would take days.
# A parameter takes 16 bytes (value, gradient and two averages in fp32); a token takes 34 bytes of activations for each
# layer and hidden unit (Korthikanti et al. 2022, section 4.1, without the attention's scores).
choose_size() {
    local room need reason where=
    if $on_cpu; then room=$(available_bytes); else room=$(smallest_gpu_bytes) where=" on the smallest GPU"; fi
    if [[ -z $room ]]; then
        size=125m
        reason="the smallest, as the machine does not say how much memory it has"
    else
        if $on_cpu; then room=$((room / processes)); fi
        read -r size need room <<<"$(awk -v room="$room" -v cap="$cap" -v batch="$batch" -v block="${block:-1024}" \
            -v cpu="$on_cpu" '
            BEGIN { room /= 1e9; if (cap > 0 && cap < room) room = cap }
            { gb = (16 * $2 * 1e6 + 34 * $3 * $4 * batch * block) / 1e9 }
            NR == 1 || (gb <= room && cpu == "false") { size = $1; need = gb }
            END { printf "%s %.1f %.1f", size, need, room }' <<<"$opt_shapes")"
        reason="training takes about $need GB, and a process can have $room GB$where"
        if $on_cpu; then reason+="; a CPU is too slow for a larger one"; fi
    fi
    echo "model: OPT-$size ($reason); the third argument names another"
}

smallest_gpu_bytes() {
    nvidia-smi ${CUDA_VISIBLE_DEVICES:+--id="$CUDA_VISIBLE_DEVICES"} --query-gpu=memory.total \
        --format=csv,noheader,nounits 2>/dev/null | grep -E '^ *[0-9]+ *$' | sort -n | head -n 1 |
        awk '{ printf "%.0f", $1 * 1048576 }' || true
}

available_bytes() {
    if [[ -r /proc/meminfo ]]; then
        awk '/^MemAvailable:/ { printf "%.0f", $2 * 1024 }' /proc/meminfo
    else
        sysctl -n hw.memsize 2>/dev/null || true # macOS
    fi
}

# can_be_had name [config]   Whether a model, or a dataset's configuration, is in the hub's cache or the hub in reach.
can_be_had() {
    PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} "$python" -m common.data.hub "$@"
}
