"""What a run has measured, what it lacks, and the files that say so. Torch is not imported."""
