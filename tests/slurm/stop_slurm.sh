#!/bin/bash
# End the daemons of the cluster in DIR, those too that a test started again, and remove DIR.
dir=$1
# Not by pid files: a slurmd that follows a killed one may have written none.
pids=$(for pid in $(pgrep -x 'slurmd|slurmctld'); do
  grep -qzx "SLURM_CONF=$dir/slurm.conf" "/proc/$pid/environ" && echo "$pid"
done)
kill $pids 2> /dev/null
for _ in $(seq 50); do
  kill -0 $pids 2> /dev/null || break
  sleep 0.2
done
for pid in $pids; do kill -9 "$pid" 2> /dev/null; done
# Steps of a slurmd that a test killed live on; they work in this cluster's log folder.
for pid in $(pgrep slurmstepd); do
  case $(readlink "/proc/$pid/cwd") in "$dir"/*) kill -9 "$pid" ;; esac
done
[ -f "$dir/run/munged.pid" ] && kill "$(cat "$dir/run/munged.pid")" 2> /dev/null
rm -rf "$dir"
