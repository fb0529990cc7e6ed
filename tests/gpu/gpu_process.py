"""A process that uses the GPU: it maps the memory of one descriptor, does what it is told on its input, line by line,
and answers each line with one.

    python gpu_process.py DEVICE FD SIZE WRITABLE

    read N        the first N bytes, in hex
    write HEX     over the first bytes
    poke          a kernel writes 7 to the first byte
    poke nowhere  to an address at which nothing ever was
    unmap         and maps no more
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from cuda.bindings import driver

from dynamo_box.gms.vmm import CudaVmm

_POKE = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry poke(.param .u64 at)
{
    .reg .u64 %rd<3>;
    .reg .u32 %r1;
    ld.param.u64 %rd1, [at];
    cvta.to.global.u64 %rd2, %rd1;
    mov.u32 %r1, 7;
    st.global.u8 [%rd2], %r1;
    ret;
}
\0"""
NOWHERE = 0x7F00_0000_0000


def done(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(status.name)
    return values[0] if values else None


def poke(address: int) -> None:
    module = done(driver.cuModuleLoadData(_POKE))
    kernel = done(driver.cuModuleGetFunction(module, b"poke"))
    done(driver.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, 0, ((address,), (ctypes.c_uint64,)), 0))
    done(driver.cuCtxSynchronize())


def main() -> None:
    device, fd, size, writable = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "writable"
    vmm = CudaVmm(driver, device)
    address = vmm.reserve(size)
    vmm.map(address, size, fd, writable=writable)
    done(driver.cuCtxSetCurrent(done(driver.cuDevicePrimaryCtxRetain(done(driver.cuDeviceGet(0))))))

    def obey(line: str) -> str:
        match line.split():
            case ["read", count]:
                read = ctypes.create_string_buffer(int(count))
                done(driver.cuMemcpyDtoH(ctypes.addressof(read), address, int(count)))
                return read.raw.hex()
            case ["write", digits]:
                done(driver.cuMemcpyHtoD(address, bytes.fromhex(digits), len(digits) // 2))
            case ["poke"]:
                poke(address)
            case ["poke", "nowhere"]:
                poke(NOWHERE)
            case ["unmap"]:
                vmm.unmap(address, size)
        return "done"

    print("mapped", flush=True)
    for line in sys.stdin:
        try:
            print(obey(line), flush=True)
        except RuntimeError as error:
            print(error, flush=True)


if __name__ == "__main__":
    main()
