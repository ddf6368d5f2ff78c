#!/usr/bin/env bash
# All that is measured on a GPU, in one command of less than ten minutes and without a network:
#
#     benchmarks/wheels.sh .whl                    # beforehand, where there is a network: what the machine lacks
#     OUT=results benchmarks/gpu.sh                # there; JSON and gpu.log in $OUT
#     OUT=/tmp/try benchmarks/gpu.sh --device cpu  # the same calls at small sizes, to see that they run
#
# Every part has its own time limit, and one that fails does not stop the next; the exit code says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda
[ "${1:-}" = --device ] && device=$2
out=${OUT:-gpu-results} wheels=${WHEELS:-.whl} python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if compgen -G "$wheels/*.whl" >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -r "$site"' EXIT
  $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || exit
  PYTHONPATH=$PYTHONPATH:$site
fi

failed=()
part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" 2>&1 || failed+=("$name ($?)")
  echo "== $name: $((SECONDS - start)) s"
}

if [ "$device" = cuda ]; then
  sae=(--d 3072 --n 65536 --k 64 --batch 8192)
  streaming=(--copies 4 --n-latents 16384 --batch-size 8192)
  export TRITON_INTERPRET=0
  llama=(--shapes 3b --dtype bfloat16) capture=(--shape 3b --dtype bfloat16) inference=(--shape 3b --new-tokens 32 --rounds 5)
else
  streaming=(--copies 1 --n-latents 256 --k 8 --batch-size 256 --rounds 1)
  sae=(--d 64 --n 2048 --k 8 --batch 256 --rounds 2)
  llama=(--shapes tiny --rounds 2 --in-flight 2048) capture=(--shape tiny --rounds 2)
  inference=(--shape embedded --new-tokens 8 --rounds 2)
fi
all() {
  [ "$device" = cuda ] && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  part kernels 120 $python -m pytest -q -p no:cacheprovider tests/test_sae_kernels.py
  part sae-aux 150 $python -m benchmarks.bench_sae --device $device --dead 0.01 "${sae[@]}" --out "$out/sae-aux.json"
  part sae 90 $python -m benchmarks.bench_sae --device $device --dead 0 "${sae[@]}" --only "product, fastest" "matrix rate" \
    sparsify --out "$out/sae.json"
  part llama3 90 $python -m benchmarks.bench_llama3 --measures mfu --device $device "${llama[@]}" --out "$out/llama3.json"
  part capture 90 $python -m benchmarks.bench_capture --parts gpu --device $device "${capture[@]}" --out "$out/capture.json"
  part streaming 90 $python -m benchmarks.bench_streaming --device $device "${streaming[@]}" --out "$out/streaming.json"
  part inference 60 $python -m benchmarks.bench_inference --device $device --batches 1 "${inference[@]}" --out "$out/inference.json"
  [ ${#failed[@]} -eq 0 ] && echo "all parts passed" && return
  echo "failed: ${failed[*]}"
  return 1
}
all > >(tee "$out/gpu.log")
