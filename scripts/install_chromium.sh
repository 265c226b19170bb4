#!/bin/sh
# Install Chromium from Debian's packages, for the tests of the page that `peer-analyze report` writes.
# Does nothing when a browser is there. Where it cannot be installed it says so in one line and
# succeeds: the tests that need it are then skipped.
set -eu

cannot() {
    echo "no Chromium: $1; the tests that need it are skipped" >&2
    exit 0
}

has_one() {
    for program in chromium chromium-browser google-chrome chrome; do
        command -v "$program" >/dev/null 2>&1 && return 0
    done
    return 1
}

has_one && exit 0
[ "$(id -u)" -eq 0 ] || cannot "not root"
command -v apt-get >/dev/null 2>&1 || cannot "no apt-get here"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if { apt-get update && apt-get install -y --no-install-recommends chromium; } >"$log" 2>&1; then
    rm -f "$log"
else
    cannot "apt-get failed, see $log"
fi
