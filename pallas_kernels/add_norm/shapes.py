"""Named real shapes: widths of the residual stream of known models."""

WIDTHS = {
    "smollm2-135m": 576,
    "qwen3-0.6b": 1024,
    "llama-3.2-1b": 2048,
    "gpt-oss-20b": 2880,
    "gemma-2-9b": 3584,
    "llama-3.1-8b": 4096,
    "falcon-7b": 4544,
    "llama-2-13b": 5120,
    "llama-3.3-70b": 8192,
    "llama-3.1-405b": 16384,
}
