#!/bin/bash
# End the daemons that `start_slurm.sh DIR` started, by their pid files, and remove DIR.
dir=$1
pids=$(cat "$dir"/run/slurmd.*.pid "$dir"/run/slurmctld.pid 2> /dev/null)
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
