"""The machine under a run: ranks, memory, the peak against which MFU is stated."""
