"""One process: CUDA devices in xDiT mean the CPU; xDiT's own device functions are unchanged."""

import sys
from types import SimpleNamespace

import torch
import xfuser  # noqa: F401  (as in a user's program)
from diffusers import FluxPipeline
from xfuser.model_executor.models.runner_models import base_model, krea2
from xfuser.model_executor.models.runner_models.loading import meta_load

OFFLOADS = ("enable_group_cpu_offload", "enable_sequential_cpu_offload", "enable_model_cpu_offload")


def image_of(pipeline):
    return pipeline(
        "a cat",
        height=64,
        width=64,
        num_inference_steps=1,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images


def offloaded(option, path):
    """A pipeline after xDiT's ``_enable_options`` with one offload option on rank 3."""
    flags = dict.fromkeys(("enable_slicing", "enable_tiling", "group_offload_low_cpu_mem", *OFFLOADS), False)
    model = SimpleNamespace(
        config=SimpleNamespace(**{**flags, option: True}),
        pipe=FluxPipeline.from_pretrained(path),
        _get_compiled_pipe_components=lambda: ["transformer"],
        _vae_manager=SimpleNamespace(enable_options=lambda vaes: None),
        _decoding_vaes=lambda: [],
    )
    model._local_onload_device = lambda: base_model.xFuserModel._local_onload_device(model)
    base_model.xFuserModel._enable_options(model)
    assert model._local_onload_device() == torch.device("cuda:3")
    return model.pipe


def main(path):
    base_model.log = lambda *_: None
    base_model.get_world_group = lambda: SimpleNamespace(local_rank=3)
    pipeline = FluxPipeline.from_pretrained(path)
    expected = image_of(pipeline)
    for component in (pipeline.transformer, pipeline.text_encoder_2):
        assert component.to("cuda:3").device == torch.device("cpu")
        assert component.to(device=torch.device("cuda")).device == torch.device("cpu")
    for option in OFFLOADS:
        torch.testing.assert_close(image_of(offloaded(option, path)), expected)
        print(f"{option}: same image")
    assert krea2.torch.Generator(device="cuda").device == torch.device("cpu")
    assert meta_load.torch.tensor([1], device="cuda:3").device == torch.device("cpu")
    seeded = torch.Generator(device="cuda").manual_seed(1)
    assert seeded.device == torch.device("cpu") and isinstance(seeded, torch.Generator)
    assert krea2.torch.Tensor is torch.Tensor
    assert meta_load.torch.device("cuda:3").type == "cuda"


main(sys.argv[1])
