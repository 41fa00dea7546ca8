#!/usr/bin/env bash
# A browser for the test that opens the page of diagnostics, from the packages of Debian or Ubuntu.
#
# Exit status 1, with the reason, where there is none and it cannot be installed; that test is then skipped.
set -euo pipefail

for program in chromium chromium-browser google-chrome google-chrome-stable chrome; do
    command -v "$program" >/dev/null && exit 0
done
echo "absent: a browser"
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "install Chromium, or run this as root on Debian or Ubuntu" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --yes --no-install-recommends chromium
