"""DeepSpeed, imported as soon as this module is: for a server that processes are forked from."""

from aimscale.harness.distributed.group import import_deepspeed

deepspeed = import_deepspeed()
