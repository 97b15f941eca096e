"""Whatever the rows are: examples, or an error of ours that names what is wrong; never anything else."""

import json
from contextlib import suppress

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat import CALLING, PLAIN, TOKENIZERS

from zotune.config import DataConfig
from zotune.data import Dataset, load
from zotune.errors import ZotuneError

characters = st.text(st.characters(), max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | characters,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)
odd = values | characters
said = st.text("ab .", max_size=4) | characters
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "ipython"]), "content": said | st.none()},
    optional={"tool_calls": odd, "name": odd},
)
rows = st.fixed_dictionaries(
    {"a": said, "b": st.lists(said, max_size=2), "label": st.integers(0, 2), "m": st.lists(turns, max_size=4)},
    optional={"tools": odd | st.lists(st.dictionaries(st.sampled_from("abc"), values), max_size=2)},
)
spoils = st.dictionaries(st.sampled_from(["a", "b", "label", "m"]), odd | st.lists(turns | odd, max_size=3), max_size=1)
forms = st.sampled_from(
    [
        {"prompt": "{a} It was", "candidates": [" x", " {a} y", " z"], "label": "label"},
        {"prompt": "{a} {label}", "completion": "{b.0}", "answers": "b"},
        {"messages": "m"},
    ]
)
options = st.fixed_dictionaries(
    {},
    optional={
        "chat": st.booleans(),
        "fields": st.dictionaries(st.sampled_from("abm"), st.sampled_from("abcm"), max_size=1),
        "train_size": st.integers(1, 3),
        "validation_size": st.integers(1, 3),
        "max_length": st.integers(2, 20),
        "bos": st.sampled_from(["tokenizer", "none", 0, 10**6, -1]),
    },
)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(
    form=forms,
    keys=options,
    lines=st.lists(rows, min_size=2, max_size=6),
    spoil=st.just({}) | spoils,
    template=st.sampled_from([PLAIN, CALLING]),
)
def test_any_rows_under_any_configuration(tmp_path, form, keys, lines, spoil, template):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [lines[0] | spoil, *lines[1:]]))
    before = path.read_bytes()
    with suppress(ZotuneError):
        data = load(DataConfig(train=str(path), **form, **keys), TOKENIZERS[template], 64)
        assert isinstance(data, Dataset)
        for example in (*data.train, *data.validation):
            assert all(0 <= at < len(c.tokens) for c in example.row.candidates for at in c.scored)
            assert len(example.row.prompt) + max(len(c.tokens) for c in example.row.candidates) <= 64
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["rows.jsonl"]
