#!/usr/bin/env bash
# Installs Side-Step for you alone, without root: into this folder, and uv's folders in your home. Run it again to update.
#
#   ./install.sh [--yes] [--torch NAME]
#     --yes         ask nothing and do not start the wizard
#     --torch NAME  the torch build: auto (what fits the GPU), index (the one your package index has, which `uv run`
#                   installs), cpu, cu126, cu128, cu130, rocm6.4, xpu, ...

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
: "${HOME:=$(cd ~ && pwd)}"
export HOME

python=.venv/bin/python
uses_gpu='import sys, torch; sys.exit(not torch.cuda.is_available())'

main() {
  local yes='' torch=${UV_TORCH_BACKEND:-} updated='' arguments=("$@")
  while [ $# -gt 0 ]; do
    case $1 in
      --yes | -y) yes=1 ;;
      --updated) updated=1 ;;
      --torch)
        case ${2:-} in
          '' | -*) fail "--torch needs a name." "For instance: ./install.sh --torch cu126" ;;
        esac
        torch=$2; shift ;;
      --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit ;;
      *) fail "The installer takes only --yes and --torch NAME." "Type ./install.sh --help, or nothing but ./install.sh." ;;
    esac
    shift
  done
  cd "$(dirname "$0")"
  check_folder
  [ -n "$updated" ] || echo "Installing Side-Step. Nothing here needs root; run this again to update."
  if [ -z "$updated" ] && [ -d .venv ]; then
    update
    exec bash ./install.sh --updated ${arguments[@]+"${arguments[@]}"}
  fi
  unset UV_TORCH_BACKEND  # Else `index` would not mean the index.
  find_uv
  find_python
  install_packages "$torch"
  echo
  "$python" train.py --version || fail "torch is installed but does not start, for the reason above." \
    "Report it, with that reason."
  echo
  "$python" train.py doctor ||
    printf '\nNote: training waits for what is called a problem above. The wizard fetches the models.\n'
  write_launcher
  offer_wizard "$yes"
}

check_folder() {
  { [ -f pyproject.toml ] && [ -f uv.lock ]; } ||
    fail "Side-Step's files do not lie beside this installer." "Get the whole folder, and run the installer in it."
  [ -w . ] || fail "This folder cannot be written: $PWD" "Move Side-Step to a folder of your own."
  if [ "$(uname -sm)" = "Darwin x86_64" ]; then
    fail "torch is no longer made for Macs with Intel processors." "Use a Mac with Apple silicon, or another machine."
  fi
}

update() {
  if [ ! -e .git ]; then
    echo "Note: this folder came as an archive, so Side-Step's own files stay as they are. To update them, extract a new"
    echo "  archive over this folder and run this again; your songs, runs and settings stay."
  elif ! command -v git >/dev/null; then
    echo "Note: there is no git here, so Side-Step's own files stay as they are. To update them, run: git pull"
  else
    echo "Updating Side-Step."
    # uv writes addresses into uv.lock, which would stand in the way.
    { git checkout --quiet -- uv.lock && git pull --ff-only; } ||
      echo "Note: Side-Step's own files could not be updated, for the reason above."
  fi
}

find_uv() {
  # Named, since uv's installer goes by XDG_BIN_HOME and XDG_DATA_HOME else, which the terminals of some programs set.
  export UV_INSTALL_DIR="${UV_INSTALL_DIR:-$HOME/.local/bin}"
  export PATH="$PATH:$UV_INSTALL_DIR:$HOME/.local/bin:$HOME/.cargo/bin"
  command -v uv >/dev/null && return
  echo
  echo "Getting uv, the program that installs Python and everything else."
  if command -v curl >/dev/null; then
    curl -LsSf https://astral.sh/uv/install.sh | sh || true
  elif command -v wget >/dev/null; then
    wget -qO- https://astral.sh/uv/install.sh | sh || true
  elif command -v python3 >/dev/null; then
    python3 -m pip install --user uv || true
  fi
  hash -r
  command -v uv >/dev/null || fail "uv could not be installed: there is no internet connection, no curl, or a proxy stopped it." \
    "Install uv another way (pip install uv), then run this again."
}

find_python() {
  # A virtual environment that was made on another system, or whose Python has gone, is made anew.
  "$python" -c '' 2>/dev/null && return
  echo
  echo "Getting Python."
  # By its name: without one uv clears and fills what UV_PROJECT_ENVIRONMENT names.
  uv venv --quiet --clear .venv || fail "Python could not be installed into the folder .venv, for the reason above." \
    "Check the internet connection; an old uv is updated by: uv self update"
}

# Installs everything; $1: the torch build asked for, if any.
install_packages() {
  local torch=$1 gpu
  # No `head`: it closes the pipe after the first GPU, and nvidia-smi fails at the second.
  gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null) || gpu=''
  gpu=${gpu%%$'\n'*}
  echo
  [ -n "$gpu" ] && echo "NVIDIA GPU and its driver: $gpu"
  if [ -n "$torch" ]; then
    install_with "$torch" again
  elif [ "$(uname -s)" = Darwin ]; then
    install_with index
  elif [ -n "$gpu" ]; then
    # The index's build is the one that `uv run` keeps; another one only where the driver is too old for it.
    install_with index
    "$python" -c "$uses_gpu" 2>/dev/null && return
    echo "The driver is too old for this torch: looking for one that it can run."
    install_with auto again
  else
    echo "No NVIDIA GPU answers here: training will be very slow, unless torch has a build for the GPU that there is."
    install_with auto
  fi
  if [ -n "$gpu" ] && ! "$python" -c "$uses_gpu" 2>/dev/null; then
    echo
    echo "Note: torch cannot use the GPU. Its driver is probably too old: install a new one, then run this again."
    echo "  Until then training runs on the CPU, very slowly."
  fi
}

# $1: the torch build; $2: whether a torch that is there already is replaced, and fetched anew.
install_with() {
  local options=()
  [ "$1" = index ] || options+=(--torch-backend "$1")
  [ -z "${2:-}" ] || options+=(--reinstall-package torch --reinstall-package torchaudio)
  echo "Installing torch ($1) and the rest: some gigabytes the first time."
  uv export --quiet --frozen --no-dev --no-emit-project --prune torch --prune torchaudio -o .venv/locked.txt ||
    fail "Side-Step's list of packages could not be read, for the reason above." \
      "Get a fresh copy of Side-Step; an old uv is updated by: uv self update"
  uv pip install --python "$python" ${options[@]+"${options[@]}"} -r pyproject.toml -c .venv/locked.txt ||
    fail "The packages could not be installed, for the reason above." \
      "Check the internet connection and that 10 GB are free, and run this again."
}

write_launcher() {
  cat >side-step <<'LAUNCHER'
#!/bin/sh
# Starts Side-Step; made by install.sh. Arguments go to train.py.
launcher=$0
while [ -L "$launcher" ]; do  # Linked to from a folder on the PATH.
  link=$(readlink "$launcher")
  case $link in /*) launcher=$link ;; *) launcher=$(dirname -- "$launcher")/$link ;; esac
done
here=$(CDPATH='' cd -- "$(dirname -- "$launcher")" && pwd)
SIDESTEP_START=$0 exec "$here/.venv/bin/python" "$here/train.py" "$@"
LAUNCHER
  chmod +x side-step
  echo
  echo "Side-Step is installed. Start it with ./side-step"
  if "$python" -c "import sys, importlib.metadata as m; sys.exit('+' not in m.version('torch'))"; then
    echo "  and not with uv run: that would put the torch of your package index in the place of this one."
  fi
}

offer_wizard() {
  local answer
  { [ -z "$1" ] && [ -t 0 ] && [ -t 1 ]; } || return 0
  read -r -p "Start it now? [Y/n] " answer || return 0  # Ctrl-D; all is installed.
  case $answer in [Nn]*) ;; *) exec ./side-step ;; esac
}

fail() {
  printf '\nError: %s\n  %s\n' "$1" "$2" >&2
  exit 1
}

main "$@"; exit
