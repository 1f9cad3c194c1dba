import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from megatron_rb.checkpoint.hf.tiny import SPECIAL_TOKENS, TinySize, conversation_texts, write_tiny_model
from megatron_rb.shapes.families import FAMILIES
from megatron_rb.shapes.shape import load_shape

TEXTS = ["Point to the red cube.", "[(12, 345)]", "<score>+12%</score>", "system user assistant"] * 50
SMALL = replace(
    TinySize(), vision_layers=3, text_layers=3, vision_hidden=32, text_hidden=64, head_dim=16, vocab_size=300
)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / request.param
    write_tiny_model(TEXTS, out, family=request.param, size=SMALL, seed=1)
    return out


def test_folder_loads_with_stock_classes_and_runs(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(images=[torch.zeros(3, 64, 64).numpy()], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokens = int(pixels["image_grid_thw"].prod()) // 4
    ids = tokenizer("<|vision_start|>" + "<|image_pad|>" * tokens + "<|vision_end|>red cube", return_tensors="pt")
    kinds = (ids["input_ids"] == model.config.image_token_id).long()
    logits = model(**ids, **pixels, mm_token_type_ids=kinds).logits
    assert logits.isfinite().all() and model.config.text_config.vocab_size % 128 == 0


def test_our_shape_reader_understands_the_folder(folder):
    shape = load_shape(folder)
    assert shape.family == folder.name
    assert all(count % 2 == 0 for count in (shape.text.num_heads, shape.text.num_query_groups, shape.vision.num_heads))
    assert sum(shape.text.mrope_section) * 2 == shape.text.head_dim


def test_every_digit_is_a_token_and_special_tokens_are_whole(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    digits = [token for token in tokenizer.tokenize("[(12, 345)]") if any(c.isdigit() for c in token)]
    assert digits == list("12345")
    assert all(len(tokenizer(token)["input_ids"]) == 1 for token in SPECIAL_TOKENS)
    text = "[(12, 345)] <score>+7%</score> Grüße 你好"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_places_media_and_the_generation_prompt(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Where?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "<|vision_start|><|video_pad|><|vision_end|>Where?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_seed_decides_the_weights(tmp_path, folder):
    def weights(name, seed):
        write_tiny_model(TEXTS, tmp_path / name, family=folder.name, size=SMALL, seed=seed)
        return (tmp_path / name / "model.safetensors").read_bytes()

    assert weights("a", 1) == (folder / "model.safetensors").read_bytes()
    assert weights("b", 2) != weights("c", 3)


def test_existing_folder_and_unknown_family_are_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        write_tiny_model(TEXTS, tmp_path, size=SMALL, seed=0)
    with pytest.raises(ValueError, match="unknown family 'llama'"):
        write_tiny_model(TEXTS, tmp_path / "new", family="llama", size=SMALL, seed=0)


def test_texts_of_a_conversation_file(tmp_path):
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    assert conversation_texts(tmp_path / "a.jsonl")[:2] == ["Where?", "There."]
    with pytest.raises(ValueError, match="demo-data"):
        conversation_texts(tmp_path / "b.jsonl")


def test_texts_of_messages_are_those_of_conversations(tmp_path):
    said = [
        {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": "There."},
    ]
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps({"messages": said}) + "\n\n")
    assert conversation_texts(tmp_path / "a.jsonl")[:2] == ["Where?", "There."]


def test_markers_of_pictures_are_learnt_as_they_stand(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "There."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns, "image": "a.png"}))
    assert conversation_texts(tmp_path / "a.jsonl")[:2] == ["<image>\nWhere?", "There."]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a.jsonl holds no row"),
        ("\n \n", "a.jsonl holds no row"),
        ('\n{"bad', "a.jsonl, line 2: the line is not JSON"),
        ("[1]", "a.jsonl, line 1: the line holds a list"),
        ('{"text": "x"}', "a.jsonl, line 1: "),
    ],
)
def test_file_without_conversations_is_refused_with_its_line(tmp_path, text, sentence):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        conversation_texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["file", "file/new"])
def test_file_in_place_of_the_folder_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file; name a new folder for the model"):
        write_tiny_model(TEXTS, tmp_path / name, size=SMALL, seed=0)
    assert (tmp_path / "file").read_text() == "mine"
