# Sourced by the run_*.sh scripts: environment, accelerate YAML, thread settings, and the launch itself.
# Usage: source scripts/launch_env.sh
# Nothing changes the folder: relative paths mean the folder of whoever calls. Empty arrays are written
# ${a[@]+"${a[@]}"} because bash before 4.4 (macOS) takes them for unset.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$repo/scripts/setup.sh"
python=${FRUGAL_VENV:-.venv}/bin/python
[[ $python == /* ]] || python=$repo/$python
launch_flags=()

# Sets config, launcher, processes, machines, precision, role and distributed_type: the YAML for a name in
# accelerate_configs/ or a path, or without one what fits the machine.
resolve_config() {
    local name=$1
    count_gpus
    if [[ -z $name ]]; then
        if ((gpus > 1)); then name=ddp; elif ((gpus == 1)); then name=single_gpu; else name=cpu; fi
    fi
    config=$repo/accelerate_configs/$name.yaml
    [[ -f $config ]] || config=$name
    if [[ ! -f $config ]]; then
        echo "error: accelerate config '$name' not found: give a file, or one of" \
            "$(cd "$repo/accelerate_configs" && echo *.yaml | sed 's/\.yaml//g')" >&2
        exit 2
    fi
    launcher=("$python" -m accelerate.commands.launch --config_file "$config")
    processes=$(yaml_value num_processes)
    [[ $processes =~ ^[1-9][0-9]*$ ]] || processes=1
    machines=$(yaml_value num_machines)
    [[ $machines =~ ^[1-9][0-9]*$ ]] || machines=1
    precision=$(yaml_value mixed_precision)
    role=$(yaml_value role)
    distributed_type=$(yaml_value distributed_type)
    if [[ -z $1 ]] && ((gpus > 1)); then
        processes=$gpus
        launch_flags+=(--num_processes "$gpus")
    fi
}

# A value of the YAML, without quotes and comment.
yaml_value() {
    sed -n "s/^ *$1: *//p" "$config" | sed "s/#.*//; s/[[:space:]]*$//; s/^[\"']//; s/[\"']$//" | head -n 1
}

# Sets gpus: whole GPUs (not the MIG parts of one), as far as CUDA may see them.
count_gpus() {
    local visible
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        visible=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^ *[0-9GM]' || true) # numbers, GPU-… and MIG-…
        if ((visible < gpus)); then gpus=$visible; fi
    fi
}

# choose_precision arguments...   --fp32, --bf16 or --fp16 among the program's arguments is for the launcher too. Without
# one, fp32 on a CPU that would emulate bf16, tens of times slower, where the strategy has it.
choose_precision() {
    local asked=
    while (($#)); do
        case "$1=${2:-}" in
            --[bf][fp][0-9]*=[Ff]alse*) ;;
            --fp32=*) asked=no ;;
            --bf16=*) asked=bf16 ;;
            --fp16=*) asked=fp16 ;;
        esac
        shift
    done
    if [[ -n $asked ]]; then
        precision=$asked
        launch_flags+=(--mixed_precision "$asked")
        return
    fi
    [[ $precision == bf16 && -r /proc/cpuinfo ]] && grep -q '^flags' /proc/cpuinfo || return 0
    [[ $role == cpu ]] || ((gpus == 0)) || return 0
    if ! grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
        if [[ $role == colossalai*plugin=gemini* ]]; then
            echo "This CPU has no bf16 instructions, and Gemini no fp32: bf16 is emulated, tens of times slower."
            return
        fi
        echo "This CPU has no bf16 instructions: training in fp32 instead of $config's bf16."
        precision=no
        launch_flags+=(--mixed_precision no)
    fi
}

# name_data data   Adds to flags what names the text: embedded, token files, text files, or a dataset on the hub.
name_data() {
    local data=$1
    # where none are, the error names them
    local looks_like_files='^\.{0,2}/|/$|[*?[]|\.(txt|json|jsonl|parquet|gz|bz2|xz|zst)$'
    if [[ $data == embedded ]]; then :
    elif [[ -f $data.bin || -f $data/train.bin ]]; then flags+=(--dataset_path "$data")
    elif [[ -e $data || $data =~ $looks_like_files ]]; then flags+=(--train_file "$data")
    else flags+=(--dataset_name "$data"); fi
}

# accelerate would give a worker one thread, or say that it chose for us; its flag for it is not DeepSpeed's.
choose_threads() {
    local cores physical
    [[ -z ${OMP_NUM_THREADS:-} ]] || return 0
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) # nproc knows what a container or taskset leaves
    physical=$(lscpu -p=core,socket 2>/dev/null | grep '^[0-9]' | sort -u | wc -l || true) # without hyper-threads
    if ((physical > 0 && physical < cores)); then cores=$physical; fi
    export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
}

# check_then_launch script.py arguments...   Bad input ends in the check, with exit code 2: the launcher would make it 1.
check_then_launch() {
    local script=$1 word
    check "$@"
    shift
    for word in "$@"; do
        if [[ $word == --dry_run ]]; then exit; fi # the check has printed the plan
        if [[ $word == --overwrite_cache || $word == --overwrite_cache=* ]]; then
            set -- "$@" --overwrite_cache false # the check has done it
            break
        fi
    done
    exec "${launcher[@]}" ${launch_flags[@]+"${launch_flags[@]}"} "$repo/$script" "$@"
}

# check script.py arguments...   Ends this shell with the check's exit code if it fails.
check() {
    local script=$repo/$1 deepspeed=false fsdp=false
    shift
    [[ $distributed_type != DEEPSPEED ]] || deepspeed=true
    [[ $distributed_type != FSDP ]] || fsdp=true
    # as the launcher would set them
    ACCELERATE_USE_DEEPSPEED=$deepspeed ACCELERATE_USE_FSDP=$fsdp \
        ACCELERATE_DEEPSPEED_ZERO_STAGE=$(yaml_value zero_stage) \
        ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=$(yaml_value offload_optimizer_device) \
        ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE=$(yaml_value offload_param_device) \
        FSDP_OFFLOAD_PARAMS=$(yaml_value fsdp_offload_params) \
        PARALLELISM_CONFIG_TP_SIZE=$(yaml_value parallelism_config_tp_size) \
        PARALLELISM_CONFIG_DP_REPLICATE_SIZE=$(yaml_value parallelism_config_dp_replicate_size) \
        WORLD_SIZE=$processes LOCAL_WORLD_SIZE=$((processes / machines)) \
        ACCELERATE_MIXED_PRECISION=${precision:-no} ROLE_NAME=$role \
        ACCELERATE_FP8_BACKEND=$(yaml_value backend) \
        interruptible "$python" "$script" "$@" --check_arguments || exit
}

# launch script.py arguments...   As check_then_launch without the check, and this shell goes on after it.
launch() {
    local script=$repo/$1
    shift
    interruptible "${launcher[@]}" ${launch_flags[@]+"${launch_flags[@]}"} "$script" "$@"
}

# Runs a command such that a signal to this shell ends it too. In the background, as bash hears signals only while it
# waits.
interruptible() {
    trap 'stop_jobs 143' TERM
    trap 'stop_jobs 130' INT
    "$@" &
    wait "$!" || return
    trap - TERM INT
}

# TERM for either signal: what bash starts in the background ignores INT.
stop_jobs() {
    kill $(jobs -p) 2>/dev/null || true
    wait
    exit "$1"
}
