#!/bin/sh
# Runs the command that the container is given. Orchestrators mount a secret as a file; the server reads its key from
# the environment: MESH_TRANSFORMER_API_KEY_FILE names a file whose first line becomes MESH_TRANSFORMER_API_KEY.
set -eu

if [ -n "${MESH_TRANSFORMER_API_KEY_FILE:-}" ]; then
    if [ ! -r "$MESH_TRANSFORMER_API_KEY_FILE" ]; then
        echo "error: MESH_TRANSFORMER_API_KEY_FILE=$MESH_TRANSFORMER_API_KEY_FILE cannot be read by user $(id -u)" >&2
        echo "Mount it there, readable by that user, or unset the variable." >&2
        exit 2
    fi
    MESH_TRANSFORMER_API_KEY=$(head -n 1 "$MESH_TRANSFORMER_API_KEY_FILE" | tr -d '\r')
    if [ -z "$MESH_TRANSFORMER_API_KEY" ]; then
        # An empty key would be no key, and the server open to everybody.
        echo "error: the first line of MESH_TRANSFORMER_API_KEY_FILE=$MESH_TRANSFORMER_API_KEY_FILE is empty" >&2
        echo "Put the key there, or unset the variable to serve without one." >&2
        exit 2
    fi
    export MESH_TRANSFORMER_API_KEY
    unset MESH_TRANSFORMER_API_KEY_FILE
fi

exec mesh-transformer "$@"
