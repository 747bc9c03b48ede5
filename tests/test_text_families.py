"""Text models of every family, with random weights, next to their own library, one caption at a time and unpadded."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from index.errors import EncoderError
from pipeline.encoders.families import FAMILIES
from pipeline.encoders.text import TransformersTextEncoder

CAPTIONS = [
    "a small red circle",
    "a large blue square left of a small black triangle",
    "red",
    "a small red circle above a large green triangle and a small blue circle",
]
POSITIONS, DIM = 64, 16
SMALL = {
    "hidden_size": DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": POSITIONS,
}
T5 = {"d_model": DIM, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
TOWER = {**SMALL, "projection_size": DIM}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
VISION = {key: value for key, value in SMALL.items() if key != "max_position_embeddings"} | {"patch_size": 16}
FULL = {"text_config": TOWER, "vision_config": VISION | {"image_size": 32}}
CLIP = {**SMALL, "projection_dim": 12}
FULL_CLIP = {"text_config": CLIP, "vision_config": VISION | {"image_size": 32}, "projection_dim": 12}
BART = {
    **{"d_model": DIM, "max_position_embeddings": POSITIONS, "encoder_layers": 1, "decoder_layers": 1},
    **{"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}
DISTILBERT = {"dim": DIM, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": POSITIONS}
GPT2 = {"n_embd": DIM, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
FROM_2 = {**SMALL, "max_position_embeddings": POSITIONS + 1}  # those count positions from the one after padding, 0 here
GEMMA3 = {**GROUPED, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}

# class that is saved, its config, pooling (None: the default), class that is expected to encode
CASES = [
    ("CLIPTextModel", CLIP, None, "CLIPTextModel"),
    ("CLIPModel", FULL_CLIP, None, "CLIPTextModel"),
    ("CLIPModel", FULL_CLIP, "projected", "CLIPTextModelWithProjection"),
    ("CLIPTextModelWithProjection", CLIP, None, "CLIPTextModel"),
    ("CLIPTextModelWithProjection", CLIP, "projected", "CLIPTextModelWithProjection"),
    ("SiglipTextModel", TOWER, None, "SiglipTextModel"),
    ("SiglipModel", FULL, None, "SiglipTextModel"),
    ("Siglip2TextModel", TOWER, None, "Siglip2TextModel"),
    ("Siglip2Model", {"text_config": TOWER, "vision_config": VISION}, None, "Siglip2TextModel"),
    ("T5EncoderModel", T5, None, "T5EncoderModel"),
    ("T5ForConditionalGeneration", T5 | {"num_decoder_layers": 1}, None, "T5EncoderModel"),
    ("MT5EncoderModel", T5, None, "MT5EncoderModel"),
    ("UMT5EncoderModel", T5, None, "UMT5EncoderModel"),
    ("UMT5ForConditionalGeneration", T5 | {"num_decoder_layers": 1}, None, "UMT5EncoderModel"),
    ("BartModel", BART, None, "BartModel"),
    ("BartForConditionalGeneration", BART, None, "BartModel"),
    ("AlbertForPreTraining", {**SMALL, "embedding_size": 8}, None, "AlbertModel"),
    ("BertModel", SMALL, None, "BertModel"),
    ("BertForPreTraining", SMALL, None, "BertModel"),
    ("BertForMaskedLM", SMALL, "cls", "BertModel"),
    ("CamembertForMaskedLM", FROM_2, None, "CamembertModel"),
    ("DebertaForMaskedLM", {**SMALL, **DEBERTA}, None, "DebertaModel"),
    ("DebertaV2ForMaskedLM", {**SMALL, **DEBERTA}, "cls", "DebertaV2Model"),
    ("DistilBertForMaskedLM", DISTILBERT, None, "DistilBertModel"),
    ("DistilBertModel", DISTILBERT, "cls", "DistilBertModel"),
    ("ElectraForPreTraining", {**SMALL, "embedding_size": 8}, None, "ElectraModel"),
    ("ElectraForMaskedLM", {**SMALL, "embedding_size": 8}, None, "ElectraModel"),
    ("ModernBertForMaskedLM", SMALL, None, "ModernBertModel"),
    ("MPNetForMaskedLM", FROM_2 | {"max_position_embeddings": POSITIONS + 2}, None, "MPNetModel"),
    ("RobertaForMaskedLM", FROM_2, None, "RobertaModel"),
    ("RobertaForSequenceClassification", FROM_2, "cls", "RobertaModel"),
    ("XLMRobertaForMaskedLM", FROM_2, None, "XLMRobertaModel"),
    ("GemmaModel", GROUPED, None, "GemmaModel"),
    ("Gemma2ForCausalLM", GROUPED, None, "Gemma2Model"),
    ("Gemma2Model", GROUPED, "last", "Gemma2Model"),
    ("Gemma3ForCausalLM", GEMMA3, None, "Gemma3TextModel"),
    ("Gemma3TextModel", GEMMA3, "last", "Gemma3TextModel"),
    ("GPT2LMHeadModel", GPT2, None, "GPT2Model"),
    ("LlamaForCausalLM", GROUPED, None, "LlamaModel"),
    ("LlamaModel", GROUPED, "last", "LlamaModel"),
    ("MistralForCausalLM", GROUPED, None, "MistralModel"),
    ("Qwen2ForCausalLM", GROUPED, None, "Qwen2Model"),
    ("Qwen3ForCausalLM", GROUPED, "last", "Qwen3Model"),
]
PADS_LEFT = ("Gemma", "Llama", "Qwen")


@pytest.fixture(scope="module")
def words(tokenizer):
    """A function that returns the tokenizer as a family's come: no stated limit, padding on its side or none at all."""

    def make(class_name: str):
        made = copy.deepcopy(tokenizer)
        made.model_max_length = 10**30
        if class_name.startswith(PADS_LEFT):
            made.padding_side = "left"
        if class_name.startswith(("GPT2", "Llama")):
            made.pad_token = None
        return made

    return make


def save_model(class_name, config, tokenizer, folder):
    """Save a small random model of the class with its tokenizer, and return it."""
    torch.manual_seed(0)
    cls = getattr(transformers, class_name)
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    if class_name.startswith("ModernBert"):
        ids |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    config = config | ({"text_config": config["text_config"] | ids} if "text_config" in config else ids)
    model = cls(cls.config_class(**config)).eval()
    for name, weight in model.named_parameters():  # as drawn, some give all captions nearly the same vector
        if "norm" not in name.lower() and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    if class_name.startswith("Mistral"):  # a padding token that the model has no embedding for
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    return model


def own_library(class_name, folder, pooling, limit):
    """Return the function from a caption to the vector and the token states that transformers gives."""
    model = getattr(transformers, class_name).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def encode(caption):
        padded = {"padding": "max_length"} if "Siglip" in class_name else {}
        inputs = tokenizer([caption], truncation=True, max_length=limit, return_tensors="pt", **padded)
        run = model.get_encoder() if class_name == "BartModel" else model
        out = run(input_ids=inputs["input_ids"])
        states = out.last_hidden_state[0]
        vector = {
            "pooled": lambda: out.pooler_output[0],
            "projected": lambda: out.text_embeds[0],
            "mean": lambda: states.mean(0),
            "cls": lambda: states[0],
            "last": lambda: states[-1],
        }[pooling]()
        return vector.numpy(), states[inputs["attention_mask"][0].bool()].numpy()

    return encode


@pytest.mark.parametrize(("saved", "config", "pooling", "class_name"), CASES)
def test_text_models_equal_their_own_library(tmp_path, words, saved, config, pooling, class_name):
    tokenizer = words(saved)
    save_model(saved, config, tokenizer, tmp_path / "model")
    encoder = TransformersTextEncoder(str(tmp_path / "model"), pooling=pooling)
    assert encoder.ref.class_name == class_name
    dim = 12 if encoder.ref.pooling == "projected" else DIM
    assert encoder.text_dim() == dim
    limit = 512 if "T5" in saved else POSITIONS
    assert encoder.max_length == limit
    expected = own_library(class_name, tmp_path / "model", encoder.ref.pooling, limit)
    captions = [*CAPTIONS, "red " * 100]
    vectors, truncated = encoder.encode_counted(captions)
    assert truncated.tolist() == [False] * 4 + ["T5" not in saved]
    for caption, vector in zip(captions, vectors, strict=True):
        assert np.abs(vector - expected(caption)[0]).max() < 1e-5, caption[:30]
        assert np.abs(vector - encoder.encode([caption])[0]).max() < 1e-5
    check_tokens(encoder, expected, dim)
    check_copy(encoder, tmp_path / "copy", captions)


def check_tokens(encoder, expected, dim):
    """A caption's own tokens, whatever the batch and the tokenizer's side of padding."""
    if dim != DIM:
        with pytest.raises(EncoderError, match=r"12 dimensions, and token embeddings of 16: .* --num-tokens 0$"):
            encoder.encode_tokens(CAPTIONS, num_tokens=6)
        return
    tokens = encoder.encode_tokens(CAPTIONS, num_tokens=6)
    for caption, rows in zip(CAPTIONS, tokens, strict=True):
        states = np.zeros((6, DIM), np.float32)
        own = expected(caption)[1][:6]
        states[: len(own)] = own
        assert np.abs(rows[1:] - states).max() < 1e-5
        assert np.abs(rows - encoder.encode_tokens([caption], num_tokens=6)[0]).max() < 1e-5


def check_copy(encoder, folder, captions):
    """A run's own copy is the same encoder."""
    encoder.save(folder)
    moved = TransformersTextEncoder(str(folder), pooling=encoder.ref.pooling, prompt=encoder.ref.prompt)
    for field in ("class_name", "digest", "tokenizer_digest", "pooling", "prompt"):
        assert getattr(moved.ref, field) == getattr(encoder.ref, field)
    assert np.array_equal(moved.encode(captions), encoder.encode(captions))


def test_every_family_is_compared():
    compared = {getattr(transformers, saved).config_class.model_type for saved, *_ in CASES}
    assert compared == set(FAMILIES)


def save_sentence_model(folder, tokenizer, mode="cls", dense=None, normalize=False, left=False, **prompts):
    """Save a small sentence-transformers model; returns the library's own, opened from the folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 12
    tokenizer.padding_side = "left" if left else "right"
    save_model(*(("Qwen3Model", GROUPED) if left else ("BertModel", SMALL)), tokenizer, folder / "plain")
    modules = [Transformer(str(folder / "plain")), Pooling(DIM, pooling_mode=mode)]
    modules += [Dense(DIM, dense)] if dense else []
    modules += [Normalize()] if normalize else []
    SentenceTransformer(modules=modules, device="cpu", **prompts).save_pretrained(str(folder / "model"))
    return SentenceTransformer(str(folder / "model"), device="cpu")


SENTENCE_MODELS = {
    "cls": {"mode": "cls"},
    "mean, dense, normalized": {"mode": "mean", "dense": 8, "normalize": True},
    "last, padded on the left": {"mode": "lasttoken", "left": True, "normalize": True},
    "default prompt": {"mode": "mean", "prompts": {"query": "red blue "}, "default_prompt_name": "query"},
}


@pytest.mark.parametrize("name", SENTENCE_MODELS)
def test_sentence_transformers_folders_equal_their_own_library(tmp_path, tokenizer, name):
    options = SENTENCE_MODELS[name]
    library = save_sentence_model(tmp_path, tokenizer, **options)
    captions = [*CAPTIONS, "red " * 100]
    for prompt in (None, "green ", ""):
        encoder = TransformersTextEncoder(str(tmp_path / "model"), prompt=prompt)
        default = "red blue " if "prompts" in options else ""
        assert (encoder.ref.pooling, encoder.ref.prompt) == (
            "sentence-transformers",
            default if prompt is None else prompt,
        )
        vectors, truncated = encoder.encode_counted(captions)
        assert truncated[2:].tolist() == [False, True, True]
        for caption, vector in zip(captions, vectors, strict=True):
            assert np.abs(vector - library.encode([caption], prompt=prompt)[0]).max() < 1e-5
    assert encoder.text_dim() == options.get("dense", DIM)

    def expected(caption):
        return None, library.encode([caption], prompt="", output_value="token_embeddings")[0].numpy()

    if "dense" not in options:
        check_tokens(encoder, expected, DIM)
    check_copy(encoder, tmp_path / "copy", captions)


def test_a_sentence_transformers_folder_can_be_pooled_otherwise(tmp_path, tokenizer):
    save_sentence_model(tmp_path, tokenizer, "cls")
    encoder = TransformersTextEncoder(str(tmp_path / "model"), pooling="mean")
    assert (encoder.ref.class_name, encoder.ref.pooling) == ("BertModel", "mean")


def test_the_name_of_a_prompt_is_not_its_text(tmp_path, tokenizer):
    save_sentence_model(tmp_path, tokenizer, prompts={"query": "red blue "})
    with pytest.raises(
        EncoderError, match=r"^--text-prompt query is the name of a prompt .*: type its text, 'red blue '"
    ):
        TransformersTextEncoder(str(tmp_path / "model"), prompt="query")


def test_random_weights_of_a_sentence_transformer_are_refused(tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    save_sentence_model(tmp_path, tokenizer)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in sorted(weights) if "attention" in name))
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(EncoderError, match="1 missing keys, such as "):
        TransformersTextEncoder(str(tmp_path / "model"))


def test_a_prompt_is_put_before_each_caption(text_encoder):
    plain, prompted = (TransformersTextEncoder(text_encoder, prompt=prompt) for prompt in ("", "red "))
    assert prompted.ref.prompt == "red "
    assert np.abs(prompted.encode(["circle"]) - plain.encode(["red circle"])).max() < 1e-6


def test_a_pooling_that_does_not_fit_is_refused(text_encoder):
    with pytest.raises(EncoderError, match=r"^--text-pooling pooled does not fit .*: use mean or cls$"):
        TransformersTextEncoder(text_encoder, pooling="pooled")


def test_rotary_angles_keep_their_precision(tmp_path, words):
    """Half precision as the library itself computes it: the angles of a decoder's positions stay in float32."""
    save_model("LlamaModel", GROUPED, words("Llama"), tmp_path)
    encoder = TransformersTextEncoder(str(tmp_path), dtype="bfloat16")
    library = transformers.LlamaModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ids = encoder.tokenizer(["red " * 40], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = library(input_ids=ids).last_hidden_state[0].float().numpy()
    assert np.array_equal(encoder.encode_tokens(["red " * 40], num_tokens=len(states))[0, 1:], states)


@pytest.mark.parametrize("saved", ["BertModel", "GemmaModel", "CLIPTextModel", "T5EncoderModel"])
def test_a_model_without_tokenizer_files_is_refused(tmp_path, words, saved):
    """Transformers makes an empty tokenizer up, which gives most captions the same tokens."""
    config = next(config for name, config, *_ in CASES if name == saved)
    save_model(saved, config, words(saved), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(EncoderError, match=r"^no tokenizer in .* \(one of tokenizer.json, .*\): copy the model's own"):
        TransformersTextEncoder(str(tmp_path))


def test_the_tokenizer_of_a_pipeline_is_found_beside_its_text_encoder(tmp_path, words):
    save_model("CLIPTextModel", CLIP, words("CLIP"), tmp_path / "text_encoder_2")
    whole = TransformersTextEncoder(str(tmp_path / "text_encoder_2"))
    (tmp_path / "tokenizer_2").mkdir()
    for path in (tmp_path / "text_encoder_2").glob("tokenizer*"):
        path.rename(tmp_path / "tokenizer_2" / path.name)
    found = TransformersTextEncoder(str(tmp_path / "text_encoder_2"))
    assert found.ref == whole.ref
    shutil.rmtree(tmp_path / "tokenizer_2")
    with pytest.raises(EncoderError, match=r"^no tokenizer in \S+text_encoder_2 or \S+tokenizer_2 "):
        TransformersTextEncoder(str(tmp_path / "text_encoder_2"))


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path, words):
    tokenizer = words("Bert")
    save_model("BertModel", SMALL, tokenizer, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["zebra"] = len(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        EncoderError, match=r"has token ids up to 97, the model 97 token embeddings: .* another model's"
    ):
        TransformersTextEncoder(str(tmp_path))


def test_a_model_that_does_not_tell_captions_apart_is_refused(tmp_path, words):
    model = save_model("BertModel", SMALL, words("Bert"), tmp_path)
    torch.nn.init.zeros_(model.embeddings.word_embeddings.weight)
    model.save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match=r"gives 'a small red circle' and 'a large blue square' the same vector"):
        TransformersTextEncoder(str(tmp_path)).text_dim()


def test_half_precision_and_variants_keep_their_bytes(tmp_path, words):
    model = save_model("T5EncoderModel", T5, words("T5"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    model.half().save_pretrained(tmp_path / "model", variant="fp16")
    assert not (tmp_path / "model" / "model.safetensors").exists()
    check_copy(TransformersTextEncoder(str(tmp_path / "model")), tmp_path / "copy", CAPTIONS)


@pytest.mark.slow
def test_pooling_and_prompt_belong_to_the_table(tmp_path, shapes, encode_shapes):
    from index.errors import TableError
    from pipeline.encoders.stored import open_text_encoder

    options = {"text_pooling": "cls", "text_prompt": "red ", "limit": 40}
    table = encode_shapes(shapes, tmp_path / "t.lance", **options).table
    ref = table.meta.text_encoder
    assert (ref.pooling, ref.prompt) == ("cls", "red ")
    encoder = open_text_encoder(ref)
    rows = table.dataset().to_table(["caption", "text"]).to_pylist()
    given = encoder.encode([row["caption"] for row in rows])
    assert np.abs(given - np.array([row["text"] for row in rows], np.float32)).max() < 1e-2
    with pytest.raises(TableError, match=r"--text-pooling: cls, now mean; --text-prompt: red , now "):
        encode_shapes(shapes, tmp_path / "t.lance", append=True)
    with pytest.raises(TableError, match=r"--text-prompt: red , now blue"):
        encode_shapes(shapes, tmp_path / "t.lance", **{**options, "text_prompt": "blue"})
