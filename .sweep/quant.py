"""Whole decode steps of 8B with quantised linear layers: our kernels, Inductor's, torchao's, PyTorch's own int8/int4 operators."""
import json, os, sys, time, traceback
import torch, torch.nn.functional as F
from torch import nn
from hashfast.commands import bench
from hashfast.ops import quant_linear as ql
from hashfast.ops.quant_linear import Int4Linear, Int8Linear, Quantization
from hashfast.runtime.checkpoint import random_model
OUT = os.environ.get("OUT", "/tmp")
rows = []
class InductorInt8(nn.Module):
    def __init__(s, l): super().__init__(); s.weight, s.scale, s.bias = l.weight, l.scale, l.bias
    def forward(s, x): return F.linear(x, s.weight.to(x.dtype)) * s.scale
class PackInt8(InductorInt8):
    def forward(s, x):
        r = x.reshape(-1, x.shape[-1])
        return torch._weight_int8pack_mm(r, s.weight, s.scale).view(*x.shape[:-1], -1)
class InductorInt4(nn.Module):
    def __init__(s, l): super().__init__(); s.weight, s.scale, s.zero = l.weight, l.scale, l.zero
    def forward(s, x): return F.linear(x, ql.dequantize_int4(s.weight, s.scale, s.zero))
class TinyInt4(nn.Module):
    group = 32
    def __init__(s, l):
        super().__init__()
        N, K = l.weight.shape[0], l.weight.shape[1] * 8
        q = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
        s.packed = nn.Parameter(torch.ops.aten._convert_weight_to_int4pack(q, 8), requires_grad=False)
        s.sz = nn.Parameter(0.004 * torch.randn(K // s.group, N, 2, device="cuda").bfloat16(), requires_grad=False)
    def forward(s, x):
        r = x.reshape(-1, x.shape[-1])
        return torch.ops.aten._weight_int4pack_mm(r, s.packed, s.group, s.sz).view(*x.shape[:-1], -1)
class TinyInt4g128(TinyInt4): group = 128
class AoLinear(nn.Module):
    def __init__(s, l): super().__init__(); s.weight, s.bias = l.weight, l.bias
    def forward(s, x): return F.linear(x, s.weight)
def swap(model, kind, cls):
    for name, l in list(model.named_modules()):
        if isinstance(l, kind): model.set_submodule(name, cls(l))
def run(label, make, shapes):
    try:
        t = time.time(); model = make()
        for batch, context in shapes:
            r = bench.bench_decode(model, "8b", batch, context, "hash", 32, bw, 30)
            row = dict(label=label, batch=batch, context=context, ms=r["ms_per_step"], compile_s=r["compile_s"], gib=r["peak_gib"])
            rows.append(row); print(json.dumps(row), f"{time.time()-T0:.0f}s", flush=True)
            json.dump(rows, open(f"{OUT}/quant.json", "w"))
        bench.release(model)
        del model
    except Exception as e:
        print(label, "FAILED", type(e).__name__, str(e)[:300].replace("\n", " "), flush=True)
        if os.environ.get("TB"): traceback.print_exc()
    import gc; gc.collect(); torch.cuda.empty_cache(); torch._dynamo.reset()
T0 = time.time()
bw = 4250.0
S = [(1, 32768), (8, 32768)]
m = "llama-3.1-8b"
def rm(q=None): return random_model(m, "cuda", torch.bfloat16, quantization=Quantization(q) if q else None)
def with_(q, kind, cls):
    def make():
        x = rm(q); swap(x, kind, cls); return x
    return make
def ao(config):
    def make():
        from torchao.quantization import quantize_
        x = rm(); quantize_(x, config()); swap(x, nn.Linear, AoLinear); return x
    return make
def ao_int8():
    from torchao.quantization import Int8WeightOnlyConfig; return Int8WeightOnlyConfig()
todo = {
 "bf16": lambda: rm(), "int8 ours": lambda: rm("int8"), "int8 inductor": with_("int8", Int8Linear, InductorInt8),
 "int8 torchao": ao(ao_int8), "int8 pack": with_("int8", Int8Linear, PackInt8),
 "int4 ours": lambda: rm("int4"), "int4 tinygemm g32": with_("int4", Int4Linear, TinyInt4), "int4 tinygemm g128": with_("int4", Int4Linear, TinyInt4g128),
 "int4 inductor": with_("int4", Int4Linear, InductorInt4)}
for label in sys.argv[1:] or todo:
    run(label, todo[label], S)
