#!/usr/bin/env bash
# Everything that a GPU has to show, within 8 minutes and without a network: tests, operator, training, inference.
#
#     benchmarks/gpu.sh                  # all parts; figures in docs/gpu/, tables in docs/kernels.md and docs/training.md
#     benchmarks/gpu.sh --device cpu --quick     # the same lines on a CPU with small numbers, in 3 minutes
#     benchmarks/gpu.sh operator training        # some parts; `more` (compiled models, Swin-T) only if named
#
# Every part has a time limit and saves each figure as it comes; a part that fails does not stop the others.
# PYTHON names the interpreter (default: python3). If the original's CUDA kernel is installed
# (MultiScaleDeformableAttention), or MSDA_SOURCE names the folder of its source, `ops`, it is measured as well.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda quick= parts=()
while (($#)); do
  case $1 in
    --device) device=$2; shift ;;
    --quick) quick=1 ;;
    tests | operator | training | inference | scenes | more | tables) parts+=("$1") ;;
    *) echo "$0: $1 is no part or option; see the first lines of this file" >&2; exit 2 ;;
  esac
  shift
done
((${#parts[@]})) || parts=(tests operator training inference scenes tables)

if [[ -n $quick ]]; then
  size=64 problems=(--batch 1)
  [[ $device == cpu ]] && problems+=(--image 128x128)
  step=(--size 64 --batch 1 --targets 3 --repeats 1 --bf16 --device "$device")
  models=(--backbones r50 --dtype bfloat16)
  scenes=(--steps 4 --eval-images 4 --precision bf16)
else
  size=1024 problems=()
  step=(--size 1024 --batch 8 --targets 20 --repeats 5 --bf16 --device "$device")
  models=(--backbones r50 swin-l --batch 8 1 --dtype bfloat16 float32 float16 --variants stock ours graph)
  scenes=(--steps 500 --workers 4)
fi
python=${PYTHON:-python3}
figures=docs/gpu
if [[ $device == cpu || -n $quick ]]; then figures=$(mktemp -d); fi
mkdir -p "$figures"
export PYTHONPATH=$PWD/src:$PWD/tests/support:${PYTHONPATH:-} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [[ $device == cpu ]]; then export MASK2FORMER_HF_TEST_DEVICE=cpu CUDA_VISIBLE_DEVICES=; fi
failed=()

run() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS; shift 2
  [[ $device == cpu ]] && limit=$((limit * 5)) # a rehearsal may meet a busy machine
  echo; echo "== $name: $*"
  timeout --kill-after=5 "$limit" "$@"
  local code=$?
  echo "== $name: exit $code after $((SECONDS - start)) s"
  ((code)) && failed+=("$name")
}

bench() { # NAME SECONDS SCRIPT ARGUMENTS...
  local name=$1 limit=$2 script=$3; shift 3
  run "$name" "$limit" "$python" "benchmarks/$script" "$@" --json "$figures/$name.json"
}

build_the_originals_kernel() {
  local target=${TMPDIR:-/tmp}/mask2former_hf_msda
  if [[ -n ${MSDA_SOURCE:-} && $device == cuda ]]; then
    cp -r "$MSDA_SOURCE" "$target"
    # Written for PyTorch 1: what a tensor's type() did then is is_cuda() and scalar_type() today.
    sed -i 's/\.type()\.is_cuda()/.is_cuda()/g; s/\([a-z_]*\)\.type(), "ms_deform/\1.scalar_type(), "ms_deform/' \
      "$target"/src/*.h "$target"/src/cuda/*.cu
    sed -i 's/\.data</.data_ptr</g' "$target"/src/cuda/*.cu
    (cd "$target" && run build 120 env FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" \
      "$python" setup.py build_ext --inplace) >"$target/log" 2>&1
    export PYTHONPATH=$target:$PYTHONPATH
  fi
}

for part in "${parts[@]}"; do
  case $part in
    tests)
      files=(tests/kernels/test_{triton_kernel,window_attention,norms_on_gpu}.py tests/model/test_on_gpu.py)
      if [[ $device == cpu ]]; then
        export TRITON_INTERPRET=1
        run tests 120 "$python" -m pytest -q -x -p no:cacheprovider "${files[@]}" -k "${quick:+three or real or results or cpus or shifted}"
        unset TRITON_INTERPRET
      else
        build_the_originals_kernel &
        run tests 120 "$python" -m pytest -q -p no:cacheprovider -n 8 "${files[@]}" \
          -k "not tritons_interpreter" --junitxml "$figures/tests.xml"
        wait
        export PYTHONPATH=${TMPDIR:-/tmp}/mask2former_hf_msda:$PYTHONPATH
      fi ;;
    operator)
      bench operator 80 deformable_attention.py --device "$device" --repeats 3 "${problems[@]}" ;;
    training)
      bench training 60 training_step.py --backbone r50 "${step[@]}" --profile "$figures/training_profile.txt" ;;
    inference)
      bench inference 110 inference.py --device "$device" --size $size --repeats 3 --stages "${models[@]}" ;;
    scenes)
      bench scenes 90 scenes_training.py "${scenes[@]}" ;;
    more)
      bench training_swin 60 training_step.py --backbone swin-t "${step[@]}"
      bench inference_compiled 90 inference.py --device "$device" --size $size --repeats 3 --backbones r50 \
        --dtype bfloat16 --variants stock ours compiled
      bench training_compiled 120 training_step.py --backbone r50 "${step[@]}" --compile ;;
    tables)
      run tables 20 "$python" benchmarks/gpu_tables.py "$figures" ;;
  esac
done
((${#failed[@]})) && { echo "failed: ${failed[*]}"; exit 1; }
echo "all parts done in $SECONDS s; figures in $figures"
