#!/usr/bin/env bash
# All that only a GPU can show, in at most 8 minutes, on a machine with a GPU and a torch that is built for it:
#
#     bash benchmarks/gpu_check.sh [--budget SECONDS] [--out FILE] [--small]
#
# The other packages are installed in a virtual environment that goes at the end; torch stays as it is. Prints one table
# and writes one JSON file (gpu_check.json in this checkout). GPU_CHECK_SMALL=1 tries the check itself with a tiny model.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
began=$(printf '%(%s)T' -1)
python=$(command -v python3) || { echo "python3 is not on PATH; install Python 3.10 or newer, and a torch that is built for the GPU" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "$("$python" --version) is too old; install Python 3.10 or newer, and a torch that is built for the GPU" >&2; exit 1; }
"$python" -W ignore -m benchmarks.gpu_check --why-not || exit 1

here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
# The package under its import name: in the checkout the name would be that of the folder.
ln -s "$PWD" "$here/wanvideo_enhanced_blockswap"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

why=""
missing=$("$python" -W ignore -m benchmarks.gpu_check --missing)
if [ -n "$missing" ]; then
  echo "packages: at most 120 s" >&2
  printf '%s\n' "$missing" >"$here/missing"
  "$python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$here/constraint"
  if "$python" -m venv --system-site-packages "$here/venv" >"$here/log" 2>&1; then
    # Where this python3 belongs to a virtual environment itself, the new one would not see its packages.
    "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
      >"$(echo "$here"/venv/lib/python3*/site-packages)/torch.pth"
    timeout 120 "$here/venv/bin/python3" -m pip install --quiet --retries 1 --timeout 10 \
      --requirement "$here/missing" --constraint "$here/constraint" >"$here/log" 2>&1 ||
      why="pip install failed ($(grep -v '^$' "$here/log" | tail -n 1))"
    python="$here/venv/bin/python3"
  else
    why="python3 -m venv failed ($(grep -v '^$' "$here/log" | tail -n 1))"
  fi
fi
"$python" -m benchmarks.gpu_check "$@" --began="$began" --packages="$why"
