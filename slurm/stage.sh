#!/usr/bin/env bash
# Copy what a run reads to this node's own disk, once: a later start on the same node finds it there.
#
#   slurm/stage.sh SOURCE TARGET      run by job.sh, one task per node
#
# A folder is copied file by file, a .tar is unpacked into TARGET.

set -euo pipefail

source=$1 target=$2
mkdir -p "$target"
exec 9>"$target.lock"
flock 9 # two jobs of one user may share the node

needed=$(du -skL "$source" | cut -f 1)
present=$(du -sk "$target" | cut -f 1)
free=$(df -Pk "$target" | awk 'NR == 2 { print $4 }')
if ((needed > present + free)); then
    echo "stage.sh: $source needs $((needed >> 20)) GiB, but $(uname -n):$target has $((free >> 20)) GiB left" >&2
    exit 1
fi

if [[ -f $source ]]; then
    if [[ ! -e $target/.whole ]]; then
        tar -C "$target" -xf "$source"
        touch "$target/.whole"
    fi
else
    # A file counts as present when size and time agree; it gets its name when it is whole.
    # shellcheck disable=SC2016  # expanded by the inner shell
    (cd "$source" && find -L . -type f -print0) | xargs -0 -r -n 1 -P 8 bash -c '
        from=$1/$3 to=$2/$3
        [[ $(stat -Lc "%s %Y" "$from") == "$(stat -c "%s %Y" "$to" 2>/dev/null)" ]] && exit
        mkdir -p "${to%/*}" && cp -L --preserve=timestamps "$from" "$to.partial" && mv "$to.partial" "$to"
    ' stage "$source" "$target"
fi
echo "stage.sh: $(uname -n):$target holds all of $source"
