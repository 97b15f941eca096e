from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, merging

from zotune.config import DataConfig
from zotune.data.chat import ChatTemplate, Conversation
from zotune.data.encode import Encoder
from zotune.data.forms import form
from zotune.errors import DataError

PLAIN = (
    "<s>{% for m in messages %}[{{ m.role }}]\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
MARKED = (
    "<s>{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
FORGETFUL = (
    "<s>{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}" + PLAIN
LLAMA = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


def tokenizer(template):
    made = deepcopy(byte_level(bos=True))
    made.chat_template = template
    return made


TOKENIZERS = {template: tokenizer(template) for template in (PLAIN, MARKED, FORGETFUL, STRICT, LLAMA)}


def chat(*contents, system=None):
    """The user and the assistant in turn."""
    turns = [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def encode(messages, template=PLAIN, max_length=4096, **keys):
    """The one example of a conversation."""
    part = form(DataConfig(messages="messages", **keys)).examples(
        [("row 1 of chats.jsonl", {"messages": messages})], Encoder(TOKENIZERS[template], max_length)
    )
    return part.examples[0]


def scored_texts(example):
    """The text of each run of scored tokens."""
    (candidate,) = example.row.candidates
    runs: list[list[int]] = []
    for before, at in zip((-2, *candidate.scored), candidate.scored, strict=False):
        runs = [*runs, []] if at != before + 1 else runs
        runs[-1].append(candidate.tokens[at])
    return [TOKENIZERS[PLAIN].decode(run) for run in runs]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_assistants_turns_are_scored_up_to_where_a_model_stops(template):
    example = encode(chat("a film ?", "great", "and the plot ?", "it was dull", system="be warm"), template)
    assert scored_texts(example) == ["great</s>", "it was dull</s>"]
    prompt = TOKENIZERS[PLAIN].decode(example.row.prompt)
    assert prompt == "<s>[system]\nbe warm</s>\n[user]\na film ?</s>\n[assistant]\n"
    assert list(example.row.prompt).count(TOKENIZERS[PLAIN].bos_token_id) == 1


def test_what_follows_the_last_answer_is_not_computed():
    example = encode(chat("a film ?", "great", "thanks"))
    (candidate,) = example.row.candidates
    assert candidate.scored == tuple(range(len(candidate.tokens)))


contents = st.text(alphabet="ab .\n'é😀[]", min_size=1, max_size=12).filter(lambda text: text.strip() == text)


@given(turns=st.lists(st.tuples(contents, contents), min_size=1, max_size=4), system=st.none() | contents)
def test_every_conversation_gives_back_what_the_assistant_said(turns, system):
    messages = chat(*(text for pair in turns for text in pair), system=system)
    plain, marked = encode(messages), encode(messages, MARKED)
    assert plain == marked
    assert scored_texts(plain) == [f"{answer}</s>" for _, answer in turns]
    whole = [*plain.row.prompt, *plain.row.candidates[0].tokens]
    rendered = TOKENIZERS[PLAIN].apply_chat_template(messages, return_dict=False)
    assert whole == rendered[: len(whole)]


def test_other_dialects_and_other_names():
    said = [{"from": "human", "value": "a film ?"}, {"from": "gpt", "value": "great"}]
    assert encode(said) == encode(chat("a film ?", "great"))
    assert scored_texts(encode(chat("a film ?", "great"), LLAMA)) == [" great </s>"]


def test_a_long_conversation_loses_its_last_turns_then_its_prompt_then_its_answer():
    messages = chat("a film ?", "great", "and the plot ?", "it was dull")
    whole = encode(messages).row
    cut = encode(messages, max_length=len(whole.prompt) + 5).row
    assert cut.prompt == whole.prompt
    assert scored_texts(encode(messages, max_length=len(whole.prompt) + 5)) == ["great</s>"]
    short = encode(messages, max_length=8).row
    assert len(short.prompt) + len(short.candidates[0].tokens) == 8
    assert short.prompt[0] == TOKENIZERS[PLAIN].bos_token_id
    assert short.prompt[1:] == whole.prompt[-len(short.prompt[1:]) :]
    tight = encode(chat("a film ?", "great " * 9), max_length=6).row
    assert (len(tight.prompt), len(tight.candidates[0].scored)) == (1, 5)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "holds an empty conversation"),
        ("hello", "holds a str"),
        (None, "holds nothing"),
        (chat("a film ?"), "no turn of the assistant"),
        (chat("a film ?", "great")[1:], "begins with the assistant"),
        (["hello"], "message 1 is a str"),
        ([{"role": "user"}], "message 1 has no 'content'"),
        ([{"content": "a film ?"}], "message 1 has no 'role'"),
        ([{"role": "usr", "content": "a"}], r"message 1: unknown role 'usr'. Did you mean 'user'\?"),
        ([{"role": "user", "content": None}], "its 'content' holds nothing, not text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "its 'content' holds a list, not text"),
        ([{"role": ["user"], "content": "a"}], "its 'role' holds a list"),
        (chat("a\ud83d", "great"), "half of a surrogate pair"),
    ],
)
def test_conversations_that_are_none(messages, message):
    with pytest.raises(DataError, match=rf"row 1 of chats.jsonl: the field 'messages'.*{message}"):
        encode(messages)


def test_templates_that_cannot_be_used():
    with pytest.raises(DataError, match=r"cannot tell where the assistant's turn begins.*generation"):
        encode(chat("a film ?", "great", "and ?", "dull"), FORGETFUL)
    with pytest.raises(DataError, match="refuses the conversation: the user must begin"):
        encode(chat("a film ?", "great", system="be warm"), STRICT)
    with pytest.raises(DataError, match="no chat template"):
        ChatTemplate.of(merging())


@pytest.mark.parametrize("keys", [{"prompt": "{text}"}, {"completion": "{text}"}, {"label": "label"}, {"answers": "a"}])
def test_a_conversation_is_all_that_is_learnt(keys):
    with pytest.raises(DataError, match=rf"data\.messages does not go with data\.{next(iter(keys))}"):
        form(DataConfig(messages="messages", **keys))


@pytest.mark.parametrize("keys", [{"messages": "messages"}, {"chat": True, "prompt": "{text}", "completion": "{text}"}])
def test_the_template_sets_the_first_token(keys):
    with pytest.raises(DataError, match=r"data\.bos does not go with"):
        form(DataConfig(bos="none", **keys))


def test_prompt_and_completion_as_turns():
    keys = {"prompt": "{text} ?", "completion": "{answer}", "chat": True}
    rows = [("row 1", {"text": "a film", "answer": "great"})]
    part = form(DataConfig(**keys)).examples(rows, Encoder(TOKENIZERS[PLAIN], 4096))
    assert part.examples == (encode(chat("a film ?", "great")),)


@pytest.mark.parametrize("template", [PLAIN, MARKED, FORGETFUL, LLAMA])
def test_candidates_as_the_beginning_of_the_assistants_turn(template):
    keys = {"prompt": "{text} ?", "candidates": [" terrible", " great"], "label": "label", "chat": True}
    rows = [("row 1", {"text": "a film", "label": 1})]
    (example,) = form(DataConfig(**keys)).examples(rows, Encoder(TOKENIZERS[template], 4096)).examples
    decode = TOKENIZERS[template].decode
    whole = [decode([*example.row.prompt, *candidate.tokens]) for candidate in example.row.candidates]
    said = TOKENIZERS[template].apply_chat_template(chat("a film ?", "great"), tokenize=False)
    assert whole[1] == said[: said.index("great") + len("great")]
    assert whole[0] == whole[1].removesuffix("great") + "terrible"
    scored = [decode([c.tokens[at] for at in c.scored]).strip() for c in example.row.candidates]
    assert scored == ["terrible", "great"]


def test_candidates_that_are_also_in_the_templates_own_text():
    keys = {"prompt": "{text}", "candidates": ["s", "t"], "label": "label", "chat": True}
    rows = [("row 1", {"text": "a film", "label": 0})]
    (example,) = form(DataConfig(**keys)).examples(rows, Encoder(TOKENIZERS[PLAIN], 4096)).examples
    assert TOKENIZERS[PLAIN].decode(example.row.prompt).endswith("[assistant]\n")


def test_a_conversation_is_named_by_its_row():
    assert Conversation.read({"m": chat("a", "b")}, "m", "row 7").where == "row 7: the field 'm'"
