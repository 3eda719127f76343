# Sourced by the scripts that train.
# Usage: source scripts/memory_env.sh

# glibc: huge pages for large blocks, and memory that is kept instead of returned and faulted in again at every step.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-8589934592}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}
