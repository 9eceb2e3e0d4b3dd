"""Runs a script of timm under torchrun on CPUs: `torchrun ... cpu_ddp.py SCRIPT ARGS`.

timm passes its device to `DistributedDataParallel` as `device_ids`, which PyTorch accepts only for GPUs. Here they are
dropped; on GPUs this is not needed.
"""

import functools
import sys

from torch.nn.parallel import DistributedDataParallel

from equivision_timm.cli.main import main

__init__ = DistributedDataParallel.__init__


@functools.wraps(__init__)
def _without_device_ids(self, module, device_ids=None, **options):
    __init__(self, module, **options)


if __name__ == "__main__":
    DistributedDataParallel.__init__ = _without_device_ids
    main(sys.argv[1:])
