"""A tokenizer in which every byte is one token and the token id is the byte's value.

Ids 0..255 are bytes, 256 ends a text, 257 pads, and 258..319 are reserved, so that the vocabulary
fills the embedding (320 rows) and no id a server may sample is without a text.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
END_OF_TEXT_ID = 256
PAD_ID = 257
VOCAB_SIZE = 320


def byte_symbols() -> list[str]:
    """The printable character by which ByteLevel writes each byte, in order of the byte's value.

    Bytes that print in Latin-1 stand for themselves; the others take the code points from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A BPE model without merges: what is left is its alphabet, the 256 bytes."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_{number}|>" for number in range(PAD_ID + 1, VOCAB_SIZE)]
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in (END_OF_TEXT, PAD, *reserved)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    build_tokenizer(max_length).save_pretrained(folder)
