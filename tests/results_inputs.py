"""Rows of every kind of results file, and the cells that a table must make of them."""
ABOUT = {"gpu": "A GPU", "torch": "2.0", "triton": "3.0", "commit": "abc", "command": "python bench.py x"}
SIZES = {"batch": 1, "context": 32768}
STEP = {"model": "m", **SIZES, "attention": "dense", "sparsity": 1, "ms_per_step": 8.0, "floor_ms": 4.0, "peak_gib": 9.0,
        "compile_s": 3.0}
CASE = {**SIZES, "sparsity": 32, "mode": "default", "encode_us": 5.0, "total_us": 20.0, "floor_us": 2.0}
PEERS = {"dense_best_us": 50.0, "dense_best": "cudnn", "dense_gb_s": 4000.0, "flash_us": 60.0, "flex_us": None}
MEASURED = {"model": "m", "context": 8192, "selector": "hash", "recipe": "listwise", "bits": 32, "share": "kv", "ratio": 16,
          "budget": 512, "exact": 3, "samples": 4, "bytes_per_token": 4.0, "nll_difference": 0.25}
DISTANCE = MEASURED | {"kind": "all", "ppl_ratio": 0.99, "ratio_interval": [0.98, 1.01], "kl": 0.0138,
                       "kl_interval": [0.0121, 0.0155], "agreement": 0.941, "agreement_interval": [0.93, 0.95],
                       "per_text": {"a": 0.99}}
ROWS = {  # table: its rows, and cells that must come of them
    "attention": ([CASE | PEERS, CASE | {"mode": "hashattention", "total_us": 33.0}],
                  ["1 x 32K, 1/32", "20.0", "50 (cudnn, 4000 GB/s)", "2.5x", "60", "-", "33.0"]),
    "decode": ([STEP | {"warm_start_s": 1.5}, STEP | {"attention": "hash", "sparsity": 32, "ms_per_step": 3.2}],
               ["8.00", "4.00", "3.20", "2.50x", "9.0"]),
    "latency": ([{**SIZES, "attention": mode, "sparsity": 32, "ttft_s": 0.5, "ms_per_token": ms, "floor_ms": 1.0}
                 for mode, ms in (("dense", 6.0), ("hash", 4.0))], ["32K", "0.50", "6.00", "4.00", "1.50x"]),
    "prefill": ([{**SIZES, "model": "m", "seconds": 2.5, "tflops": 400.4, "peak_gib": 20.0, "plan_gib": 21.0},
                 {**SIZES, "model": "m", "prefill": "hash", "prefill_sparsity": 16, "pairs_read": 0.125, "ttft_s": 1.5,
                  "floor_s": 1.1, "linear_s": 0.7, "select_s": 0.05, "attention_s": 0.3, "tflops": 300.0, "peak_gib": 20.0,
                  "plan_gib": 21.0}],
                ["2.50", "400", "20.0", "21.0", "dense", "100.0%", "hash, 1/16", "12.5%", "1.50", "0.70", "0.05", "0.30"]),
    "ragged": ([{"lengths": [1000, 2048], "attention": "hash", "together_tok_s": 300.0, "alone_tok_s": 100.0, "speedup": 3.0}],
               ["1000, 2K", "hash", "300", "100", "3.0x"]),
    "speculate": ([{**SIZES, "model": "m", "sparsity": 32, "k": 4, "draft_ms": 1.0, "verify_ms": 2.0, "round_ms": 6.0,
                    "dense_ms": 4.0}], ["4", "6.00", "1.50"]),
    "parity": ([{**SIZES, "feature": "int8", "model": "m", "attention": "hash", "ms_per_token": 3.0, "baseline_ms": 5.0,
                 "ratio": 0.6, "note": "random weights"}], ["int8", "3.00", "5.00", "0.60", "random weights"]),
    "ppl": ([MEASURED | {"ppl_ratio": 1.25, "per_text": {"a": 1.5, "b": 1.0}}],
            ["hash (listwise, 32 bit)", "512 of 8192", "1.250", "1.000 - 1.500"]),
    "needles": ([MEASURED | {"task": "uuids"}, MEASURED | {"task": "single", "exact": 4},
                 MEASURED | {"task": "uuids", "selector": "hash_calibrated", "share": "query"}],
                ["3/4 (+0.25)", "4/4 (+0.25)", "7/8", "4", "hash calibrated (listwise, 32 bit, one per query head)"]),
    "ruler": ([MEASURED | {"task": task, "value": value} for task, value in (("niah_single_1", 1.0), ("ruler_vt", 0.5))],
              ["niah_single_1", "vt", "1.000", "0.500", "0.750"]),
    "grid": ([MEASURED | {"depth": depth} for depth in (0, 50)], ["1/16", "6/8"]),
    "ablations": ([{"name": "64 bits", "bytes_per_token": 8.0, "ratio": ratio, "mass_books": 0.5 + ratio / 64,
                    "mass_needles": 0.25} for ratio in (16, 32)], ["64 bits", "8", "0.750", "1.000", "0.250"]),
    "quickstart": ([{"device": "cpu", "attention": "hash", "prompt_tokens": 6000, "budget": 384, "decode_tok_s": 20.0,
                     "agreement": 0.9, "perplexity_ratio": 1.01}], ["384", "20.0", "0.900", "1.010"]),
}
