"""Instructions of memory and warps: loads, stores, atomics, asynchronous copies, shuffles, matrices and products."""

from __future__ import annotations

import re

import numpy as np

from .hopper import bulk_copy
from .memory import WARP, Fault
from .operands import address_reader, all_lanes, instruction, reader, readers, write
from .parser import Immediate, Register
from .values import F32, F64, I32, I64, SIGNED, U8, U16, U32, UNSIGNED, WIDTHS, as_real, tf32, to_bits


def locate_shared(machine, addresses, size, mask, what, i):
    """(threads that take part, where the bytes lie that they mean), checked."""
    threads = machine.taking_part(mask)
    addresses = all_lanes(addresses, machine)[threads]
    return threads, machine.shared.locate(addresses, size, machine.block[threads], what, machine.where(i))


def _vector(i, registers):
    """How many words a load or store moves."""
    found = [int(m[1]) for m in map(re.compile(r"v(\d)$").match, i.parts[2:-1]) if m]
    i.require(i.kind[0] == "b" and i.parts[1] in ("global", "shared") and len(i.operands) == 2)
    i.require(set(i.parts[2:-1]) <= {f"v{n}" for n in found} and len(registers) == (found or [1])[0])
    return len(registers)


@instruction("ld")
def load(i):
    if i.parts[1] == "param":
        return _load_parameter(i)
    width = WIDTHS[i.kind]
    registers = i.operands[0] if isinstance(i.operands[0], list) else [i.operands[0]]
    count = _vector(i, registers)
    i.require(all(r.width == width or (width, r.width) == (8, 16) for r in registers))
    is_global = i.parts[1] == "global"
    address = address_reader(i.operands[1], 64 if is_global else 32)

    def run(machine, mask):
        if is_global:
            threads = machine.taking_part(mask)
            numbers = machine.numbers[machine.block[threads]]
            addresses = all_lanes(address(machine), machine)[threads]
            words = machine.memory.load(addresses, width, count, numbers, machine.where(i))
        else:
            size = width * count // 8
            threads, places = locate_shared(machine, address(machine), size, mask, "load", i)
            machine.shared.mark_read(places, size, machine.warp_bit[threads], machine.where(i))
            words = machine.shared.load(places, width, count)
        for register, word in zip(registers, words, strict=True):
            word = word.astype(UNSIGNED[register.width], copy=False)
            write(machine, register, machine.spread(word, mask), mask)

    return run


def _load_parameter(i):
    target, address = i.operands
    i.require(address.offset == 0 and isinstance(target, Register))
    width, signed = WIDTHS[i.kind], i.kind[0] == "s"
    i.require(target.width == width or (target.width > width and i.kind[0] in "ubs"))

    def run(machine, mask):
        bits, given = machine.parameters[address.base]
        if given != width:
            raise Fault(f"a parameter of {given} bits is read as {width}: {machine.where(i)}")
        value = UNSIGNED[width](bits)
        value = value.view(SIGNED[width]).astype(SIGNED[target.width]) if signed else value
        write(machine, target, value.astype(UNSIGNED[target.width]), mask)

    return run


@instruction("st")
def store(i):
    width = WIDTHS[i.kind]
    sources = i.operands[1] if isinstance(i.operands[1], list) else [i.operands[1]]
    count = _vector(i, sources)
    if width == 8:  # the low byte of a wider register
        wide = [reader(s, s.width if isinstance(s, Register) else 16) for s in sources]
        gets = [lambda machine, get=get: np.asarray(get(machine)).astype(U8) for get in wide]
    else:
        gets = readers(sources, width)
    is_global, size = i.parts[1] == "global", width * count // 8
    address = address_reader(i.operands[0], 64 if is_global else 32)

    def run(machine, mask):
        threads, where = machine.taking_part(mask), machine.where(i)
        words = [all_lanes(get(machine), machine)[threads] for get in gets]
        if is_global:
            addresses = all_lanes(address(machine), machine)[threads]
            machine.memory.store(addresses, words, width, machine.numbers[machine.block[threads]], where)
        else:
            threads, places = locate_shared(machine, address(machine), size, mask, "store", i)
            machine.shared.mark_write(places, size, machine.warp_bit[threads], where)
            machine.shared.store(places, words, width, where)

    return run


@instruction("atom")
def atomic_or(i):
    i.require(i.parts[1] == "global" and i.parts[-2:] == ["or", "b32"])
    address, value = address_reader(i.operands[1], 64), reader(i.operands[2], 32)

    def run(machine, mask):
        threads = machine.taking_part(mask)
        addresses, words = (all_lanes(get(machine), machine)[threads] for get in (address, value))
        before = machine.memory.or_into(addresses, words, machine.where(i))
        write(machine, i.operands[0], machine.spread(before, mask), mask)

    return run


# ----------------------------------------------------------------------------------------------------------------
# Copies from global to shared memory that a thread starts and waits for


class AsynchronousCopies:
    """Copies on their way. Each takes effect as late as its thread's waits allow."""

    def __init__(self, machine) -> None:
        self.machine = machine
        self.committed = np.zeros(machine.n, I64)  # groups, by thread
        self._pending = []  # (threads, places, words, the group of each thread)

    def start(self, threads, places, words) -> None:
        self._pending.append((threads, places, words, self.committed[threads].copy()))

    def wait(self, mask, newest: int, where: str) -> None:
        """Until at most the `newest` groups of each thread are on their way."""
        shared, left = self.machine.shared, []
        for threads, places, words, group in self._pending:
            done = mask[threads] & (group < self.committed[threads] - newest)
            if done.any():
                warps = self.machine.warp_bit[threads[done]]
                shared.mark_write(places[done], 4 * len(words), warps, where)
                shared.store(places[done], [word[done] for word in words], 32, where)
            if not done.all():
                keep = ~done
                left.append((threads[keep], places[keep], [word[keep] for word in words], group[keep]))
        self._pending = left


@instruction("cp")
def copy(i):
    if i.operation.startswith("cp.async.bulk"):
        return bulk_copy(i)
    if i.operation == "cp.async.commit_group":

        def commit(machine, mask):
            machine.copies.committed[machine.taking_part(mask)] += 1

        return commit
    if i.operation == "cp.async.wait_group":
        newest = i.operands[0].bits
        return lambda machine, mask: machine.copies.wait(machine.as_mask(mask), newest, machine.where(i))
    i.require(i.operation in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"))
    size = i.operands[2].bits
    i.require(size == 16 or (size in (4, 8) and ".ca." in i.operation))
    target, source = address_reader(i.operands[0], 32), address_reader(i.operands[1], 64)
    read_size = reader(i.operands[3] if len(i.operands) > 3 else Immediate(size), 32)

    def start(machine, mask):
        where, shared = machine.where(i), machine.shared
        threads, places = locate_shared(machine, target(machine), size, mask, "cp.async", i)
        sizes = all_lanes(read_size(machine), machine)[threads]
        if not np.isin(sizes, (0, size)).all():
            raise Fault(f"cp.async of {set(sizes)} bytes: {where}")
        full = sizes == size  # the others write zeros and read nothing
        words = [np.zeros(len(threads), U32) for _ in range(size // 4)]
        addresses, blocks = all_lanes(source(machine), machine)[threads[full]], machine.block[threads[full]]
        loaded = machine.memory.load(addresses, 32, size // 4, machine.numbers[blocks], where)
        for word, values in zip(words, loaded, strict=True):
            word[full] = values
        cells = np.concatenate([places // 2 + k for k in range(size // 2)])
        known = shared.known[cells]
        shared.mark_write(places, size, machine.warp_bit[threads], where)
        shared.known[cells] = known  # it is not there yet
        machine.copies.start(threads, places, words)

    return start


# ----------------------------------------------------------------------------------------------------------------
# Warps


@instruction("shfl")
def shuffle(i):
    _, source, by, clamp, members = i.operands
    i.require(i.parts[1:] in (["sync", "bfly", "b32"], ["sync", "idx", "b32"]))
    i.require(all(isinstance(x, Immediate) for x in (by, clamp, members)))
    i.require(clamp.bits == 31 and members.bits & 0xFFFFFFFF == 0xFFFFFFFF)
    get, butterfly = reader(source, 32), i.parts[2] == "bfly"

    def run(machine, mask):
        machine.need_whole_warps(mask, i)
        other = machine.lane ^ by.bits if butterfly else machine.lane // WARP * WARP + by.bits
        write(machine, i.operands[0], all_lanes(get(machine), machine)[other], mask)

    return run


@instruction("redux")
def reduce_warp(i):
    i.require(i.operation.startswith(("redux.sync.max.", "redux.sync.min.")) and i.kind in ("s32", "u32"))
    reduce, dtype = getattr(np, i.parts[2]), I32 if i.kind == "s32" else U32
    get, members = readers(i.operands[1:], 32)

    def run(machine, mask):
        machine.need_whole_warps(mask, i)
        if (all_lanes(members(machine), machine)[machine.taking_part(mask)] != U32(0xFFFFFFFF)).any():
            raise Fault(f"not all threads of a warp are named: {machine.where(i)}")
        extreme = reduce(all_lanes(get(machine), machine).view(dtype).reshape(-1, WARP), 1)
        write(machine, i.operands[0], np.repeat(extreme, WARP).view(U32), mask)

    return run


def _matrices(i, registers):
    """How many 8 by 8 matrices of 16-bit elements ldmatrix and stmatrix move."""
    i.require(i.parts[1:4] == ["sync", "aligned", "m8n8"] and i.kind == "b16" and "shared" in i.parts)
    i.require(f"x{len(registers)}" == i.parts[4])
    return len(registers)


def _rows(machine, addresses, count, mask, what, i):
    """Where the matrices' rows lie: thread 8 m + r of a warp names row r of matrix m. (warps, 32); -1 where none."""
    machine.need_whole_warps(mask, i)
    named = machine.lane % WARP < 8 * count
    threads, places = locate_shared(machine, addresses, 16, named if mask is None else named & mask, what, i)
    marked = machine.shared.mark_read if what == "ldmatrix" else machine.shared.mark_write
    marked(places, 16, machine.warp_bit[threads], machine.where(i))
    rows = np.full(machine.n, -1, I64)
    rows[threads] = places
    return rows.reshape(-1, WARP)


@instruction("ldmatrix")
def load_matrix(i):
    """Thread t holds elements 2 (t % 4) and 2 (t % 4) + 1 of row t / 4; transposed, of column t / 4."""
    registers, transposed = i.operands[0], "trans" in i.parts
    count, address = _matrices(i, registers), address_reader(i.operands[1], 32)

    def run(machine, mask):
        rows = _rows(machine, address(machine), count, mask, "ldmatrix", i)
        halves, t = machine.shared.words(16), np.arange(WARP)
        for n, register in enumerate(registers):
            start = rows[:, 8 * n : 8 * n + 8] // 2
            if transposed:
                low, high = (halves[start[:, t % 4 * 2 + odd] + t // 4] for odd in (0, 1))
            else:
                low, high = (halves[start[:, t // 4] + t % 4 * 2 + odd] for odd in (0, 1))
            write(machine, register, (low.astype(U32) | (high.astype(U32) << U32(16))).reshape(-1), mask)

    return run


@instruction("stmatrix")
def store_matrix(i):
    """As ldmatrix, the other way."""
    gets = readers(i.operands[1], 32)
    count, address = _matrices(i, i.operands[1]), address_reader(i.operands[0], 32)
    i.require("trans" not in i.parts)

    def run(machine, mask):
        rows = _rows(machine, address(machine), count, mask, "stmatrix", i)
        words, active, t = machine.shared.words(32), machine.as_mask(mask), np.arange(WARP)
        for n, get in enumerate(gets):
            places = (rows[:, 8 * n + t // 4] // 4 + t % 4).reshape(-1)
            words[places[active]] = all_lanes(get(machine), machine)[active]

    return run


@instruction("mma")
def matrix_product(i):
    """D = A B + C of a warp: A 16 by K, B K by 8. Sums are exact, and rounded once."""
    shape, (_, a_kind, b_kind, _) = i.parts[3], i.parts[6:]
    i.require(i.parts[1:3] == ["sync", "aligned"] and i.parts[4:6] == ["row", "col"] and a_kind == b_kind)
    i.require(
        i.parts[6] == i.parts[9] == "f32" and (shape, a_kind == "tf32") in (("m16n8k16", False), ("m16n8k8", True))
    )
    K, per_word = (8, 1) if a_kind == "tf32" else (16, 2)  # elements in a register
    gets = [readers(registers, 32) for registers in i.operands[1:]]
    t = np.arange(WARP)
    row, column = t // 4, t % 4  # where a thread's first word lies, in words along K

    def elements(words, part):
        if a_kind == "tf32":
            return tf32(words).astype(F64)
        return as_real((words >> U32(16 * part)).astype(U16), a_kind).astype(F64)

    def run(machine, mask):
        machine.need_whole_warps(mask, i)
        a, b, c = ([all_lanes(get(machine), machine).reshape(-1, WARP) for get in of] for of in gets)
        warps = machine.n // WARP
        A, B, C = np.zeros((warps, 16, K)), np.zeros((warps, K, 8)), np.zeros((warps, 16, 8))
        for part in range(per_word):
            along = column * per_word + part
            for n, (down, right) in enumerate(((0, 0), (8, 0), (0, K // 2), (8, K // 2))):
                A[:, row + down, along + right] = elements(a[n], part)
            for n, down in enumerate((0, K // 2)):
                B[:, along + down, row] = elements(b[n], part)
        places = [(row + down, column * 2 + right) for down in (0, 8) for right in (0, 1)]
        for place, word in zip(places, c, strict=True):
            C[:, place[0], place[1]] = word.view(F32)
        D = (C + A @ B).astype(F32)
        for place, register in zip(places, i.operands[0], strict=True):
            write(machine, register, to_bits(D[:, place[0], place[1]].reshape(-1), "f32"), mask)

    return run
