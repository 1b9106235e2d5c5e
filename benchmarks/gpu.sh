#!/usr/bin/env bash
# Build, test and time on a machine with a GPU that may have no network.
#   benchmarks/gpu.sh [-c COMMIT] [-t SECONDS] DIR [SUITE...]
# DIR gets a JSON file for each suite, tests.txt and log.txt; a short table comes last. What DIR
# already holds is not run again, so a second call goes on where time ran out. Ends within SECONDS
# (530). COMMIT is what results name where there is no .git. Wheels in .whl/ are installed beside.
# Without a GPU only the small shapes run, and everything else says why it is skipped.
set -u

usage() { echo "usage: $0 [-c COMMIT] [-t SECONDS] DIR [SUITE...]" >&2; exit 2; }

commit= limit=530
while getopts c:t: option; do
    case $option in
        c) commit=$OPTARG ;;
        t) limit=$OPTARG ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || usage
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
log=$out/log.txt
# a suite, and the most seconds that it may take
declare -A most=(
    [qformer_attention]=200 [itc]=100 [stage1_step]=150 [glue]=60 [qformer]=90 [stage2_step]=150
    [captioning]=150
)
suites=("$@")
[ $# -gt 0 ] || suites=(qformer_attention itc stage1_step glue qformer stage2_step captioning)
for suite in "${suites[@]}"; do
    [ -n "${most[$suite]:-}" ] || { echo "no suite $suite; known: ${!most[*]}" >&2; exit 2; }
done

left() { echo $((limit - SECONDS)); }

# MOST SECONDS, then a command; its output goes to the log. 124 where time ran out.
run() {
    local seconds=$1
    shift
    [ "$seconds" -lt "$(left)" ] || seconds=$(left)
    [ "$seconds" -gt 5 ] || return 124
    printf '\n$ %s\n' "$*" >>"$log"
    # an interrupt lets pytest write what it has, unless the script was started deaf to it
    timeout --signal=INT --kill-after=10 "$seconds" env --default-signal=INT "$@" >>"$log" 2>&1
}

packages=
if compgen -G ".whl/*.whl" >/dev/null; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    run 60 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$packages" .whl/*.whl ||
        echo "wheels: not all installed, see log.txt"
fi
export PYTHONPATH="$PWD${packages:+:$packages}${PYTHONPATH:+:$PYTHONPATH}"
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
echo "device: ${gpu:-no CUDA device, small shapes on the CPU}"

if run 180 "$python" setup.py build_ext --inplace; then
    echo "build: $(cat blip2fast/_C.txt)"
else
    echo "build: failed or out of time, see log.txt"
fi

if [ -s "$out/tests.txt" ]; then
    echo "tests: done before"
else
    # kernels that run through Triton's interpreter elsewhere run on the GPU here
    mapfile -t files < <(grep -rl --include='test_*.py' 'pytest.mark.gpu' tests)
    marker=(-m gpu)
    if [ -n "$gpu" ]; then
        files+=(tests/ops/test_*_triton.py)
        marker=(-m "gpu or not slow")
    fi
    "$python" -c 'import xdist' 2>/dev/null && [ -n "$gpu" ] && marker+=(-n 4)
    mapfile -t files < <(printf '%s\n' "${files[@]}" | sort -u)
    run 150 "$python" -m pytest -q -rfEs -p no:cacheprovider "${marker[@]}" "${files[@]}"
    status=$?
    if [ $status -ne 124 ]; then
        tail -n 25 "$log" >"$out/tests.txt"
    fi
    echo "tests ($status): $(tail -n 1 "$log")"
fi

cells="not fullsize"
[ -z "$gpu" ] || cells=gpu
for suite in "${suites[@]}"; do
    if [ -s "$out/$suite.json" ]; then
        echo "$suite: done before"
        continue
    fi
    part=$(mktemp)
    run "${most[$suite]}" "$python" -m pytest -q -rfEs -p no:cacheprovider "benchmarks/bench_$suite.py" \
        -m "$cells" --benchmark-only --benchmark-max-time=0.2 --benchmark-json="$part" \
        ${commit:+--bench-commit="$commit"}
    status=$?
    case $status in
        0 | 1) kept=$suite.json said="done" ;;
        5) kept= said="nothing to time here" ;;
        124 | 137 | 2) kept=$suite.partial.json said="out of time" ;;
        *) kept= said="did not start" ;;
    esac
    [ $status -ne 1 ] || said="done, with failures, see log.txt"
    echo "$suite: $said after $SECONDS s"
    [ "$kept" != "$suite.json" ] || rm -f "$out/$suite.partial.json"
    if [ -n "$kept" ] && [ -s "$part" ]; then mv "$part" "$out/$kept"; else rm -f "$part"; fi
done

compgen -G "$out/*.json" >/dev/null || { echo "no results"; exit 1; }
"$python" benchmarks/report.py --show "$out"/*.json
