#!/bin/sh
# Installs what tests/slurm needs, by apt and as root: Slurm, its accounting, munge, MariaDB; and strace, with which the
# tests of claims count metadata operations. None of the services is
# started or enabled: the tests bring up a cluster of their own (tests/slurm/cluster.py). Where it cannot install, it
# says so and ends well, and those tests are skipped; in CI (CI=true) that is an error.
set -eu

packages="slurmctld slurmd slurm-client slurmdbd munge mariadb-server util-linux coreutils shellcheck strace"

give_up() {
    echo "tests/slurm/install.sh: $1" >&2
    case "${CI:-}" in
    1 | true | True) exit 1 ;;
    esac
    echo "tests/slurm/install.sh: the tests on a real Slurm cluster will be skipped" >&2
    exit 0
}

missing=
for package in $packages; do
    dpkg-query --show --showformat='${Status}\n' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

command -v apt-get >/dev/null || give_up "not a Debian or Ubuntu system; install Slurm with its daemons by hand"
[ "$(id -u)" = 0 ] || give_up "not root; run it once with sudo to install:$missing"

log=$(mktemp)
policy=/usr/sbin/policy-rc.d # asked by every package before it starts its service
made=
clean_up() {
    rm -f "$log"
    [ -z "$made" ] || rm -f "$policy"
}
trap clean_up EXIT
if [ ! -e "$policy" ]; then
    made=yes
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

echo "tests/slurm/install.sh: installing$missing"
fresh=$(echo "$missing" | tr ' ' '\n' | grep -E '^(slurm|munge|mariadb)' || true)
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # $missing is a list of words
if ! { apt-get update && apt-get install --yes --no-install-recommends $missing; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    give_up "apt-get could not install:$missing"
fi

# on a machine with systemd they must not start at the next boot either
if [ -d /run/systemd/system ]; then
    for service in slurmctld slurmd slurmdbd munge mariadb; do
        if echo "$fresh" | grep -q "^$service"; then
            systemctl disable --quiet "$service" || true
        fi
    done
fi
