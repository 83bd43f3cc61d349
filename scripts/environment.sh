# Makes the environment that scripts/serve, scripts/test and .ci/run share. Sourced, not run: `environment serve|test`.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"

say() { printf 'jaxserve: %s\n' "$*" >&2; }

# A Python that can make environments: shims of version managers exist for versions that do not.
find_python() {
  local name
  for name in python3.11 python3.12 python3.13 python3; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  say "no Python 3.11, 3.12 or 3.13 with the venv module found."
  say "Install one (Debian, Ubuntu: apt install python3.11-venv; macOS: brew install python@3.11) and run this again."
  return 1
}

# pip_install WHAT ARGS...: installs quietly; shows the seconds on a terminal and pip's own words when it fails.
pip_install() {
  local what="$1" log="$venv/install.log" start=$SECONDS pid
  shift
  say "installing $what"
  "$python" -m pip install --quiet --disable-pip-version-check "$@" >"$log" 2>&1 &
  pid=$!
  if [[ -t 2 ]]; then
    while kill -0 "$pid" 2>/dev/null; do
      printf '\r  %3d s' $((SECONDS - start)) >&2
      sleep 1
    done
    printf '\r         \r' >&2
  fi
  if ! wait "$pid"; then
    tail -n 30 "$log" >&2
    say "could not install $what (the whole log is $log)"
    return 1
  fi
}

gpu_extra() { if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then echo '[cuda]'; fi; }

stamp_of() { cat "$root/requirements.lock" "$@" "$root/pyproject.toml" <(echo "$root $(gpu_extra)") | cksum; }

# environment serve: what running needs. environment test: what the tests need as well.
environment() {
  local kind="$1" base extra found
  extra="$(gpu_extra)"
  if [[ ! -x "$python" ]] || ! "$python" -c '' 2>/dev/null; then
    found="$(find_python)" || return 1
    say "making $venv with $("$found" --version)"
    "$found" -m venv --clear "$venv" || return 1
  fi
  base="$(stamp_of)"
  if [[ "$(cat "$venv/jaxserve.serve" 2>/dev/null)" != "$base" ]]; then
    pip_install "pinned packages (once; about 400 MB)" -r "$root/requirements.lock" || return 1
    pip_install "jaxserve$extra" -c "$root/requirements.lock" -e "$root$extra" || return 1
    echo "$base" >"$venv/jaxserve.serve"
  fi
  if [[ "$kind" == test ]]; then
    base="$(stamp_of "$root/requirements-test.lock")"
    if [[ "$(cat "$venv/jaxserve.test" 2>/dev/null)" != "$base" ]]; then
      pip_install "torch, the tests' yardstick (once; its CPU build is about 200 MB)" \
        "$(grep '^torch==' "$root/requirements-test.lock")" -c "$root/requirements-test.lock" || return 1
      pip_install "test packages (once; about 300 MB)" -r "$root/requirements-test.lock" || return 1
      echo "$base" >"$venv/jaxserve.test"
    fi
  fi
}
