# Sourced by the run_*.sh scripts, from the repository root: environment, accelerate YAML, memory and thread settings.
# Usage: source scripts/launch_env.sh

bash scripts/setup.sh
source scripts/memory_env.sh
python=${FRUGAL_VENV:-.venv}/bin/python

# The YAML for a name in accelerate_configs/ or a path; without one, what fits the machine.
resolve_config() {
    local gpus
    case "$1" in
        "")
            gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
            if ((gpus > 1)); then config=accelerate_configs/ddp.yaml launch_flags+=(--num_processes "$gpus")
            elif ((gpus == 1)); then config=accelerate_configs/single_gpu.yaml
            else config=accelerate_configs/cpu.yaml; fi ;;
        *.yaml | *.yml) config=$1 ;;
        *) config=accelerate_configs/$1.yaml ;;
    esac
    if [[ ! -f $config ]]; then
        echo "error: accelerate config '$1' not found: give a file, or one of" \
            "$(cd accelerate_configs && echo *.yaml | sed 's/\.yaml//g')" >&2
        exit 2
    fi
}

# bf16 products are emulated, tens of times slower, on a CPU without instructions for them.
choose_cpu_precision() {
    grep -q '^mixed_precision: bf16' "$config" && grep -qs '^flags' /proc/cpuinfo || return 0
    grep -q 'role: cpu' "$config" || ! command -v nvidia-smi >/dev/null || return 0
    if ! grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
        echo "This CPU has no bf16 instructions: training in fp32 instead of $config's bf16."
        launch_flags+=(--mixed_precision no)
    fi
}

# accelerate would give a worker one thread, or say that it chose for us.
choose_threads() {
    local cores processes
    [[ -n ${OMP_NUM_THREADS:-} ]] && return 0
    cores=$(lscpu -p=core,socket 2>/dev/null | grep -v '^#' | sort -u | wc -l || true)
    ((cores > 0)) || cores=$(getconf _NPROCESSORS_ONLN)
    processes=$(sed -n 's/^num_processes: *\([0-9]*\).*/\1/p' "$config")
    launch_flags+=(--num_cpu_threads_per_process "$((cores > ${processes:-1} ? cores / ${processes:-1} : 1))")
}
