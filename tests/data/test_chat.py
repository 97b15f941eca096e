import json
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, merging

from zotune.config import DataConfig
from zotune.data.chat import ChatTemplate
from zotune.data.conversation import Conversation
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
CALLING = (
    "<s>{% if tools %}[tools]\n{{ tools | tojson }}</s>\n{% endif %}{% for m in messages %}[{{ m.role }}]\n"
    "{{ m.content }}{% for call in m.tool_calls %}<call>{{ call | tojson }}</call>{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
CALLS_ALONE = PLAIN.replace("{{ m.content }}", "{{ m.tool_calls[0] | tojson if m.tool_calls else m.content }}")
NAMES = PLAIN.replace("[{{ m.role }}]", "[{{ m.name or m.role }}]")
LAST_THOUGHTS = MARKED.replace("{% generation %}", "{% generation %}{{ m.reasoning_content if loop.last }}")
USER_AND_ASSISTANT = PLAIN.replace(
    "{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}"
)
THOUGHTLESS = PLAIN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
PYTHON = PLAIN.replace("<s>", "<s>{# whose tools are called by 'ipython' #}")


def tokenizer(template):
    made = deepcopy(byte_level(bos=True))
    made.chat_template = template
    return made


TEMPLATES = (PLAIN, MARKED, FORGETFUL, STRICT, LLAMA, CALLING, CALLS_ALONE, NAMES, LAST_THOUGHTS, USER_AND_ASSISTANT)
TOKENIZERS = {template: tokenizer(template) for template in (*TEMPLATES, THOUGHTLESS, PYTHON)}

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def with_arguments(text):
    """The call with other arguments."""
    return {"type": "function", "function": {"name": "weather", "arguments": text}}


def weather(*calls, **said):
    """A conversation in which the assistant calls a tool."""
    return [
        {"role": "user", "content": "is it warm ?"},
        {"role": "assistant", "tool_calls": list(calls), **said},
        {"role": "tool", "content": "21"},
        {"role": "assistant", "content": "it is"},
    ]


def chat(*contents, system=None):
    """The user and the assistant in turn."""
    turns = [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def encode(messages, template=PLAIN, max_length=4096, **fields):
    """The one example of a conversation, in a row with other fields."""
    part = form(DataConfig(messages="messages")).examples(
        [("row 1 of chats.jsonl", {"messages": messages, **fields})], Encoder(TOKENIZERS[template], max_length)
    )
    return part.examples[0]


def text_of(example):
    """The text of all tokens."""
    return TOKENIZERS[PLAIN].decode([*example.row.prompt, *example.row.candidates[0].tokens])


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
        ([{"role": "usr", "content": "a"}, *chat("b", "c")], r"message 1: unknown role 'usr'. Did you mean 'user'\?"),
        (chat("a", "b", "c", ""), "message 4: the assistant says nothing"),
        (weather(), "message 2 has no 'content'"),
        (weather(content=None), "message 2: its 'content' holds nothing, not text"),
        ([{"role": "user", "content": None}], "its 'content' holds nothing, not text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "its 'content' holds a list, not text"),
        ([{"role": ["user"], "content": "a"}], "its 'role' holds a list"),
        (chat("a\ud83d", "great"), "half of a surrogate pair"),
    ],
)
def test_conversations_that_are_none(messages, message):
    with pytest.raises(DataError, match=rf"row 1 of chats.jsonl: the field 'messages'.*{message}"):
        encode(messages)


THOUGHTFUL = [turn | {"reasoning_content": "hm"} for turn in chat("a", "b", "c", "d")]
for turn in THOUGHTFUL[::2]:
    del turn["reasoning_content"]


@pytest.mark.parametrize("said", [{}, {"content": None}, {"content": ""}, {"content": "let me see"}])
def test_what_the_assistant_calls_is_learnt(said):
    example = encode(weather(CALL, **said), CALLING)
    assert '"city": "Paris"' in scored_texts(example)[0]
    rendered = TOKENIZERS[CALLING].apply_chat_template(
        weather(CALL, **{"content": "", **{key: text for key, text in said.items() if text}}), tokenize=False
    )
    assert text_of(example) == rendered.removesuffix("\n")


@pytest.mark.parametrize(
    ("tools", "template", "known"),
    [
        ([TOOL], CALLING, True),
        (json.dumps([TOOL]), CALLING, True),
        ([], CALLING, False),
        (None, CALLING, False),
        ("hammer", PLAIN, False),
    ],
)
def test_the_tools_of_a_row_go_to_a_template_that_takes_them(tools, template, known):
    example = encode(chat("is it warm ?", "it is"), template, tools=tools)
    assert ('"parameters": {"type": "object"}' in TOKENIZERS[PLAIN].decode(example.row.prompt)) == known


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("hammer", "the row's 'tools' are text that is not JSON"),
        (3, "the row's 'tools' hold a int"),
        ([TOOL, "hammer"], "tool 2 of the row's 'tools' is a str"),
    ],
)
def test_tools_that_are_none(tools, message):
    with pytest.raises(DataError, match=f"row 1 of chats.jsonl: the field 'messages': {message}.*Give a list of obj"):
        encode(chat("is it warm ?", "it is"), CALLING, tools=tools)


def test_a_template_of_its_own_for_conversations_with_tools(monkeypatch):
    monkeypatch.setattr(TOKENIZERS[PLAIN], "chat_template", {"default": PLAIN, "tool_use": CALLING})
    assert "[tools]" in text_of(encode(chat("is it warm ?", "it is"), tools=[TOOL]))
    assert encode(chat("is it warm ?", "it is")) == encode(chat("is it warm ?", "it is"), STRICT)


@pytest.mark.parametrize(
    ("messages", "template", "number", "key"),
    [
        (weather(CALL), PLAIN, 2, "tool_calls"),
        (weather(CALL), MARKED, 2, "tool_calls"),
        (weather(CALL, CALL | {"type": "other"}), CALLS_ALONE, 2, "tool_calls"),
        (weather(CALL, content="let me see"), CALLS_ALONE, 2, "content"),
        (weather(CALL, reasoning_content="warm clothes ?"), CALLING, 2, "reasoning_content"),
        ([*chat("a", "b"), {"role": "tool", "content": "21"}], USER_AND_ASSISTANT, 3, "content"),
        (THOUGHTFUL, LAST_THOUGHTS, 2, "reasoning_content"),
    ],
)
def test_what_a_template_leaves_out_is_refused(messages, template, number, key):
    found = rf"row 1 of chats.jsonl: the field 'messages', message {number}: .*tokenizer leaves out '{key}'"
    with pytest.raises(DataError, match=found):
        encode(messages, template)


def test_parts_that_hold_nothing_or_say_what_is_rendered_anyway_are_not_missed():
    empty = {"tool_calls": [], "name": None, "reasoning_content": ""}
    assert encode([turn | empty for turn in chat("a", "b")]) == encode(chat("a", "b"))
    assert encode([turn | {"name": turn["role"]} for turn in chat("a", "b")], NAMES) == encode(chat("a", "b"))
    assert scored_texts(encode(THOUGHTFUL[:2], LAST_THOUGHTS)) == ["hmb</s>"]


def test_arguments_of_calls_may_be_the_json_of_an_object():
    written = encode(weather(CALL), CALLING)
    assert '"arguments": {"city": "Paris"}' in text_of(written)
    assert encode(weather(with_arguments('{"city": "Paris"}')), CALLING) == written
    assert r'"arguments": "{city"' in text_of(encode(weather(with_arguments("{city")), CALLING))
    assert '"arguments": "7"' in text_of(encode(weather(with_arguments("7")), CALLING))


def test_what_is_about_a_message_may_be_left_out():
    about = {"name": "Ann", "id": "7", "tool_call_id": "a"}
    assert encode([turn | about for turn in chat("a", "b")]) == encode(chat("a", "b"))


def test_roles_that_a_template_names():
    messages = [*chat("a", "b"), {"role": "ipython", "content": "21"}, *chat("c", "d")[1:]]
    assert "[ipython]\n21" in text_of(encode(messages, PYTHON))
    with pytest.raises(DataError, match="message 3: unknown role 'ipython'"):
        encode(messages)


@pytest.mark.parametrize("template", [PLAIN, MARKED, FORGETFUL])
def test_a_turn_that_only_ends_is_not_learnt(template):
    for nothing in ("", " \n"):
        with pytest.raises(DataError, match="message 2: the assistant says nothing, so only to stop would be learnt"):
            encode(chat("a", nothing), template)
    with pytest.raises(DataError, match="message 2: the assistant says nothing"):
        encode(chat("a", "<think>b</think>"), THOUGHTLESS)


def test_half_a_character_in_a_tool_call_is_refused():
    with pytest.raises(DataError, match=r"row 1 of chats.jsonl: .*half of a surrogate pair"):
        encode(weather(CALL | {"type": "a\ud83d"}), CALLING)


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


@pytest.mark.parametrize(("template", "opening"), [(PLAIN, ""), (FORGETFUL, "<think></think>"), (LLAMA, "")])
def test_an_answer_is_written_on_from_what_the_template_opens_its_turn_with(template, opening):
    keys = {"prompt": "{text} ?", "completion": "{answer} , it is", "answers": "all", "chat": True}
    rows = [("row 1", {"text": "a great film", "answer": word, "all": [word]}) for word in ("great", "a <t")]
    part = form(DataConfig(**keys)).examples(rows, Encoder(TOKENIZERS[template], 4096))
    for example, (_, row) in zip(part.examples, rows, strict=True):
        decode = TOKENIZERS[template].decode
        (candidate,) = example.row.candidates
        whole = (*example.row.prompt, *candidate.tokens)
        assert example.prompt == whole[: len(example.prompt)]
        assert decode(example.row.prompt) + opening == decode(example.prompt).rstrip(" ")
        assert decode(whole[len(example.prompt) :]).strip().startswith(row["answer"])


def test_an_answer_that_was_cut_is_written_on_from_the_prompt():
    keys = {"prompt": "{text}", "completion": "{answer}", "answers": "answer", "chat": True}
    rows = [("row 1", {"text": "a film", "answer": "very good " * 40})]
    (example,) = form(DataConfig(**keys)).examples(rows, Encoder(TOKENIZERS[FORGETFUL], 60)).examples
    assert example.prompt == example.row.prompt


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% set now = strftime_now('%d %b %Y') %}[{{ now }}]", "[26 Jul 2024]"),
        ("\n{{ strftime_now('%A, %B %-d, %Y') if strftime_now is defined }}", "\nFriday, July 26, 2024"),
        ("{% macro today(form) %}{{ strftime_now(form) }}{% endmacro %}{{ today('%Y-%m-%d') }}", "2024-07-26"),
    ],
)
def test_rows_are_the_same_on_every_day(template: str, expected: str) -> None:
    turns = Conversation.read({"m": chat("a", "b")}, "m", "row 1")
    (row,) = ChatTemplate.of(tokenizer(template + PLAIN)).encode([turns], 4096).rows
    assert TOKENIZERS[PLAIN].decode(row.prompt).startswith(expected)


@pytest.mark.parametrize("keys", [{"candidates": ["terrible", "great"], "label": "label"}, {"completion": "great"}])
def test_a_prompt_that_is_cut_keeps_the_first_token_of_the_template(keys):
    rows = [("row 1", {"text": "a very long film " * 20, "label": 0})]
    part = form(DataConfig(prompt="{text}", chat=True, **keys)).examples(rows, Encoder(TOKENIZERS[PLAIN], 60))
    assert part.encoded.cut_prompts == 1
    assert part.examples[0].row.prompt[0] == TOKENIZERS[PLAIN].bos_token_id


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
