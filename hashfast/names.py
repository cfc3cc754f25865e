"""What flags choose among, importable without torch, so that `--help` and a misspelt name do not wait for it."""
RECIPES = ("listwise", "hashattention", "hata")  # research/recipes.py
SELECTORS = ("dense", "hash", "hash_calibrated", "oracle", "oracle_group", "oracle_max", "streaming", "h2o", "quest",
             "double_sparsity", "magicpig", "multipole", "lsh", "random")  # research/selectors.py
VARIANTS = ("ours", "random", "hashattention", "hata", "16 bits", "64 bits", "128 bits", "1-bit query", "2-bit query",
            "8-bit query", "depth 2", "depth 3", "per query head", "no needles", "log |v|", "1/4 of the context")
MODES = ("default", "hashattention", "hata")  # of bench attention: research/attention_latency.py
IMPLEMENTATIONS = ("hashfast", "sdpa", "flash_attention_2")  # of bench transformers: attention in transformers
