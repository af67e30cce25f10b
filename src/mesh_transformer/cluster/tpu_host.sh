#!/usr/bin/env bash
# What `mesh-transformer tpu run` does on each host of a TPU, in the directory of this file:
#   host.sh install             ends an earlier training, unpacks ../mesh-transformer.tar.gz, installs it in .venv
#   host.sh train ARGUMENTS...  `mesh-transformer train ARGUMENTS`, its output, its exit status
#   host.sh stop                ends the training; it saves its state
# Every line of output begins with the number of the host.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

seconds_to_save=300

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

make_environment() {
  local python
  is_new_enough .venv/bin/python && return
  for python in python3.13 python3.12 python3.11 python3; do
    rm -rf .venv
    if is_new_enough "$python" && "$python" -m venv .venv; then return; fi
  done
  rm -rf .venv
  # Ubuntu 22.04 has Python 3.10; uv brings its own.
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --python 3.12 .venv
}

install() {
  stop
  # What is no longer in the archive must go too.
  rm -rf src config train.pid train.status
  tar -xzf ../mesh-transformer.tar.gz
  make_environment
  .venv/bin/python -m pip install --quiet --constraint constraints.txt '.[tpu]'
  echo "installed"
}

is_running() { [ -e train.pid ] && kill -0 "$(cat train.pid)" 2>/dev/null; }

# Detached, so that it outlives the connection: when that breaks, gcloud connects and calls this again.
train() {
  local lines=+1
  if [ -e train.pid ]; then
    lines=50
  else
    # TERM is for the child; this shell waits for it and notes its status. In words of its own: $? is the child's.
    : >train.log
    setsid bash -c 'trap : TERM; .venv/bin/mesh-transformer train "$@"; echo $? >status.new; mv status.new train.status' \
      train "$@" </dev/null >>train.log 2>&1 &
    echo $! >train.pid
  fi
  tail -n "$lines" -f --pid="$(cat train.pid)" train.log
  if [ ! -e train.status ]; then
    echo "the training was killed"
    return 137
  fi
  return "$(cat train.status)"
}

stop() {
  local second
  is_running || return 0
  echo "ending the training that runs here"
  kill -TERM -- "-$(cat train.pid)" || return 0
  for ((second = 0; second < seconds_to_save; second++)); do
    is_running || return 0
    sleep 1
  done
  kill -KILL -- "-$(cat train.pid)" || true
}

# https://cloud.google.com/compute/docs/metadata/querying-metadata; JAX numbers its processes by this attribute too.
attribute=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
worker=$(curl --silent --fail --max-time 5 --header 'Metadata-Flavor: Google' "$attribute") || worker=$(hostname)
"$@" 2>&1 | sed --unbuffered "s/^/[worker ${worker//[^A-Za-z0-9._-]/}] /"
