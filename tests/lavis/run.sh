#!/bin/sh
# Makes LAVIS's environment (once, in $LAVIS_ENV) and checks edits on its Blip2OPT with both versions of transformers
# that LAVIS 1.0.2 allows. LAVIS's own requirements do not install beside a current torch, hence --no-deps.
set -eu
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3.11} # tokenizers 0.13.3 has wheels up to Python 3.11
LAVIS_ENV=${LAVIS_ENV:-build/lavis}
TORCH=${TORCH:-torch==2.13.0}
VERSIONS="4.25.1 4.26.1"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
pip="$LAVIS_ENV/bin/python -m pip install -q"

if [ ! -e "$LAVIS_ENV/ready" ]; then
    "$PYTHON" -m venv "$LAVIS_ENV"
    $pip "$TORCH" filelock numpy packaging pillow pyyaml regex requests tqdm
    $pip --no-deps salesforce-lavis==1.0.2 tokenizers==0.13.3 huggingface_hub==0.36.2
    for version in $VERSIONS; do
        $pip --no-deps --upgrade --target "$LAVIS_ENV/transformers-$version" "transformers==$version"
    done
    touch "$LAVIS_ENV/ready"
fi

failed=0
for version in $VERSIONS; do
    PYTHONPATH=".:$LAVIS_ENV/transformers-$version" "$LAVIS_ENV/bin/python" -W ignore -m tests.lavis.check_lavis || failed=1
done
exit $failed
