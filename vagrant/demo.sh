#!/usr/bin/env bash
# The demo between two virtual machines: a Redis on host1 is moved to host2 and back while a client counts in it.
set -euo pipefail
cd "$(dirname "$0")"
vagrant up
exec vagrant ssh host1 -c 'sudo pymigrate demo host2'
