"""Prompts to the text encoder's rows: token ids, hidden states of the prompt, embeddings of the lyrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Model

from sidestep.data.prompts import Prompt
from sidestep.events import Notice

# As at inference (ACE-Step's handler and diffusers' pipeline alike).
MAX_PROMPT_TOKENS = 256
MAX_LYRICS_TOKENS = 2048
COUNTS = ("caption_tokens", "lyric_tokens", "caption_truncated", "lyrics_truncated")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids [1, n], and how many more the text would have had: `truncated` is 0 where all of it is read."""

    ids: Tensor
    truncated: int


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """The tokens of one song's prompt and of its lyrics."""

    text: Tokens
    lyrics: Tokens

    @property
    def counts(self) -> dict[str, int]:
        """How many tokens they have and were cut, under the names in `COUNTS`."""
        numbers = (self.text.ids.shape[1], self.lyrics.ids.shape[1], self.text.truncated, self.lyrics.truncated)
        return dict(zip(COUNTS, numbers, strict=True))


@dataclass(frozen=True, slots=True)
class EncodedText:
    """The rows of one song, on the CPU, without padding: `text` [1, n, W] and `lyrics` [1, m, W] (W the text width),
    and how many tokens they have and were cut, under the names in `COUNTS`."""

    text: Tensor
    lyrics: Tensor
    counts: Mapping[str, int]


def tokenize(tokenizer: PreTrainedTokenizerBase, words: str, *, limit: int) -> Tokens:
    """The ids of `words`, at most `limit`, with the special tokens that the tokenizer's own template adds."""
    whole = len(tokenizer(words)["input_ids"])
    ids = tokenizer(words, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
    return Tokens(ids, whole - ids.shape[1])


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> PromptTokens:
    """The tokens of one song, as many as the model reads."""
    return PromptTokens(
        tokenize(tokenizer, prompt.text, limit=MAX_PROMPT_TOKENS),
        tokenize(tokenizer, prompt.lyrics, limit=MAX_LYRICS_TOKENS),
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, encoder: Qwen3Model, prompt: Prompt) -> EncodedText:
    """Encode one song's prompt with the whole text encoder and its lyrics with the token embedding alone."""
    return encode_tokens(encoder, [tokenize_prompt(tokenizer, prompt)])[0]


def encode_tokens(encoder: Qwen3Model, prompts: Sequence[PromptTokens]) -> list[EncodedText]:
    """Encode the prompts of several songs in one pass, and their lyrics with the token embedding alone.

    No mask: the encoder is causal, so what stands behind a shorter text changes nothing in front of it but the rounding
    (1e-5 of float32; in bfloat16 its last bit, layer by layer). A song alone has no padding.
    """
    ids = [prompt.text.ids[0] for prompt in prompts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    hidden = encoder(input_ids=padded.to(encoder.device), use_cache=False).last_hidden_state.cpu()
    words = torch.cat([prompt.lyrics.ids for prompt in prompts], dim=1)
    embedded = encoder.embed_tokens(words.to(encoder.device)).cpu()
    lyrics = embedded.split([prompt.lyrics.ids.shape[1] for prompt in prompts], dim=1)
    return [
        EncodedText(hidden[at : at + 1, : ids[at].shape[0]].clone(), lyrics[at].clone(), prompt.counts)
        for at, prompt in enumerate(prompts)
    ]


def truncation_notices(name: str, counts: Mapping[str, int]) -> list[Notice]:
    """Warn of what the model does not read of the song's prompt and lyrics."""
    notices = []
    if counts["caption_truncated"]:
        text = (
            f"{name}: the prompt is {counts['caption_truncated']} tokens longer than the {MAX_PROMPT_TOKENS} the model "
            "reads. Its end is cut, first the duration, key and bpm; shorten the caption."
        )
        notices.append(Notice(text=text, level="warning"))
    if counts["lyrics_truncated"]:
        text = (
            f"{name}: the lyrics are {counts['lyrics_truncated']} tokens longer than the {MAX_LYRICS_TOKENS} the model "
            "reads. Their end is cut."
        )
        notices.append(Notice(text=text, level="warning"))
    return notices
