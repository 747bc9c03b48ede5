"""Image autoencoders: latents and images are those of diffusers, and weights are read in every form they come in."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from index.build.build_index import BuildConfig, build_index
from index.errors import EncoderError, OptionError
from index.table.schema import EncoderRef
from index.table.table import open_table
from pipeline.encoders.autoencoder_classes import AUTOENCODERS, REFUSED
from pipeline.encoders.files import locate
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.stored import open_image_encoder
from trainer.config import FitConfig
from trainer.fit import fit
from trainer.sampler import CoalescerPipeline

TWO_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
GROUPS = {"norm_num_groups": 4}
UNSCALED = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
WAN = {"z_dim": 4, "num_res_blocks": 1, "temperal_downsample": [False], **UNSCALED}
LTX = {
    "latent_channels": 8,
    "block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "upsample_residual": (False,) * 2,
    "upsample_factor": (1, 1),
    "patch_size": 2,
    "decoder_inject_noise": (True, False, True),
    "timestep_conditioning": True,
}
CONFIGS = {
    "AutoencoderKL": (2, {"block_out_channels": (8, 8), **GROUPS, **TWO_BLOCKS}),
    "AutoencoderTiny": (
        2,
        {
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
    ),
    "AutoencoderDC": (
        2,
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (8, 16),
            "decoder_block_out_channels": (8, 16),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), ()),
            "decoder_qkv_multiscales": ((), ()),
        },
    ),
    "VQModel": (2, {"block_out_channels": (8, 8), "num_vq_embeddings": 16, **GROUPS, **TWO_BLOCKS}),
    "AsymmetricAutoencoderKL": (
        2,
        {"down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8), **GROUPS, **TWO_BLOCKS},
    ),
    "AutoencoderKLFlux2": (2, {"block_out_channels": (8, 8), "latent_channels": 4, **GROUPS, **TWO_BLOCKS}),
    "AutoencoderKLHunyuanImage": (
        4,
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (32,) * 3,
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "sample_size": 16,
        },
    ),
    "AutoencoderKLKVAE": (
        2,
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2)},
    ),
    "AutoencoderKLTemporalDecoder": (
        2,
        {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2},
    ),
    "AutoencoderRAE": (
        4,
        {
            "encoder_hidden_size": 64,
            "encoder_patch_size": 2,
            "encoder_num_hidden_layers": 1,
            "encoder_input_size": 8,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
            "patch_size": 4,
        },
    ),
    "ConsistencyDecoderVAE": (
        2,
        {
            "encoder_block_out_channels": (8, 8),
            "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
            "encoder_norm_num_groups": 4,
            "decoder_block_out_channels": (8, 8),
            "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
            "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
            "decoder_norm_num_groups": 4,
        },
    ),
    "AutoencoderKLCogVideoX": (
        4,
        {
            "down_block_types": ("CogVideoXDownBlock3D",) * 3,
            "up_block_types": ("CogVideoXUpBlock3D",) * 3,
            "block_out_channels": (8,) * 3,
            "latent_channels": 4,
            "layers_per_block": 1,
            **GROUPS,
        },
    ),
    "AutoencoderKLCosmos": (
        4,
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (8, 8),
            "decode_block_out_channels": (8, 8),
            "attention_resolutions": (8,),
            "resolution": 64,
            "num_layers": 1,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 4,
            "latents_mean": None,
            "latents_std": None,
        },
    ),
    "AutoencoderKLHunyuanImageRefiner": (
        4,
        {
            "latent_channels": 4,
            "block_out_channels": (8,) * 3,
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 2,
        },
    ),
    "AutoencoderKLHunyuanVideo": (
        4,
        {
            "latent_channels": 4,
            "down_block_types": ("HunyuanVideoDownBlock3D",) * 3,
            "up_block_types": ("HunyuanVideoUpBlock3D",) * 3,
            "block_out_channels": (8,) * 3,
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            **GROUPS,
        },
    ),
    "AutoencoderKLHunyuanVideo15": (
        4,
        {
            "latent_channels": 4,
            "block_out_channels": (32,) * 3,
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 2,
        },
    ),
    "AutoencoderKLKVAEVideo": (2, {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4}),
    "AutoencoderKLLTXVideo": (
        4,
        {
            "down_block_types": ("LTXVideoDownBlock3D",) * 2,
            "spatio_temporal_scaling": (True, False),
            "decoder_spatio_temporal_scaling": (True, False),
            "downsample_type": ("conv", "conv"),
            **LTX,
        },
    ),
    "AutoencoderKLLTX2Video": (
        8,
        {
            "down_block_types": ("LTX2VideoDownBlock3D",) * 2,
            "spatio_temporal_scaling": (True, True),
            "decoder_spatio_temporal_scaling": (True, True),
            "downsample_type": ("spatial", "spatiotemporal"),
            "upsample_type": ("spatiotemporal", "spatiotemporal"),
            **LTX,
        },
    ),
    "AutoencoderKLMagvit": (
        2,
        {
            "latent_channels": 4,
            "block_out_channels": [8, 8],
            "down_block_types": ["SpatialDownBlock3D", "SpatialTemporalDownBlock3D"],
            "up_block_types": ["SpatialUpBlock3D", "SpatialTemporalUpBlock3D"],
            "layers_per_block": 1,
            **GROUPS,
        },
    ),
    "AutoencoderKLMochi": (
        8,
        {
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
            "latent_channels": 4,
            "layers_per_block": (1,) * 5,
            **UNSCALED,
        },
    ),
    "AutoencoderKLQwenImage": (2, {"base_dim": 8, "dim_mult": [1, 2], **WAN}),
    "AutoencoderKLQwenImage21": (2, {"base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1, 1], **WAN}),
    "AutoencoderKLWan": (
        4,
        {"base_dim": 8, "dim_mult": [1, 2], "patch_size": 2, "in_channels": 12, "out_channels": 12, **WAN},
    ),
    "AutoencoderVidTok": (8, {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}),
    "Kandinsky6SRVAE": (
        4,
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (8, 16, 32),
            "decoder_block_out_channels": (8, 16, 32),
            "layers_per_block": 1,
            "temporal_compression_ratio": 2,
        },
    ),
}
"""Downscale factor and a small config of every class."""
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def make_model(class_name, **changes):
    torch.manual_seed(0)
    model = getattr(diffusers, class_name)(**CONFIGS[class_name][1] | changes).eval()
    for parameter in model.parameters():  # many begin at zero, and would hide what is done to them
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def diffusers_latent(model, pixel):
    """Encode one image (H W 3) as its class documents it, and return what its `decode` takes."""
    x = torch.from_numpy(pixel).permute(2, 0, 1)[None] / 255
    if model.config["_class_name"] != "AutoencoderRAE":
        x = 2 * x - 1
    if model.config["_class_name"] == "AutoencoderKLQwenImage21":
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    if AUTOENCODERS[model.config["_class_name"]].time_axis:
        x = x[:, :, None]
    if model.config["_class_name"] == "AutoencoderVidTok":  # as its own forward does
        x = torch.cat([x] * 4, 2)
    encoded = model.encode(x)
    for name in ("latents", "latent"):
        if hasattr(encoded, name):
            return encoded[name]
    return encoded.latent_dist.mode()


def diffusers_image(model, latent):
    """Decode one latent, and return the image (H W 3)."""
    arguments = {"num_frames": 1} if model.config["_class_name"] == "AutoencoderKLTemporalDecoder" else {}
    if model.config.get("timestep_conditioning"):
        arguments["temb"] = torch.zeros(1)
    torch.manual_seed(0)
    decoded = model.decode(latent, **arguments)
    image = getattr(decoded, "sample", decoded)[0, :3].reshape(3, *PIXELS.shape[1:3])
    if model.config["_class_name"] != "AutoencoderRAE":
        image = (image + 1) / 2
    return (255 * image.clamp(0, 1)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("class_name", CONFIGS)
def test_latents_and_images_are_those_of_diffusers(tmp_path, class_name):
    """One image at a time by diffusers, all together by us."""
    factor, _ = CONFIGS[class_name]
    model = make_model(class_name)
    model.save_pretrained(tmp_path)
    encoder = DiffusersAutoencoder(str(tmp_path))
    assert (encoder.ref.class_name, encoder.factor) == (class_name, factor)
    with torch.no_grad():
        expected = [diffusers_latent(model, pixel) for pixel in PIXELS]
        images = [diffusers_image(model, latent) for latent in expected]
    latent = encoder.encode(PIXELS)
    assert np.abs(latent[0] - latent[1]).max() > 1e-3
    assert latent.shape[1:] == encoder.latent_shape(16) == (latent.shape[1], 16 // factor, 16 // factor)
    assert np.allclose(latent, torch.cat(expected).numpy().reshape(latent.shape), atol=1e-5, rtol=1e-5)
    assert np.allclose(latent, np.concatenate([encoder.encode(PIXELS[i : i + 1]) for i in range(3)]), atol=1e-5)
    decoded = encoder.decode(latent)
    assert decoded.shape == PIXELS.shape
    assert np.abs(decoded - np.stack(images)).max() < 0.51  # rounding to bytes
    assert np.abs(decoded - np.stack([encoder.decode(latent[i : i + 1])[0] for i in range(3)]).astype(int)).max() <= 1


@pytest.mark.parametrize("class_name", ["AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLMochi"])
def test_latents_are_normalized_by_the_mean_and_deviation_in_the_config(tmp_path, class_name):
    mean, std = [1.0, -2.0, 0.5, 3.0], [2.0, 0.5, 4.0, 1.0]
    model = make_model(class_name, latents_mean=mean, latents_std=std)
    model.save_pretrained(tmp_path)
    encoder = DiffusersAutoencoder(str(tmp_path))
    assert (encoder.ref.latents_mean, encoder.ref.latents_std) == (tuple(mean), tuple(std))
    with torch.no_grad():
        latent = diffusers_latent(model, PIXELS[0])
        image = diffusers_image(model, latent)
    by_channel = [np.array(each, np.float32)[:, None, None] for each in (mean, std)]
    expected = (latent.numpy().reshape(4, *latent.shape[-2:]) - by_channel[0]) / by_channel[1]
    assert np.allclose(encoder.encode(PIXELS[:1])[0], expected, atol=1e-5, rtol=1e-5)
    assert np.abs(encoder.decode(encoder.encode(PIXELS[:1]))[0] - image).max() < 0.51
    encoder = encoder.normalizing_as(EncoderRef(name="", class_name=class_name, digest=""))  # of a table from before
    assert np.allclose(encoder.encode(PIXELS[:1])[0].ravel(), latent.numpy().ravel(), atol=1e-5, rtol=1e-5)


def test_statistics_of_several_frames_are_those_of_the_first(tmp_path):
    """As Cosmos has them: (channel, frame), flattened."""
    statistics = {"latents_mean": [float(i) for i in range(8)], "latents_std": [1.0, 9.0] * 4}
    model = make_model("AutoencoderKLCosmos", **statistics)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        latent = diffusers_latent(model, PIXELS[0]).numpy()[0, :, 0]
    expected = latent - np.array([0, 2, 4, 6], np.float32)[:, None, None]
    assert np.allclose(DiffusersAutoencoder(str(tmp_path)).encode(PIXELS[:1])[0], expected, atol=1e-5)


def test_a_class_that_normalizes_by_itself_is_left_alone(tmp_path):
    model = make_model("AutoencoderRAE", latents_mean=[[[2.0]]], latents_std=[[[3.0]]])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        latent = diffusers_latent(model, PIXELS[0]).numpy()
    assert np.allclose(DiffusersAutoencoder(str(tmp_path)).encode(PIXELS[:1]), latent, atol=1e-5)


@pytest.mark.slow
def test_a_table_keeps_its_way_of_normalizing(tmp_path, shapes, encode_shapes):
    """Whatever its encoder's config says later: rows are appended, and decoded, as those before them."""
    folder, shards = tmp_path / "autoencoder", sorted(shapes.glob("*.tar"))
    make_model("AutoencoderKL").save_pretrained(folder)
    options: dict = {"image_encoder": str(folder), "image_size": 16}
    whole = encode_shapes([shards[0], shards[1]], tmp_path / "whole.lance", **options).table
    table = encode_shapes(shards[0], tmp_path / "t.lance", **options).table
    config = json.loads((folder / "config.json").read_text())
    statistics = {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [0.5] * 4}
    shutil.copytree(folder, tmp_path / "later")
    (tmp_path / "later" / "config.json").write_text(json.dumps(config | statistics))
    options["image_encoder"] = str(tmp_path / "later")
    appended = encode_shapes(shards[1], tmp_path / "t.lance", append=True, **options).table
    normalized = encode_shapes([shards[0], shards[1]], tmp_path / "normalized.lance", **options).table

    def latents(table):
        rows = table.dataset().to_table(["id", "latent"]).sort_by("id")["latent"].to_pylist()
        return np.array(rows, np.float32).reshape(-1, *table.meta.latent_shape)

    assert np.array_equal(latents(appended), latents(whole))
    mean = np.array(statistics["latents_mean"], np.float32)[:, None, None]
    assert np.allclose(latents(normalized) * 0.5 + mean, latents(whole), atol=1e-2)
    decoded = [
        open_image_encoder(each.meta.image_encoder).decode(latents(each)[:4]).astype(int)
        for each in (appended, normalized)
    ]
    assert np.abs(decoded[0] - decoded[1]).max() <= 4  # latents are stored in float16
    assert appended.meta.image_encoder.latents_std == table.meta.image_encoder.latents_std == ()


@pytest.mark.parametrize("class_name", CONFIGS)
def test_half_precision_gives_the_same_latents_and_images(tmp_path, class_name):
    """The default on CUDA."""
    make_model(class_name).save_pretrained(tmp_path)
    half, full = (DiffusersAutoencoder(str(tmp_path), dtype=dtype) for dtype in ("bfloat16", "float32"))
    latent = full.encode(PIXELS)
    assert np.abs(half.encode(PIXELS) - latent).max() < 0.03 * np.abs(latent).max()
    if not half.kind.alone:  # these decode with noise, which older versions of torch draw otherwise in bfloat16
        assert np.abs(half.decode(latent) - full.decode(latent).astype(int)).mean() < 2


def test_an_alpha_channel_is_opaque(tmp_path):
    """Qwen-Image-Layered has four channels."""
    model = make_model("AutoencoderKLQwenImage", input_channels=4)
    model.save_pretrained(tmp_path)
    encoder = DiffusersAutoencoder(str(tmp_path))
    x = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = model.encode(torch.cat([x, torch.ones_like(x[:, :1])], 1)[:, :, None]).latent_dist.mode()
    assert np.allclose(encoder.encode(PIXELS), expected[:, :, 0].numpy(), atol=1e-5)
    assert encoder.decode(encoder.encode(PIXELS)).shape == PIXELS.shape


@pytest.mark.parametrize("class_name", CONFIGS)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(tmp_path, class_name):
    factor, _ = CONFIGS[class_name]
    make_model(class_name).save_pretrained(tmp_path)
    encoder = DiffusersAutoencoder(str(tmp_path))
    fits = f"shrinks images by {factor}: use 16 or {16 + factor}$"
    if class_name == "AutoencoderRAE":
        fits = "gives back 16 pixels: use 16$"
    with pytest.raises(OptionError, match=f"^--image-size 17 does not fit {class_name} {tmp_path}, which {fits}"):
        encoder.latent_shape(17)


def test_every_class_of_diffusers_is_known():
    """A class that diffusers adds is tried, and then stands in the table, among the refused or here."""
    from diffusers.models import autoencoders

    others = {
        *("AutoencoderKLKVAEAudio", "AutoencoderKLLTX2Audio", "AutoencoderKLMiniMaxH3Audio", "AutoencoderOobleck"),
        *("AutoencoderSAME", "Cosmos3AVAEAudioTokenizer", "LongCatAudioDiTVae", "MMAudioVAE", "MMAudioVocoder"),
        *("MiniMaxMusic3Vocoder", "RFD4ProteinaAutoencoder"),
    }
    classes = {name for name, value in vars(autoencoders).items() if isinstance(value, type)}
    assert classes == {*AUTOENCODERS, *REFUSED, *others}
    assert set(CONFIGS) == set(AUTOENCODERS)


@pytest.mark.parametrize("class_name", [*REFUSED, "AutoencoderOobleck", "UNet2DModel"])
def test_classes_that_give_back_no_image_are_refused_with_the_list(tmp_path, class_name):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": class_name}))
    reason = f"which {REFUSED[class_name]}" if class_name in REFUSED else "not an autoencoder"
    with pytest.raises(EncoderError, match=f"is a {class_name}, {reason}: use one of AutoencoderKL, AutoencoderTiny"):
        DiffusersAutoencoder(str(tmp_path))


def test_a_text_model_as_image_encoder_is_named(text_encoder):
    with pytest.raises(EncoderError, match="is a BertModel, not an autoencoder: use one of AutoencoderKL"):
        DiffusersAutoencoder(text_encoder)


def test_an_autoencoder_that_cannot_decode_one_frame_is_refused_before_the_work(tmp_path):
    make_model("AutoencoderVidTok", is_causal=False).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match=r"^AutoencoderVidTok .* cannot decode \(AssertionError: Too short latent"):
        DiffusersAutoencoder(str(tmp_path)).latent_shape(16)


def test_a_decoder_of_another_factor_is_refused_before_the_work(tmp_path):
    make_model(
        "AsymmetricAutoencoderKL", up_block_out_channels=(8,), up_block_types=("UpDecoderBlock2D",)
    ).save_pretrained(tmp_path)
    with pytest.raises(
        EncoderError, match=r"shrinks images by 2 .* latents of 8 x 8 are decoded to 8 pixels: use another"
    ):
        DiffusersAutoencoder(str(tmp_path)).latent_shape(16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("computed_in", ["float32", "bfloat16"])
def test_half_precision_weights_keep_their_bytes_when_saved(tmp_path, dtype, computed_in):
    model = make_model("AutoencoderKL").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "half")
    encoder = DiffusersAutoencoder(str(tmp_path / "half"), dtype=computed_in)
    encoder.save(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tmp_path / "half")
    copy = DiffusersAutoencoder(str(tmp_path / "copy"))
    assert copy.ref.digest == encoder.ref.digest
    with torch.no_grad():
        expected = diffusers_latent(model.float(), PIXELS[0]).numpy()
    assert np.allclose(copy.encode(PIXELS[:1]), expected, atol=1e-5)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights(tmp_path, variant):
    model = make_model("AutoencoderKL")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20kB", variant=variant)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (DiffusersAutoencoder(str(tmp_path / name)) for name in ("one", "many"))
    assert one.ref.digest == many.ref.digest
    many.save(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tmp_path / "many")


def test_a_folder_with_one_variant_alone_is_opened(tmp_path):
    model = make_model("AutoencoderKL")
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert locate(str(tmp_path), None, "image").variant == "fp16"
    encoder = DiffusersAutoencoder(str(tmp_path))
    encoder.save(tmp_path / "copy")
    assert DiffusersAutoencoder(str(tmp_path / "copy")).ref.digest == encoder.ref.digest
    with torch.no_grad():
        assert np.allclose(encoder.encode(PIXELS[:1]), diffusers_latent(model.float(), PIXELS[0]).numpy(), atol=1e-5)


def test_of_several_variants_the_plain_one_is_opened(tmp_path):
    model = make_model("AutoencoderKL")
    model.save_pretrained(tmp_path)
    plain = DiffusersAutoencoder(str(tmp_path)).ref.digest
    for variant, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        model.to(dtype).save_pretrained(tmp_path, variant=variant)
    encoder = DiffusersAutoencoder(str(tmp_path))
    assert encoder.ref.digest == plain
    encoder.save(tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert locate(str(tmp_path), None, "image").variant == "fp16"


def test_the_advice_about_weights_that_do_not_match_keeps_the_model_right(image_encoder, tmp_path):
    """Weights that the class does not know would be dropped if it were saved again."""
    file = "diffusion_pytorch_model.safetensors"
    weights = load_file(f"{image_encoder}/{file}")
    changes = {
        "unexpected": ({**weights, "extra.weight": torch.ones(1)}, "must name the class that made them"),
        "missing": (dict(list(weights.items())[1:]), "get the whole weights, or the config.json that belongs"),
        "mismatched": (
            {**weights, "encoder.conv_in.bias": torch.ones(9)},
            r"1 mismatched keys, such as .*conv_in.bias.*: get the config",
        ),
    }
    for problem, (changed, advice) in changes.items():
        folder = tmp_path / problem
        shutil.copytree(image_encoder, folder)
        save_file(changed, folder / file, {"format": "pt"})
        with pytest.raises(EncoderError, match=advice) as caught:
            DiffusersAutoencoder(str(folder))
        assert "save_pretrained" not in str(caught.value), problem


def encode_fit_and_sample(class_name, folder, shapes, encode_shapes):
    """Encode the shapes with an autoencoder, train four steps, and return the table and what is sampled."""
    make_model(class_name).save_pretrained(folder / "autoencoder")
    table = encode_shapes(
        shapes, folder / "t.lance", image_encoder=str(folder / "autoencoder"), image_size=16, limit=120
    ).table
    built = build_index(open_table(table.uri), BuildConfig()).table
    fit(built, FitConfig(size="tiny", images=4 * 16, batch_size=16), folder / "run")
    CoalescerPipeline.from_pretrained(folder / "run", device="cpu").save_pretrained(folder / "export")
    shutil.rmtree(folder / "autoencoder")  # what is exported has a copy
    return built, CoalescerPipeline.from_pretrained(folder / "export", device="cpu")(["a red circle", "a blue square"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "class_name", ["AsymmetricAutoencoderKL", "AutoencoderRAE", "AutoencoderKLWan", "AutoencoderKLFlux2"]
)
def test_fit_and_sample_with_one_autoencoder_of_each_kind(tmp_path, shapes, encode_shapes, class_name):
    """Pixels of -1 to 1 and of 0 to 1, a time axis, more latent channels than images have."""
    table, output = encode_fit_and_sample(class_name, tmp_path, shapes, encode_shapes)
    assert table.meta.image_encoder.class_name == class_name
    assert output.latents.shape == (2, *table.meta.latent_shape)
    assert [image.size for image in output.images] == [(16, 16)] * 2


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
