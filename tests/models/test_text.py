"""The text encoders, read as SDXL reads its own."""

import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.text import Conditioner, TextConfig, TextEncoders

CAPTIONS = ["a small red circle at the top", "two zebras, übermütig"]


@pytest.fixture(scope="module")
def text() -> TextEncoders:
    return TextConfig(path="assets/shapes").build()


def test_states_are_the_joined_penultimate_ones_and_pooled_the_projection(text):
    states, mask, pooled = text.encode(CAPTIONS)
    expected = []
    for kind, i in ((CLIPTextModel, ""), (CLIPTextModelWithProjection, "_2")):
        tokenizer = CLIPTokenizer.from_pretrained("assets/shapes", subfolder=f"tokenizer{i}")
        encoder = kind.from_pretrained("assets/shapes", subfolder=f"text_encoder{i}").eval()
        ids = tokenizer(CAPTIONS, padding="max_length", max_length=32, return_tensors="pt").input_ids
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        expected.append(output.hidden_states[-2])
    torch.testing.assert_close(states, torch.cat(expected, -1))
    torch.testing.assert_close(pooled, output.text_embeds)
    assert states.shape == (2, text.length, text.width)
    assert mask.sum(1).tolist() == [9, len(text.tokenizers[0](CAPTIONS[1]).input_ids)]


def test_long_captions_are_cut_not_refused(text):
    states, mask, _ = text.encode(["a red circle " * 50])
    assert states.shape[1] == text.length
    assert mask.all()


def test_null_is_the_empty_caption_or_the_label_after_the_last(text):
    words, classes = Conditioner(text), Conditioner(num_classes=48)
    assert torch.equal(words.null().text, words([""]).text)
    assert classes.null().class_id.tolist() == [48]
    with pytest.raises(ValueError, match="give a prompt, not a class label"):
        words(class_id=torch.tensor([1]))
    with pytest.raises(ValueError, match="give class labels, not a prompt"):
        classes(["a"])


def test_encoders_and_tokenizers_must_pair_up():
    with pytest.raises(ValueError, match="must pair up one to one"):
        TextConfig(path="x", encoders=["text_encoder"])
