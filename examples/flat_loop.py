"""The whole method in one screen: teach a causal language model two words by forward passes alone.

python flat_loop.py MODEL        MODEL: a Hugging Face folder or hub id
"""

import dataclasses
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import zotune

STEPS = 200
TEXTS = {"the film is lovely": 1, "a moving plot": 1, "the cast is dull": 0, "a boring film": 0}

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])

# A row is a prompt and the candidates that may follow it; an example also knows which of them is right.
candidates = tuple(
    zotune.Candidate(tokens=(token,), scored=(0,))
    for token in (tokenizer(word, add_special_tokens=False).input_ids[0] for word in (" terrible", " great"))
)
examples = [
    zotune.Example(zotune.Row(tuple(tokenizer(f"{text} It was").input_ids), candidates), gold=label)
    for text, label in TEXTS.items()
]
objective = zotune.CandidateCrossEntropy.for_examples(examples)

method = dataclasses.replace(zotune.PRESETS["lozo"].method, lr=1e-5)
optimizer = zotune.Optimizer(method, STEPS)  # knows keys and scalars
runtime = zotune.EmbeddedRuntime(model, method, seed=0)  # owns every tensor

for step in range(STEPS):
    proposal = optimizer.ask(step)  # which nearby models to try: W + eps U V^T and W - eps U V^T
    scores = runtime.score(proposal.probes, [example.row for example in examples])  # all in one forward pass
    losses = objective.losses(scores, examples).mean(axis=1)  # one per nearby model
    update = optimizer.tell(proposal, losses)  # how far to go along U V^T
    runtime.apply(update)
    print(f"step {step + 1}  loss {optimizer.loss(losses):.4f}")
