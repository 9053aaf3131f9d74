"""llama.cpp on a GGUF of ours: token ids, greedy text and logits.

stdin: {"model": path, "prompts": [text], "tokens": n, "logits": path}
stdout: one JSON line {"version", "prompts": [{"tokens": [...], "greedy": [...]}]};
the logits of every prompt position go to the file as little-endian f32 rows.
Not called llama_cpp.py: Python would import this file instead of the package.
"""

import json
import sys

import llama_cpp
import numpy

job = json.load(sys.stdin)
model = llama_cpp.Llama(
    model_path=job["model"], n_ctx=512, n_batch=512, n_threads=2, logits_all=True, verbose=False
)
answers = []
with open(job["logits"], "wb") as out:
    for prompt in job["prompts"]:
        tokens = model.tokenize(prompt.encode(), add_bos=False, special=True)
        model.reset()
        model.eval(tokens)
        out.write(numpy.asarray(model.scores[: len(tokens)], dtype="<f4").tobytes())
        greedy = []
        for _ in range(job["tokens"]):
            best = int(numpy.argmax(model.scores[model.n_tokens - 1]))
            greedy.append(best)
            if best == model.token_eos():
                break
            model.eval([best])
        answers.append({"tokens": tokens, "greedy": greedy})
print(json.dumps({"version": llama_cpp.__version__, "prompts": answers}))
