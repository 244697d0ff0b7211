"""Times for which one process waits for another, shortest first, and why they stand in this order.

Who knows most waits least: a rank that fails says why before it ends; it ends before the other ranks give up, and these
give up before a worker takes the run for lost.
"""

PATIENCE_S = 1.0
"""A lock is tried for so long: `is_held` takes it for microseconds, which must not look like another holder."""
HEARTBEAT_S = 5.0
"""Interval between heartbeats in `status.json`."""
RESCAN_S = 10.0
"""Interval between looks of a worker at a run that is not executed here, whose own worker may have died."""
FAILURE_NOTE_TIMEOUT_S = 10.0
"""A rank that lost another waits so long for that one to record what happened: well within `EXIT_TIMEOUT_S`."""
LAST_SAVE_TIMEOUT_S = 10.0
"""A run that ends waits so long for a checkpoint under way: well within `EXIT_TIMEOUT_S`."""
RANK_EXIT_TIMEOUT_S = 10.0
"""A worker waits so long for the processes of a killed run: on a GPU they take seconds to free its memory."""
TELL_S = 10.0
"""After so long, a wait for another process is told."""
KILL_MARGIN_S = 30.0
"""A run that does not stop is killed so long after its grace period."""
STEP_ALLOWANCE_S = 30
"""Part of the grace period for finishing the current step, beside saving."""
EXIT_TIMEOUT_S = 60.0
"""A process that failed ends after so long, even if its exit hangs: before `STEP_TIMEOUT_S`, in which others wait."""
STOPPED_S = 60.0
"""A helper process may be stopped by a signal for so long."""
STALLED_S = 60.0
"""After so long without an answer, a read from afar is tried again; botocore's own limit."""
MIN_START_TIME_S = 60.0
"""A worker that has less time left starts no run; twice the time that its last start took, if that is longer."""
SILENT_AFTER_S = 60.0
"""A run of another worker whose heartbeat is older may have lost its worker: twelve heartbeats."""
STEP_TIMEOUT_S, STEP_FACTOR = 100.0, 10.0
"""Ranks wait so long for each other in a step, or so many times the longest step before, if that is more."""
MIN_GRACE_S = 120
"""Minimum grace period between the signal to stop and the kill: even a small run must finish a step, a validation batch
or a probe epoch."""
RENDEZVOUS_TIMEOUT_S = 120.0
"""Ranks on several hosts meet within so long: they start together and import the same."""
EARLY_S = 120.0
"""An attempt without progress that ends sooner counts as one that failed before its first step."""
FRESH_S = 120.0
"""A run of another host whose lock is not seen is taken to be at work while its heartbeat is younger."""
EVALUATION_DELAY_S = 600.0
"""A run whose training began earlier is evaluated before others are trained; shorter ones wait for others, to share the
start of the program."""
PHASE_TIMEOUT_S = 600.0
"""Ranks wait so long where one may read a model or write files: the 26 GB of aim-7B at 50 MB/s."""
SUBMISSION_TIMEOUT_S = 600.0
"""A launch waits so long for another launch of its sweep that submits jobs."""
LOST_AFTER_S = 900.0
"""A worker waits until the heartbeat of a silent run is so old: until its ranks have given up (`PHASE_TIMEOUT_S`)."""
BATCH_TIMEOUT_S = 900.0
"""A rank waits so long for a micro-batch, half of what other ranks wait for it: a shard of 500 MB at .6 MB/s."""
COLLECTIVE_TIMEOUT_S = 1800.0
"""Ranks wait so long for each other where one may load data or compile: twice `BATCH_TIMEOUT_S`."""
TASK_TIMEOUT_S = 3600.0
"""A helper process may take so long for one task: a shard of 20 GB, scanned at 6 MB/s."""
WAIT_S = 3600.0
"""After so long, a wait for the lock of another process is given up."""
