import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, merging, words

from zotune.data.encode import Encoder, Text
from zotune.errors import DataError
from zotune.rows import Candidate, Row

BOS, EOS = 0, 1
TOKENIZERS = {
    "plain": byte_level(),
    "bos": byte_level(bos=True),
    "bos and eos": byte_level(bos=True, eos=True),
    "eos": byte_level(eos=True),
    "prefix space": byte_level(prefix_space=True),
    "merging": merging(),
}
LONG = 10_000


def text(prompt: str, *candidates: str) -> Text:
    return Text(prompt, candidates, "row 1 of rows.jsonl")


def ids(tokenizer, string: str) -> tuple[int, ...]:
    return tuple(tokenizer(string, add_special_tokens=False)["input_ids"])


def head(name: str) -> tuple[int, ...]:
    return (BOS,) if name.startswith("bos") else ()


def scored(candidate: Candidate) -> list[int]:
    return [candidate.tokens[index] for index in candidate.scored]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    prompt=st.text("abcde .\nIé", min_size=1, max_size=12).filter(lambda prompt: prompt.strip(" ")),
    candidates=st.lists(st.text("abcde ", min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_prompt_and_candidate_are_the_tokens_of_the_whole_and_the_last_ones_count(name, prompt, candidates):
    tokenizer = TOKENIZERS[name]
    known = "".join(character for character in prompt if name != "merging" or character in "abcde ").strip(" ")
    wholes = [ids(tokenizer, (known + candidate).rstrip(" ")) for candidate in candidates]
    length = len(ids(tokenizer, known))
    merged_away = not head(name) and len({whole[:1] for whole in wholes}) > 1
    if not known or merged_away or len(set(wholes)) < len(wholes) or any(len(whole) <= length for whole in wholes):
        with pytest.raises(DataError):
            Encoder(tokenizer, LONG).choices([text(known, *candidates)])
        return
    (row,) = Encoder(tokenizer, LONG).choices([text(known, *candidates)]).rows
    assert [row.prompt + candidate.tokens for candidate in row.candidates] == [head(name) + whole for whole in wholes]
    for candidate, whole in zip(row.candidates, wholes, strict=True):
        assert scored(candidate) == list(whole[length:])
    if row.candidates[0].scored[0] > 0:
        assert len({candidate.tokens[0] for candidate in row.candidates}) > 1, "the prompt could be longer"


def test_sst2_by_hand():
    tokenizer = words()
    token = tokenizer.convert_tokens_to_ids
    (row,) = Encoder(tokenizer, LONG).choices([text(" a film . It was ", " terrible", " great")]).rows
    prompt = tuple(token(word) for word in ["a", "film", ".", "It", "was"])
    assert row == Row(prompt, tuple(Candidate((token(word),), (0,)) for word in ["terrible", "great"]))
    assert row.single_token


def test_a_batch_gives_what_its_texts_give_alone():
    encoder = Encoder(byte_level(bos=True), LONG)
    texts = [text("a film", " great", " terrible"), text("the year was", " long", " dull", " bleak")]
    assert encoder.choices(texts).rows == sum((encoder.choices([each]).rows for each in texts), ())


def test_tokens_that_merge_across_the_border_branch_off_before_it():
    # "ab" + "c" is the one token "abc", "ab" + "d" stays two: the prompt's last token is no longer shared.
    tokenizer = merging()
    (row,) = Encoder(tokenizer, LONG).choices([text("eab", "cde", "dd")]).rows
    token = tokenizer.convert_tokens_to_ids
    assert row == Row(
        (token("e"),),
        (
            Candidate((token("abc"), token("d"), token("e")), (1, 2)),
            Candidate((token("ab"), token("d"), token("d")), (1, 2)),
        ),
    )


def test_a_merge_that_all_candidates_share_is_part_of_the_prompt():
    tokenizer = merging()
    (row,) = Encoder(tokenizer, LONG).completions([text("ab", "ce")]).rows
    token = tokenizer.convert_tokens_to_ids
    assert row == Row((token("abc"),), (Candidate((token("e"),), (0,)),))


def test_a_prompt_by_itself_has_nothing_of_the_completion():
    tokenizer = merging()
    token = tokenizer.convert_tokens_to_ids
    texts = [text("ea", "e"), text("eeab", "ce"), text("eab", "ce")]
    encoded = Encoder(tokenizer, 4).completions(texts)
    assert [row.prompt[-1] for row in encoded.rows] == [token("a"), token("abc"), token("abc")]
    assert encoded.alone == {1: (token("e"), token("e"), token("ab")), 2: (token("e"), token("ab"))}
    # Cut as the row is.
    cut = Encoder(tokenizer, 3, bos=token("d")).completions(texts)
    assert cut.rows[1].prompt == (token("d"), token("abc"))
    assert cut.alone == {1: (token("d"), token("ab")), 2: (token("d"), token("ab"))}


def test_candidates_share_no_scored_token():
    (row,) = Encoder(words(), LONG).choices([text("a film", " and long", " and dull")]).rows
    assert [candidate.scored for candidate in row.candidates] == [(0, 1), (0, 1)]


def test_spaces_between_prompt_and_candidate_are_the_candidates():
    tokenizer = byte_level()
    encoder = Encoder(tokenizer, LONG)
    given_to_candidate, given_to_prompt, given_twice = encoder.choices(
        [text("It was", " great", " dull"), text("It was ", "great", "dull"), text("It was ", " great", " dull")]
    ).rows
    assert given_to_candidate == given_to_prompt == given_twice
    assert encoder.choices([text("Answer:\n", "a", "b")]).rows[0].prompt == ids(tokenizer, "Answer:\n")


@pytest.mark.parametrize(
    ("name", "bos", "expected"),
    [
        ("plain", "tokenizer", ()),
        ("bos", "tokenizer", (BOS,)),
        ("bos and eos", "tokenizer", (BOS,)),
        ("eos", "tokenizer", ()),
        ("bos", "none", ()),
        ("plain", 7, (7,)),
        ("bos", 7, (7,)),
    ],
)
def test_what_comes_first(name, bos, expected):
    (row,) = Encoder(TOKENIZERS[name], LONG, bos).choices([text("a film", " great", " dull")]).rows
    assert row.prompt == expected + ids(TOKENIZERS[name], "a film")


def test_completions_end_with_eos_and_all_their_tokens_count():
    tokenizer = byte_level(bos=True, eos=True)
    (row,) = Encoder(tokenizer, LONG).completions([text("Question: what?\n", "the sum is nine")]).rows
    assert row.prompt == (BOS, *ids(tokenizer, "Question: what?\n"))
    (candidate,) = row.candidates
    assert candidate.tokens == (*ids(tokenizer, "the sum is nine"), EOS)
    assert candidate.scored == tuple(range(len(candidate.tokens)))


def test_long_prompts_lose_their_left_behind_bos_and_are_counted():
    tokenizer = byte_level(bos=True)
    texts = [text("the worst film of the year . It was", " terrible", " great"), text("dull", " great", " terrible")]
    whole, short = Encoder(tokenizer, LONG).choices(texts).rows
    longest = len(whole.prompt) + max(len(candidate.tokens) for candidate in whole.candidates)
    encoded = Encoder(tokenizer, longest - 3).choices(texts)
    assert encoded.rows == (Row((BOS, *whole.prompt[4:]), whole.candidates), short)
    assert (encoded.cut_prompts, encoded.cut_completions) == (1, 0)
    assert Encoder(tokenizer, longest).choices(texts).cut_prompts == 0


def test_candidates_that_leave_a_prompt_nothing_but_bos_are_refused():
    tokenizer = byte_level(bos=True)
    texts = [text("the worst film of the year", " terrible", " great")]
    longest = max(len(candidate.tokens) for candidate in Encoder(tokenizer, LONG).choices(texts).rows[0].candidates)
    assert len(Encoder(tokenizer, longest + 2).choices(texts).rows[0].prompt) == 2
    with pytest.raises(DataError, match="leaves no room for the prompt"):
        Encoder(tokenizer, longest + 1).choices(texts)


def test_long_completions_lose_their_end_after_the_prompt_lost_its_left():
    tokenizer = byte_level(bos=True)
    whole = Encoder(tokenizer, LONG).completions([text("the sum", " of four and five is nine")]).rows[0]
    tokens = whole.candidates[0].tokens
    encoded = Encoder(tokenizer, len(tokens)).completions([text("the sum", " of four and five is nine")])
    kept = Candidate(tokens[:-1], tuple(range(len(tokens) - 1)))
    assert encoded.rows == (Row((BOS,), (kept,)),)
    assert (encoded.cut_prompts, encoded.cut_completions) == (1, 1)


def test_without_bos_the_last_token_of_the_prompt_stays():
    tokenizer = byte_level()
    (row,) = Encoder(tokenizer, 3).completions([text("the sum", " of four and five is nine")]).rows
    assert row.prompt == ids(tokenizer, "the sum")[-1:]
    assert len(row.candidates[0].tokens) == 2


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (text("  ", " great", " dull"), "prompt '  ' is empty"),
        (text("a film", " great", ""), "'' adds no tokens"),
        (text("a film", " great", "  "), "'  ' adds no tokens"),
        (text("a film", " great", " great "), "have the same tokens"),
    ],
)
def test_texts_without_tokens_or_difference_are_refused(example, message):
    with pytest.raises(DataError, match=message) as caught:
        Encoder(byte_level(), LONG).choices([example])
    assert "row 1 of rows.jsonl" in str(caught.value)


def test_different_texts_of_the_same_tokens_are_refused():
    # Words that this tokenizer does not know are all the same token.
    with pytest.raises(DataError, match=r"' superb' and ' awful' have the same tokens"):
        Encoder(words(), LONG).choices([text("a film", " superb", " awful")])


def test_a_prompt_that_merges_away_is_refused():
    with pytest.raises(DataError, match="merges with what follows"):
        Encoder(merging(), LONG).choices([text("ab", "ce", "de")])


def test_candidates_that_leave_no_room_are_refused():
    with pytest.raises(DataError, match=r"within 3 tokens.*max_length"):
        Encoder(words(), 3).choices([text("a film", " dull and long", " great")])


@pytest.mark.parametrize("bos", [-1, 100_000])
def test_a_first_token_outside_the_vocabulary_is_refused(bos):
    with pytest.raises(DataError, match=rf"data.bos: token id {bos} is outside the vocabulary"):
        Encoder(byte_level(), LONG, bos).choices([text("a film", " great", " dull")])


def test_a_maximum_that_bos_uses_up_is_refused():
    with pytest.raises(DataError, match="leaves no room"):
        Encoder(byte_level(bos=True), 1).completions([text("a film", " great")])
