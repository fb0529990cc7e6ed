"""The memory of KV blocks: what lies where, and when the kernel gives it."""

from __future__ import annotations

import torch

from engines.native.kv_cache import PREPARED_AT_ONCE, PREPARED_BYTES, KvCache, PoolCopier

MIB = 1024 * 1024


def cache_of(blocks: int, block_bytes: int) -> KvCache:
    head_dim = block_bytes // (2 * 2 * 16 * 2 * 4)
    return KvCache(layers=2, blocks=blocks, block_size=16, kv_heads=2, head_dim=head_dim, dtype=torch.float32)


def test_a_block_lies_in_one_piece_with_its_layers_one_after_the_other() -> None:
    cache = cache_of(4, 2 * 2 * 16 * 2 * 8 * 4)
    keys, values = torch.rand(3, 2, 8), torch.rand(3, 2, 8)
    cache.write(1, (torch.tensor([3, 3, 0]), torch.tensor([0, 15, 7])), keys, values)
    lies = torch.from_numpy(cache.data.copy()).view(torch.float32).view(4, 2, 2, 16, 2, 8)
    for place, (block, row) in enumerate(((3, 0), (3, 15), (0, 7))):
        assert torch.equal(lies[block, 1, 0, row], keys[place]) and torch.equal(lies[block, 1, 1, row], values[place])
    assert lies.count_nonzero() == keys.count_nonzero() + values.count_nonzero()
    read_keys, read_values = cache.read(1, torch.tensor([[0, 3]]))
    assert torch.equal(read_keys[0, :, [7, 16, 31]], keys[[2, 0, 1]].transpose(0, 1))
    assert torch.equal(read_values[0, :, [7, 16, 31]], values[[2, 0, 1]].transpose(0, 1))
    slot = memoryview(bytearray(cache.bytes // 4))
    copier = PoolCopier(cache)
    copier.copy_out([3], [slot])
    assert bytes(slot) == cache.data[3].tobytes()
    copier.copy_in([slot], [2])
    assert bytes(slot) == cache.data[2].tobytes()
    copier.clear([2, 3])
    assert not cache.data[2:].any() and cache.data[0].any()


def test_memory_comes_ahead_of_copies_once_there_are_any() -> None:
    blocks = 3 + PREPARED_BYTES // MIB + 10
    cache = cache_of(blocks, MIB)
    copier = PoolCopier(cache)
    assert not copier.prepare() and cache.resident_bytes == 0, "nobody has loaded anything"
    copier.copy_in([memoryview(b"x" * MIB)], [2])
    assert cache.resident_bytes == MIB
    turns = 0
    while copier.prepare():
        turns += 1
    assert turns == PREPARED_BYTES // PREPARED_AT_ONCE
    assert cache.resident_bytes == MIB + PREPARED_BYTES
    copier.copy_in([memoryview(b"x" * MIB)], [blocks - 20])
    while copier.prepare():
        continue
    assert cache.resident_bytes == (1 + blocks - 3) * MIB, "up to its end"
    cache.close()
    assert not copier.prepare()
