"""Prompts to the text encoder's rows: token ids, hidden states of the prompt, embeddings of the lyrics."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Model

from sidestep.data.prompts import Prompt
from sidestep.events import Emit, Notice

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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, encoder: Qwen3Model, prompt: Prompt) -> EncodedText:
    """Encode one song's prompt with the whole text encoder and its lyrics with the token embedding alone.

    No mask and no padding: the encoder is causal, so padding behind the text would change nothing in front of it.
    """
    text = tokenize(tokenizer, prompt.text, limit=MAX_PROMPT_TOKENS)
    lyrics = tokenize(tokenizer, prompt.lyrics, limit=MAX_LYRICS_TOKENS)
    hidden = encoder(input_ids=text.ids.to(encoder.device), use_cache=False).last_hidden_state
    embedded = encoder.embed_tokens(lyrics.ids.to(encoder.device))
    numbers = (text.ids.shape[1], lyrics.ids.shape[1], text.truncated, lyrics.truncated)
    return EncodedText(hidden.cpu(), embedded.cpu(), dict(zip(COUNTS, numbers, strict=True)))


def report_truncation(name: str, counts: Mapping[str, int], *, emit: Emit) -> None:
    """Warn of what the model does not read of the song's prompt and lyrics."""
    if counts["caption_truncated"]:
        text = (
            f"{name}: the prompt is {counts['caption_truncated']} tokens longer than the {MAX_PROMPT_TOKENS} the model "
            "reads. Its end is cut, first the duration, key and bpm; shorten the caption."
        )
        emit(Notice(text=text, level="warning"))
    if counts["lyrics_truncated"]:
        text = (
            f"{name}: the lyrics are {counts['lyrics_truncated']} tokens longer than the {MAX_LYRICS_TOKENS} the model "
            "reads. Their end is cut."
        )
        emit(Notice(text=text, level="warning"))
