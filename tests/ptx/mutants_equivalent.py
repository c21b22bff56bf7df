"""Mutants that mutants.py makes and that change nothing a user could see, each with the reason."""

_SMALL = "flags are 7 at most, so the upper half of these 64 bits is 0 whatever it is shifted by"

_ANY = "of these bits it is asked only whether any is set, and each still sets one"
_BUTTERFLY = "the steps 5, 2 and 1 reach each of the eight lanes as 4, 2 and 1 do"

EQUIVALENT: dict[str, str] = {
    "finish_norm_kernel, line 265: setp.eq.b32 %p14, %r52, 0; -> setp.eq.b32 %p14, %r52, 1;": (
        "every thread holds the total: another one writes it"
    ),
    "finish_rescan_kernel, line 517: add.s32 %r87, %r85, 256; -> sub.s32 %r87, %r85, 256;": (
        "reads flags behind the sums of tiny squares: where one is set the result is NaN or infinite, else they add 0"
    ),
    "finish_rescan_kernel, line 1093: shl.b64 %rd352, %rd351, 32; -> shl.b64 %rd352, %rd351, 31;": _SMALL,
    "finish_rescan_kernel, line 1067: shl.b64 %rd342, %rd341, 32; -> shl.b64 %rd342, %rd341, 31;": _SMALL,
    "tensor_norms_kernel, line 1098: shl.b64 %rd372, %rd371, 32; -> shl.b64 %rd372, %rd371, 31;": _SMALL,
    "scale_kernel, line 442: add.s64 %rd55, %rd120, -256; -> add.s64 %rd55, %rd120, -257;": (
        "it is compared with the first element, which is within 16 bytes of the start; this place is 128 elements on"
    ),
    "relu_in_place_kernel, line 605: shfl.sync.bfly.b32 %r346, %r283, 4, 31, -1; -> shfl.sync.bfly.b32 %r346, %r283, "
    "5, 31, -1;": _BUTTERFLY,
    "norm_kernel, line 453: shfl.sync.bfly.b32 %r37, %r21, 4, 31, -1; -> shfl.sync.bfly.b32 %r37, %r21, 5, 31, -1;": (
        _BUTTERFLY + "; float32 rounds in another order, within the stated error, the same at each run"
    ),
    "linear_relu_kernel, line 186: cp.async.commit_group; -> (nothing)": (
        "the copy joins the group that is committed next, and waits count from the newest group"
    ),
    "relu_in_place_kernel, line 1071: shl.b16 %rs41, %rs40, 12; -> shl.b16 %rs41, %rs40, 11;": (
        _ANY + "; bit 4, which is kept now, is set only with bit 3"
    ),
    "relu_in_place_kernel, line 538: shl.b16 %rs276, %rs275, 2; -> shl.b16 %rs276, %rs275, 3;": _ANY,
    "relu_in_place_kernel, line 1211: shl.b16 %rs115, %rs114, 1; -> shl.b16 %rs115, %rs114, 0;": _ANY,
}
