"""Tiny random quantized checkpoints, and what other programs make of them.

usage: quantized.py FOLDER

FOLDER/<name>/ is a checkpoint in Hugging Face's layout with a
`quantization_config`; `weights.safetensors` in it has the quantized matrices'
values in f32, `logits.bin` what transformers computes with them in f32, and
`tokens.json` the tokens.

Who writes and who reads:
- compressed-tensors: its own compressor writes, transformers and it read back.
- AWQ: written here after AutoAWQ's layout; compressed-tensors' converter reads.
- FP8: written here with torch's types; transformers reads.
- GPTQ: written here after AutoGPTQ's layout; read here, independently of the
  writing, from the stored tensors (and by llama.cpp's converter, where
  ASHLAR_LLAMA_CPP_SOURCE names its folder).
stdout: one JSON line {"version", "names": [...]}.
"""

import copy
import json
import os
import pathlib
import sys

import numpy
import torch
import transformers as hf
from compressed_tensors.compressors import ModelCompressor, PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization import apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

VOCAB, LENGTH = 97, 75
SIZES = dict(
    vocab_size=VOCAB, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LLAMA = hf.LlamaConfig(**SIZES)
# Groups and blocks of 128 do not divide 352.
ODD = hf.LlamaConfig(**SIZES | dict(intermediate_size=352))
PHI = hf.Phi3Config(**SIZES, sliding_window=None)
QWEN = hf.Qwen2Config(**SIZES)
# All experts are used: a choice between them would turn on the rounding of activations.
MIXTRAL = hf.MixtralConfig(**SIZES | dict(intermediate_size=128), num_local_experts=2, num_experts_per_tok=2)


def build(config, seed):
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                p.normal_(0.0, 0.2)
            else:
                p.normal_(0.0, 0.3 if "embed" in name else 1.5 * p.shape[-1] ** -0.5)
    return model.eval()


def linears(tensors):
    """Names, without `.weight`, of the matrices that are quantized."""
    return [
        name.removesuffix(".weight") for name, t in tensors.items()
        if name.endswith(".weight") and t.ndim == 2 and not any(x in name for x in ("embed", "lm_head", "mlp.gate.", "block_sparse_moe.gate."))
    ]  # fmt: skip


# GPTQ and AWQ: groups along the inputs.


def grouped(weight, groups, sym, bits=4):
    """Codes `[out, in]`, scales and zero points `[group, out]` by the least and largest of each group."""
    count, top = int(groups.max()) + 1, 2**bits - 1
    codes = torch.zeros_like(weight, dtype=torch.int64)
    scales, zeros = [], []
    for g in range(count):
        part = weight[:, groups == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if sym:
            scale, zero = torch.maximum(-low, high) * 2 / top, torch.full_like(low, (top + 1) // 2)
        else:
            scale = (high - low) / top
            zero = (-low / scale).round().clamp(1, top)
        scale = scale.half().float()
        codes[:, groups == g] = (part / scale[:, None] + zero[:, None]).round().clamp(0, top).long()
        scales.append(scale)
        zeros.append(zero)
    return codes, torch.stack(scales), torch.stack(zeros).long()


def words(values, bits, dim):
    """Packs along `dim`, the first value lowest."""
    per = 32 // bits
    values = values.movedim(dim, -1)
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % per)).reshape(*values.shape[:-1], -1, per)
    packed = (values << (torch.arange(per) * bits)).sum(-1)
    return packed.to(torch.uint32).view(torch.int32).movedim(-1, dim).contiguous()


def gptq(tensors, config, bits=4, group=128, sym=True, ordered=False, version="gptq", scale=torch.float16):
    for base in linears(tensors):
        weight = tensors.pop(base + ".weight")
        k = weight.shape[1]
        size = k if group == -1 else group
        groups = torch.arange(k) // size
        if ordered:
            # Those of one input have one order, as one Hessian gives them.
            seed = hash_of(base.rsplit(".", 1)[0] + ("" if base.endswith(("o_proj", "down_proj")) else "in"))
            groups[torch.from_numpy(numpy.random.default_rng(seed).permutation(k))] = torch.arange(k) // size
        codes, scales, zeros = grouped(weight, groups, sym, bits)
        tensors[base + ".qweight"] = words(codes.T, bits, 0)
        tensors[base + ".qzeros"] = words(zeros - int(version == "gptq"), bits, 1)
        tensors[base + ".scales"] = scales.to(scale)
        tensors[base + ".g_idx"] = groups.int()
        # As AutoGPTQ once did.
        if sym and base + ".bias" not in tensors:
            tensors[base + ".bias"] = torch.zeros(weight.shape[0], dtype=torch.float16)
    config["quantization_config"] = dict(
        bits=bits, group_size=group, sym=sym, desc_act=ordered, quant_method="gptq", checkpoint_format=version,
        damp_percent=0.01, lm_head=False, true_sequential=True, meta={"quantizer": ["none"]}, pack_dtype="int32",
    )  # fmt: skip


def hash_of(text):
    return sum((i + 1) * b for i, b in enumerate(text.encode()))


def read_gptq(tensors, config):
    """The weights, bit by bit from the stored words."""
    q = config["quantization_config"]
    bits = q["bits"]
    for base in [n.removesuffix(".qweight") for n in list(tensors) if n.endswith(".qweight")]:
        qweight, qzeros, groups = (tensors.pop(f"{base}.{part}").numpy() for part in ("qweight", "qzeros", "g_idx"))
        scales = tensors.pop(base + ".scales").float().numpy()
        if bits == 4:
            spread = lambda a: numpy.stack([a & 15, a >> 4], -1).reshape(*a.shape[:-1], -1)
        else:
            spread = lambda a: a
        # Little-endian words are their codes in order.
        codes = spread(qweight.T.copy().view(numpy.uint8)).T.astype(numpy.int32)
        zeros = spread(qzeros.copy().view(numpy.uint8)).astype(numpy.int32)[:, : scales.shape[1]]
        zeros += int(q["checkpoint_format"] == "gptq")
        groups = groups.astype(int)
        weight = (codes - zeros[groups]).astype(numpy.float32) * scales[groups]
        tensors[base + ".weight"] = torch.from_numpy(weight.T.copy())


AWQ = [0, 2, 4, 6, 1, 3, 5, 7]


def awq(tensors, config, group=128, zero_point=True):
    for base in linears(tensors):
        weight = tensors.pop(base + ".weight")
        k = weight.shape[1]
        codes, scales, zeros = grouped(weight, torch.arange(k) // (k if group == -1 else group), not zero_point)
        order = lambda t: words(t.reshape(t.shape[0], -1, 8)[:, :, AWQ].reshape(t.shape), 4, 1)
        tensors[base + ".qweight"] = order(codes.T)
        if zero_point:
            tensors[base + ".qzeros"] = order(zeros)
        tensors[base + ".scales"] = scales.half()
    config["quantization_config"] = dict(
        bits=4, group_size=group, quant_method="awq", version="gemm", zero_point=zero_point,
        modules_to_not_convert=["lm_head"],
    )  # fmt: skip


def read_awq(tensors, config):
    q = config["quantization_config"]
    group = q["group_size"]
    converter = AutoAWQConverter(group_size=group, zero_point=q["zero_point"])
    for base in [n.removesuffix(".qweight") for n in list(tensors) if n.endswith(".qweight")]:
        own = {n: tensors.pop(n) for n in list(tensors) if n.startswith(base + ".") and not n.endswith("bias")}
        own = {n.removeprefix(base + "."): t for n, t in converter.process(own).items()}
        own["weight_scale"] = own["weight_scale"].float()
        k = int(own["weight_shape"][1])
        args = QuantizationArgs(num_bits=4, strategy="group", group_size=k if group == -1 else group, symmetric=not q["zero_point"])
        own = PackedQuantizationCompressor.decompress(own, QuantizationScheme(targets=["Linear"], weights=args))
        tensors[base + ".weight"] = own["weight"].float()


# FP8.


def fp8(tensors, config, block=(128, 128), dtype=torch.float8_e4m3fn, channel=False, suffix="weight_scale_inv"):
    top = torch.finfo(dtype).max
    for base in linears(tensors):
        weight = tensors[base + ".weight"]
        if channel or block is None:
            scale = (weight.abs().amax(1, keepdim=True) if channel else weight.abs().amax()) / top
            wide = scale
        else:
            rows, cols = (-(-s // b) for s, b in zip(weight.shape, block))
            scale = torch.stack([
                torch.stack([
                    weight[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]].abs().amax() / top
                    for c in range(cols)
                ])
                for r in range(rows)
            ])  # fmt: skip
            wide = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            wide = wide[: weight.shape[0], : weight.shape[1]]
        tensors[base + ".weight"] = (weight / wide).to(dtype)
        tensors[f"{base}.{suffix}"] = scale
    config["quantization_config"] = dict(
        quant_method="fp8", activation_scheme="dynamic", weight_block_size=block and list(block),
        modules_to_not_convert=["lm_head"],
    ) | ({"fmt": "e5m2"} if dtype == torch.float8_e5m2 else {})  # fmt: skip


def read_fp8(tensors, config):
    block = config["quantization_config"]["weight_block_size"]
    for name in [n for n in tensors if n.endswith((".weight_scale_inv", ".weight_scale"))]:
        scale, weight = tensors.pop(name), name.rsplit(".", 1)[0] + ".weight"
        values = tensors[weight].float()
        if block:
            scale = numpy.kron(scale.numpy(), numpy.ones(block, numpy.float32))[: values.shape[0], : values.shape[1]]
            scale = torch.from_numpy(scale)
        tensors[weight] = values * scale


# compressed-tensors.


def compressed(model, folder, layout, activations=None, **args):
    """Writes `model` by compressed-tensors' own means."""
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**args), format=layout,
        input_activations=activations and QuantizationArgs(**activations),
    )  # fmt: skip
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=layout)
    model = copy.deepcopy(model)
    apply_quantization_config(model, config)
    for module in model.modules():
        own = getattr(module, "quantization_scheme", None)
        if own is None:
            continue
        w, a = module.weight.data, own.weights
        if a.strategy == "group":
            w = w.reshape(w.shape[0], -1, a.group_size)
            low, high = w.amin(-1), w.amax(-1)
        elif a.strategy == "channel":
            low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
        elif a.strategy == "block":
            (r, c), (n, k) = a.block_structure, w.shape
            w = torch.nn.functional.pad(w, (0, -k % c, 0, -n % r)).reshape(-(-n // r), r, -(-k // c), c)
            low, high = w.amin((1, 3)), w.amax((1, 3))
        else:
            low, high = w.amin(), w.amax()
        scale, zero = calculate_qparams(low, high, a)
        module.weight_scale.data = scale.to(module.weight_scale.dtype).reshape(module.weight_scale.shape)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype).reshape(module.weight_zero_point.shape)
    compressor = ModelCompressor.from_pretrained_model(model, layout)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def read_compressed(folder):
    config = hf.CompressedTensorsConfig(dequantize=True)
    return hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", quantization_config=config
    ).eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy().astype("<f4").tobytes()


def llama_cpp(folder, config, stored, ours):
    """Holds our reading of the tensors against llama.cpp's converter, where it is at hand."""
    source = os.environ.get("ASHLAR_LLAMA_CPP_SOURCE")
    if not source:
        return
    sys.path[:0] = [source, source + "/gguf-py"]
    from conversion.base import ModelBase

    stub = type("Stub", (), dict(hparams=config, lazy=False, _is_nvfp4=False, _fp8_as_q8=False))()
    stub.model_tensors = {n: (lambda t=t: t) for n, t in stored.items()}
    ModelBase.dequant_model(stub)
    for name, get in stub.model_tensors.items():
        if name.endswith(".weight"):
            assert torch.equal(get().float(), ours[name].float()), (folder.name, name)
    print(f"{folder.name}: llama.cpp reads the same weights", file=sys.stderr)


FORMATS = {"gptq": (gptq, read_gptq), "awq": (awq, read_awq), "fp8": (fp8, read_fp8)}
CASES = {
    "gptq-128": (LLAMA, "gptq", {}),
    "gptq-128-odd": (ODD, "gptq", dict(sym=False)),
    "gptq-64": (QWEN, "gptq", dict(group=64, sym=False)),
    "gptq-32-v2": (LLAMA, "gptq", dict(group=32, sym=False, version="gptq_v2")),
    "gptq-row": (LLAMA, "gptq", dict(group=-1)),
    "gptq-order": (LLAMA, "gptq", dict(group=64, sym=False, ordered=True)),
    "gptq-order-fused": (PHI, "gptq", dict(ordered=True, scale=torch.bfloat16)),
    "gptq-8": (LLAMA, "gptq", dict(bits=8, sym=False)),
    "awq-128": (LLAMA, "awq", {}),
    "awq-32": (PHI, "awq", dict(group=32)),
    "awq-experts": (MIXTRAL, "awq", dict(group=64)),
    "awq-no-zeros": (QWEN, "awq", dict(group=64, zero_point=False)),
    "fp8-block": (LLAMA, "fp8", {}),
    "fp8-block-odd": (ODD, "fp8", {}),
    "fp8-tensor": (QWEN, "fp8", dict(block=None)),
    "fp8-channel": (PHI, "fp8", dict(block=None, channel=True, suffix="weight_scale")),
    "fp8-e5m2": (LLAMA, "fp8", dict(dtype=torch.float8_e5m2)),
    "ct-4-group": (LLAMA, "pack-quantized", dict(num_bits=4, strategy="group", group_size=128)),
    "ct-4-group-zeros": (PHI, "pack-quantized", dict(num_bits=4, strategy="group", group_size=32, symmetric=False)),
    "ct-4-channel": (QWEN, "pack-quantized", dict(num_bits=4, strategy="channel")),
    "ct-4-channel-zeros": (LLAMA, "pack-quantized", dict(num_bits=4, strategy="channel", symmetric=False)),
    "ct-8-packed": (LLAMA, "pack-quantized", dict(num_bits=8, strategy="channel", symmetric=False)),
    "ct-8-int": (LLAMA, "int-quantized", dict(num_bits=8, strategy="channel", activations=dict(num_bits=8, strategy="token", dynamic=True))),
    "ct-fp8-tensor": (LLAMA, "float-quantized", dict(num_bits=8, type="float", strategy="tensor", activations=dict(num_bits=8, type="float", strategy="token", dynamic=True))),
    "ct-fp8-channel": (QWEN, "float-quantized", dict(num_bits=8, type="float", strategy="channel", activations=dict(num_bits=8, type="float", strategy="token", dynamic=True))),
    "ct-fp8-block": (LLAMA, "float-quantized", dict(num_bits=8, type="float", strategy="block", block_structure=[128, 128], activations=dict(num_bits=8, type="float", strategy="token", dynamic=True))),
}  # fmt: skip


def main():
    root = pathlib.Path(sys.argv[1])
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = []
    only = sys.argv[2:]
    for seed, (name, (config, kind, args)) in enumerate(CASES.items()):
        if only and name not in only:
            continue
        folder = root / name
        tokens = numpy.random.default_rng(seed).integers(3, VOCAB, LENGTH).tolist()
        model = build(config, seed)
        if kind in FORMATS:
            write, read = FORMATS[kind]
            model.save_pretrained(folder)
            path, settings = folder / "model.safetensors", folder / "config.json"
            tensors, config = load_file(path), json.loads(settings.read_text())
            quantized = linears(tensors)
            write(tensors, config, **args)
            save_file({n: t.contiguous() for n, t in tensors.items()}, path, {"format": "pt"})
            settings.write_text(json.dumps(config))
            stored = load_file(path)
            plain = dict(stored)
            read(plain, config)
            if kind != "awq":
                llama_cpp(folder, config, stored, plain)
            # A plain checkpoint of those weights, so that transformers does its own renaming.
            save_file({n: t.float().contiguous() for n, t in plain.items()}, root / "model.safetensors", {"format": "pt"})
            del config["quantization_config"]
            (root / "config.json").write_text(json.dumps(config))
            model = hf.AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, attn_implementation="eager").eval()
            # transformers takes whole blocks only.
            if kind == "fp8" and args.get("block", True) and model.config.intermediate_size % 128 == 0:
                theirs = hf.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, attn_implementation="eager",
                    quantization_config=hf.FineGrainedFP8Config(dequantize=True),
                )  # fmt: skip
                for n, t in model.state_dict().items():
                    assert torch.equal(theirs.state_dict()[n].float(), t), (name, n)
        else:
            compressed(model, folder, kind, **args)
            model = read_compressed(folder)
            plain = model.state_dict()
            quantized = linears(plain)
        (folder / "logits.bin").write_bytes(logits(model, tokens))
        weights = {n + ".weight": plain[n + ".weight"].float().contiguous() for n in quantized}
        save_file(weights, folder / "weights.safetensors")
        (folder / "tokens.json").write_text(json.dumps(tokens))
        names.append(name)
    print(json.dumps({"version": hf.__version__, "names": names}))


main()
