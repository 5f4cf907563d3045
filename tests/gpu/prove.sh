#!/usr/bin/env bash
# What a change of the kernels must pass on a machine with a GPU, and the measurements there. Parts run in
# the given order, each with its own time limit; a part that fails does not stop the others.
#
#     tests/gpu/prove.sh OUT_FOLDER PART...
#
#     harness    several ranks in one process against the CPU's bits, faults, sanitizers (builds cuda_ranks.cu)
#     op-chain-N dispatch and combine back to back on N GPUs, without XLA, in both modes
#     row-rates  rows loaded, stored, copied, encoded and decoded by few SMs: what bounds ops in formats
#     soak       20,000 steps of eight ranks with random routing and delays
#     suite-N    conformance and transformations, N ranks that share the GPU
#     graphs-N   the same, captured in CUDA graphs
#     links-N    the same, N ranks with a GPU each
#     two-each-N the same, two ranks on each of N / 2 GPUs, under MPS; JAX_DEEPEP_NODES=2 declares nodes
#     nodes-N    the same, N ranks that share the GPU, on two declared nodes
#     hosts-N    the same on two pretended hosts, by NVSHMEM
#     ucx-N      the same between hosts of one rank each, over TCP: xla_ffi/nvshmem/README.md says what UCX needs
#     ucx-faults, ucx-steps, ucx-example   over TCP: a late and a killed rank; 2,000 steps of four ranks
#                that share the GPU, under MPS (PART_LIMIT_S=600); the training example with two
#     alone-N    the same, where each rank sees only its own GPU (CUDA_VISIBLE_DEVICES)
#     faults     ranks that are killed, raise or stall, without MPS; plain, then captured
#     layers-N   tests/flax, N ranks with a GPU each
#     shared-layers-N  the same, N ranks that share the GPU
#     matmuls    the grouped matmul for Hopper against float64, and its products beside dense ones: two minutes
#     chain-N    bench ops for few tokens in both modes, captured, N ranks with a GPU each
#     unit       all of tests/unit with two ranks
#     example    the training example with 8 ranks
#     bench-N    python -m jax_deepep.bench, tables and JSON into OUT_FOLDER
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$1
shift
mkdir -p "$out"
failed=()

share() {
  local ranks=$1
  shift
  python3 -m jax_deepep.launch -n "$ranks" --share-gpu --console first --log-dir "$out/logs$ranks" -- "$@"
}

spread() {
  local ranks=$1
  shift
  python3 -m jax_deepep.launch -n "$ranks" --platform cuda --console first --log-dir "$out/logs$ranks" -- "$@"
}

begin_mps() {
  mkdir -p "$out/mps"
  export CUDA_MPS_PIPE_DIRECTORY=$(realpath "$out/mps") CUDA_MPS_LOG_DIRECTORY=$(realpath "$out/mps")
  nvidia-cuda-mps-control -d || return
  trap 'echo quit | nvidia-cuda-mps-control' EXIT
}

two_each() {
  local ranks=$1
  shift
  begin_mps || return
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.3 spread "$ranks" bash -c \
    "CUDA_VISIBLE_DEVICES=\$((JAX_LOCAL_DEVICE_IDS / 2)) JAX_LOCAL_DEVICE_IDS=0 $*"
}

# Run a command in which NVSHMEM puts by UCX, over TCP.
over_tcp() {
  NVSHMEM_REMOTE_TRANSPORT=ucx NVSHMEM_DISABLE_P2P=1 NVSHMEM_UCX_TLS=tcp,cuda_copy,self NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME=lo \
    UCX_NET_DEVICES=lo UCX_TCP_PUT_ENABLE=n UCX_MEMTYPE_CACHE=n UCX_ERROR_SIGNALS= \
    CUDA_DEVICE_MAX_CONNECTIONS="${QUEUES:-32}" TIMEOUT_S=20 "$@"
}

suite="python3 -m pytest -q tests/conformance tests/transforms -m 'not collectives'"

build() {
  [ -x "$out/$1" ] || python3 tests/rank_programs.py "$1" "$out"
}

part() {
  local ranks=${1##*-}
  case $1 in
    harness) JAX_PLATFORMS=cuda python3 -m pytest -q tests/gpu ;;
    op-chain-*) build op_chain && for mode in throughput low_latency; do "$out/op_chain" $mode "$ranks" 1 8 32 128 256; done ;;
    row-rates) build row_rates && "$out/row_rates" ;;
    soak) build cuda_ranks && "$out/cuda_ranks" soak 20000 ;;
    suite-*) share "$ranks" bash -c "$suite" ;;
    graphs-*) XLA_FLAGS="--xla_gpu_enable_command_buffer=+CUSTOM_CALL --xla_gpu_graph_min_graph_size=1" share "$ranks" bash -c "$suite" ;;
    nodes-*) JAX_DEEPEP_NODES=2 share "$ranks" bash -c "$suite" ;;
    hosts-*) JAX_DEEPEP_HOSTS=2 JAX_DEEPEP_NODES=2 NVSHMEM_REMOTE_TRANSPORT=none NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME=lo \
      share "$ranks" bash -c "$suite" ;;
    ucx-faults) QUEUES=8 JAX_PLATFORMS=cuda over_tcp python3 -m pytest -q tests/multiprocess/test_faults.py \
      -k "between and hosts and (stalls_before or dies)" ;;
    ucx-steps)
      begin_mps || return
      QUEUES=8 JAX_PLATFORMS=cuda CUDA_VISIBLE_DEVICES=0 XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_DEEPEP_STRESS_STEPS=2000 over_tcp \
        python3 -m pytest -q tests/multiprocess/test_stress.py -k "cuda and hosts" ;;
    ucx-example) over_tcp spread 2 bash -c \
      'JAX_DEEPEP_HOST_ID=$JAX_DEEPEP_LAUNCH_RANK exec python3 examples/train_moe.py --compare --steps 20' ;;
    ucx-*) JAX_DEEPEP_HOSTS=$ranks JAX_DEEPEP_NODES=$ranks over_tcp spread "$ranks" bash -c "$suite" ;;
    links-*) spread "$ranks" bash -c "$suite" ;;
    two-each-*) two_each "$ranks" "$suite" ;;
    alone-*) spread "$ranks" bash -c "CUDA_VISIBLE_DEVICES=\$JAX_LOCAL_DEVICE_IDS JAX_LOCAL_DEVICE_IDS=0 $suite" ;;
    layers-*) spread "$ranks" python3 -m pytest -q tests/flax ;;
    shared-layers-*) share "$ranks" bash -c 'NCCL_HOSTID=$JAX_DEEPEP_LAUNCH_RANK exec python3 -m pytest -q tests/flax' ;;
    matmuls) JAX_PLATFORMS=cuda timeout 120 python3 -m pytest -q tests/flax/test_mosaic_matmul.py &&
      JAX_PLATFORMS=cuda timeout 300 python3 -m jax_deepep.bench matmuls --json "$out/matmuls.json" --markdown "$out/matmuls.md" ;;
    chain-*) XLA_FLAGS="--xla_gpu_enable_command_buffer=+CUSTOM_CALL --xla_gpu_graph_min_graph_size=1" spread "$ranks" \
      python3 -m jax_deepep.bench ops --tokens 1,8,32,128 --hidden 7168 --experts 256 --capacity worst --modes throughput low_latency \
      --num-sms auto --json "$out/chain$ranks.json" --markdown "$out/chain$ranks.md" ;;
    unit) share 2 python3 -m pytest -q tests/unit -m "not collectives" ;;
    faults) JAX_PLATFORMS=cuda python3 -m pytest -q tests/multiprocess/test_faults.py -k cuda ;;
    example) share 8 python3 examples/train_moe.py --steps 30 ;;
    bench-*) share "$ranks" python3 -m jax_deepep.bench --json "$out/g$ranks.json" --markdown "$out/g$ranks.md" ;;
    *) echo "no part is called $1" >&2 && return 2 ;;
  esac
}

export -f share spread begin_mps two_each over_tcp build part
export out suite
for name in "$@"; do
  echo "== $name"
  timeout "${PART_LIMIT_S:-300}" bash -c 'part "$1"' part "$name" || failed+=("$name")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
