#!/bin/sh
# Run transformers' own tests of the models that hold a Q-Former: as they are, with every model
# patched when it is built, and patched after from_pretrained. Prints what differs, and fails then.
#   tools/peer_tests.sh CHECKOUT [PYTEST OPTION...]     e.g. tools/peer_tests.sh ../transformers -n 8
# CHECKOUT is a clone of transformers at the version that is installed: its tests are not in the
# package. PYTHON names the interpreter (default: .venv/bin/python). Takes minutes per run.
# ALLOW_OTHER_VERSION=1 takes the tests of another version. Some then fail unpatched too, which is
# no difference; what they import and is gone, --supply MODULE.NAME replaces. RESULTS names a folder
# that keeps the runs' JUnit files.
set -eu

[ $# -ge 1 ] || { echo "usage: tools/peer_tests.sh CHECKOUT [PYTEST OPTION...]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
checkout=$1
shift
[ -d "$checkout/tests/models" ] || {
    echo "$checkout has no tests/models: give a clone of huggingface/transformers" >&2
    exit 2
}
checkout=$(cd "$checkout" && pwd)
here=$("$python" -c 'import transformers; print(transformers.__version__)')
there=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$checkout/src/transformers/__init__.py")
[ "$here" = "$there" ] || [ "${ALLOW_OTHER_VERSION:-0}" = 1 ] || {
    echo "transformers $here is installed, $checkout is $there:" \
         "git -C $checkout checkout v$here, or set ALLOW_OTHER_VERSION=1" >&2
    exit 2
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
results=${RESULTS:-$scratch/results}
mkdir -p "$results"
results=$(cd "$results" && pwd)
echo "transformers $here, tests of $there"
if [ "$here" != "$there" ]; then
    # tests import src/transformers by its path, which would mix both versions
    copy=$scratch/checkout
    mkdir -p "$copy/src"
    for part in "$checkout"/*; do
        [ "$part" = "$checkout/src" ] || cp -R "$part" "$copy"
    done
    ln -s "$("$python" -c 'import transformers; print(transformers.__path__[0])')" "$copy/src"
    checkout=$copy
fi

set -- "$@" -q -p no:cacheprovider -p peer_patching
for family in blip_2 instructblip instructblipvideo granite_speech granite_speech_plus \
              granite4_vision; do
    [ ! -d "$checkout/tests/models/$family" ] || set -- "$@" "tests/models/$family"
done
export PYTHONPATH="$root/tools:$root${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1
for when in never construction loading; do
    echo "== patched: $when"
    # failures are compared below; anything else, such as tests that cannot be collected, ends here
    (cd "$checkout" && "$python" -m pytest "$@" --patch-models "$when" \
        --junit-xml "$results/$when.xml") || [ $? -eq 1 ]
done
"$python" "$root/tools/peer_patching.py" "$results/never.xml" "$results/construction.xml" \
    "$results/loading.xml"
