"""vLLM's CPU build on a folder in Hugging Face's layout; run by its own Python.

    vllm_bench.py convert FILE.gguf FOLDER      bf16 safetensors, configuration, tokenizer
    vllm_bench.py bench FOLDER --prompt 512,2048 --generate 64 --batch 1,16 --depth 128 --repeat 3

`bench` prints a JSON object a test, keys as in `ashlar bench engine`. Prompts
are random tokens, never the same twice, prefix caching is off, ends of text are
ignored, and text is never made of the tokens.
"""

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path


def convert(source, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    # The weights are plain again; `save_pretrained` takes them for GGUF's.
    model.hf_quantizer, model._is_hf_quantized, model.is_quantized = None, False, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bench(args):
    from vllm import LLM, SamplingParams

    tokens = max([*args.prompt, args.depth + args.generate]) + 8
    sequences = max(args.batch)
    llm = LLM(str(args.folder), dtype="bfloat16", max_model_len=tokens, max_num_seqs=sequences,
              max_num_batched_tokens=max(tokens, sequences * args.depth), enable_prefix_caching=False,
              disable_log_stats=True)
    engine, numbers, count = llm.llm_engine, random.Random(1), [0]
    words = llm.get_tokenizer().vocab_size

    def run(n, prompt, generate):
        """Seconds to the first token of all, and tokens a second after it."""
        wanted = SamplingParams(max_tokens=generate, ignore_eos=True, temperature=0, detokenize=False)
        for _ in range(n):
            count[0] += 1
            ids = [numbers.randrange(words) for _ in range(prompt)]
            engine.add_request(str(count[0]), {"prompt_token_ids": ids}, wanted)
        start, first, had, made = time.perf_counter(), None, 0, {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                made[output.request_id] = len(output.outputs[0].token_ids)
            if first is None and len(made) == n:
                first, had = time.perf_counter(), sum(made.values())
        end = time.perf_counter()
        assert sum(made.values()) == n * generate, made
        return first - start, (n * generate - had) / (end - first) if generate > 1 else 0.0

    def report(n, prompt, generate, samples):
        print(json.dumps({"n_prompt": prompt, "n_gen": generate, "n_batch_sequences": n,
                          "samples_ts": samples, "median_ts": statistics.median(samples)}), flush=True)

    for prompt in args.prompt:
        run(1, prompt, 1)
        report(1, prompt, 0, [prompt / run(1, prompt, 1)[0] for _ in range(args.repeat)])
    for n in args.batch:
        run(n, args.depth, 4)
        report(n, 0, args.generate, [run(n, args.depth, args.generate + 1)[1] for _ in range(args.repeat)])


def main():
    numbers = lambda s: [int(n) for n in s.split(",") if n]
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=["convert", "bench"])
    p.add_argument("paths", nargs="+", type=Path)
    p.add_argument("--prompt", type=numbers, default=[512, 2048])
    p.add_argument("--generate", type=int, default=64)
    p.add_argument("--batch", type=numbers, default=[1, 8, 16, 32])
    p.add_argument("--depth", type=int, default=128)
    p.add_argument("--repeat", type=int, default=3)
    args = p.parse_args()
    args.folder = args.paths[-1]
    if args.what == "convert":
        convert(args.paths[0], args.folder)
    else:
        bench(args)


if __name__ == "__main__":
    main()
