"""What came with compute capability 9.0: barriers in memory, bulk copies by tensor maps, asynchronous products (wgmma).

All that is asynchronous takes effect as late as the program's waits allow: a bulk load when its barrier is asked for, a
bulk store and a product when they are waited for. So a wait that is missing is seen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .memory import WARP, Fault
from .operands import address_reader, all_lanes, instruction, reader, readers, write
from .parser import SHARED_BASE, Address, Box
from .values import F32, F64, I32, I64, U8, U16, U32, U64, as_real, tf32, to_bits

_GROUP = 4 * WARP  # threads that take part in one product
_ALL_WARPS = U32(0xFFFFFFFF)


class TensorMap(NamedTuple):
    """A matrix in global memory, as cuTensorMapEncodeTiled describes it, and the box that a copy moves."""

    address: int
    swizzle: int  # 0: none; 1, 2, 3: spans of 32, 64, 128 bytes
    element_size: int
    element_type: int
    box: list[int]
    shape: list[int]
    strides: list[int]  # in elements
    padding: int


@dataclass
class Barrier:
    """Turns its phase when `count` arrivals and all bytes that were announced have come."""

    count: int
    missing: int
    made_by: int  # the warp, as a bit; 0 once its block's threads have met since
    used_by: int = 0  # the warps that used it since they met, as bits
    bytes: int = 0
    phase: int = 0

    def turn(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.phase = self.count, self.phase ^ 1


class Load(NamedTuple):
    key: tuple[int, int]  # the block and the barrier's address
    places: np.ndarray  # in shared memory
    data: np.ndarray


class Store(NamedTuple):
    thread: int
    places: np.ndarray
    addresses: np.ndarray
    where: str


class Product(NamedTuple):
    """One wgmma on its way."""

    threads: np.ndarray  # a mask
    group: np.ndarray  # how many groups each thread had committed
    finish: Any
    reads: list[np.ndarray]  # the places in shared memory


class BulkUnit:
    """What is on its way of a machine."""

    def __init__(self, machine) -> None:
        self.machine = machine
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.loads: list[Load] = []
        self.stores: list[Store] = []
        self.products: list[Product] = []
        self.committed = np.zeros(machine.n, I64)
        self.fenced = np.zeros(machine.n, bool)  # threads whose registers a product may use

    def barrier(self, key, warp, where) -> Barrier:
        """For a warp (a bit) to use."""
        if key not in self.barriers:
            raise Fault(f"no barrier at shared address {key[1]}: {where}")
        barrier = self.barriers[key]
        if barrier.made_by & ~warp:
            raise Fault(f"race: a barrier that another warp made, and the block has not met since: {where}")
        barrier.used_by |= warp
        return barrier

    def make_barrier(self, key, warp, count: int, where) -> None:
        self.forget_barrier(key, warp, where)
        self.barriers[key] = Barrier(count, count, made_by=warp)

    def forget_barrier(self, key, warp, where) -> None:
        if key in self.barriers and (self.barriers[key].used_by | self.barriers[key].made_by) & ~warp:
            raise Fault(f"race: a barrier that other warps may be using: {where}")
        self.barriers.pop(key, None)

    def synchronize(self, blocks) -> None:
        """Threads of these blocks (a mask) have met."""
        for (block, _), barrier in self.barriers.items():
            if blocks[block]:
                barrier.made_by = barrier.used_by = 0

    def locate(self, tensor_map: TensorMap, x: int, y: int, address: int, block: int, where: str):
        """Of each byte of a box: its place in shared memory, its address, and whether the matrix has it."""
        rows, columns = tensor_map.box
        row_bytes = columns * tensor_map.element_size
        if tensor_map.swizzle and row_bytes != 16 << tensor_map.swizzle:
            raise NotImplementedError(f"a box of {row_bytes} bytes in a row, swizzled by {tensor_map.swizzle}: {where}")
        alignment = 128 << tensor_map.swizzle if tensor_map.swizzle else 128
        if address % alignment:
            raise Fault(f"a box at shared address {address}, not a multiple of {alignment}: {where}")
        offset = address - SHARED_BASE
        if offset < 0 or offset + rows * row_bytes > self.machine.shared.size:
            raise Fault(f"a box beyond shared memory: {where}")
        r, c = np.meshgrid(np.arange(rows), np.arange(row_bytes), indexing="ij")
        places = _swizzled(address + r * row_bytes + c, tensor_map.swizzle) - SHARED_BASE
        row, column = y + r, x + c // tensor_map.element_size
        inside = (row >= 0) & (row < tensor_map.shape[0]) & (column >= 0) & (column < tensor_map.shape[1])
        element = row * tensor_map.strides[0] + column
        addresses = tensor_map.address + element * tensor_map.element_size + c % tensor_map.element_size
        return places + block * self.machine.shared.size, addresses.astype(U64), inside

    def start_load(self, key, places, data, where) -> None:
        shared, cells = self.machine.shared, np.unique(places // 2)
        if (shared.wrote[cells] | shared.read[cells]).any():
            raise Fault(f"race: a bulk copy into what threads touched since the last barrier: {where}")
        if any(np.isin(reads, places).any() for product in self.products for reads in product.reads):
            raise Fault(f"race: a bulk copy into what a product reads: {where}")
        if any(np.isin(load.places, places).any() for load in self.loads):
            raise Fault(f"race: two bulk copies into one place: {where}")
        shared.known[cells] = False
        self.loads.append(Load(key, places, data))

    def arrive(self, key, barrier: Barrier) -> None:
        """The loads that a barrier counts."""
        shared = self.machine.shared
        for load in [load for load in self.loads if load.key == key]:
            self.loads.remove(load)
            shared.bytes[load.places] = load.data
            shared.known[np.unique(load.places // 2)] = True
            barrier.bytes -= load.data.size
            barrier.turn()

    def flush_stores(self, mask) -> None:
        """What these threads started to store."""
        machine, shared, left = self.machine, self.machine.shared, []
        for store in self.stores:
            if not mask[store.thread]:
                left.append(store)
                continue
            cells = store.places // 2
            if not shared.known[cells].all():
                raise Fault(f"a bulk copy of what nobody wrote: {store.where}")
            if shared.unfenced[cells].any():
                raise Fault(f"a bulk copy of what threads wrote, without a fence: {store.where}")
            number = machine.numbers[machine.block[store.thread]]
            machine.memory.store_bytes(store.addresses, shared.bytes[store.places], number, store.where)
        self.stores = left

    def wait_products(self, mask, newest: int) -> None:
        left = []
        self.fenced &= ~mask
        for product in self.products:
            now = product.threads & mask & (product.group < self.committed - newest)
            if now.any():
                product.finish(self.machine, now)
            if (product.threads & ~now).any():
                left.append(product._replace(threads=product.threads & ~now))
        self.products = left

    def finish(self) -> None:
        """At the kernel's end stores still arrive; nothing else may be on its way."""
        self.flush_stores(np.ones(self.machine.n, bool))
        if self.loads or self.products:
            raise Fault(f"{self.machine.program.name} ends with bulk copies or products on their way")


def _swizzled(addresses, swizzle):
    """Bits 4 and up, xor-ed with as many bits from bit 7 on."""
    return addresses ^ (((addresses >> 7) & ((1 << swizzle) - 1)) << 4)


@instruction("elect")
def elect(i):
    """One thread of each warp, the first."""
    i.require(i.operation == "elect.sync" and i.operands[1].bits == -1)

    def run(machine, mask):
        machine.need_whole_warps(mask, i)
        lane, chosen = i.operands[0]
        write(machine, lane, U32(0), mask)
        write(machine, chosen, machine.lane % WARP == 0, mask)

    return run


@instruction("fence")
def fence(i):
    i.require(i.operation == "fence.proxy.async.shared::cta")
    return lambda machine, mask: machine.shared.fence(np.unique(machine.block[machine.taking_part(mask)]))


@instruction("mbarrier")
def barrier(i):
    what = i.parts[1]
    address = address_reader(next(x for x in i.operands if isinstance(x, Address)), 32)

    def keys(machine, mask):
        addresses = all_lanes(address(machine), machine)
        for thread in machine.taking_part(mask):
            yield thread, int(machine.warp_bit[thread]), (int(machine.block[thread]), int(addresses[thread]))

    if what == "init":
        count = i.operands[1].bits

        def run(machine, mask):
            for _, warp, key in keys(machine, mask):
                if key[1] % 8 or not SHARED_BASE <= key[1] <= SHARED_BASE + machine.shared.size - 8:
                    raise Fault(f"a barrier at shared address {key[1]}: {machine.where(i)}")
                machine.bulk.make_barrier(key, warp, count, machine.where(i))
    elif what == "inval":

        def run(machine, mask):
            for _, warp, key in keys(machine, mask):
                machine.bulk.forget_barrier(key, warp, machine.where(i))
    elif what == "arrive":
        i.require(i.parts[2] == "expect_tx" and i.operands[0] is None)
        announced = i.operands[2].bits

        def run(machine, mask):
            for _, warp, key in keys(machine, mask):
                arrived = machine.bulk.barrier(key, warp, machine.where(i))
                arrived.missing -= 1
                arrived.bytes += announced
                arrived.turn()
    else:
        i.require(i.parts[1:4] == ["try_wait", "parity", "shared::cta"])
        parity = reader(i.operands[2], 32)

        def run(machine, mask):
            parities, done, phases = all_lanes(parity(machine), machine), np.zeros(machine.n, bool), {}
            for thread, warp, key in keys(machine, mask):
                asked = machine.bulk.barrier(key, warp, machine.where(i))
                if key not in phases:
                    machine.bulk.arrive(key, asked)
                    phases[key] = asked.phase
                done[thread] = phases[key] != (parities[thread] & 1)
            write(machine, i.operands[0], done, mask)

    return run


_BULK_LOAD = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
_BULK_STORE = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"


def bulk_copy(i):
    if i.operation == "cp.async.bulk.commit_group":
        return lambda machine, mask: None
    if i.operation == "cp.async.bulk.wait_group.read":
        i.require(i.operands[0].bits == 0)
        return lambda machine, mask: machine.bulk.flush_stores(machine.as_mask(mask))
    i.require(i.operation in (_BULK_LOAD, _BULK_STORE))
    is_load = i.operation == _BULK_LOAD
    box = next(x for x in i.operands if isinstance(x, Box))
    addresses = [address_reader(x, 32) for x in i.operands if isinstance(x, Address)]  # data; a load's barrier
    gets = [*addresses, reader(box.tensor_map.base if isinstance(box.tensor_map, Address) else box.tensor_map, 64)]
    gets += readers(box.coordinates, 32)

    def run(machine, mask):
        values, where = [all_lanes(get(machine), machine) for get in gets], machine.where(i)
        for thread in machine.taking_part(mask):
            address, *barrier_address, tensor_map, x, y = (v[thread] for v in values)
            tensor_map, block = machine.maps[int(tensor_map)], int(machine.block[thread])
            x, y = int(x.view(I32)), int(y.view(I32))
            places, sources, inside = machine.bulk.locate(tensor_map, x, y, int(address), block, where)
            if is_load:
                data = np.zeros(places.shape, U8)  # what the matrix does not have
                data[inside] = machine.memory.load_bytes(sources[inside], where)
                key = block, int(barrier_address[0])
                machine.bulk.barrier(key, int(machine.warp_bit[thread]), where)
                machine.bulk.start_load(key, places, data, where)
                continue
            written_by = machine.shared.wrote[np.unique(places // 2)]
            if (written_by & ~machine.warp_bit[thread]).any():
                raise Fault(f"race: a bulk copy of what another warp wrote since the last barrier: {where}")
            machine.bulk.stores.append(Store(thread, places[inside], sources[inside], where))

    return run


@instruction("wgmma")
def asynchronous_product(i):
    """D = A B (+ D) of four warps: A 64 by 32 bytes, B 32 bytes by N, both in shared memory, named by descriptors."""
    if i.operation == "wgmma.fence.sync.aligned":

        def fence(machine, mask):
            machine.bulk.fenced |= machine.as_mask(mask)

        return fence
    if i.operation == "wgmma.commit_group.sync.aligned":

        def commit(machine, mask):
            machine.bulk.committed[machine.taking_part(mask)] += 1

        return commit
    if i.operation == "wgmma.wait_group.sync.aligned":
        newest = i.operands[0].bits
        return lambda machine, mask: machine.bulk.wait_products(machine.as_mask(mask), newest)
    shape = re.match(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(tf32|bf16|f16)\.\3$", i.operation)
    i.require(shape is not None)
    N, K, kind = int(shape[1]), int(shape[2]), shape[3]
    registers, *sources = i.operands[:4]
    i.require(K * (4 if kind == "tf32" else 2) == 32 and len(registers) == N // 2)
    i.require([x.bits for x in i.operands[4:]] == ([1, 1] if kind == "tf32" else [1, 1, 0, 0]))
    get_a, get_b, get_adds = *readers(sources[:2], 64), reader(sources[2], 1)

    def start(machine, mask):
        taking_part, where = machine.as_mask(mask), machine.where(i)
        whole = taking_part.reshape(-1, _GROUP)
        if (whole.any(1) != whole.all(1)).any():
            raise Fault(f"not all of four warps take part: {where}")
        if not machine.bulk.fenced[taking_part].all():
            raise Fault(f"a product of registers that were written since, without a fence: {where}")
        a, b = (all_lanes(get(machine), machine).reshape(-1, _GROUP) for get in (get_a, get_b))
        adds, operands = all_lanes(get_adds(machine), machine).reshape(-1, _GROUP), {}
        for group in np.flatnonzero(whole.all(1)):
            if (a[group] != a[group, 0]).any() or (b[group] != b[group, 0]).any():
                raise Fault(f"threads name different operands: {where}")
            base = int(machine.block[group * _GROUP]) * machine.shared.size
            places = [_rows_of(int(d[group, 0]), rows, i) for d, rows in ((a, 64), (b, N))]
            if any(p.min() < 0 or p.max() >= machine.shared.size for p in places):
                raise Fault(f"a product reads beyond shared memory: {where}")
            operands[group] = ([p + base for p in places], bool(adds[group, 0]))

        def finish(machine, now):
            values = [all_lanes(machine.registers[r.index], machine).copy() for r in registers]
            for group, (places, add) in operands.items():
                if now[group * _GROUP]:
                    left, right = (_matrix(machine.shared, p, kind, where) for p in places)
                    for p in places:  # for all four warps: only when they have met may it be overwritten
                        machine.shared.read[np.unique(p // 2)] |= _ALL_WARPS
                    _accumulate(values, slice(group * _GROUP, (group + 1) * _GROUP), left @ right.T, add)
            for register, v in zip(registers, values, strict=True):
                write(machine, register, v, now)

        reads = [p for places, _ in operands.values() for p in places]
        machine.bulk.products.append(Product(taking_part.copy(), machine.bulk.committed.copy(), finish, reads))

    return start


def _rows_of(descriptor: int, rows: int, i):
    """Places of 32 bytes in each of a matrix's rows, which lie in groups of eight, swizzled."""
    layout = descriptor >> 62  # 1, 2, 3: spans of 128, 64, 32 bytes
    i.require(layout != 0 and (descriptor >> 49) & 7 == 0)
    start, stride = (descriptor & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    r, c = np.meshgrid(np.arange(rows), np.arange(32), indexing="ij")
    return _swizzled(start + r // 8 * stride + r % 8 * (256 >> layout) + c, 4 - layout) - SHARED_BASE


def _matrix(shared, places, kind, where):
    if not shared.known[places // 2].all():
        raise Fault(f"a product of what nobody wrote: {where}")
    raw = shared.bytes[places]
    return (tf32(raw.view(U32)) if kind == "tf32" else as_real(raw.view(U16), kind)).astype(F64)


def _accumulate(registers, lanes, products, add) -> None:
    """products: (64, N). Thread t has rows 16 (t / 32) + t / 4 % 8 (+ 8), columns 2 (t % 4) (+ 1) of each 8."""
    t = np.arange(_GROUP)
    row, column = 16 * (t // WARP) + t % WARP // 4, t % 4 * 2
    for n, register in enumerate(registers):
        j, lower, odd = n // 4, n // 2 % 2, n % 2
        x = products[row + 8 * lower, 8 * j + column + odd]
        if add:
            x = x + register[lanes].view(F32)
        register[lanes] = to_bits(x.astype(F32), "f32")
