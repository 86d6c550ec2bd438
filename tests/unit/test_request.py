"""Descriptions of requests: equal for the same request, different for different ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from sf_xfuser.integrations.request import describe
from sf_xfuser.integrations.xdit import session

LONG = "a red chair near the window " * 20


def generator(seed: int, drawn: int = 0) -> torch.Generator:
    made = torch.Generator().manual_seed(seed)
    torch.randn(drawn, generator=made)
    return made


REQUEST = {"prompt": "a red chair", "height": 1024, "width": 768, "generator": generator(42)}
SAME = [
    {"generator": generator(42)},
    {"output_type": "latent", "return_dict": False},
    {"callback_on_step_end": print},
    {"negative_prompt": None},
]
OTHER = [
    {"prompt": "a blue chair"},
    {"prompt": LONG},
    {"prompt": ["a red chair"]},
    {"negative_prompt": "a blue chair"},
    {"height": 512},
    {"guidance_scale": 4.0},
    {"generator": generator(43)},
    {"generator": generator(42, drawn=100)},
    {"generator": [generator(42), generator(43)]},
    {"generator": None},
    {"prompt_embeds": torch.zeros(1, 16, 32)},
    {"prompt_embeds": torch.zeros(1, 13, 32)},
    {"prompt_embeds": torch.zeros(1, 16, 32, dtype=torch.bfloat16)},
    {"image": Image.new("RGB", (8, 8))},
    {"image": Image.new("RGB", (8, 8), "red")},
    {"cross_attention_kwargs": {"scale": 1.0}},
]


@pytest.mark.parametrize("change", SAME)
def test_equal_requests(change):
    assert describe(REQUEST | change) == describe(REQUEST)


def test_requests_that_differ():
    texts = [describe(REQUEST), *(describe(REQUEST | change) for change in OTHER)]
    assert len(set(texts)) == len(texts), texts


def test_truncated_texts_differ():
    values = {f"value_{n}": n for n in range(100)}
    one, other = describe({"prompt": LONG + "1", **values}), describe({"prompt": LONG + "2", **values})
    assert one != other and len(one) <= 300 and len(other) <= 300
    assert describe(values | {"value_99": 0}) != describe(values)


def test_the_text_is_readable():
    text = describe(REQUEST)
    assert text.startswith("prompt='a red chair', height=1024, width=768, seed=42, state "), text


def test_noise_from_the_default_generator():
    def drawn(seed: int, **latents: torch.Tensor) -> str:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return describe({"prompt": "a red chair", **latents})

    assert "seed=drawn by this rank (1, state" in drawn(1)
    assert drawn(1) == drawn(1) != drawn(2)
    latents = torch.zeros(1, 64, 64)
    assert drawn(1, latents=latents) == drawn(2, latents=latents)


def test_a_request_begins_and_ends_on_every_mesh():
    class Mesh:
        @contextmanager
        def request(self, request: str) -> Iterator[None]:
            seen.append((self, request))
            yield
            seen.append((self, "end"))

    class Selector:
        meshes = (Mesh(), Mesh())

    seen: list[tuple[Mesh, str]] = []
    mesh, selector = Mesh(), Selector()
    with session.Session(mesh=mesh, selector=selector).request(REQUEST):
        assert seen == [(one, describe(REQUEST)) for one in (mesh, *selector.meshes)]
    assert seen[3:] == [(one, "end") for one in (*selector.meshes[::-1], mesh)]
    with session.Session().request(REQUEST):  # without --sp-backend
        assert len(seen) == 6
