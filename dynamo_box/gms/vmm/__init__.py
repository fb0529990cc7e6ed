"""Virtual memory management: physical memory apart from the addresses it is seen at.

base.py  the interface, and what it refuses
host.py  memfd and mmap
"""

from dynamo_box.gms.vmm.base import Mapping, StillMapped, Vmm, VmmError, VmmOutOfMemory
from dynamo_box.gms.vmm.host import HostVmm

__all__ = ["HostVmm", "Mapping", "StillMapped", "Vmm", "VmmError", "VmmOutOfMemory"]
