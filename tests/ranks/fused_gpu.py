"""The fused chunk attention kernel on a GPU, every head size and dtype, against its reference."""

from __future__ import annotations

import torch

from sf_xfuser.kernels import attend_chunks_, attend_chunks_into
from sf_xfuser.kernels.fused import DTYPES, HEAD_SIZES, Chunks, attend_reference


def chunks(D, dtype):
    q = [torch.randn(2, n, 4, D, device="cuda").to(dtype).transpose(1, 2) for n in (300, 0, 1)]
    k, v = ([torch.randn(2, 2, n, D, device="cuda").to(dtype) for n in (257, 0, 600)] for _ in range(2))
    out = [torch.full(x.shape, float("nan"), device="cuda") for x in q]
    lse = [torch.full(x.shape[:3], float("-inf"), device="cuda") for x in q]
    return q, k, v, out, lse


def copies(*lists):
    return [[x.clone() for x in each] for each in lists]


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for D in HEAD_SIZES:
        for dtype in DTYPES:
            q, k, v, out, lse = chunks(D, dtype)
            results = [torch.full_like(x, float("nan")) for x in q]
            (expected, expected_lse), got = copies(out, lse), copies(out, lse)
            attend_reference(Chunks(q, k, v, expected, expected_lse, []))
            attend_chunks_(q, k, v, *got)
            attend_chunks_into(results, q, k, v, out, lse)
            rounding = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(got, [expected, expected_lse], rtol=rounding, atol=rounding)
            torch.testing.assert_close(results, [x.to(dtype) for x in expected], rtol=rounding, atol=rounding)
    print("matches the reference")


if __name__ == "__main__":
    main()
