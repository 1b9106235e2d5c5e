#!/usr/bin/env bash
# Check and time everything on a machine with a GPU that is lent for minutes and has no network.
#   benchmarks/gpu.sh [-c COMMIT] [-t SECONDS] [-k EXPRESSION] DIR [STEP...]
# Ends within SECONDS (530). DIR gets results.tar.gz (every result and log), log.txt, table.txt,
# records.json (which kernels passed their check) and tuned.json (what the sweep chose, for
# `benchmarks/tune.py --install`); the table is printed last. Without STEPs all run, in this order:
#   tests     the Triton kernels and whole steps against their references
#   cuda      the CUDA kernels likewise
#   sanitize  compute-sanitizer on the CUDA kernels: memory accesses, races
#   sweep     configurations of the Triton kernels; what follows runs the quickest
#   check     the check at first use, of every kernel; makes records.json
#   step      stage-1 steps with our kernels, without them, and the textbook's
#   shares    what the time of such a step goes to, from the profiler
#   itc, attention, glue, qformer    the suites
#   profile   Nsight Compute on one launch of each kernel
# EXPRESSION picks tests, as pytest's -k. Every step is a process of its own, so that an error of the
# device ends with it. COMMIT is what results name where there is no .git. Wheels in .whl/ are used.
# Without a GPU small shapes run, through Triton's interpreter: a rehearsal.
set -u

usage() { sed -n '3s/^# */usage: /p' "$0" >&2; exit 2; }

commit= limit=530 picked=
while getopts c:t:k: option; do
    case $option in
        c) commit=$OPTARG ;;
        t) limit=$OPTARG ;;
        k) picked=$OPTARG ;;
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
work=$(mktemp -d)
log=$out/log.txt
: >"$log"
# the most seconds that a step may take
declare -A most=(
    [tests]=110 [cuda]=70 [sanitize]=70 [check]=100 [step]=120 [shares]=60 [sweep]=90 [itc]=60
    [attention]=60 [glue]=50 [qformer]=30 [profile]=60
)
# a step's suite; its benchmarks are those that selection.py marks as brief
declare -A suite_of=(
    [step]=stage1_step [shares]=stage1_step [itc]=itc [attention]=qformer_attention [glue]=glue
    [qformer]=qformer
)
# and where two steps share a suite, which of them
declare -A cells=([step]=bench_step [shares]=bench_shares)
steps=("$@")
[ $# -gt 0 ] || steps=(tests cuda sanitize sweep check step shares itc attention glue qformer profile)
for step in "${steps[@]}"; do
    [ -n "${most[$step]:-}" ] || { echo "no step $step; known: ${!most[*]}" >&2; exit 2; }
done

left() { echo $((limit - SECONDS)); }

# NAME, MOST SECONDS, then a command; its output goes to NAME.log. 124 where time ran out.
run() {
    local name=$1 seconds=$2
    shift 2
    [ "$seconds" -lt "$(left)" ] || seconds=$(left)
    [ "$seconds" -gt 5 ] || return 124
    printf '\n$ %s\n' "$*" >>"$work/$name.log"
    # an interrupt lets pytest write what it has, unless the script was started deaf to it
    timeout --signal=INT --kill-after=10 "$seconds" env --default-signal=INT "$@" \
        >>"$work/$name.log" 2>&1
}

say() { echo "[$SECONDS s] $*"; }

# Everything into few files, whatever happened.
pack() {
    for each in "$work"/*.log; do
        [ -f "$each" ] || continue
        printf '\n===== %s\n' "$(basename "$each")" >>"$log"
        cat "$each" >>"$log"
    done
    tar -C "$work" -czf "$out/results.tar.gz" .
    rm -rf "$work"
}
trap pack EXIT

packages=
if compgen -G ".whl/*.whl" >/dev/null; then
    packages=$(mktemp -d)
    run packages 60 "$python" -m pip install -q --no-index --no-deps --no-compile \
        --target "$packages" .whl/*.whl || say "wheels: not all installed, see log.txt"
fi
export PYTHONPATH="$PWD${packages:+:$packages}${PYTHONPATH:+:$PYTHONPATH}"
# cuBLAS under deterministic algorithms, which tests turn on
export CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONUNBUFFERED=1

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader \
    >"$work/nvidia-smi.txt" 2>&1 || true
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
say "device: ${gpu:-no CUDA device, a rehearsal}"
device=cpu
[ -z "$gpu" ] || device=cuda
workers=$(($(nproc) < 12 ? $(nproc) : 12))
# a suite's file and its choice of benchmarks, as pytest takes them
select_cells() { # STEP
    local which="not fullsize"
    [ -z "$gpu" ] || which=brief
    # full: as many rounds as ever
    chosen=("benchmarks/bench_${suite_of[$1]}.py" --full -m "$which")
    [ -z "$gpu" ] || [ -z "${cells[$1]:-}" ] || chosen+=(-k "${cells[$1]}")
}

# beside what follows, until something is timed: files are read, kernels compiled
compiling=()
case " ${steps[*]} " in
    *" sweep "*)
        if [ -n "$gpu" ]; then
            run compile 150 "$python" benchmarks/sweep.py --compile --workers "$workers" &
            compiling+=($!)
        fi
        ;;
esac
if ! run smoke 90 "$python" -c "
import blip2fast, torch, triton
from blip2fast import QFormer, Blip2Stage1
from blip2fast.ops import itc_loss
print(torch.__version__, triton.__version__, torch.ones(3, device='$device').sum().item())"; then
    say "blip2fast does not import here:"
    tail -n 5 "$work/smoke.log"
    exit 1
fi
for step in "${steps[@]}"; do
    if [ -n "$gpu" ] && [ -n "${suite_of[$step]:-}" ]; then
        select_cells "$step"
        run "compile-$step" 75 "$python" -m pytest -q -p no:cacheprovider "${chosen[@]}" \
            --benchmark-disable --kernels=trust --without-compiled-rivals &
        compiling+=($!)
    fi
done
# the extension: what lies there, where it holds the operators, else built beside the tests
build=
if run extension 60 "$python" -c "
from blip2fast._extension import why_not
why = why_not('itc_sweep')
print(why or 'found')
raise SystemExit(bool(why))"; then
    say "extension: found"
else
    run build 150 "$python" setup.py build_ext --inplace &
    build=$!
fi
# Wait for what runs beside, so that it disturbs no time.
built() {
    if [ -n "$build" ]; then
        if wait "$build"; then
            say "extension: $(cat blip2fast/_C.txt)"
        else
            say "extension: not built, see log.txt"
        fi
        build=
    fi
    [ ${#compiling[@]} = 0 ] || { wait "${compiling[@]}"; say "kernels of sweep and suites: compiled"; }
    compiling=()
}

pytest() { local name=$1 seconds=$2; shift 2; run "$name" "$seconds" "$python" -m pytest -q -p no:cacheprovider "$@"; }

verdict() { # NAME STATUS
    case $2 in
        124 | 137 | 130 | 2)
            say "$1: out of time or interrupted; $(tail -n 1 "$work/$1.log" 2>/dev/null)"
            ;;
        *) say "$1 ($2): $(tail -n 1 "$work/$1.log")" ;;
    esac
    [ "$2" = 0 ] || [ ! -f "$work/$1.log" ] ||
        grep -E '^(FAILED|ERROR) ' "$work/$1.log" | cut -c1-200 | sort -u | head -n 20
}

suite() { # STEP: the results of its suite as STEP.json
    local step=$1 status
    built
    select_cells "$step"
    pytest "$step" "${most[$step]}" -rfE "${chosen[@]}" --benchmark-only \
        --benchmark-max-time=0.2 --benchmark-json="$work/$step.json" --kernels=trust \
        --without-compiled-rivals ${commit:+--bench-commit="$commit"}
    status=$?
    # of a suite that was killed, what had finished
    [ -s "$work/$step.json" ] || mv "$work/$step.part" "$work/$step.json" 2>/dev/null
    rm -f "$work/$step.part"
    verdict "$step" $status
}

step_tests() {
    local files
    mapfile -t files < <(
        grep -rl --include='test_*.py' 'pytest.mark.gpu' tests | grep -v '_gpu.py$'
        find tests -name 'test_*triton*.py'
        find tests -name 'test_stage1_gpu.py'
    )
    mapfile -t files < <(printf '%s\n' "${files[@]}" | sort -u)
    if [ -z "$gpu" ]; then
        # the quickest of them, interpreted; Triton is asked for that before it is imported
        mapfile -t files < <(find tests -name 'test_philox_triton.py')
        export TRITON_INTERPRET=1
    fi
    pytest tests "${most[tests]}" -rfE --maxfail=25 --tb=short -n "$workers" -m "gpu or not slow" \
        ${picked:+-k "$picked"} "${files[@]}"
    verdict tests $?
    unset TRITON_INTERPRET
}

step_cuda() {
    built
    local files
    mapfile -t files < <(find tests -name 'test_itc_gpu.py' -o -name 'test_attention_gpu.py')
    pytest cuda "${most[cuda]}" -rfEs --maxfail=25 --tb=short -n "$workers" ${picked:+-k "$picked"} "${files[@]}"
    verdict cuda $?
}

step_sanitize() {
    built
    command -v compute-sanitizer >/dev/null && [ -n "$gpu" ] ||
        { say "sanitize: needs compute-sanitizer and a GPU"; return 0; }
    local jobs=()
    for tool in memcheck racecheck; do
        run "sanitize-$tool" "${most[sanitize]}" compute-sanitizer --tool $tool --error-exitcode 9 \
            "$python" benchmarks/launches.py --small &
        jobs+=($!)
    done
    # the one that made an illegal access on an H200
    run sanitize-uses1 "${most[sanitize]}" compute-sanitizer --error-exitcode 9 "$python" \
        benchmarks/launches.py --only cross_backward_32x257_b256:uses1_n64_w4_s1 &
    jobs+=($!)
    wait "${jobs[@]}"
    for tool in memcheck racecheck uses1; do
        say "$tool: $(tail -n 1 "$work/sanitize-$tool.log")"
    done
}

step_check() {
    built
    run check "${most[check]}" env XDG_CACHE_HOME="$work/cache" "$python" -m blip2fast kernels check \
        --jobs "$workers" --out "$out/records.json"
    verdict check $?
}

step_sweep() {
    [ -n "$gpu" ] || return 0 # the interpreter takes hours for these sizes
    built
    run sweep "${most[sweep]}" "$python" benchmarks/sweep.py "$work/sweep.json" \
        --seconds $((most[sweep] - 8)) --compiled ${commit:+--commit "$commit"}
    verdict sweep $?
    # also where time ran out: what was timed counts
    [ -s "$work/sweep.json" ] || return 0
    run tune 30 "$python" benchmarks/tune.py "$work/sweep.json" --combined "$out/tuned.json"
    verdict tune $?
    grep -v '^$' "$work/tune.log" | tail -n +2
}

step_profile() {
    built
    command -v ncu >/dev/null && [ -n "$gpu" ] || { say "profile: needs ncu and a GPU"; return 0; }
    run profile "${most[profile]}" ncu --clock-control none --set basic \
        --section WarpStateStats --section InstructionStats --csv --page details --kernel-name \
        'regex:itc|attention|norm|gelu|cross' --launch-count 40 \
        "$python" benchmarks/launches.py
    verdict profile $?
}

for step in "${steps[@]}"; do
    if [ -n "${suite_of[$step]:-}" ]; then suite "$step"; else "step_$step"; fi
done

compgen -G "$work/*.json" >/dev/null || { say "no results"; exit 1; }
suites=()
for each in "$work"/*.json; do
    # an interrupted suite may have written nothing
    case $each in */sweep.json) ;; *) [ ! -s "$each" ] || suites+=("$each") ;; esac
done
[ ${#suites[@]} = 0 ] || "$python" benchmarks/report.py --show "${suites[@]}" >"$out/table.txt" 2>&1
cat "$out/table.txt" 2>/dev/null
say "done"
