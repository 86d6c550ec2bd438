"""Compares the inputs of a model's forward between ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, str, torch.Tensor | None]]:
    """(name, description, tensor) for each leaf of a nested ``value``. Numbers become tensors."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for n, item in enumerate(value):
            yield from flatten(item, f"{name}[{n}]")
    elif isinstance(value, torch.Tensor):
        yield name, f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}", value
    elif isinstance(value, (int, float)):
        yield name, type(value).__name__, torch.tensor(value, dtype=torch.float64)
    else:
        yield name, repr(value) if value is None or isinstance(value, str) else type(value).__name__, None


def summarize(inputs: Mapping[str, Any]) -> dict[str, tuple[str, torch.Tensor]]:
    """Description and summary of each input by name. A summary is float64 on the input's device: tolerance, mean, root
    mean square, and up to 16 elements. Does not synchronize with the GPU.

    Not a bit digest, because different GPU models round differently. The tolerance is 1/16 of the root mean square for
    tensors of 3 or more dimensions, which may come from low-precision networks, and half the digits of the dtype for
    other floating-point inputs.
    """
    summary = {}
    for name, description, x in flatten(inputs):
        values = torch.empty(0, dtype=torch.float64)
        if x is not None and x.numel():
            relative = 0.0 if not x.is_floating_point() else 2**-4 if x.dim() > 2 else torch.finfo(x.dtype).eps ** 0.5
            flat = x.detach().flatten()
            norm = torch.linalg.vector_norm(flat if x.is_floating_point() else flat.double(), dtype=torch.float64)
            rms = norm / x.numel() ** 0.5
            moments = torch.stack([relative * rms, flat.mean(dtype=torch.float64), rms])
            values = torch.cat([moments, flat[:: -(-x.numel() // 16)].double()])
        summary[name] = description, values
    return summary


def require_same(summaries: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise RuntimeError, with the same text on every rank, if the summaries (by rank) differ."""
    (first, reference), *others = summaries.items()
    for name in dict.fromkeys(name for summary in summaries.values() for name in summary):
        if differing := [rank for rank, summary in others if not _is_close(reference.get(name), summary.get(name))]:
            texts = {rank: summaries[rank].get(name, ["absent"])[0] for rank in (first, *differing)}
            raise RuntimeError(
                f"ranks were called with different inputs: {name} differs on rank(s) {differing} from rank {first} "
                f"({texts if len(set(texts.values())) > 1 else 'in its values'}); give every rank the same inputs, and "
                f"its pipeline the same seed: generator=torch.Generator().manual_seed(0)"
            )


def _is_close(first: Any, second: Any) -> bool:
    if first is None or second is None or first[0] != second[0]:
        return first is second
    a, b = (torch.tensor(values, dtype=torch.float64) for _, values in (first, second))
    tolerance = float(a[0].nan_to_num()) if len(a) else 0.0
    return torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True)
