"""The copies, the merge, the fused kernel and the flags of a call on a GPU, against their references on the CPU. No
kernel is compiled after ``prepare``."""

from __future__ import annotations

import torch

from sf_xfuser.kernels import (
    Chunks,
    Copies,
    Copy,
    FusedAttention,
    Side,
    check_flags,
    fused_unsupported_reason,
    merge_partial,
    poison_result,
    prepare,
)
from sf_xfuser.kernels.checks import uses_triton
from sf_xfuser.kernels.merge import fix_flash_lse, merge_partial_reference

NAN = float("nan")


def num_compiled() -> int:
    from sf_xfuser.kernels import triton_copies, triton_flags, triton_fused, triton_merge

    kernels = triton_merge.merge_kernel, triton_copies.copy_kernel, triton_fused.attend_chunks_kernel
    kernels += triton_flags.check_flags_kernel, triton_flags.poison_kernel
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def check_copies(D: int, dtype: torch.dtype, device: torch.device) -> None:
    """Heads of inputs in both layouts go to a window, and back to a result that starts at any element."""
    S, B, H = 300, 2, 5
    rows = H * D
    q, k = (torch.randn(B * S * rows).to(dtype) for _ in range(2))
    window, result = torch.zeros(4 * S * B * rows, dtype=dtype), torch.zeros(S * B * rows + 7, dtype=dtype)[7:]
    in_window = (B * 2 * D, 2 * D, D)
    copies = [
        Copy(Side(0, 3 * D, (rows, S * rows, D)), Side(2, 0, in_window), (S, B, 2, D)),
        Copy(Side(1, D, (D, S * rows, S * D)), Side(2, 2 * S * B * rows, in_window), (S - 1, B, 2, D)),
        Copy(Side(0, 0, (rows, S * rows, D)), Side(3, 0, (B * rows, rows, D)), (1, B, H, D)),
        Copy(Side(0, 0, (rows, S * rows, D)), Side(3, 0, (B * rows, rows, D)), (0, B, H, D)),
    ]
    expected = [q, k, window.clone(), result.clone()]
    on_device = [x.to(device) for x in (q, k, window)] + [torch.zeros(S * B * rows + 7, dtype=dtype, device=device)[7:]]
    Copies(copies, dtype, torch.device("cpu")).run(expected)
    run = Copies(copies, dtype, device)
    for _ in range(2):
        run.run(on_device)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(on_device, expected, strict=True))
    assert run.launches == (1 if uses_triton(on_device[0]) else 3)


def check_merge(D: int, dtype: torch.dtype, device: torch.device) -> None:
    """Three partial results of a row, the first one with masked rows as flash attention returns them."""
    B, H, S = 2, 3, 300
    total_dtype = torch.promote_types(dtype, torch.float32)
    parts = [(torch.randn(B, S, H, D).to(dtype).transpose(1, 2), torch.randn(B, H, S).to(total_dtype)) for _ in "123"]
    parts[0][1][:, :, 5], parts[0][0][:, :, 5] = float("inf"), 0.0
    accumulators = [
        (torch.full((S, B, H, D), NAN, dtype=total_dtype), torch.full((B, H, S), NAN, dtype=total_dtype))
        for _ in range(2)
    ]
    results = [torch.zeros(B, H, S, D, dtype=dtype) for _ in range(2)]
    out, lse = accumulators[0]
    on_device, result = [x.to(device) for x in accumulators[1]], results[1].to(device)
    for i, (new_out, new_lse) in enumerate(parts):
        last = i == len(parts) - 1
        fixed = fix_flash_lse(new_out, new_lse)
        merge_partial_reference(out.permute(1, 2, 0, 3), lse, new_out, fixed, results[0] if last else None, i == 0)
        new = new_out.to(device), (fixed if device.type == "cpu" else new_lse).to(device)
        merge_partial(on_device[0].permute(1, 2, 0, 3), on_device[1], *new, result if last else None, i == 0)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.cpu(), results[0], rtol=tolerance, atol=tolerance)


def check_fused(D: int, dtype: torch.dtype, device: torch.device) -> None:
    """Two launches for inputs at aligned and other addresses, and on a GPU in a CUDA graph, which refuses uploads."""
    B, H, S, heads = 2, 3, 300, [2, 0, 2]
    on_meta = torch.empty(B, S, H, D, device="meta", dtype=dtype).transpose(1, 2)
    q, (k, v) = on_meta[:, :, 1:], (on_meta.split((64, 236), 2) for _ in "kv")
    out, lse = (torch.full((B, H, S - 1, *size), NAN, device=device) for size in ((D,), ()))
    start = FusedAttention(Chunks([q], k[:1], v[:1], [out], [lse], []), kv_of_q=heads, first=True)
    end = FusedAttention(Chunks([q], k[1:], v[1:], [out], [lse], [on_meta[:, :, 1:]]), kv_of_q=heads)

    def attend(tensors: list[torch.Tensor]) -> None:
        start.run(*tensors)
        end.run(*tensors)

    for shift in (0, 1):
        memory = [torch.randn(B * S * H * D + shift).to(device, dtype)[shift:] for _ in range(4)]
        tensors = [x.view(B, S, H, D).transpose(1, 2) for x in memory]
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                attend(tensors)
            for x in memory[:3]:
                x.normal_()
            graph.replay()
        else:
            attend(tensors)
        queries, keys, values, result = (x.cpu().double() for x in tensors)
        expected = torch.nn.functional.scaled_dot_product_attention(queries, keys[:, heads], values[:, heads])
        tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
        torch.testing.assert_close(result[:, :, 1:], expected[:, :, 1:], rtol=tolerance, atol=tolerance)


def check_end_of_call(dtype: torch.dtype, device: torch.device) -> None:
    flags, ended = torch.full((300,), 5, device=device), torch.zeros((), dtype=torch.int64, device=device)
    index, expected = torch.arange(0, 300, 2, device=device), torch.tensor(5, device=device)
    poison, result = torch.ones((), device=device), torch.zeros(3, 70_000, device=device, dtype=dtype)
    check_flags(flags, index, expected, poison, ended)
    poison_result(result, poison)
    assert not result.any() and flags.sum() == 5 * 150 and ended == 1
    flags[::2] = 5
    flags[298] = 6
    check_flags(flags, index, expected, poison, ended)
    poison_result(result, poison)
    assert result.isnan().all() and flags.sum() == 5 * 150 and ended == 2


def main(device: torch.device) -> None:
    for D in (64, 72, 128):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            fused = fused_unsupported_reason(device, dtype, D) is None
            prepare(device, dtype, D, fused=fused)
            compiled = num_compiled()
            check_copies(D, dtype, device)
            check_merge(D, dtype, device)
            check_end_of_call(dtype, device)
            if fused:
                check_fused(D, dtype, device)
            assert num_compiled() == compiled, f"{num_compiled() - compiled} kernels compiled after prepare()"
    print("match the references")


if __name__ == "__main__":
    main(torch.device("cuda", 0))
