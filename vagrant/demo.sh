#!/usr/bin/env bash
# Run the demo between two virtual machines: move a Redis from host1 to host2 and back while a client counts in it.
set -euo pipefail
cd "$(dirname "$0")"
vagrant up
exec vagrant ssh host1 -c 'sudo pymigrate demo host2'
