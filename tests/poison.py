"""Memory whose surroundings are NaN: what a kernel reads or writes beyond a buffer shows."""

import math

import torch

GUARD = 512  # elements on either side of every buffer


def guarded(shape, dtype, device, value=math.nan):
    """A tensor of `value` inside of a larger one that is NaN throughout, and the larger one."""
    size = math.prod(shape)
    whole = torch.full((size + 2 * GUARD,), math.nan, dtype=dtype, device=device)
    tensor = whole[GUARD : GUARD + size].view(shape)
    return tensor.fill_(value), whole


def guarded_copy(x):
    """x in a buffer of its own, its memory laid out as it was."""
    if not x.is_floating_point():
        return x
    order = sorted(range(x.dim()), key=lambda dim: -x.stride(dim))
    back = [order.index(dim) for dim in range(x.dim())]
    x = x.permute(order)
    if not x.is_contiguous():  # cut out of a larger buffer, which is NaN already
        return x.permute(back)
    return guarded(x.shape, x.dtype, x.device)[0].copy_(x).permute(back)


def allocator(original, value, buffers):
    """In the place of `Tensor.new_empty` or `new_zeros`; `buffers` gets what it allocates."""

    def allocated(self, shape, *rest, **options):
        dtype = options.get("dtype") or self.dtype
        if not isinstance(shape, tuple | torch.Size) or not dtype.is_floating_point:
            return original(self, shape, *rest, **options)  # the interpreter's, or of integers
        tensor, whole = guarded(shape, dtype, self.device, value)
        buffers.append((tensor, whole))
        return tensor

    return allocated


def assert_untouched(buffers):
    for tensor, whole in buffers:
        outside = whole.isnan().sum() - whole[GUARD : GUARD + tensor.numel()].isnan().sum()
        assert outside == 2 * GUARD, f"written beyond a buffer of shape {tuple(tensor.shape)}"
