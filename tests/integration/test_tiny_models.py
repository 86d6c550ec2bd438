"""The tiny models load and run in plain diffusers, are reproducible, and make a wrong attention visible."""

import hashlib
import json
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from sf_xfuser.bench.tiny_models import FAMILIES, SMALL_INPUT, main, save_tiny_model
from tests.launch import run

CAT = "A small cat sits on a red chair near the window while the rain falls over the old city and people walk home."
DOG = "Three dogs run along the sea at night; the moon is white, 7 birds fly over a boat with a torn sail — déjà."


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(family, model_folder):
    pipeline = DiffusionPipeline.from_pretrained(model_folder(family))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline, family, prompt=CAT, text_length=16, seed=1):
    return pipeline(
        prompt=prompt,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed),
        max_sequence_length=text_length,
        output_type="latent",
        **SMALL_INPUT[family],
    )[0]


@contextmanager
def attention_of_blocks(pipeline, change):
    """Let ``change(kv_BHSD) -> kv_BHSD`` edit keys and values of every self-attention in the transformer's blocks.

    Text encoders and HunyuanVideo's text refiner do not change, because sequence parallelism does not split them.
    """
    original, inside, edits = F.scaled_dot_product_attention, [], []

    def attention(query, key, value, attn_mask=None, **options):
        if inside and query.shape[-2] == key.shape[-2]:
            edits.append(key.shape)
            key, value = change(key), change(value)
            attn_mask = None  # HunyuanVideo masks text padding; these prompts fill the text
        return original(query, key, value, attn_mask=attn_mask, **options)

    blocks = [
        block
        for name in ("transformer_blocks", "single_transformer_blocks", "blocks")
        for block in getattr(pipeline.transformer, name, ())
    ]
    hooks = [block.register_forward_pre_hook(lambda *_: inside.append(True)) for block in blocks]
    hooks += [block.register_forward_hook(lambda *_: inside.clear()) for block in blocks]
    F.scaled_dot_product_attention = attention
    try:
        yield edits
    finally:
        F.scaled_dot_product_attention = original
        for hook in hooks:
            hook.remove()


def drop_a_quarter(kv_BHSD):
    return kv_BHSD[..., : kv_BHSD.shape[-2] * 3 // 4, :]


def repeat_a_quarter(kv_BHSD):
    return torch.cat([kv_BHSD, kv_BHSD[..., : kv_BHSD.shape[-2] // 4, :]], dim=-2)


def test_two_steps_are_reproducible_and_tame(pipeline, family):
    first = latents(pipeline, family)
    assert torch.equal(first, latents(pipeline, family))
    assert torch.isfinite(first).all()
    assert 0.3 < first.std() < 5


def test_prompt_text_length_and_seed_change_the_result(pipeline, family):
    first = latents(pipeline, family)
    for other in ({"prompt": DOG}, {"text_length": 13}, {"seed": 2}):
        assert (first - latents(pipeline, family, **other)).abs().max() > 1e-2, other


@pytest.mark.parametrize("change", [drop_a_quarter, repeat_a_quarter])
def test_a_quarter_of_the_keys_is_visible(pipeline, family, change):
    right = latents(pipeline, family)
    with attention_of_blocks(pipeline, lambda kv_BHSD: kv_BHSD) as edits:
        assert (right - latents(pipeline, family)).abs().max() < 1e-5
    assert edits, "no attention was reached"
    with attention_of_blocks(pipeline, change):
        wrong = latents(pipeline, family)
    assert (right - wrong).abs().max() >= 1e-3


def test_every_prompt_has_its_own_tokens(pipeline):
    prompts = ["", "a cat", "a dog", "A cat.", "naïve 猫 \N{CAT FACE}\t\n{}", CAT, DOG]
    for name, tokenizer in pipeline.components.items():
        if name.startswith("tokenizer") and tokenizer is not None:
            # CLIP ignores case; all other differences must change the tokens.
            ids = [tuple(tokenizer(prompt).input_ids) for prompt in prompts]
            assert len(set(ids)) == len(ids)


def test_decodes_to_pixels(pipeline, family):
    pixels = pipeline(
        prompt=CAT, num_inference_steps=1, max_sequence_length=16, output_type="np", **SMALL_INPUT[family]
    )[0][0]
    assert pixels.shape[-3:] == (SMALL_INPUT[family]["height"], SMALL_INPUT[family]["width"], 3)


def test_folder_carries_its_small_input(family, model_folder):
    assert json.loads((model_folder(family) / "small_input.json").read_text()) == SMALL_INPUT[family]


def test_hunyuan_prompt_survives_the_template_crop(model_folder):
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as template

    tokenizer = DiffusionPipeline.from_pretrained(model_folder("hunyuanvideo")).tokenizer
    instruction = template["template"].split("{}")[0]
    assert len(tokenizer(instruction).input_ids) == template["crop_start"]


@pytest.mark.parametrize("family", ["sd3", "hunyuanvideo"])  # two CLIPs and T5; Llama and CLIP
def test_same_arguments_same_bytes(tmp_path, family):
    """Even in another process, because each rank of a job may make its own model."""

    def digests(folder):
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    before = torch.random.get_rng_state()
    first = digests(save_tiny_model(family, tmp_path / "a"))
    assert torch.equal(before, torch.random.get_rng_state())
    run([sys.executable, "-m", "sf_xfuser.bench.tiny_models", family, str(tmp_path / "b")])
    assert first == digests(tmp_path / "b")
    other = digests(save_tiny_model(family, tmp_path / "c", seed=1))
    assert {name for name in first if first[name] != other[name]} >= {
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": 5}, "heads=5"), ({"head_dim": 24}, "head_dim=24"), ({"layers": 0}, "layers=0")],
)
def test_sizes_that_cannot_be_split_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        save_tiny_model("flux", tmp_path, **options)


def test_unknown_family_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown model family 'dalle'.*flux, sd3"):
        save_tiny_model("dalle", tmp_path)


def test_command_line(tmp_path, capsys):
    main(["wan", str(tmp_path / "wan"), "--heads", "4", "--layers", "1"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "wan")
    transformer = DiffusionPipeline.from_pretrained(tmp_path / "wan").transformer
    assert (transformer.config.num_attention_heads, transformer.config.num_layers) == (4, 1)
    with pytest.raises(SystemExit):
        main(["wan", str(tmp_path / "wan"), "--heads", "5"])
    assert "even number" in capsys.readouterr().err
