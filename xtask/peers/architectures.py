"""Tiny random checkpoints of each architecture, and what transformers makes of them.

usage: architectures.py FOLDER

FOLDER/<name>/ is a checkpoint in Hugging Face's layout, `logits.bin` in it what
transformers computes (or `vector.bin`, an encoder's embedding), `tokens.json`
the tokens. FOLDER/<name>.gguf holds the same weights under llama.cpp's names,
written here with the `gguf` package, not by our own writer. FOLDER/<name>-4/
has the settings in the layout of transformers 4, as most published checkpoints
do. Weights are f32 (one model's bf16), larger than usual so that every part
moves the result, norms and biases random.
stdout: one JSON line {"version", "names": [...]}.
"""

import json
import pathlib
import re
import shutil
import sys

import gguf
import numpy
import torch
import transformers as hf

VOCAB, LENGTH, WINDOW = 199, 75, 20
PLAIN = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def rope(kind, **more):
    return dict(rope_type=kind, rope_theta=10000.0, **more)


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
LONG = rope(
    "longrope", short_factor=[1.0 + i / 8 for i in range(8)], long_factor=[2.0 + i for i in range(8)],
    original_max_position_embeddings=128,
)  # fmt: skip
FULL, LOCAL = "full_attention", "sliding_attention"
GEMMA = dict(
    PLAIN, head_dim=32, num_hidden_layers=4, sliding_window=WINDOW, query_pre_attn_scalar=32,
    layer_types=[LOCAL, LOCAL, FULL, LOCAL],
)  # fmt: skip
NEOX = {k: v for k, v in PLAIN.items() if k != "num_key_value_heads"}
CASES = {
    "llama": hf.LlamaConfig(**PLAIN, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
    "llama-linear": hf.LlamaConfig(**PLAIN, rope_parameters=rope("linear", factor=4.0), head_dim=24),
    "llama-yarn": hf.LlamaConfig(**PLAIN, rope_parameters=YARN),
    "smollm": hf.LlamaConfig(**PLAIN, tie_word_embeddings=True),
    "mistral": hf.MistralConfig(**PLAIN, sliding_window=WINDOW),
    "mixtral": hf.MixtralConfig(**PLAIN, num_local_experts=5, num_experts_per_tok=2),
    "qwen2": hf.Qwen2Config(**PLAIN),
    "qwen2-window": hf.Qwen2Config(
        **PLAIN, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": hf.Qwen3Config(**PLAIN, head_dim=32, tie_word_embeddings=True),
    "qwen3moe": hf.Qwen3MoeConfig(
        **PLAIN, head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True
    ),
    "qwen3moe-raw": hf.Qwen3MoeConfig(
        **PLAIN, head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=False
    ),
    "gemma2": hf.Gemma2Config(**GEMMA | {"layer_types": None}, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    "gemma3": hf.Gemma3TextConfig(**GEMMA),
    "gemma3-pattern": hf.Gemma3TextConfig(**GEMMA | {"layer_types": None, "num_hidden_layers": 7}),
    "phi3": hf.Phi3Config(**PLAIN, sliding_window=WINDOW),
    "phi3-long": hf.Phi3Config(
        **PLAIN, sliding_window=None, original_max_position_embeddings=128, rope_parameters=LONG
    ),
    "phi3-part": hf.Phi3Config(**PLAIN, rope_parameters=rope("default", partial_rotary_factor=0.75), sliding_window=None),
    "olmo2": hf.Olmo2Config(**PLAIN),
    "gpt-neox": hf.GPTNeoXConfig(**NEOX),
    "gpt-neox-serial": hf.GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    "bloom": hf.BloomConfig(vocab_size=VOCAB, hidden_size=96, n_layer=3, n_head=6),
    "bert": hf.BertConfig(**NEOX),
}
# Which of them are also written as GGUF, and under which architecture.
GGUF = {
    "llama": "llama", "llama-linear": "llama", "llama-yarn": "llama", "smollm": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3moe": "qwen3moe", "gemma2": "gemma2", "gemma3-pattern": "gemma3", "phi3": "phi3", "phi3-long": "phi3",
    "olmo2": "olmo2", "gpt-neox": "gptneox", "bloom": "bloom", "bert": "bert",
}  # fmt: skip
SHARDED, HALF = "qwen2", "olmo2"


def build(config, seed):
    """A model whose every parameter is random: norms about 1, biases about 0."""
    torch.manual_seed(seed)
    encoder = config.model_type == "bert"
    model = (hf.AutoModel if encoder else hf.AutoModelForCausalLM).from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    gemma = config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = "norm" in name.lower() or "ln_f" in name
            if norm and name.endswith("weight"):
                p.normal_(0.0 if gemma else 1.0, 0.2)
            elif name.endswith("bias"):
                p.normal_(0.0, 0.2)
            else:
                p.normal_(0.0, 0.3 if "embed" in name else 1.5 * p.shape[-1] ** -0.5)
    return model.eval()


def expected(model, tokens):
    with torch.no_grad():
        out = model(torch.tensor([tokens]))
        if model.config.model_type != "bert":
            return "logits.bin", out.logits[0]
        mean = out.last_hidden_state[0].mean(0)
        return "vector.bin", mean / mean.norm()


def older(config):
    """The same settings as transformers 4 writes them; `None` where it is no different."""
    c = dict(config)
    parameters = c.pop("rope_parameters", None)
    if parameters is None:
        return None
    own = dict(parameters.get(FULL, parameters))
    theta, part = own.pop("rope_theta"), own.pop("partial_rotary_factor", 1.0)
    if c["model_type"] == "gpt_neox":
        c |= {"rotary_emb_base": theta, "rotary_pct": part}
    else:
        c |= {"rope_theta": theta, "partial_rotary_factor": part}
    if own["rope_type"] != "default":
        c["rope_scaling"] = own | {"type": own["rope_type"]}
    if c["model_type"] == "gemma3_text":
        c["rope_local_base_freq"] = parameters[LOCAL]["rope_theta"]
        c["sliding_window_pattern"] = c.pop("_sliding_window_pattern")
    if c["model_type"] != "gemma3_text" or c["num_hidden_layers"] == 7:
        c.pop("layer_types", None)
    if "num_local_experts" in c and c["model_type"] == "qwen3_moe":
        c["num_experts"] = c.pop("num_local_experts")
    return c


def interleave(rows, heads):
    """Rows of q or k from halves to pairs, as llama.cpp keeps llama's."""
    per = rows.shape[0] // heads
    return rows.reshape(heads, 2, per // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def apart(rows, heads):
    """Rows of a fused projection from head by head to all q, all k, all v."""
    return rows.reshape(heads, 3, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


NAMES = [
    (r"embed_in|embed_tokens|word_embeddings$|embeddings.word_embeddings", "token_embd"),
    (r"embeddings.position_embeddings", "position_embd"),
    (r"embeddings.token_type_embeddings", "token_types"),
    (r"word_embeddings_layernorm|embeddings.LayerNorm", "token_embd_norm"),
    (r"final_layer_norm|ln_f|norm", "output_norm"),
    (r"lm_head|embed_out", "output"),
]
LAYER = [
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"pre_feedforward_layernorm", "ffn_norm"),
    (r"post_feedforward_layernorm", "post_ffw_norm"),
    (r"attention.output.LayerNorm", "attn_output_norm"),
    (r"output.LayerNorm", "layer_output_norm"),
    (r"self_attn.([qkv])_proj", r"attn_\1"),
    (r"self_attn.([qk])_norm", r"attn_\1_norm"),
    (r"self_attn.qkv_proj|(self_)?attention.query_key_value", "attn_qkv"),
    (r"attention.self.query", "attn_q"),
    (r"attention.self.key", "attn_k"),
    (r"attention.self.value", "attn_v"),
    (r"self_attn.o_proj|(self_)?attention.dense|attention.output.dense", "attn_output"),
    (r"mlp.gate_proj", "ffn_gate"),
    (r"mlp.(up_proj|gate_up_proj|dense_h_to_4h)|intermediate.dense", "ffn_up"),
    (r"mlp.(down_proj|dense_4h_to_h)|output.dense", "ffn_down"),
    (r"(mlp|block_sparse_moe).gate", "ffn_gate_inp"),
    (r"mlp.experts.gate_proj|block_sparse_moe.experts.w1", "ffn_gate_exps"),
    (r"mlp.experts.up_proj|block_sparse_moe.experts.w3", "ffn_up_exps"),
    (r"mlp.experts.down_proj|block_sparse_moe.experts.w2", "ffn_down_exps"),
]


def rename(name, kind):
    """llama.cpp's name of a tensor."""
    base, end = name.rsplit(".", 1)
    at = re.search(r"(?:layers|layer|h)\.(\d+)\.(.*)", base)
    if kind in ("gemma2", "gemma3", "olmo2") and base.endswith("post_attention_layernorm"):
        return f"blk.{at[1]}.post_attention_norm.{end}"
    table, part = (LAYER, at[2]) if at else (NAMES, re.sub(r"^(model|transformer|gpt_neox)\.", "", base))
    for pattern, new in table:
        if match := re.fullmatch(pattern, part):
            new = match.expand(new)
            return f"blk.{at[1]}.{new}.{end}" if at else f"{new}.{end}"
    raise KeyError(name)


def write_gguf(model, folder, path, kind):
    c, w = model.config, gguf.GGUFWriter(str(path), kind)
    get = lambda *keys: next((v for k in keys if (v := getattr(c, k, None)) is not None), None)
    heads, hidden = get("n_head", "num_attention_heads"), c.hidden_size
    kv = get("num_key_value_heads") or heads
    dim = get("head_dim") or hidden // heads
    w.add_name("tiny")
    w.add_context_length(get("max_position_embeddings") or 2048)
    w.add_embedding_length(hidden)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(get("intermediate_size") or 4 * hidden)
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_file_type(0)
    w.add_tokenizer_model("no_vocab")
    w.add_vocab_size(VOCAB)
    layer_norm = kind in ("gptneox", "bloom", "bert")
    eps = get("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    (w.add_layer_norm_eps if layer_norm else w.add_layer_norm_rms_eps)(eps)
    turning = dim
    if kind not in ("bloom", "bert"):
        parameters = c.rope_parameters
        own = parameters.get(FULL, parameters)
        turning = int(dim * own.get("partial_rotary_factor", 1.0))
        w.add_rope_dimension_count(turning)
        w.add_rope_freq_base(own["rope_theta"])
        if own["rope_type"] == "llama3":
            speed, factors = own["rope_theta"] ** -(numpy.arange(0, dim, 2) / dim), []
            for s in speed:
                turns = own["original_max_position_embeddings"] * s / (2 * numpy.pi)
                low, high = own["low_freq_factor"], own["high_freq_factor"]
                blend = min(1.0, max(0.0, (turns - low) / (high - low)))
                factors.append(1 / ((1 - blend) / own["factor"] + blend))
            w.add_tensor("rope_freqs.weight", numpy.array(factors, numpy.float32))
        if own["rope_type"] in ("linear", "yarn"):
            w.add_rope_scaling_type(gguf.RopeScalingType(own["rope_type"]))
            w.add_rope_scaling_factor(own["factor"])
            if "original_max_position_embeddings" in own:
                w.add_rope_scaling_orig_ctx_len(own["original_max_position_embeddings"])
        if own["rope_type"] == "longrope":
            original = own["original_max_position_embeddings"]
            factor = c.max_position_embeddings / original
            w.add_rope_scaling_orig_ctx_len(original)
            w.add_rope_scaling_attn_factors(float(numpy.sqrt(1 + numpy.log(factor) / numpy.log(original))))
            for length in ("short", "long"):
                w.add_tensor(f"rope_factors_{length}.weight", numpy.array(own[f"{length}_factor"], numpy.float32))
    if dim * heads != hidden:
        w.add_key_length(dim)
        w.add_value_length(dim)
    if c.model_type in ("mistral", "gemma2", "gemma3_text", "phi3") and c.sliding_window:
        w.add_sliding_window(c.sliding_window)
    if kind == "gemma2":
        w.add_attn_logit_softcapping(c.attn_logit_softcapping)
        w.add_final_logit_softcapping(c.final_logit_softcapping)
    if kind == "gptneox":
        w.add_parallel_residual(c.use_parallel_residual)
    if kind == "bert":
        w.add_causal_attention(False)
        w.add_pooling_type(gguf.PoolingType.MEAN)
    if experts := get("num_local_experts", "num_experts"):
        w.add_expert_count(experts)
        w.add_expert_used_count(c.num_experts_per_tok)
    if kind == "qwen3moe":
        w.add_expert_feed_forward_length(c.moe_intermediate_size)

    from safetensors.torch import load_file

    tensors, stacks = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {k: t.float().numpy() for k, t in load_file(file).items()}
    for name, t in tensors.items():
        if name.startswith("pooler."):
            continue
        if m := re.match(r"(.*\.experts)\.(\d+)(\..*)", name):
            stacks.setdefault(m[1] + m[3], {})[int(m[2])] = t
            continue
        if kind == "llama" and (m := re.search(r"\.([qk])_proj\.", name)):
            t = interleave(t, heads if m[1] == "q" else kv)
        if "query_key_value" in name:
            t = apart(t, heads)
        if kind in ("gemma2", "gemma3") and "norm" in name:
            t = t + numpy.float32(1)
        w.add_tensor(rename(name, kind), t.astype(numpy.float32))
    for name, parts in stacks.items():
        w.add_tensor(rename(name, kind), numpy.stack([parts[i] for i in range(len(parts))]))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    root = pathlib.Path(sys.argv[1])
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = []
    for seed, (name, config) in enumerate(CASES.items()):
        folder = root / name
        model = build(config, seed)
        tokens = numpy.random.default_rng(seed).integers(3, VOCAB, LENGTH).tolist()
        state = model.state_dict()
        if name == HALF:
            # Parameters alone: rotary frequencies stay as they are.
            state = {k: v.bfloat16() for k, v in state.items()}
            model.load_state_dict(state)
        model.save_pretrained(folder, state_dict=state, max_shard_size="60KB" if name == SHARDED else "50GB")
        file, values = expected(model, tokens)
        (folder / file).write_bytes(values.numpy().astype("<f4").tobytes())
        (folder / "tokens.json").write_text(json.dumps(tokens))
        names.append(name)
        if settings := older(json.loads((folder / "config.json").read_text())):
            names.append(f"{name}-4")
            shutil.copytree(folder, root / names[-1])
            (root / names[-1] / "config.json").write_text(json.dumps(settings))
        if kind := GGUF.get(name):
            write_gguf(model, folder, root / f"{name}.gguf", kind)
    print(json.dumps({"version": hf.__version__, "names": names}))


main()
