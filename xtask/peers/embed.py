"""A sentence encoder by transformers: tokens and mean-pooled vectors of length 1.

stdin: {"model": folder, "texts": [text]}
stdout: one JSON line {"version", "texts": [{"tokens": [...], "vector": [...]}]}
"""

import json
import sys

import torch
import transformers

job = json.load(sys.stdin)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
model = transformers.AutoModel.from_pretrained(job["model"], dtype=torch.float32).eval()
answers = []
for text in job["texts"]:
    tokens = tokenizer(text)["input_ids"]
    with torch.no_grad():
        mean = model(torch.tensor([tokens])).last_hidden_state[0].mean(0)
    answers.append({"tokens": tokens, "vector": (mean / mean.norm()).tolist()})
print(json.dumps({"version": transformers.__version__, "texts": answers}))
