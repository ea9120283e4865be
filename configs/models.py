"""The `model` sections of published models, from their config.json files. Recipes choose how to run them."""

TINYLLAMA_1B = {
    "family": "llama",
    "vocab_size": 32_000,
    "width": 2048,
    "layers": 22,
    "heads": 32,
    "kv_heads": 4,
    "head_width": 64,
    "ff_width": 5632,
    "context_length": 2048,
    "tied_embeddings": False,
}
MISTRAL_7B = {
    "family": "mistral",
    "vocab_size": 32_000,
    "width": 4096,
    "layers": 32,
    "heads": 32,
    "kv_heads": 8,
    "head_width": 128,
    "ff_width": 14_336,
    "context_length": 32_768,
    "sliding_window": 4096,
    "tied_embeddings": False,
}
LLAMA3_8B = {
    "family": "llama",
    "vocab_size": 128_256,
    "width": 4096,
    "layers": 32,
    "heads": 32,
    "kv_heads": 8,
    "head_width": 128,
    "ff_width": 14_336,
    "context_length": 8192,
    "rope_theta": 500_000.0,
    "tied_embeddings": False,
}
LLAMA3_70B = {
    "family": "llama",
    "vocab_size": 128_256,
    "width": 8192,
    "layers": 80,
    "heads": 64,
    "kv_heads": 8,
    "head_width": 128,
    "ff_width": 28_672,
    "context_length": 8192,
    "rope_theta": 500_000.0,
    "tied_embeddings": False,
}
