"""What the embedded runtime refuses, and what it gives where nothing is asked."""

import numpy as np
import pytest

from zotune.errors import ModelError
from zotune.protocol import CLEAN
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.testing import conformance, tiny

METHOD = conformance.METHODS["all"]


def test_a_model_has_one_runtime_at_a_time() -> None:
    model, rows = tiny.model("llama"), tiny.rows("mixed", 4)
    first = EmbeddedRuntime(model, METHOD)
    scores = first.score([CLEAN], rows)
    with pytest.raises(ModelError, match="wrapped by another EmbeddedRuntime; close that one first"):
        EmbeddedRuntime(model, METHOD)
    assert np.array_equal(first.score([CLEAN], rows), scores)
    first.close()
    assert np.array_equal(EmbeddedRuntime(model, METHOD).score([CLEAN], rows), scores)


def test_nothing_asked_is_nothing_scored() -> None:
    runtime, rows = EmbeddedRuntime(tiny.model("llama"), METHOD), tiny.rows("single", 4)
    assert runtime.score([CLEAN], []).shape == (1, 0)
    assert runtime.score([], rows).shape == (0, 8)
