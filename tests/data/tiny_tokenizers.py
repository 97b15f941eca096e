"""Small real tokenizers for tests."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"

SENTENCES = [
    "it 's a charming and often affecting journey . It was great",
    "unflinchingly bleak and desperate . It was terrible",
    "a warm , funny film about people who travel . It was great",
    "the worst film of the year , dull and long . It was terrible",
    "Answer: the sum of four and five is nine\nQuestion: what is the sum?",
]


@cache
def byte_level(bos: bool = False, eos: bool = False, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2 and OPT; ``bos`` and ``eos`` say what it adds to each text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    return _wrap(core, bos, eos)


@cache
def merging() -> PreTrainedTokenizerFast:
    """BPE over bare characters, without words: tokens merge across any border. It has no special tokens."""
    characters = "abcde "
    merges = [("a", "b"), ("ab", "c"), ("c", "d")]
    words = [*characters, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    return PreTrainedTokenizerFast(tokenizer_object=core)


@cache
def words() -> PreTrainedTokenizerFast:
    """One token per known word; all unknown words are the same token."""
    known = sorted({word for sentence in SENTENCES for word in sentence.split()})
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate([BOS, EOS, *known])}, unk_token=BOS))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(core, bos=False, eos=False)


def _wrap(core: Tokenizer, bos: bool, eos: bool) -> PreTrainedTokenizerFast:
    if bos or eos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A" * bos + "$A" * (not bos) + f" {EOS}" * eos,
            special_tokens=[(BOS, core.token_to_id(BOS)), (EOS, core.token_to_id(EOS))],
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS)
