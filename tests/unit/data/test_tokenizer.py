"""Both kinds of tokenizers behind one interface."""

import copy
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import sentencepiece

from megatron_rb.data.tokenizer import SPECIAL_TOKENS, build_tokenizer, check_tokens

TEXT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Where  is it?<|im_end|>\n<|endoftext|>"


@pytest.fixture(scope="module")
def train_pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    corpus = folder / "corpus.txt"
    words = "where is the red cube point to it system user assistant you are helpful gripper table opens closes"
    corpus.write_text("\n".join([words, words[::-1]] * 30))

    def train(name: str, **options):
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(folder / name),
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            minloglevel=2,
            **options,
        )
        return folder / f"{name}.model"

    return train


@pytest.fixture(scope="module", params=["user_defined_symbols", "control_symbols"])
def pieces(request, train_pieces):
    return build_tokenizer(train_pieces(request.param, **{request.param: ",".join(SPECIAL_TOKENS)}))


def test_hugging_face_ids_are_those_of_transformers(folder, hf_tokenizer):
    tokenizer = build_tokenizer(folder)
    assert tokenizer.encode(TEXT) == hf_tokenizer.encode(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert len(tokenizer) == len(hf_tokenizer)


def test_template_comes_from_the_folder(folder):
    assert "<|im_start|>" in build_tokenizer(folder).chat_template


def test_end_tokens_are_those_of_qwen(folder, hf_tokenizer):
    wanted = hf_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert list(build_tokenizer(folder).eos_ids) == wanted


def test_many_threads_may_encode(folder):
    tokenizer = build_tokenizer(folder)
    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(lambda _: tuple(tokenizer.encode(TEXT * 20)), range(64)))
    assert len(results) == 1


def test_pieces_keep_special_tokens_and_every_space(pieces):
    assert pieces.decode(pieces.encode(TEXT)) == TEXT
    ids = pieces.encode(TEXT)
    assert all(pieces.token_id(token) in ids for token in SPECIAL_TOKENS if token in TEXT)


def test_pieces_of_a_text_do_not_depend_on_a_special_token_before_it(pieces):
    whole = pieces.encode("<|im_start|>user")
    assert whole == [pieces.token_id("<|im_start|>"), *pieces.encode("user")]


def test_a_model_without_special_tokens_is_refused(train_pieces):
    with pytest.raises(ValueError, match=r"has no piece <\|im_start\|>; train the model with user_defined_symbols="):
        build_tokenizer(train_pieces("plain"))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "x.model").write_text("no protobuf at all")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        build_tokenizer(tmp_path / "x.model")


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at .*nowhere"):
        build_tokenizer(tmp_path / "nowhere")


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="no readable Hugging Face tokenizer in"):
        build_tokenizer(tmp_path)


def test_fingerprint_follows_the_vocabulary(folder, hf_tokenizer, tmp_path):
    shutil.copytree(folder, tmp_path / "same")
    shutil.copytree(folder, tmp_path / "other")
    other = copy.deepcopy(hf_tokenizer)
    other.add_tokens(["gripper"])
    other.save_pretrained(tmp_path / "other")
    fingerprint = build_tokenizer(folder).fingerprint
    assert build_tokenizer(tmp_path / "same").fingerprint == fingerprint
    assert build_tokenizer(tmp_path / "other").fingerprint != fingerprint


def test_tokens_of_another_model_are_refused(folder, shape):
    tokenizer = build_tokenizer(folder)
    check_tokens(tokenizer, shape)
    with pytest.raises(ValueError, match=r"<\|image_pad\|> is token \d+ in the tokenizer but 7 in the model"):
        check_tokens(tokenizer, replace(shape, image_token_id=7))
    with pytest.raises(ValueError, match="vocab_size is 10; use the tokenizer"):
        check_tokens(tokenizer, replace(shape, text=replace(shape.text, vocab_size=10)))


@pytest.mark.parametrize(("file", "content"), [("tokenizer_config.json", "[]"), ("tokenizer.json", "[]")])
def test_a_file_of_another_form_is_one_sentence(folder, tmp_path, file, content):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match="no readable Hugging Face tokenizer in"):
        build_tokenizer(tmp_path)
