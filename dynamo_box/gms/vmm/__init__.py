"""Virtual memory management: physical memory apart from the addresses it is seen at.

base.py  the interface, and what it refuses
host.py  memfd and mmap
cuda.py  an NVIDIA GPU; the service doesn't use it yet
"""

from dynamo_box.gms.vmm.base import Mapping, StillMapped, Vmm, VmmError, VmmOutOfMemory
from dynamo_box.gms.vmm.cuda import CudaVmm
from dynamo_box.gms.vmm.host import HostVmm

__all__ = ["CudaVmm", "HostVmm", "Mapping", "StillMapped", "Vmm", "VmmError", "VmmOutOfMemory"]
