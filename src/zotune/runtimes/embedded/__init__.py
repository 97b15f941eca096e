"""The embedded runtime: a Hugging Face model in this process, its modules wrapped in place."""

from zotune.runtimes.embedded.runtime import EmbeddedRuntime, twin

__all__ = ["EmbeddedRuntime", "twin"]
