"""Loading encoders from folders: what they are known by, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from index.errors import EncoderError, OptionError
from pipeline.encoders.devices import resolve_device
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.text import TransformersTextEncoder


@pytest.fixture(scope="module")
def text_models(tmp_path_factory, tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    size = len(tokenizer)
    models = {
        "clip": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=size,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
                eos_token_id=tokenizer.sep_token_id,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.cls_token_id,
            )
        ),
        "t5": T5EncoderModel(T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


CAPTIONS = ["a small red circle", "a large blue square left of a small black triangle"]


def run_alone(model, tokenizer, caption):
    """Run a model on one caption without padding."""
    tokens = tokenizer([caption], return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])


def test_bert_is_mean_pooled_regardless_of_padding(text_encoder):
    encoder = TransformersTextEncoder(text_encoder)
    assert encoder.ref.class_name == "BertModel"
    embeddings = encoder.encode(CAPTIONS)
    for embedding, caption in zip(embeddings, CAPTIONS, strict=True):
        states = run_alone(encoder.model, encoder.tokenizer, caption).last_hidden_state
        assert np.allclose(embedding, states.mean(1)[0].numpy(), atol=1e-5)


def test_clip_returns_its_pooled_output(text_models):
    encoder = TransformersTextEncoder(str(text_models["clip"]))
    assert encoder.ref.class_name == "CLIPTextModel"
    expected = run_alone(encoder.model, encoder.tokenizer, CAPTIONS[0]).pooler_output
    assert np.allclose(encoder.encode(CAPTIONS)[0], expected[0].numpy(), atol=1e-5)


def test_t5_is_mean_pooled(text_models):
    encoder = TransformersTextEncoder(str(text_models["t5"]))
    assert encoder.ref.class_name == "T5EncoderModel"
    expected = run_alone(encoder.model, encoder.tokenizer, CAPTIONS[0]).last_hidden_state.mean(1)
    assert np.allclose(encoder.encode(CAPTIONS)[0], expected[0].numpy(), atol=1e-5)


def test_token_embeddings_follow_the_pooled_one_and_are_padded_with_zeros(text_encoder):
    encoder = TransformersTextEncoder(text_encoder)
    states = run_alone(encoder.model, encoder.tokenizer, CAPTIONS[0]).last_hidden_state[0].numpy()
    short, long = encoder.encode_tokens(CAPTIONS, num_tokens=len(states) + 3)
    assert np.allclose(short[0], encoder.encode(CAPTIONS)[0], atol=1e-5)
    assert np.allclose(short[1 : 1 + len(states)], states, atol=1e-5)
    assert not short[1 + len(states) :].any()
    assert long[1 + len(states) :].any()
    assert np.allclose(encoder.encode_tokens(CAPTIONS, num_tokens=2), np.stack([short, long])[:, :3], atol=1e-5)


def test_a_repeated_caption_is_encoded_once(text_encoder):
    encoder = TransformersTextEncoder(text_encoder)
    batch_sizes = []
    encoder.model.register_forward_pre_hook(
        lambda model, args, inputs: batch_sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    embeddings = encoder.encode([CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]])
    assert batch_sizes == [2]
    assert np.array_equal(embeddings[0], embeddings[2])


def test_a_caption_longer_than_the_model_allows_is_truncated(text_encoder):
    assert np.isfinite(TransformersTextEncoder(text_encoder).encode(["red " * 500])).all()


@pytest.mark.parametrize("kind", ["umt5", "t5", "roberta", "gpt2", "bart", "siglip", "siglip full", "bert left"])
def test_text_models_give_what_their_own_library_gives(tmp_path, tokenizer, kind):
    """Each caption alone and unpadded, as its model was trained; long captions are truncated to the model's limit."""
    folder, expected = text_model(kind, tokenizer, tmp_path)
    encoder = TransformersTextEncoder(str(folder))
    assert encoder.text_dim() == 16
    long = "red " * 700
    vectors, truncated = encoder.encode_counted([*CAPTIONS, long])
    limit = {"siglip": 24, "siglip full": 24, "roberta": 30, "gpt2": 40, "bart": 40, "bert left": 48}.get(kind, 512)
    assert encoder.max_length == limit
    for vector, caption in zip(vectors, [*CAPTIONS, long], strict=True):
        assert np.allclose(vector, expected(caption, limit), atol=1e-4), caption[:30]
    assert truncated.tolist() == [False, False, True]
    tokens = encoder.encode_tokens(CAPTIONS, num_tokens=4)
    alone = np.concatenate([encoder.encode_tokens([caption], num_tokens=4) for caption in CAPTIONS])
    assert np.allclose(tokens, alone, atol=1e-4)
    encoder.save(tmp_path / "copy")
    copy = TransformersTextEncoder(str(tmp_path / "copy"))
    assert (copy.ref.digest, copy.ref.tokenizer_digest) == (encoder.ref.digest, encoder.ref.tokenizer_digest)


def text_model(kind, tokenizer, folder):
    """Save a small model with a tokenizer, and return its folder and a function from caption and limit to vector."""
    import copy

    import transformers as t

    torch.manual_seed(0)
    size, tokenizer = len(tokenizer), copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 10**30
    small = {"vocab_size": size, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind in ("t5", "umt5"):
        config, cls = {"t5": (t.T5Config, t.T5EncoderModel), "umt5": (t.UMT5Config, t.UMT5EncoderModel)}[kind]
        model = cls(config(vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    elif kind == "roberta":
        model = t.RobertaModel(
            t.RobertaConfig(**small, intermediate_size=32, max_position_embeddings=32, pad_token_id=1), False
        )
    elif kind == "gpt2":
        model = t.GPT2Model(t.GPT2Config(vocab_size=size, n_positions=40, n_embd=16, n_layer=1, n_head=2))
        tokenizer.pad_token = None
    elif kind == "bart":
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        model = t.BartModel(t.BartConfig(vocab_size=size, d_model=16, max_position_embeddings=40, **layers, **heads))
    elif kind == "bert left":
        model = t.BertModel(t.BertConfig(**small, intermediate_size=32, max_position_embeddings=48))
        tokenizer.padding_side = "left"
    else:
        tower = {**small, "intermediate_size": 32, "max_position_embeddings": 24, "projection_size": 16}
        if kind == "siglip":
            model = t.SiglipTextModel(t.SiglipTextConfig(**tower))
        else:
            vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            vision |= {"image_size": 32, "patch_size": 16}
            model = t.SiglipModel(t.SiglipConfig(text_config=tower, vision_config=vision))
    model.eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    def expected(caption, limit):
        padding = {"padding": "max_length"} if "siglip" in kind else {}
        ids = tokenizer([caption], truncation=True, max_length=limit, return_tensors="pt", **padding)["input_ids"]
        with torch.no_grad():
            if "siglip" in kind:
                text = model.text_model if kind == "siglip full" else model
                return text(input_ids=ids).pooler_output[0].numpy()
            if kind == "bart":
                return model.get_encoder()(input_ids=ids).last_hidden_state.mean(1)[0].numpy()
            return model(input_ids=ids).last_hidden_state.mean(1)[0].numpy()

    return folder / "model", expected


def test_a_family_that_is_not_known_is_refused_with_the_list(tmp_path, tokenizer):
    from transformers import ViTConfig, ViTModel

    folder = tmp_path / "vit"
    shape = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ViTModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(EncoderError, match=r"is of model_type vit: text encoders are albert, .*, or a sentence-"):
        TransformersTextEncoder(str(folder))


def test_a_text_model_that_fails_is_one_line(text_encoder, monkeypatch):
    encoder = TransformersTextEncoder(text_encoder)
    monkeypatch.setattr(encoder.model, "forward", lambda **_: [][0])
    with pytest.raises(EncoderError, match=r"^BertModel .* cannot encode \(\w+Error: .*\): use another encoder$"):
        encoder.text_dim()


def test_a_text_encoder_without_a_tokenizer_is_refused(text_encoder, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(text_encoder, folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(EncoderError, match=r"no tokenizer in|cannot be loaded as a text encoder"):
        TransformersTextEncoder(str(folder))


def test_the_tokenizer_beside_a_diffusers_text_encoder_is_found(text_encoder, tmp_path):
    shutil.copytree(text_encoder, tmp_path / "text_encoder_2")
    (tmp_path / "tokenizer_2").mkdir()
    for path in (tmp_path / "text_encoder_2").glob("tokenizer*"):
        path.rename(tmp_path / "tokenizer_2" / path.name)
    found, whole = (TransformersTextEncoder(str(each)) for each in (tmp_path / "text_encoder_2", text_encoder))
    assert np.array_equal(found.encode(CAPTIONS), whole.encode(CAPTIONS))
    assert found.ref.tokenizer_digest == whole.ref.tokenizer_digest


def test_the_tokenizer_has_a_digest_of_its_own(text_encoder, tokenizer, tmp_path):
    first = TransformersTextEncoder(text_encoder).ref
    tokenizer("a caption", truncation=True, max_length=5, padding="max_length")  # leaves its settings in tokenizer.json
    digests = {}
    for name, change in (("same", {}), ("limit", {"model_max_length": 20}), ("words", {})):
        folder = tmp_path / name
        shutil.copytree(text_encoder, folder)
        tokenizer.save_pretrained(folder)
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        if name == "words":
            text = (folder / "tokenizer.json").read_text()
            content = json.loads(text)
            content["normalizer"] = {**content["normalizer"], "lowercase": False}
            (folder / "tokenizer.json").write_text(json.dumps(content))
        digests[name] = TransformersTextEncoder(str(folder)).ref
    assert digests["same"].tokenizer_digest == first.tokenizer_digest
    assert len({ref.tokenizer_digest for ref in digests.values()}) == 3
    assert {ref.digest for ref in digests.values()} == {first.digest}


def test_an_image_size_below_the_factor_names_the_next(image_encoder):
    encoder = DiffusersAutoencoder(image_encoder)
    assert encoder.factor == 8
    for size, fits in ((30, "24 or 32"), (100, "96 or 104"), (7, "8")):
        with pytest.raises(OptionError, match=f"shrinks images by 8: use {fits}$"):
            encoder.latent_shape(size)


def test_the_digest_depends_on_the_weights_alone(text_encoder, image_encoder, changed_encoder):
    assert TransformersTextEncoder(text_encoder).ref == TransformersTextEncoder(text_encoder).ref
    first = DiffusersAutoencoder(image_encoder).ref
    assert DiffusersAutoencoder(changed_encoder).ref.digest != first.digest


@pytest.mark.parametrize("problem", ["missing", "unexpected"])
def test_weights_that_do_not_match_the_config_are_refused(image_encoder, text_encoder, tmp_path, problem):
    for source, file, load in (
        (image_encoder, "diffusion_pytorch_model.safetensors", DiffusersAutoencoder),
        (text_encoder, "model.safetensors", TransformersTextEncoder),
    ):
        folder = tmp_path / file
        shutil.copytree(source, folder)
        weights = load_file(folder / file)
        name = sorted(name for name in weights if "pooler" not in name)[0]
        if problem == "missing":
            del weights[name]
        else:
            weights["something.else"] = torch.zeros(1)
        save_file(weights, folder / file, {"format": "pt"})
        with pytest.raises(EncoderError, match=f"1 {problem} keys, such as "):
            load(str(folder))


def test_pickled_weights_are_not_loaded(image_encoder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(image_encoder, folder)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(EncoderError):
        DiffusersAutoencoder(str(folder))


def test_a_model_that_is_not_an_autoencoder_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(EncoderError, match="is a UNet2DModel, not an autoencoder: use one of AutoencoderKL"):
        DiffusersAutoencoder(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all"])
def test_a_missing_folder_is_an_error(name):
    for load in (DiffusersAutoencoder, TransformersTextEncoder):
        with pytest.raises(EncoderError, match=f"no folder {name}"):
            load(name)


def test_devices():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device() in ("cuda", "mps", "cpu")
    with pytest.raises(OptionError, match=r"^--device tpu9 cannot be used \(.*\): use auto, cpu, cuda") as caught:
        resolve_device("tpu9")
    assert "\n" not in str(caught.value)
