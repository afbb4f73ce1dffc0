#!/bin/sh
# Check and measure this project on a GPU: sh benchmarks/gpu.sh [OUTPUT FOLDER]
#
# No GPU has run this script yet. It should take ten minutes on a large GPU. Each part has a time limit of its own, and
# its output stays in the folder even if the part fails or runs out of time. DATA_ROOT names the folder with the prepared
# dataset beauty, and FEATURES, optional, a file with its features (--features NAME=FILE), so that no encoder runs here;
# without it texts are hashed (--language_encoder lexical).
set -u
out=${1:-gpu-results}
data="--data_root ${DATA_ROOT:-data} --dataset_code beauty --device cuda --runs_root $out/runs --no-use_img_encoder"
if [ -n "${FEATURES:-}" ]; then
    data="$data --no-use_language_encoder --features $FEATURES"
else
    data="$data --language_encoder lexical"
fi
mkdir -p "$out"
export PYTHONUNBUFFERED=1 # a part that runs out of time keeps what it printed

# part NAME SECONDS COMMAND...: run a command with a time limit and keep its output.
part() {
    name=$1 limit=$2
    shift 2
    echo "== $name (at most $limit s)"
    timeout -k 10 "$limit" "$@" >"$out/$name.txt" 2>&1
    status=$?
    tail -n 15 "$out/$name.txt"
    echo "$name: exit status $status" | tee -a "$out/status.txt"
}

nvidia-smi >"$out/gpu.txt" 2>&1
part tests 120 python -m pytest -x -q tests/test_devices.py -k gpu
for batch in 32 128 1024; do
    part "speed-$batch" 90 python -m benchmarks.speed --device cuda --batch "$batch" --runs 3
done
part scaling 90 python -m benchmarks.scaling --device cuda --tables items,batch --items 10000,100000 --runs 3
part faithful 300 python train.py $data --precision bf16 --num_epochs 100 --no-early_stopping --run_name faithful
for seed in 42 43 44; do
    part "plus-$seed" 60 python train.py $data --preset plus --precision bf16 --seed "$seed" --run_name "plus-$seed"
done
cat "$out/status.txt"
