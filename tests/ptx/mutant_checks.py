"""A quick check of each kernel, for mutants.py: a function that is true as long as the kernel does what it should.

Inputs are small, references torch's or float64's, and memory beside the outputs must keep its values.
"""

import math

import torch
from initlab.kernels import Draw, Normal, Region, TruncatedNormal, backends, clip_, fill_, grad_norm
from initlab.kernels import _linear_epilogue_triton as epilogue
from initlab.kernels import _linear_triton as linear
from initlab.kernels import _nonfinite_triton as nonfinite
from initlab.kernels import _norms_table_triton as table
from initlab.kernels import _norms_triton as norm_kernels

INF, NAN = math.inf, math.nan
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def normal(*shape, seed=0, dtype=BF16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def same(a, b):
    """Equal, with NaN where the other has NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))


def fill_check(parts, distribution, dtype, keys_differ=True):
    """parts: (number of elements, region, offset of the first one) of tensors that are filled together."""

    def make():
        wholes, draws = [], []
        for place, (numel, region, offset) in enumerate(parts):
            wholes.append(torch.full((numel + offset + 40,), 7, dtype=dtype))
            x = wholes[-1][offset : offset + numel]
            x = x if region is None else x.view(region.sizes)
            draws.append(Draw(x, distribution, 0xFEDC_BA98_7654_3210 + place * keys_differ, region))
        fill_(draws)
        return wholes

    backends.requested = lambda: "torch"
    expected = make()
    backends.requested = lambda: "triton"
    return lambda: all(torch.equal(bits(x), bits(y)) for x, y in zip(make(), expected, strict=True))


def fill_rows():
    parts = [(9001, None, 0), (8500, Region((9000,), (3,), (8500,)), 1)]
    parts.append((4096, Region((2**40,), (2**34 - 2048,), (4096,)), 0))
    return fill_check(parts, Normal(0.3, 1.5), BF16)


def fill_rows_far_from_the_mean():
    """Around some of the smallest random words below 2**26, where a value depends on the word's last bits."""
    centres = (35723838, 3954100, 13308877, 58143212, 41525567, 32820583, 41593745, 53290720)
    whole = (2**40,)
    return fill_check([(4096, Region(whole, (c - 2048,), (4096,)), 0) for c in centres], Normal(0.0, 1.0), F32, False)


def both(*makers):
    """All of several checks."""

    def make():
        checks = [maker() for maker in makers]
        return lambda: all(check() for check in checks)

    return make


def fill_short_rows():
    parts = [(210, Region((9, 7, 11), (2, 1, 3), (5, 6, 7)), 1), (602, Region((2**20, 2**22), (2**15, 5), (2, 301)), 0)]
    return fill_check(parts, TruncatedNormal(0.0, 0.02, -2.0, 2.0), F32)


def flag_of(values, launch):
    flag = torch.full((3,), 8, dtype=torch.int32)
    launch(flag[1:2], values)
    return int(flag[1]) - 8 if flag[0] == flag[2] == 8 else None


PLANTS = [{}, {4500: NAN}, {8999: INF, 0: -INF}, {50: NAN, 3: INF, 4: -INF}, {4095: INF}, {8192: -INF}]
KINDS = ((NAN, 1), (INF, 2), (-INF, 4))


def single_plants():
    """(place, value) in a full block: each kind in each of a thread's elements, and in each warp."""
    for i in range(96):
        chunk, element, lane = i // 8 % 4, i % 8, 37 * i % 128
        yield 1024 * chunk + 8 * lane + element, KINDS[(i + 2 * (i // 32)) % 3][0]


def planted(numel, values, dtype):
    x = torch.full((numel,), 3.0, dtype=dtype)
    for place, value in values.items():
        x[place] = value
    kinds = {1 if v != v else 2 if v > 0 else 4 for v in values.values()}
    return x, sum(kinds)


def add_flag():
    def check():
        for numel, values in ((9000, p) for p in PLANTS):
            x, expected = planted(numel, values, BF16)
            if flag_of(x, nonfinite.launch) != expected:
                return False
        for place, value in single_plants():
            for numel in (4096, 8191):  # in a full block, and in one that is not
                x, expected = planted(numel, {place % 4095 + numel - 4096: value}, BF16)
                if flag_of(x, nonfinite.launch) != expected:
                    return False
        for i in range(7):  # each of the programs' blocks
            x, expected = planted(4096 * 7 + 4090, {4096 * i + 97: KINDS[i % 3][0], 4096 * 7 + 4089: NAN}, BF16)
            if flag_of(x, nonfinite.launch) != expected:
                return False
        return True

    return check


def close(found, exact):
    return abs(float(found) - exact) <= 1e-6 * exact


def exact_norm(tensors):
    flat = torch.cat([t.double() for t in tensors])
    largest = float(flat.abs().max())
    return float((flat / largest).square().sum().sqrt()) * largest


def norms():
    tensors = [normal(n, seed=n) for n in (9001, 5, 4096, 1000)]
    tensors += [normal(n, seed=n, dtype=d) for n, d in ((700, F32), (5000, F64), (4930, torch.float16), (9001, F32))]
    cases = [tensors, [torch.zeros(7, dtype=BF16)], [tensors[0][1:], tensors[5][1:], tensors[6][3:], tensors[7][2:]]]
    cases += [[(t.double() * scale).to(BF16) for t in tensors[:4]] for scale in (1e30, 1e-25)]
    cases += [[(t.double() * scale) for t in tensors[:4]] for scale in (1e180, 1e-190)]
    cases += [[normal(700, dtype=F64) * 1e180, normal(5000, dtype=F64)], [normal(700, dtype=F64) * 1e-190] * 2]
    cases += [[torch.full((2000,), 1e-20), torch.full((2000,), 1e18)]]
    # All are read again; the last element of each is at another of a thread's places.
    ends = [normal(n, seed=n, dtype=d) for d in (BF16, F32, F64, torch.float16) for n in (612, 740, 868, 996, 9001)]
    cases += [[*ends, normal(600, dtype=F64) * 1e180], [*ends, normal(600, dtype=F64) * 1e-190]]
    wanted = [(exact_norm(c) if c[0].any() else 0.0, [exact_norm([t]) if t.any() else 0.0 for t in c]) for c in cases]
    dtypes = (BF16, F32, F64, torch.float16)

    def check():
        for case, (total, each) in zip(cases, wanted, strict=True):
            table._plans.clear()
            found = grad_norm(case, per_tensor=True)
            if 1e-150 < total < 1e150 and not close(found.sum_of_powers.sqrt(), total):
                return False
            if not close(found.norm64, total) or found.flag or found.first_nonfinite_index != -1:
                return False
            if not all(close(n, e) for n, e in zip(found.tensor_norms, each, strict=True)):
                return False
        for kind, (value, flag) in enumerate(KINDS):  # in each warp, each of a thread's places, each dtype
            bad = [normal(600, seed=9, dtype=dtypes[i % 4]) for i in range(32)]
            for i, t in enumerate(bad):
                t[(37 * i + 11 * kind) % 32 + 32 * ((i // 4 + kind) % 4) + 128 * (i // 16 + 2 * (i // 4 % 2))] = value
            sound = normal(600, seed=8)
            table._plans.clear()
            found = grad_norm([sound, *bad, sound], per_tensor=True)
            if (int(found.flag), int(found.first_nonfinite_index)) != (flag, 1):
                return False
            norm, n = (NAN if flag == 1 else INF), found.tensor_norms
            expected = torch.tensor([n[0], *[norm] * 32, n[0]], dtype=F64)
            if not same(found.norm64, torch.tensor(norm, dtype=F64)) or not same(n, expected) or n[0].isinf():
                return False
        return True

    return check


def finish(launch_kernel, cases):
    """A kernel of one program that writes `results`. cases: (arguments, what results hold before, and after)."""

    def check():
        for arguments, before, after in cases:
            whole = torch.full((9,), 7, dtype=torch.int64)
            whole[2:7] = torch.tensor(before)
            launch_kernel(*arguments, whole[2:7])
            if not bool((whole[:2] == 7).all() and (whole[7:] == 7).all()):
                return False
            reals = whole[2:7].view(F64)[:2]
            expected = torch.tensor(after[:2], dtype=F64)
            near = torch.allclose(reals, expected, rtol=1e-13, atol=0.0, equal_nan=True)
            if not near or whole[4:7].tolist() != after[2:]:
                return False
        return True

    return check


def finish_norm():
    sums = torch.rand(1300, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.5
    cases = []
    for scale, sound in ((1.0, 1e-30), (1.0, 2.0**20), (2.0**-110, 2.0**-100), (INF, 1e-30), (NAN, 1e-30)):
        total = math.fsum(sums.tolist()) * scale
        rescan = not sound <= total < INF
        sound = float(torch.tensor(sound))  # as a float32 has it
        cases.append(((sums * scale, 1300, sound), [0] * 5, [total**0.5, total, 0, -1, int(rescan)]))
    ones = torch.ones(1024, dtype=F64)
    cases.append(((ones, 1024, 1024.0), [0] * 5, [32.0, 1024.0, 0, -1, 0]))
    few = sums[:1030]
    cases.append(((few, 1030, 1.0), [0] * 5, [math.fsum(few.tolist()) ** 0.5, math.fsum(few.tolist()), 0, -1, 0]))
    return finish(lambda *args: norm_kernels._launch(norm_kernels.finish_norm_kernel, 1, *args), cases)


def finish_rescan():
    items, none = 1300, (1 << 63) - 1
    shrink, grow = 2.0**-538, 2.0**537
    cases = []
    for big, mid, tiny in ((0, 1, 0), (2, 3, 1), (0, 0, 2), (0, 1e-308, 3), (1e-10, 1e300, 0), (0, 0, 0)):
        for flagged in ({}, {1299: (4, 17)}, {3: (2, 9), 1100: (2, 8)}, {700: (1, 5), 5: (6, 6)}):
            scratch = torch.rand(5, items, dtype=F64, generator=torch.Generator().manual_seed(1)) + 0.5
            scratch[:3] *= torch.tensor([big, mid, tiny], dtype=F64)[:, None]
            sums = [math.fsum(row) for row in scratch[:3].tolist()]
            words = scratch.view(torch.int64)
            words[3], words[4] = 0, none
            for item, (flag, index) in flagged.items():
                words[3, item], words[4, item] = flag, index
            flag = 0
            for kinds, _ in flagged.values():
                flag |= kinds
            first = min((index for _, index in flagged.values()), default=-1)
            small = math.hypot(math.sqrt(sums[1]), math.sqrt(sums[2]) / grow)
            norm = math.hypot(math.sqrt(sums[0]), math.sqrt(sums[1]) * shrink) / shrink if big else small
            norm = NAN if flag & 1 else INF if flag else norm
            square = norm * norm
            cases.append(((scratch, items), [0, 0, 0, 0, 1], [norm, square, flag, first, 1]))
    for k, item in enumerate(range(0, 1030, 29)):  # each of a thread's places; a last round of a few
        scratch = torch.zeros(5, 1030, dtype=F64)
        scratch[:3] = (torch.arange(1030) % 7 == k % 7) * torch.tensor([0.0, 1.0, 0.0])[:, None]
        words, kinds = scratch.view(torch.int64), 1 << k % 3
        words[3], words[4] = 0, none
        words[3, item], words[4, item] = kinds, k + 2**40
        norm = NAN if kinds == 1 else INF
        cases.append(((scratch, 1030), [0, 0, 0, 0, 1], [norm, norm, kinds, k + 2**40, 1]))
    for count in (1026, 1027, 1282, 1283, 1538, 1539, 1794, 1795):  # the last item is at each of a thread's places
        scratch = torch.zeros(5, count, dtype=F64)
        words = scratch.view(torch.int64)
        words[3], words[4] = 0, none
        words[3, -1], words[4, -1] = 2, 11
        cases.append(((scratch, count), [0, 0, 0, 0, 1], [INF, INF, 2, 11, 1]))
    sums = torch.ones(5, items, dtype=F64)
    cases.append(((sums, items), [0, 0, 3, 4, 0], [0.0, 0.0, 3, 4, 0]))
    return finish(lambda *args: norm_kernels._launch(norm_kernels.finish_rescan_kernel, 1, *args), cases)


def tensor_norms():
    firsts, places, items = [0, 1029, 1032, 2304], [2, 0, 3, 1], 2310
    columns = table.on_device([torch.tensor([firsts, *[[0] * 4] * 5, places]).numpy()], torch.device("cpu"))
    sums = torch.rand(items, dtype=F64, generator=torch.Generator().manual_seed(2)) + 0.5
    scratch = torch.rand(5, items, dtype=F64, generator=torch.Generator().manual_seed(3)) + 0.5
    scratch.view(torch.int64)[3] = 0
    scratch[[0, 2]] = 0.0
    sums[[3, 1028, 2309]] = torch.tensor([0.0, INF, NAN], dtype=F64)  # they are read again

    def check():
        for all_again in (0, 1):
            for kind, flag in enumerate((0, 1, 2, 4, 0, 0, *(1, 2, 4) * 3)):
                again = torch.full((items,), bool(all_again)) | ~((sums >= 1e-30) & (sums < INF))
                whole = scratch.clone()
                flagged = torch.tensor([1032 + 128 * (kind % 8) + 5 * kind if all_again else 1028])
                whole.view(torch.int64)[3, flagged] = flag  # each of a thread's places
                if kind == 4:  # big ones beside the middling, and tiny ones alone
                    whole[0] = sums.nan_to_num(0.5, 0.5)
                if kind == 5:
                    whole[2], whole[1] = scratch[1], 0.0
                found = torch.full((8,), 7.0, dtype=F64)
                results = torch.tensor([0, 0, 0, 0, all_again])
                norm_kernels._launch(
                    norm_kernels.tensor_norms_kernel, 4, columns, 4, 1, items, results, sums, whole, found[2:6],
                    BLOCK_SIZE=table.BLOCK_SIZE,
                )  # fmt: skip
                if not torch.allclose(found, expected(whole, again, flag, flagged), 1e-13, 0.0, equal_nan=True):
                    return False
        return True

    def expected(whole, again, flag, flagged):
        norms = torch.full((8,), 7.0, dtype=F64)
        zero = torch.zeros((), dtype=F64)
        for first, end, place in zip(firsts, [*firsts[1:], items], places, strict=True):
            own = slice(first, end)
            mid = torch.where(again, whole[1], sums)[own].sum()
            big, tiny = (torch.where(again, row, zero)[own].sum() for row in (whole[0], whole[2]))
            # Beside sums near 1, those of other scales add less than a unit in the last place.
            norms[2 + place] = big.sqrt() * 2.0**538 if big else mid.sqrt() if mid else tiny.sqrt() / 2.0**537
            if flag and bool(((flagged >= first) & (flagged < end)).any()):
                norms[2 + place] = NAN if flag == 1 else INF
        return norms

    return check


def scale():
    before = [normal(9001), normal(300, dtype=torch.float16), normal(4099, dtype=F32), normal(5000, dtype=F64)]
    before[0][7], before[2][9] = NAN, -0.0
    cases = [(4.0, 1.0, "propagate"), (4.0, 0.37, "zero"), (0.5, 1.0, "zero"), (NAN, 1.0, "zero"), (INF, 1.0, "keep")]
    cases += [(NAN, 1.0, "propagate"), (INF, 1.0, "propagate"), (1e38, 1e-20, "zero"), (1e30, 1e-5, "keep")]
    cases += [(3.0, 0.0, "zero"), (1e-6, 1e-7, "zero"), (1e-6, 1e-7, "propagate"), (1e-6, 1e-7, "keep")]

    def expected(x, norm, max_norm, policy):
        c = max_norm / (norm + 1e-6)
        if not math.isfinite(norm) and policy != "propagate":
            return x if policy == "keep" else torch.zeros_like(x)
        return x if c >= 1.0 else (x.double() * c).to(x.dtype)

    def check():
        for case in cases:
            wholes = [torch.full((x.numel() + 19,), 7, dtype=x.dtype) for x in before]
            tensors = [whole[3 : 3 + x.numel()] for whole, x in zip(wholes, before, strict=True)]
            for x, y in zip(tensors, before, strict=True):
                x.copy_(y)
            table._plans.clear()
            clip_(tensors, torch.tensor(case[0], dtype=F64), case[1], nonfinite=case[2])
            for x, y, whole in zip(tensors, before, wholes, strict=True):
                y = expected(y, *case)
                exact = torch.equal if x.dtype == BF16 else lambda a, b: torch.allclose(a, b, rtol=1e-3, atol=1e-44)
                if not torch.equal(x.isnan(), y.isnan()) or not exact(x.nan_to_num(9.0), y.nan_to_num(9.0)):
                    return False
                if not bool((whole[:3] == 7).all() and (whole[3 + x.numel() :] == 7).all()):
                    return False
        return True

    return check


def relu_in_place():
    pool = torch.tensor([NAN, 0.0, -1.5, 2.5, 1e-3, -1e30, 1e30, -0.0], dtype=BF16)

    def check():
        for values in PLANTS:
            whole, expected = planted(9016, values, BF16)
            y = whole[:9000]
            before = y.clone()
            if flag_of(y, lambda flag, y: epilogue.relu_in_place(y, flag)) != expected:
                return False
            if not same(y, torch.relu(before)) or not bool((whole[9000:] == 3.0).all()):
                return False
        for place, value in single_plants():
            for numel in (4096, 4095):  # in a full block, and in one that is not
                y, expected = planted(numel, {place % numel: value}, BF16)
                if flag_of(y, lambda flag, y: epilogue.relu_in_place(y, flag)) != expected:
                    return False
        for numel in (4097, 8190, 9000):
            x = pool[torch.randint(0, 8, (numel,), generator=torch.Generator().manual_seed(numel))]
            y = x.clone()
            if flag_of(y, lambda flag, y: epilogue.relu_in_place(y, flag)) != 1 or not same(y, torch.relu(x)):
                return False
        return True

    return check


def mask_and_sum():
    cases = []
    for M, N in ((300, 130), *((M, 130) for M in range(33, 65)), (40, 257)):  # each remainder of a block's rows
        y, grad = normal(M, N, seed=1).relu(), normal(M, N, seed=2)
        y[3, 3] = NAN
        cases.append((y, grad, torch.where(y <= 0, torch.zeros((), dtype=BF16), grad)))

    def check():
        for y, grad, expected in cases:
            out, sums = epilogue.mask_and_sum(grad, y)
            if not torch.equal(bits(out), bits(expected)):
                return False
            if not torch.allclose(sums.double(), expected.double().sum(0), 1e-5, 1e-4):
                return False
        return True

    return check


def gemm(shape, capability_major, tile):
    M, K, N = shape
    x, w, bias = normal(M, K, seed=3), normal(N, K, seed=4), normal(N, seed=5)
    exact = x.double() @ w.double().T + bias.double()
    size = x.double().abs() @ w.double().abs().T + bias.double().abs()

    # One element that is the least that rounds to infinity: 511 * 2**119.
    small, weights = torch.ones(tile.BLOCK_M, 64, dtype=BF16), torch.zeros(tile.BLOCK_N, 64, dtype=BF16)

    def check():
        for i in range(32):
            row, column = 29 * i % tile.BLOCK_M, 8 * (i % (tile.BLOCK_N // 8)) + i // 2 % 8
            a, b, flags = small.clone(), weights.clone(), torch.zeros(1, dtype=torch.int32)
            a[:, 0], a[row, 0], b[column, 0] = 1.0, 73 * 2.0**60, (-1) ** i * 7 * 2.0**59
            y = linear.gemm(a, b, None, flags, capability_major, tile)
            if int(flags) != (4 if i % 2 else 2) or (y[row, column] == INF) != (i % 2 == 0):
                return False
        for place, value, flag in ((None, 0, 0), (N - 1, INF, 2), (3, -INF, 4), (N // 2, NAN, 1)):
            planted_bias, reference = bias.clone(), exact.clone()
            if place is not None:
                planted_bias[place] = value
                reference[:, place] = value
            flags = torch.full((3,), 8, dtype=torch.int32)
            y = linear.gemm(x, w, planted_bias, flags[1:2], capability_major, tile)
            if flags.tolist() != [8, 8 | flag, 8] or not torch.equal(y.isnan(), reference.isnan()):
                return False
            error = (y.double() - torch.relu(reference)).abs().nan_to_num(0.0, 0.0)
            if not bool((error <= 2 * 2.0**-9 * size + 1e-6).all()):
                return False
        return True

    return check


# By kernel: compute capability, and what makes its check.
CHECKS = {
    "fill_rows": (90, both(fill_rows, fill_rows_far_from_the_mean)),
    "fill_short_rows": (90, fill_short_rows),
    "add_flag_kernel": (90, add_flag),
    "norm_kernel": (90, norms),
    "finish_norm_kernel": (90, finish_norm),
    "rescan_kernel": (90, norms),
    "finish_rescan_kernel": (90, finish_rescan),
    "tensor_norms_kernel": (90, tensor_norms),
    "scale_kernel": (90, scale),
    "relu_in_place_kernel": (90, relu_in_place),
    "mask_and_sum_kernel": (90, mask_and_sum),
    "linear_relu_kernel": (80, lambda: gemm((70, 144, 136), 8, linear.TILES[8][1])),
    "linear_relu_tma_kernel": (90, lambda: gemm((70, 328, 136), 9, linear.TILES[9][2])),
}
