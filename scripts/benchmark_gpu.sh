#!/usr/bin/env bash
# All benchmarks of a GPU, in about half an hour: networks in both precisions, eager and compiled, against the dense
# network of equal width and timm's ResNet; the batch norm of fields; the results of `tune`.
#
#     scripts/benchmark_gpu.sh cuda out/                                                # device, folder of the results
#     MODELS=test_c8resnet BATCH=2 SIZE=65 scripts/benchmark_gpu.sh cpu out/            # a rehearsal
set -euo pipefail
device=$1 out=$(mkdir -p "$2" && cd "$2" && pwd)
cd "$(dirname "$0")"
read -ra models <<< "${MODELS:-c8resnet50 d4resnet50 c8resnet18 d8resnet18}"
images=(--device "$device" --channels-last --batch-size "${BATCH:-128}" --size "${SIZE:-224}")
for amp in "" bfloat16; do
    precision=(${amp:+--amp "$amp"})
    for form in --eager --compile; do
        python benchmark.py "${models[@]}" "${images[@]}" "${precision[@]}" "$form" \
            --modes eval train --out "$out" --name "networks-${amp:-float32}$form"
    done
    python benchmark_norm.py --device "$device" --dtype "${amp:-float32}" > "$out/norm-${amp:-float32}.md"
    for model in "${models[@]}"; do
        for mode in "" --train; do
            python -m equivision_timm tune "$model" "${images[@]}" "${precision[@]}" $mode \
                | tee "$out/tune-$model-${amp:-float32}$mode.txt"
        done
    done
done
