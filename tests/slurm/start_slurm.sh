#!/bin/bash
# A real Slurm cluster on this machine for the tests: munged, slurmctld and several slurmd with made-up node names.
#
#   start_slurm.sh DIR [NUM_NODES=2] [GPUS_PER_NODE=0]       then: export SLURM_CONF=DIR/slurm.conf
#
# The GPUs are made up: Slurm counts, reserves and numbers device files like /dev/null.
# Runs as root without systemd, cgroups or accounting; everything it writes lies in DIR. stop_slurm.sh DIR ends it.
# Needs Debian's or Ubuntu's packages slurm-wlm and munge.
set -euo pipefail

dir=$1
num_nodes=${2:-2}
num_gpus=${3:-0}
port=${SLURM_TEST_PORT:-27000}
host=$(hostname -s)
socket=$dir/run/munge.socket

mkdir -p "$dir"/{state,log,run}
chmod 755 "$dir" "$dir/run"

head -c 1024 /dev/urandom > "$dir/munge.key"
chmod 400 "$dir/munge.key"
munged --force --socket="$socket" --key-file="$dir/munge.key" --pid-file="$dir/run/munged.pid" \
       --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"

# Ranks of a job find each other by the names of their nodes.
grep -qw node1 /etc/hosts || echo "127.0.0.1 $(seq -s ' ' -f node%g 1 16)" >> /etc/hosts

cat > "$dir/slurm.conf" <<CONF
ClusterName=aimscale
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired: 120 s by default.
AuthInfo=socket=$socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# Memory is watched by polling, and a job above its --mem is killed.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=1900
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=30
MinJobAge=300
# Ranks meet at a port that follows from the id: clusters side by side count from different numbers.
FirstJobId=$((port - 26999))
MaxArraySize=4
SlurmdTimeout=6
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptParameters=send_user_signal
CONF
resources="CPUs=2 RealMemory=4000"
if [ "$num_gpus" -gt 0 ]; then
  mkdir -p "$dir/gpus"
  for i in $(seq 0 $((num_gpus - 1))); do mknod "$dir/gpus/nvidia$i" c 1 3; done
  echo "GresTypes=gpu" >> "$dir/slurm.conf"
  echo "Name=gpu Type=h100 Flags=nvidia_gpu_env File=$dir/gpus/nvidia[0-$((num_gpus - 1))]" > "$dir/gres.conf"
  resources="CPUs=$((num_gpus * 12)) RealMemory=4000 Gres=gpu:h100:$num_gpus"
fi
for i in $(seq "$num_nodes"); do
  echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) $resources State=UNKNOWN"
done >> "$dir/slurm.conf"
nodes="Nodes=node[1-$num_nodes] MaxTime=INFINITE State=UP OverSubscribe=NO"
echo "PartitionName=main $nodes Default=YES PriorityTier=1 GraceTime=20" >> "$dir/slurm.conf"
echo "PartitionName=urgent $nodes PriorityTier=10" >> "$dir/slurm.conf"

export SLURM_CONF=$dir/slurm.conf
slurmctld -c
for i in $(seq "$num_nodes"); do
  mkdir -p "$dir/spool.node$i"
  slurmd -N "node$i"
done
for _ in $(seq 150); do
  idle=$(sinfo --noheader --Node --states=idle -o %N 2> /dev/null | sort -u | wc -l) || idle=0
  [ "$idle" -ge "$num_nodes" ] && exit 0
  sleep 0.2
done
echo "the nodes did not come up; see $dir/log" >&2
exit 1
